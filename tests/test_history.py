"""`history`: the versions of a file or folder, over snapshots and backups, against what is known to be true."""

import json
import os
import random
import stat
import sys
import unittest
from typing import Any, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import remote
from fakes import without_rights
from support import BackupTestCase, TestCase, chance, create, delete, scratch_folder, snapshot
from terminal import OnTerminal
from trees import Churn, describe

import btrfs_backup_ng as program
from btrfs_backup_ng import (
    BackupError,
    Entry,
    Events,
    Moment,
    Pair,
    PathHistory,
    Row,
    Sighting,
    Subvolume,
    Task,
    in_table,
    nearest_path,
    parse_file_place,
    rows_text,
    undecided,
    versions_of,
)

HISTORIES = int(os.environ.get("TORTURE") or 1)


class HistoryTestCase(BackupTestCase):

    def history(self, path, *options, status=0):
        """What `--json` says."""
        return json.loads(self.run_program("history", "--json", *options, path, status=status).stdout)

    @staticmethod
    def told(document):
        """Each version as (size, snapshots, path where it is another, whether it is live)."""
        return [(one["size"], sorted({place["snapshot"] for place in one["places"]}), one["path"], one["live"])
                for one in document["versions"]]

    def path(self, name):
        return os.path.join(self.source, name)


class Pure(TestCase):

    @classmethod
    def setUpClass(cls):
        pass

    @staticmethod
    def moment(name, *sightings):
        return Moment(Row(name, 0.0, {number: Entry(Subvolume(name, name), "", "complete", 0.0)
                                      for number, _ in sightings}), dict(sightings))

    def test_what_decides(self):
        one = Sighting("s", "p", "file", 0o644, 0, 0, 5, 7, 9, 300, 3)
        for other, decides in ((one, False), (one._replace(ctime=10), True), (one._replace(inode=301), True),
                               (one._replace(born=4), True), (one._replace(size=6), False),
                               (one._replace(mtime=8, ctime=10), False), (one._replace(inner="q"), False)):
            pair = undecided(self.moment("b", (0, one)), self.moment("a", (0, other)))
            self.assertEqual(decides, pair is not None, other)

    def test_one_place_that_decides_is_enough(self):
        one = Sighting("s", "p", "file", 0o644, 0, 0, 5, 7, 9, 300, 3)
        newer, older = self.moment("b", (0, one), (1, one)), self.moment("a", (0, one._replace(ctime=1)), (1, one))
        self.assertIsNone(undecided(newer, older))
        pair = undecided(self.moment("b", (0, one)), self.moment("a", (1, one)))
        self.assertEqual(Pair((0, one), (1, one)), pair, "in no place in common: the inode says nothing")

    def test_what_cannot_be_compared_is_another_version(self):
        one = Sighting("s", "p", "file", 0o644, 0, 0, 5, 7, 9, 300, 3)
        moments = [self.moment("b", (0, one)), self.moment("a", (0, one._replace(ctime=1)))]
        self.assertEqual([2], [len(v.moments) for v in versions_of(moments, lambda pair: True)])
        self.assertEqual([1, 1], [len(v.moments) for v in versions_of(moments, lambda pair: False)])

    def test_of_several_names_the_one_most_alike(self):
        self.assertEqual("a/x", nearest_path(["b/y", "a/x", "a/y"], "c/x"))
        self.assertEqual("a/y", nearest_path(["b/y", "a/y"], "a/x"))
        self.assertEqual("b/y", nearest_path(["c/y", "b/y"], "a/x"))

    def test_stretches_of_snapshots(self):
        def row(name, *numbers):
            return Row(name, 0.0, {number: Entry(Subvolume(name, name), "", "complete", 0.0) for number in numbers})

        rows = [row("d", 0, 1), row("c", 1), row("b", 1), row("a", 1)]
        self.assertEqual(["d here, nas", "a ... c nas"], rows_text(rows, ["here", "nas"]))
        self.assertEqual(["b and c nas"], rows_text(rows[1:3], ["here", "nas"]))

    def test_a_line_that_is_too_long_for_the_terminal(self):
        rows = [["changed", "where"], ["yesterday", "now;\na here, /mnt/backup;\nb and c nas"], ["before", "d here"]]
        whole = ["changed    where", "yesterday  now; a here, /mnt/backup; b and c nas", "before     d here"]
        self.assertEqual(whole, in_table(rows))
        self.assertEqual(whole, in_table(rows, 48))
        parted = ["yesterday  now;", " " * 11 + "a here, /mnt/backup;", " " * 11 + "b and c nas"]
        self.assertEqual(whole[:1] + parted + whole[2:], in_table(rows, 47))
        parted[1:2] = [" " * 11 + "a here,", " " * 11 + "/mnt/backup;"]
        self.assertEqual(whole[:1] + parted + whole[2:], in_table(rows, 24))

    def test_a_cell_that_is_too_wide(self):
        rows = [["size", "name", "last in"], ["1 B", "n" * 30, "a here"], ["2 B", "of", "b here, nas"]]
        self.assertEqual(["size  name  last in", "1 B   " + "n" * 30 + "  a here", "2 B   of    b here, nas"],
                         in_table(rows, widest=28))
        for width in range(20, 80):
            lines = in_table(rows, width, 28)
            self.assertLessEqual(max(map(len, lines)), width)
            self.assertLessEqual(len(lines), 8)

    def test_names_with_line_breaks(self):
        for text, path in (("/a/b\nc", "/a/b\nc"), ("ssh://h/a\nb/c", "/a\nb/c"), ("a\nb", "./a\nb")):
            self.assertEqual(path, parse_file_place(text).path)
        self.assertEqual("h", parse_file_place("ssh://h/a\nb").machine)


class OnDisk(HistoryTestCase):

    def test_the_top_of_a_subvolume_that_holds_folders_alone(self):
        self.take(1)
        for name in os.listdir(self.source):
            if os.path.isfile(os.path.join(self.source, name)):
                os.unlink(os.path.join(self.source, name))
        os.makedirs(os.path.join(self.source, "alice"))
        result = self.run_program("history", self.source)
        self.assertNotIn("1970", result.stdout)
        self.assertRegex(result.stdout, r"(?m)^- +0 B ")
        told = json.loads(self.run_program("history", "--json", self.source).stdout)
        self.assertIsNone(told["versions"][0]["time"])

    def test_versions_and_their_places(self):
        os.mkdir(self.path("docs"))
        self.write("docs/plan", "one")
        one, two = self.take(1, 2)
        self.write("docs/plan", "longer")
        three, = self.take(3)
        self.transfer()
        found = self.history(self.path("docs/plan"))
        self.assertEqual([(6, [three], None, True), (3, [one, two], None, False)], self.told(found))
        self.assertEqual([{"endpoint": self.source, "snapshot": three}, {"endpoint": self.target, "snapshot": three}],
                         found["versions"][0]["places"])
        self.assertEqual(self.path("docs/plan"), found["path"])
        shown = self.run_program("history", self.path("docs/plan")).stdout.splitlines()
        self.assertRegex(shown[3], r"^20\S+ \S+  6 B   now; {} here, {}$".format(three, self.target))
        self.assertRegex(shown[4], r"^20\S+ \S+  3 B   {} and {} here, {}$".format(one, two, self.target))
        running = OnTerminal("history", self.path("docs/plan"), columns=80, lines=40, results=True)
        self.addCleanup(running.close)
        self.assertEqual(0, running.finish().status)
        self.assertEqual(0, running.screen.wrapped, running.screen.everything())

    def test_from_a_backup_and_from_a_folder_of_backups(self):
        self.write("plan", "one")
        one, = self.take(1)
        self.write("plan", "two, longer")
        two, = self.take(2)
        self.transfer()
        for path in (os.path.join(self.target, one, "plan"), os.path.join(self.target, "plan"),
                     self.snapshot_path(one) + "/plan"):
            found = self.history(path)
            self.assertEqual([(11, [two], None, False), (3, [one], None, False)], self.told(found), path)

    def test_renamed_and_gone(self):
        self.write("old", "content")
        one, = self.take(1)
        os.rename(self.path("old"), self.path("new"))
        two, = self.take(2)
        self.transfer()
        self.assertEqual([(7, [two], None, True), (7, [one], self.path("old"), False)],
                         self.told(self.history(self.path("new"))))
        self.assertEqual([(7, [two], self.path("new"), True), (7, [one], None, False)],
                         self.told(self.history(self.path("old"))))
        self.assertEqual([(None, [two], None, True), (7, [one], None, False)],
                         self.told(self.history(self.path("old"), "--no-renames")))
        os.unlink(self.path("new"))
        self.assertEqual([(None, [], None, True), (7, [two], None, False), (7, [one], self.path("old"), False)],
                         self.told(self.history(self.path("new"))))
        self.assertIn("as old", self.run_program("history", self.path("new")).stdout)

    def test_what_only_backups_have_leads_to_where_it_is_now(self):
        self.write("old", "content")
        one, two = self.take(1, 2)
        os.rename(self.path("old"), self.path("new"))
        self.take(3, 4)
        self.transfer()
        for name in (one, two):
            delete(self.snapshot_path(name))
        found = self.told(self.history(self.path("old")))
        self.assertEqual([(self.path("new"), True), (None, False)], [(path, live) for _, _, path, live in found])

    def test_the_content_decides_where_times_do_not(self):
        self.write("file", "same")
        status = os.stat(self.path("file"))
        names = self.take(1)
        for day, content in ((2, "same"), (3, "diff"), (4, "diff")):
            self.write("new", content)
            os.utime(self.path("new"), ns=(status.st_atime_ns, status.st_mtime_ns))
            os.rename(self.path("new"), self.path("file"))
            names += self.take(day)
        os.link(self.path("file"), self.path("another"))
        names += self.take(5)
        os.setxattr(self.path("file"), "user.note", b"x")
        names += self.take(6)
        found = self.told(self.history(self.path("file")))
        self.assertEqual([names[5:], names[2:5], names[:2]], [snapshots for _, snapshots, _, _ in found])

    def test_times_of_long_ago(self):
        self.write("file", "same")
        for day, mtime in ((1, -5 * 10 ** 9), (2, -4 * 10 ** 9)):
            os.utime(self.path("file"), ns=(0, mtime))
            self.take(day)
        self.assertEqual(2, len(self.history(self.path("file"))["versions"]))

    def test_holes_of_any_size_are_compared(self):
        """Which takes neither time nor memory."""
        with open(self.path("file"), "wb") as file:
            file.truncate(1 << 62)
            file.seek(1 << 61)
            file.write(b"data")
        names = self.take(1)
        for mode in (0o600, 0o644):
            os.chmod(self.path("file"), mode)
        names += self.take(2)
        self.assertEqual([(1 << 62, names, None, True)], self.told(self.history(self.path("file"))))

    def test_after_a_full_transfer_the_path_alone_counts(self):
        self.write("filler", "x")
        self.write("file", "content")
        one, = self.take(1)
        self.transfer()
        os.unlink(self.path("filler"))
        two, = self.take(2)
        self.transfer("-I")
        found = self.told(self.history(os.path.join(self.target, "file")))
        self.assertEqual([(7, [one, two], None, False)], found)
        self.assertEqual([(None, [two], None, False), (1, [one], None, False)],
                         self.told(self.history(os.path.join(self.target, "filler"))))

    def test_of_several_lines_of_backups_the_one_that_is_meant(self):
        self.write("file", "content")
        self.take(1)
        self.transfer()
        other = create(os.path.join(self.source_disk.path, "other"))
        self.run_program("-p", "other", other, self.target)
        name, = [name for name in os.listdir(self.target) if name.startswith("other")]
        self.assertEqual([(7, [self.name(1)], None, True)], self.told(self.history(self.path("file"))))
        self.assertEqual([(7, [self.name(1)], None, False)], self.told(self.history(
            os.path.join(self.target, self.name(1), "file"))))
        result = self.run_program("history", self.target + "/file", status=1)
        self.assertErrorSays(result, "several prefixes", "-p")
        self.history(self.target + "/file", "-p", "home")

    def test_a_folder(self):
        os.mkdir(self.path("docs"))
        self.write("docs/a", "one")
        one, two = self.take(1, 2)
        self.write("docs/b", "four")
        os.mkdir(self.path("docs/inner"))
        three, = self.take(3)
        self.write("docs/inner/deep", "not directly in it")
        four, = self.take(4)
        self.assertEqual([(7, [three, four], None, True), (3, [one, two], None, False)],
                         self.told(self.history(self.path("docs"))))
        self.assertEqual("folder", self.history(self.path("docs"))["versions"][0]["type"])

    def test_what_a_folder_holds_no_more(self):
        os.mkdir(self.path("docs"))
        for name in ("stays", "goes", "new\nline", "goes early"):
            self.write("docs/" + name, name)
        one, = self.take(1)
        os.unlink(self.path("docs/goes early"))
        two, = self.take(2)
        self.transfer()
        os.unlink(self.path("docs/goes"))
        os.rename(self.path("docs"), self.path("papers"))
        found = self.history(self.path("papers"), "--deleted")["deleted"]
        self.assertEqual([("docs/goes", two), ("docs/goes early", one)],
                         [(one["path"][len(self.source) + 1:], one["places"][0]["snapshot"]) for one in found])
        self.assertEqual([self.source, self.target], [place["endpoint"] for place in found[0]["places"]])
        shown = self.run_program("history", "--deleted", self.path("papers")).stdout
        self.assertRegex(shown, r"4 B +goes +{} here, {}\n".format(two, self.target))
        os.unlink(self.path("papers/new\nline"))
        self.assertIn("new\\nline", self.run_program("history", "--deleted", self.path("papers")).stdout)
        self.write("papers/" + "long" * 50, "gone")
        self.write("papers/\udcff", "gone")
        self.take(3)
        os.unlink(self.path("papers/" + "long" * 50))
        os.unlink(self.path("papers/\udcff"))
        shown = self.run_program("history", "--deleted", self.path("papers")).stdout
        self.assertRegex(shown, r"4 B +goes {1,30}" + two)
        self.assertIn(r"  \xff  ", shown)
        self.assertEqual(["docs/goes early"], [one["path"] for one in self.history(
            os.path.join(self.target, "docs"), "--deleted")["deleted"]])

    # -- bad input

    def test_what_is_no_path_of_a_subvolume(self):
        result = self.run_program("history", "/proc/self/status", status=1)
        self.assertErrorSays(result, "in no subvolume", "name a file")
        self.assertErrorSays(self.run_program("history", "shell://cat", status=2), "cannot be looked into")
        self.assertErrorSays(self.run_program("history", status=2), "history takes a file or folder", "history --help")

    def test_what_never_was(self):
        self.take(1)
        result = self.run_program("history", self.path("no/such"), status=1)
        self.assertErrorSays(result, "no version of", "in 1 snapshot at 1 place")
        self.assertEqual("", result.stdout)
        result = self.run_program("history", self.path("day1/below a file"), status=1)
        self.assertErrorSays(result, "no version of")
        for path in ("no/such", "day1"):
            self.assertErrorSays(self.run_program("history", "--deleted", self.path(path), status=1), "no folder")

    def test_in_a_nested_subvolume(self):
        nested = create(self.path("nested"))
        with open(os.path.join(nested, "file"), "w") as file:
            file.write("content")
        self.run_program("-p", "home", nested)
        for path in (nested + "/file", nested):
            found = self.history(path)
            self.assertEqual(path, found["path"])
            self.assertEqual([{"endpoint": nested, "error": None}], found["locations"])
            self.assertEqual([True], [version["live"] for version in found["versions"]])

    def test_through_links(self):
        os.mkdir(self.path("docs"))
        self.write("docs/file", "content")
        os.symlink("docs", self.path("link"))
        one, = self.take(1)
        self.assertEqual(self.path("docs/file"), self.history(self.path("link/file"))["path"])
        found = self.history(self.path("link"))
        self.assertEqual(["symbolic link"], [version["type"] for version in found["versions"]])
        delete(self.snapshot_path(one))

    def test_no_link_leads_out_of_a_tree(self):
        os.mkdir(self.path("etc"))
        self.write("etc/hostname", "ours")
        self.take(1)
        os.unlink(self.path("etc/hostname"))
        os.rmdir(self.path("etc"))
        os.symlink("/etc", self.path("etc"))
        two, = self.take(2)
        os.unlink(self.path("etc"))
        os.mkdir(self.path("other"))
        self.write("other/hostname", "another's")
        os.symlink("other", self.path("etc"))
        three, = self.take(3)
        self.transfer()
        found = self.told(self.history(os.path.join(self.target, "etc/hostname")))
        self.assertEqual([(None, [two, three], None, False), (4, [self.name(1)], None, False)], found)

    def test_a_backup_that_goes_meanwhile(self):
        self.write("file", "content")
        one, two = self.take(1, 2)
        history = PathHistory(Task(verb="history", source=self.path("file")), Events())
        self.addCleanup(history.survey.end)
        surveyed = history.survey_all

        def survey_all():
            found = surveyed()
            delete(self.snapshot_path(one))
            return found

        history.survey_all = survey_all
        history.look()
        self.assertEqual([[two]], [[row.name for row in version.rows] for version in history.versions()])
        self.assertEqual(set(), history.ending.statuses)

    def test_a_folder_that_is_away(self):
        self.write("file", "content")
        one, = self.take(1)
        self.transfer()
        os.rename(self.target, self.target + " away")
        result = self.run_program("history", "--json", self.path("file"), status=1)
        self.assertErrorSays(result, self.target, "no such folder")
        found = json.loads(result.stdout)
        self.assertEqual([(7, [one], None, True)], self.told(found))
        self.assertIn("no such folder", found["locations"][1]["error"])

    def test_a_snapshot_folder_that_is_none(self):
        """What else is remembered cannot be known then; what is named is looked at all the same."""
        self.write("file", "content")
        self.take(1)
        self.transfer()
        self.write("none", "a file")
        result = self.run_program("history", "-p", "home", "-f", "none", self.path("file"), self.target, status=1)
        self.assertIn(self.name(1), result.stdout)
        self.assertErrorSays(result, "the snapshot folder", "is a file")

    def test_without_rights(self):
        os.mkdir(self.path("docs"), 0o755)
        self.write("docs/file", "content")
        self.take(1)
        os.rename(self.path("docs/file"), self.path("docs/new"))
        self.take(2)
        folders = [os.path.dirname(self.snapshots), self.snapshots]
        for folder in folders + [scratch_folder()]:
            os.chmod(folder, 0o755)

        def as_nobody(path, *options, **more):
            return self.run_program("history", "--no-elevate", *options, path, wrapper=without_rights(), **more)

        result = as_nobody(self.path("docs/new"), "--json")
        self.assertIn("renames are not followed", result.stderr)
        self.assertEqual([(7, [self.name(2)], None, True), (None, [self.name(1)], None, False)],
                         self.told(json.loads(result.stdout)))
        os.chmod(self.path("docs"), 0o700)
        self.assertErrorSays(as_nobody(self.path("docs/new"), status=1), "permission denied")

    def test_stream_files_are_known_by_what_else_is(self):
        raw = "raw://" + os.path.join(self.target_disk.path, "raw")
        os.mkdir(raw[len("raw://"):])
        self.write("file", "content")
        one, two = self.take(1, 2)
        self.transfer(to=[raw])
        delete(self.snapshot_path(one))
        found = self.history(self.path("file"))
        self.assertEqual([(7, [two], None, True)], self.told(found))
        self.assertEqual([self.source, raw], [place["endpoint"] for place in found["versions"][0]["places"]])
        self.assertEqual([{"endpoint": raw, "snapshot": one}], found["unknown"])
        self.assertRegex(self.run_program("history", self.path("file")).stdout, "not known +{} {}".format(one, raw))
        for path in (raw + "/file", raw + "/" + one + "/file"):
            self.assertErrorSays(self.run_program("history", path, status=2), "streams, which only a restore reads")

    def test_a_job_names_the_destinations(self):
        self.write("file", "content")
        self.take(1)
        self.transfer()
        job = os.path.join(self.source_disk.path, "job")
        with open(job, "w") as file:
            file.write("-p home\n-n 7\n{}\n{}\n".format(self.source, self.target))
        os.unlink(os.path.join(self.snapshots, ".destinations.json"))
        found = self.history(self.path("file"), "@" + job)
        self.assertEqual([self.source, self.target], [place["endpoint"] for place in found["locations"]])


class OverSsh(HistoryTestCase, remote.RemoteTestCase):

    def ask(self, path, *options, **more):
        result = self.run_remote("history", "--json", *options, path, **more)
        return json.loads(result.stdout), result

    def make(self):
        self.write("file", "one")
        self.take(1)
        self.write("file", "longer")
        self.take(2)
        self.push("-S")

    def test_remembered_and_from_there(self):
        self.make()
        expected = [(6, [self.name(2)], None, True), (3, [self.name(1)], None, False)]
        found, _ = self.ask(self.path("file"))
        self.assertEqual(expected, self.told(found))
        self.assertEqual([self.source, self.remote_target], [place["endpoint"] for place in found["locations"]])
        found, _ = self.ask(self.remote_source + "/file")
        self.assertEqual(expected, self.told(found))
        delete(self.snapshot_path(self.name(1)))
        found, _ = self.ask(self.path("file"))
        self.assertEqual(expected, self.told(found))
        for path in (self.remote_target + "/file", self.remote_target + "/" + self.name(1) + "/file"):
            found, _ = self.ask(path)
            self.assertEqual([one[:2] + (None, False) for one in expected], self.told(found))

    def test_times_of_long_ago(self):
        self.write("file", "same")
        for day, mtime in ((1, -5 * 10 ** 9), (2, -4 * 10 ** 9)):
            os.utime(self.path("file"), ns=(0, mtime))
            self.take(day)
        self.push("-S")
        found, _ = self.ask(self.remote_target + "/file")
        self.assertEqual(2, len(found["versions"]))

    def test_times_and_sizes_that_no_calendar_has_or_number_holds(self):
        """An ordinary user can give them to his files, in a folder that others look at as well."""
        for name in ("a", "b", "c"):
            self.write(name, name)
            os.truncate(self.path(name), (1 << 63) - (1 << 20))
            os.utime(self.path(name), ns=(0, (1 << 62) * 10 ** 9))
        self.make()
        delete(self.snapshot_path(self.name(1)))
        for path, versions in ((self.path("a"), 1), (self.source, 2)):
            found, result = self.ask(path)
            self.assertEqual([versions, None, None], [len(found["versions"])] + [
                place["error"] for place in found["locations"]], result.stderr)
            self.assertEqual(self.name(1), found["versions"][-1]["places"][-1]["snapshot"])
            self.assertIn("2262-04-11 ", self.run_remote("history", path).stdout)

    def test_a_host_that_is_away(self):
        self.make()
        self.server.stop()
        found, result = self.ask(self.path("file"), status=1)
        self.assertEqual(2, len(found["versions"]))
        self.assertIn("refused", found["locations"][1]["error"].lower())
        self.assertEqual(1, len(result.errors))

    def test_a_destination_that_another_machine_notes_is_not_asked(self):
        self.make()
        found, _ = self.ask(self.remote_source + "/file")
        self.assertEqual([self.remote_source], [place["endpoint"] for place in found["locations"]])


class Restricted(HistoryTestCase, remote.RestrictedTestCase):

    def ask(self, path, *options, **more):
        return json.loads(self.run_remote("history", "--json", *options, path, **more).stdout)

    def test_list_is_enough(self):
        self.write("old", "one")
        self.take(1)
        os.rename(self.path("old"), self.path("file"))
        self.take(2)
        self.push("-S")
        delete(self.snapshot_path(self.name(1)))
        found = self.ask(self.path("file"))
        self.assertEqual([(3, [self.name(2)], None, True), (3, [self.name(1)], self.path("old"), False)],
                         self.told(found))
        for path in (self.remote_target + "/file", self.remote_target + "/" + self.name(2) + "/file"):
            self.assertEqual(2, len(self.ask(path)["versions"]), path)
        self.assertEqual(["old"], [one["path"] for one in self.ask(self.remote_target, "--deleted")["deleted"]])

    def test_contents_that_may_not_be_compared_are_different(self):
        self.write("file", "one")
        self.take(1)
        os.chmod(self.path("file"), 0o600)
        os.chmod(self.path("file"), 0o644)
        self.take(2)
        self.push("-S")
        result = self.run_remote("history", "--json", self.remote_target + "/file")
        self.assertEqual(2, len(json.loads(result.stdout)["versions"]))
        self.assertIn("contents could not be compared", result.stderr)

    def test_nothing_outside_is_told(self):
        os.symlink("/", self.path("root"))
        self.take(1)
        self.push("-S")
        host = self.connect()
        for inner in ("root/etc/passwd", "../../outside", "/etc/passwd", "root/../root/etc"):
            found = host.trace(self.under, [self.name(1)], {}, program.Trail(inner), True)
            self.assertEqual([""], [seen.type for seen in found], inner)
        with self.assertRaises(BackupError):
            host.file_digests(self.under, [self.name(1)], ["day1"], "")


# What is true.


class Thing(NamedTuple):
    """What a path was: which inode, and all that makes a version of it."""

    inode: int
    told: Any


def belongs(path):
    return not (stat.S_ISDIR(os.lstat(path).st_mode) and os.lstat(path).st_ino in (2, 256))


def told_of(path, is_top=False):
    """Everything of a file; of a folder its own and what lies directly in it, of folders there only that they are."""
    found = describe(path)
    if found["type"] != stat.S_IFDIR:
        return found
    del found["mtime_ns"]
    inner = {}
    for name in os.listdir(path):
        at = os.path.join(path, name)
        if belongs(at) and not (is_top and name == b".btrfs-backup-ng"):
            status = os.lstat(at)
            inner[name] = (status.st_mode, status.st_uid, status.st_gid) + (
                () if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_mtime_ns))
    return dict(found, inner=inner)


def things(top):
    """{relative path: Thing} of a tree."""
    top = os.fsencode(top)
    found = {b"": Thing(os.lstat(top).st_ino, told_of(top, True))}
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if belongs(os.path.join(folder, name))
                      and (folder != top or name != b".btrfs-backup-ng")]
        for name in folders + files:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, top)] = Thing(os.lstat(path).st_ino, told_of(path))
    return found


def nearest(paths, path):
    return min(paths, key=lambda other: (os.path.basename(other) != os.path.basename(path),
                                         os.path.dirname(other) != os.path.dirname(path), other))


def trail_of(path, trees):
    """What a path was in each of some trees, newest first, as (path, Thing) or None."""
    def walk(some, path, inode):
        for tree in some:
            if path not in tree:
                others = [other for other, thing in tree.items() if thing.inode == inode]
                path = nearest(others, path) if others else path
            if path in tree:
                inode = tree[path].inode
            yield (path, tree[path]) if path in tree else None

    found = list(walk(trees, path, None))
    first = next((n for n, one in enumerate(found) if one), None)
    if first:
        path, thing = found[first]
        found[:first] = list(walk(trees[:first][::-1], path, thing.inode))[::-1]
    return found


def grouped(trail):
    """The numbers of trees that are one version, newest first."""
    groups = []
    for number, one in enumerate(trail):
        before = trail[number - 1] if number else None
        same = bool(groups) and (one is None) == (before is None) and (
            one is None or before is None or (one[0], one[1].told) == (before[0], before[1].told))
        if same:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


class OverTime(BackupTestCase):
    """Random histories of a tree, kept as they are made."""

    usual_seconds = 30.0
    moments = 30

    def setUp(self):
        super().setUp()
        self.second_disk = self.disk("512M")

    def begin(self, number):
        """Another source, and folders for its backups."""
        self.source = create(os.path.join(self.source_disk.path, "home%d" % number))
        self.snapshots = os.path.join(self.source, ".btrfs-backup-ng", "snapshots")
        self.target = os.path.join(self.target_disk.path, "backups%d" % number)
        self.second = os.path.join(self.second_disk.path, "second%d" % number)
        for folder in (self.target, self.second):
            os.mkdir(folder)

    def make(self, random_, moments):
        """Snapshots of a churned source; what was in each, by name, oldest first."""
        churn = Churn(self.source, random_.getrandbits(32))
        churn.fill(30)
        os.makedirs(self.snapshots, exist_ok=True)
        truth = {}
        for day in range(1, moments + 1):
            churn.change(random_.choice([0, 1, 5, 15]))
            snapshot(self.source, self.snapshot_path(self.name(day)))
            truth[self.name(day)] = things(self.snapshot_path(self.name(day)))
        churn.change(random_.choice([0, 5]))
        return truth

    def thin(self, random_):
        """The source keeps the newest, one destination has all, the other some."""
        self.transfer()
        self.transfer(to=[self.second])
        names = sorted(os.listdir(self.second))
        for name in names:
            if not name.startswith(".") and random_.random() < 0.5:
                delete(os.path.join(self.second, name))
        kept = random_.randint(2, self.moments)
        for name in sorted(os.listdir(self.snapshots)):
            if not name.startswith(".") and name < self.name(self.moments - kept + 1):
                delete(self.snapshot_path(name))

    def look(self, path, **options):
        task = Task(verb="history", source=os.fsdecode(path), **options)
        history = PathHistory(task, Events())
        self.addCleanup(history.survey.end)
        history.look()
        return history

    def check(self, path, truth, newest_first, history):
        expected = []
        trail = trail_of(path, [truth[name] for name in newest_first])
        for group in grouped(trail):
            one = trail[group[-1]]
            expected.append((one and one[0], [newest_first[number] for number in group]))
        found = [(os.fsencode(version.sighting.inner) if version.sighting.type else None,
                  [moment.row.name if moment.row else "" for moment in version.moments])
                 for version in history.versions()]
        self.assertEqual(expected, found, path)

    def test_every_version_place_rename_and_absence(self):
        for number in range(HISTORIES):
            random_ = random.Random("%s %d" % (chance(self).random(), number))
            with self.subTest(history=number):
                self.begin(number)
                truth = self.make(random_, self.moments)
                self.thin(random_)
                truth[""] = things(self.source)
                newest_first = [""] + sorted(set(truth) - {""}, reverse=True)
                paths = sorted({path for tree in truth.values() for path in tree})
                for path in random_.sample(paths, min(len(paths), 60)):
                    history = self.look(os.path.join(os.fsencode(self.source), path))
                    self.check(path, truth, newest_first, history)
                    self.check_places(history)
                    self.assertEqual(set(), history.ending.statuses)
                self.check_deleted(random_, truth, newest_first)

    def check_places(self, history):
        for version in history.versions():
            for row in version.rows:
                there = {number for number, folder in enumerate((self.snapshots, self.target, self.second))
                         if os.path.exists(os.path.join(folder, row.name))}
                self.assertEqual(there, set(row.cells), row.name)

    def check_deleted(self, random_, truth, newest_first):
        folders = [path for path, thing in truth[""].items() if thing.told["type"] == stat.S_IFDIR]
        for path in random_.sample(folders, min(4, len(folders))):
            trail = trail_of(path, [truth[name] for name in newest_first])
            held = {}
            for name, one in zip(newest_first, trail):
                for entry in one[1].told["inner"] if one and one[1].told["type"] == stat.S_IFDIR else ():
                    held.setdefault(entry, name)
            expected = {entry: name for entry, name in held.items() if name}
            history = self.look(os.path.join(os.fsencode(self.source), path), deleted=True)
            found = {os.fsencode(os.path.basename(seen.inner)): row.name for seen, row in history.deleted()}
            self.assertEqual(expected, found, path)


if __name__ == "__main__":
    unittest.main()
