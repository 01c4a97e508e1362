"""`diff`: what changed from one snapshot to another, against a walk of both with digests."""

import json
import os
import random
import stat
import sys
import unittest
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import remote
from fakes import without_rights
from support import BackupTestCase, chance, create, delete, scratch_folder, snapshot
from trees import Churn, describe

import btrfs_backup_ng as program
from btrfs_backup_ng import Events, LocalHost

HISTORIES = int(os.environ.get("TORTURE") or 1)
FOLDER = stat.S_IFDIR


# What is true, from a walk of both trees.


def births(top):
    """{inode: the transaction it was born in} of all inodes of a subvolume."""
    fd = os.open(top, os.O_RDONLY)
    try:
        return {inode: int.from_bytes(buffer[start:start + 8], "little")
                for inode, kind, _, buffer, start in program.items_since(fd, 0) if kind == program.INODE_ITEM}
    finally:
        os.close(fd)


def walk(top):
    """{relative path: (identity of its inode, all that may differ)}."""
    top, born, found = os.fsencode(top), births(top), {}
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if os.lstat(os.path.join(folder, name)).st_ino not in (2, 256)]
        for path in [folder] * (folder == top) + [os.path.join(folder, name) for name in folders + files]:
            told, inode = describe(path), os.lstat(path).st_ino
            if told["type"] == FOLDER:
                del told["mtime_ns"]
            found[b"" if path == top else os.path.relpath(path, top)] = ((inode, born[inode]), told)
    return found


def expected_changes(old, new):
    """[(change, path, new path)] by the rules: folders by their inode, then by name; all else by name, then inode."""
    changes, left, was = [], set(old), {}
    places = {one[0]: path for path, one in old.items() if one[1]["type"] == FOLDER}
    kept = {one[0] for one in new.values() if one[1]["type"] == FOLDER}
    for path, (identity, told) in sorted(new.items()):
        if told["type"] != FOLDER:
            continue
        above = was.get(os.path.dirname(path)) if path else b""
        same_name = None if above is None else os.path.join(above, os.path.basename(path)) if path else b""
        origin = places.get(identity)
        if origin is None and same_name in old and old[same_name][1]["type"] == FOLDER and (
                old[same_name][0] not in kept):
            origin = same_name
        was[path] = origin
        if origin is None:
            changes.append(("added", path, b""))
            continue
        left.discard(origin)
        if origin != same_name:
            changes.append(("renamed", origin, path))
        if old[origin][1] != told:
            changes.append(("modified", path, b""))
    fresh = []
    for path, (_, told) in sorted(new.items()):
        if told["type"] == FOLDER:
            continue
        above = was[os.path.dirname(path)]
        origin = None if above is None else os.path.join(above, os.path.basename(path))
        if origin in old and old[origin][1]["type"] != FOLDER:
            left.discard(origin)
            changes += [("modified", path, b"")] * (old[origin][1] != told)
        else:
            fresh.append(path)
    for path in fresh:
        identity, told = new[path]
        origins = sorted(origin for origin in left if old[origin][0] == identity and old[origin][1]["type"] != FOLDER)
        if not origins:
            changes.append(("added", path, b""))
            continue
        left.discard(origins[0])
        changes.append(("renamed", origins[0], path))
        changes += [("modified", path, b"")] * (old[origins[0]][1] != told)
    return sorted(changes + [("deleted", path, b"") for path in left])


class OverTime(BackupTestCase):

    usual_seconds = 30.0
    moments = 12

    def changes(self, old, new):
        return LocalHost(Events()).changes(self.snapshots, new, self.snapshots, old, 0)

    def test_equal_to_a_walk_of_both(self):
        for number in range(HISTORIES):
            random_ = random.Random("%s %d" % (chance(self).random(), number))
            source = create(os.path.join(self.source_disk.path, "home%d" % number))
            churn = Churn(source, random_.getrandbits(32))
            self.snapshots = os.path.join(self.source_disk.path, "snapshots%d" % number)
            os.mkdir(self.snapshots)
            churn.fill(80)
            trees = []
            for day in range(1, self.moments + 1):
                churn.change(random_.choice([0, 1, 5, 20, 60]))
                name = self.name(day)
                snapshot(source, self.snapshot_path(name))
                trees.append((name, walk(self.snapshot_path(name))))
            pairs = [[old, new] for old, new in zip(trees, trees[1:])] + [random_.sample(trees, 2) for _ in range(4)]
            for (one, before), (other, after) in pairs:
                with self.subTest(history=number, old=one, new=other):
                    found = self.changes(one, other)
                    told = sorted((change.change, os.fsencode(change.inner), os.fsencode(change.to))
                                  for change in found.changes)
                    self.assertEqual(expected_changes(before, after), told)
                    measured = LocalHost(Events()).measured(self.snapshots, other, one)
                    self.assertEqual(measured.file_data, found.size)
                    self.assertLessEqual(sum(change.size for change in found.changes), found.size)


class OnDisk(BackupTestCase):

    def diff(self, *arguments, **more):
        """What `--json` says, each change as (change, path, to, type, bytes)."""
        result = self.run_program("diff", "--json", *arguments, **more)
        return [tuple(change[key] for key in ("change", "path", "to", "type", "bytes"))
                for change in json.loads(result.stdout)["changes"]]

    def make(self):
        for name in ("docs", "old folder"):
            os.mkdir(os.path.join(self.source, name))
        for name in ("docs/plan", "docs/gone", "old folder/inside", "same", "replaced"):
            self.write(name, name)
        one, = self.take(1)
        os.rename(os.path.join(self.source, "old folder"), os.path.join(self.source, "new folder"))
        os.rename(os.path.join(self.source, "docs/plan"), os.path.join(self.source, "new folder/plan"))
        os.unlink(os.path.join(self.source, "docs/gone"))
        self.write("new folder/inside", "x" * 100000)
        self.write("new\nline", "added")
        two, = self.take(2)
        return one, two

    def test_each_kind_of_change(self):
        one, two = self.make()
        self.transfer()
        for folder in (self.snapshots, self.target):
            found = self.diff(os.path.join(folder, one), os.path.join(folder, two))
            self.assertEqual([
                ("added", "day2", None, "file", 6), ("deleted", "docs/gone", None, "file", 0),
                ("added", "new\nline", None, "file", 5), ("renamed", "old folder", "new folder", "folder", 0),
                ("modified", "new folder/inside", None, "file", 100000),
                ("renamed", "docs/plan", "new folder/plan", "file", 0)],
                [change[:4] + (min(change[4], 100000),) for change in found], folder)
        shown = self.run_program("diff", self.snapshot_path(one), self.snapshot_path(two)).stdout.splitlines()
        self.assertIn("R  folder            old folder -> new folder", shown)
        self.assertIn("A  file    5 B       new\\nline", shown)
        self.assertRegex(shown[-1], r"^2 added, 1 modified, 1 deleted, 2 renamed; [0-9.]+ KiB of new data$")
        back = self.diff(self.snapshot_path(two), self.snapshot_path(one))
        self.assertIn(("renamed", "new folder", "old folder", "folder", 0), back)

    def test_the_largest(self):
        one, two = self.make()
        found = self.diff("--top", "2", self.snapshot_path(one), self.snapshot_path(two))
        self.assertEqual(["new folder/inside", "day2"], [path for _, path, _, _, _ in found])

    def test_what_was_written_again_is_not_modified(self):
        for name in ("same", "replaced", "linked"):
            self.write(name, "content" * 3000)
        os.link(os.path.join(self.source, "linked"), os.path.join(self.source, "another"))
        one, = self.take(1)
        times = {name: os.stat(os.path.join(self.source, name)).st_mtime_ns for name in ("same", "replaced", "linked")}
        self.write("same", "content" * 3000)
        self.write("linked", "content" * 3000)
        self.write("new", "content" * 3000)
        os.rename(os.path.join(self.source, "new"), os.path.join(self.source, "replaced"))
        for name, mtime in times.items():
            os.utime(os.path.join(self.source, name), ns=(mtime, mtime))
        two, = self.take(2)
        paths = self.snapshot_path(one), self.snapshot_path(two)
        self.assertEqual([("added", "day2")], [change[:2] for change in self.diff(*paths)])
        self.write("linked", "another" * 3000)
        os.utime(os.path.join(self.source, "linked"), ns=(times["linked"], times["linked"]))
        three, = self.take(3)
        self.assertEqual([("modified", "another"), ("added", "day3"), ("modified", "linked")],
                         [change[:2] for change in self.diff(paths[1], self.snapshot_path(three))])

    def test_folders_in_the_place_of_others(self):
        def path(name):
            return os.path.join(self.source, name)

        for folder in ("again", "moved"):
            os.mkdir(path(folder))
            self.write(folder + "/same", "content")
            self.write(folder + "/other", "content")
        times = {name: os.stat(path(name)).st_mtime_ns for name in ("again/same", "moved/same")}
        one, = self.take(1)
        for name in ("again/same", "again/other"):
            os.unlink(path(name))
        os.rmdir(path("again"))
        os.rename(path("moved"), path("where it went"))
        for folder in ("again", "moved"):
            os.mkdir(path(folder))
            self.write(folder + "/same", "content")
            os.utime(path(folder + "/same"), ns=(0, times[folder + "/same"]))
        two, = self.take(2)
        found = self.diff(self.snapshot_path(one), self.snapshot_path(two))
        self.assertEqual([("deleted", "again/other", None), ("added", "day2", None), ("added", "moved", None),
                          ("added", "moved/same", None), ("renamed", "moved", "where it went")],
                         [change[:3] for change in found], "made again is the same, if its name was given up")

    def test_folders_as_deep_as_a_path_can_lead(self):
        depth, start = 2000, os.getcwd()
        self.addCleanup(os.chdir, start)
        os.chdir(self.source)
        for _ in range(depth):
            os.mkdir("a")
            os.chdir("a")
        one, = self.take(1)
        with open("file", "w", encoding="utf-8") as file:
            file.write("content")
        two, = self.take(2)
        os.chdir(start)
        found = self.diff(self.snapshot_path(one), self.snapshot_path(two))
        self.assertIn(("added", "a/" * depth + "file", None, "file", 7), found)

    def test_more_links_than_the_kernel_tells_at_once(self):
        names = ["%03d" % number + "n" * 200 for number in range(300)]
        self.write("file", "content")
        for name in names:
            os.link(os.path.join(self.source, "file"), os.path.join(self.source, name))
        one, = self.take(1)
        self.write("file", "longer than that")
        two, = self.take(2)
        found = self.diff(self.snapshot_path(one), self.snapshot_path(two))
        self.assertEqual(sorted(names + ["file"]), [path for change, path, _, _, _ in found if change == "modified"])

    def test_many_names_of_one_file(self):
        self.write("file", "long")
        os.mkdir(os.path.join(self.source, "d"))
        one, = self.take(1)
        names = ["d/{:04}".format(number) for number in range(1000)]
        for name in names:
            os.link(os.path.join(self.source, "file"), os.path.join(self.source, name))
        two, = self.take(2)
        with mock.patch.object(program, "paths_of_inode", wraps=program.paths_of_inode) as asked:
            found = LocalHost(Events()).changes(self.snapshots, two, self.snapshots, one, 0).changes
        self.assertEqual(names, [change.inner for change in found if change.inner in names])
        self.assertLess(asked.call_count, 10)

    def test_on_different_disks(self):
        one, two = self.make()
        self.transfer()
        expected = self.diff(self.snapshot_path(one), self.snapshot_path(two))
        for delete_at in (None, self.snapshot_path(one)):
            if delete_at:
                delete(delete_at)
            found = self.diff(self.backup_path(one), self.snapshot_path(two))
            self.assertEqual([change[:4] for change in expected], [change[:4] for change in found])
        delete(self.backup_path(two))
        result = self.run_program("diff", self.backup_path(one), self.snapshot_path(two), status=1)
        self.assertErrorSays(result, "different filesystems", "list shows")

    # -- bad input

    def test_what_cannot_be_compared(self):
        one, two = self.make()
        raw = os.path.join(self.target_disk.path, "raw")
        os.mkdir(raw)
        self.transfer(to=["raw://" + raw])
        here = self.snapshot_path(one)
        for old, words in ((self.source, ("is not a snapshot",)),
                           (self.snapshot_path("home20250101-000000"), ("no backup",)),
                           (self.source + "/no/such", ("no such", "mounted")),
                           ("raw://{}/{}".format(raw, one), ("streams",)), (self.source + "/docs", ("no backup",))):
            self.assertErrorSays(self.run_program("diff", old, here, status=1), *words)
        for places in ([], [here], [here, here, here], [here, "shell://cat"]):
            self.run_program("diff", *places, status=2)
        self.assertEqual([], self.diff(here, here))

    def test_without_rights(self):
        one, two = self.make()
        for folder in (os.path.dirname(self.snapshots), self.snapshots, scratch_folder()):
            os.chmod(folder, 0o755)
        result = self.run_program("diff", "--no-elevate", self.snapshot_path(one), self.snapshot_path(two), status=1,
                                  wrapper=without_rights())
        self.assertErrorSays(result, "not permitted")


class OverSsh(remote.RemoteTestCase):

    def test_between_machines(self):
        self.write("file", "one")
        one, = self.take(1)
        self.write("file", "longer")
        two, = self.take(2)
        self.push("-S")
        here, there = self.snapshots + "/", self.remote_target + "/"
        expected = None
        for old, new in ((here + one, here + two), (there + one, there + two), (here + one, there + two),
                         (there + one, here + two)):
            found = json.loads(self.run_remote("diff", "--json", old, new).stdout)
            changes = [(change["change"], change["path"]) for change in found["changes"]]
            expected = expected or changes
            self.assertEqual(expected, changes)
        self.assertEqual([("added", "day2"), ("modified", "file")], expected)


class Restricted(remote.RestrictedTestCase):

    def test_list_is_enough(self):
        one, two = self.take(1, 2)
        self.push("-S")
        result = self.run_remote("diff", "--json", self.remote_target + "/" + one, self.remote_target + "/" + two)
        self.assertEqual(["day2"], [change["path"] for change in json.loads(result.stdout)["changes"]])


class Names(unittest.TestCase):
    """What a stream that others could have made speaks of."""

    def do(self, command, *paths):
        attributes = list(zip((program.A_PATH, program.A_PATH_LINK if command == program.LINK else program.A_PATH_TO),
                              paths))
        data = program.make_command(command, attributes)
        self.names.take(command, program.CommandParts(data, 0, len(data), 1))

    def setUp(self):
        self.names = program.TouchedNames()

    def test_what_is_not_there(self):
        self.do(program.MKFILE, b"new")
        for command, path in ((program.CHMOD, b"new/inner"), (program.RENAME, b""), (program.UNLINK, b"new/x")):
            with self.assertRaises(program.StreamDamaged):
                self.do(command, path)

    def test_a_moved_folder_is_known_by_where_it_was(self):
        self.do(program.RENAME, b"a", b"o257-1-0")
        self.do(program.MKDIR, b"a")
        self.do(program.RENAME, b"o257-1-0/x", b"a/x")
        self.do(program.RENAME, b"o257-1-0", b"b")
        self.assertEqual({b"a": None, b"a/x": b"a/x", b"b": b"a"},
                         {path: inode.origin for path, inode in self.names.touched().items()})
        self.assertEqual({b"a", b"a/x"}, self.names.tree.given_up)

    def test_a_second_name_that_goes_again_gives_up_nothing(self):
        self.do(program.LINK, b"b", b"a")
        self.do(program.UNLINK, b"b")
        self.assertEqual(set(), self.names.tree.given_up)
        self.do(program.UNLINK, b"a")
        self.assertEqual({b"a"}, self.names.tree.given_up)

    def test_no_folder_has_two_names(self):
        self.do(program.CHMOD, b"d/f")
        for new, old in ((b"d/d", b"d"), (b"e/e", b"e")):
            with self.assertRaises(program.BackupError):
                self.do(program.LINK, new, old)


if __name__ == "__main__":
    unittest.main()
