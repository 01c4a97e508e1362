"""`list`: which snapshots are where, as a table and as JSON."""

import codecs
import fcntl
import itertools
import json
import os
import re
import resource
import struct
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import remote
from support import (
    NOBODY,
    BackupTestCase,
    InZone,
    create,
    delete,
    listing,
    scratch_folder,
    snapshot,
    subvolume,
    write_locks,
)
from terminal import OnTerminal

from btrfs_backup_ng import (
    UNBOUNDED,
    BackupError,
    Entry,
    Events,
    Listing,
    Location,
    Policy,
    Subvolume,
    Survey,
    Table,
    Task,
    backup_state,
    bands,
    chosen_rows,
    describe_locations,
    folded,
    format_locations,
    index_rows,
    judged_rows,
    name_moment,
    prefix_of,
    shown_width,
    snapshot_state,
    wrapped,
)

KEYS = ["name", "path", "time", "age", "uuid", "parent_uuid", "received_uuid", "state", "size", "locks",
        "parent_locks", "changed"]
WHOLE, PARENT, LOCKED, PARTIAL, MISSING, AWAY, FOREIGN, UNKNOWN = "*", "*p", "*l", "~", "!", "-", "x", "?"


def table(text):
    """The signs of each snapshot in a table as {name: [sign at each place]}, of all that have a line."""
    lines = text.split("\n\n")[1].splitlines()
    starts = [match.start() for match in re.finditer("source|[0-9]+", lines[0])]
    ends = starts[1:] + [None]
    return {line.split(" ")[0]: [line[start:end].strip() for start, end in zip(starts, ends)]
            for line in lines[1:] if not line.startswith("... ")}


def legend(text):
    """What stands above a table as {place: what is said of it}."""
    lines = [re.split("  +", line) for line in text.split("\n\n")[0].splitlines()]
    return {line[1]: line[2] for line in lines}


def draw(locations, now, width=UNBOUNDED, **task):
    """What is drawn of some locations."""
    rows = judged_rows(locations, Task(**task).backup_policy, now)
    return format_locations(Table(locations, rows, folded(chosen_rows(rows, Task(**task))), now), width)


def snapshot_quickly(source, folder, name):
    """A read-only snapshot by ioctl: thousands of them in a second."""
    snap_create_v2, readonly = 0x50009417, 2
    opened = [os.open(path, os.O_RDONLY) for path in (source, folder)]
    try:
        fcntl.ioctl(opened[1], snap_create_v2,
                    bytearray(struct.pack("<qQQ32x4040s", opened[0], 0, readonly, name.encode())))
    finally:
        for fd in opened:
            os.close(fd)


class Prefixes(InZone):

    def test_what_stands_before_the_time(self):
        for name, prefix in (("home20260131-093000", "home"), ("home-20260131-093000", "home-"),
                             ("home260131-093000", "home"), ("20260131-093000", ""), ("260131-093000", ""),
                             ("a2020260131-093000", "a20"), ("home20260131-0930", None), ("home", None), ("", None),
                             ("home20261331-093000", None), ("home20260131-093000x", None)):
            with self.subTest(name=name):
                self.assertEqual(prefix, prefix_of(name))

    def test_a_partial_has_the_time_of_its_snapshot(self):
        self.assertEqual(time.mktime((2026, 1, 31, 9, 30, 0, 0, 0, -1)), name_moment(".home20260131-093000.2.partial"))
        self.assertIsNone(name_moment(".home.partial"))


class States(unittest.TestCase):

    SNAPSHOT = Subvolume("home20260131-093000", "s")

    def state(self, name="home20260131-093000", known=True, **changes):
        backup = Subvolume(name, "b", received_uuid="s")._replace(**changes)
        snapshots = {self.SNAPSHOT.name: self.SNAPSHOT} if known else {}
        return backup_state(backup, snapshots, {"s"} if known else set())

    def test_of_a_backup(self):
        for known in (True, False):
            for expected, changes in (
                ("complete", {}),
                ("complete", {"name": "home20250101-000000", "received_uuid": "of another snapshot"}),
                ("partial", {"readonly": False, "received_uuid": None}),
                ("partial", {"name": ".home20260131-093000.partial"}),
                ("partial", {"name": ".home20260131-093000.2.partial", "readonly": False, "received_uuid": None}),
                ("foreign", {"received_uuid": None}),
                ("foreign", {"name": "other", "received_uuid": "x"}),
                ("foreign", {"name": "other", "received_uuid": None, "readonly": False}),
                ("foreign", {"received_uuid": "x", "readonly": False}),
            ):
                with self.subTest(known=known, **changes):
                    self.assertEqual(expected, self.state(known=known, **changes))

    def test_of_a_backup_whose_snapshot_is_there(self):
        self.assertEqual("foreign", self.state(received_uuid="x"))
        self.assertEqual("complete", self.state(received_uuid="x", known=False))
        self.assertEqual("complete", self.state(name="before-the-move"))
        self.assertEqual("foreign", self.state(name="before-the-move", known=False))
        self.assertEqual("partial", self.state(readonly=False))

    def test_of_a_snapshot(self):
        self.assertEqual("complete", snapshot_state(self.SNAPSHOT))
        self.assertEqual("foreign", snapshot_state(self.SNAPSHOT._replace(readonly=False)))
        self.assertEqual("foreign", snapshot_state(self.SNAPSHOT._replace(name="home")))
        self.assertEqual("partial", snapshot_state(self.SNAPSHOT._replace(name=".home20260131-093000.partial")))


DAY = 86400.0
START = time.mktime((2025, 12, 31, 0, 0, 0, 0, 0, -1))
LATER = START + 90 * DAY


class RowsTestCase(unittest.TestCase):

    def entry(self, day, state="complete", **changes):
        name = changes.pop("name", "home202601{:02}-000000".format(day))
        size = changes.pop("size", None)
        value = Subvolume(name, "s{}".format(day), **changes)
        return Entry(value, "/" + name, state, START + day * DAY, size=size)

    def backup(self, day, **changes):
        entry = self.entry(day, **dict({"received_uuid": "s{}".format(day)}, **changes))
        return entry._replace(subvolume=entry.subvolume._replace(uuid="b{}".format(day)))

    def location(self, *entries, endpoint="/b", **more):
        listing = Listing(tuple(entry.subvolume for entry in entries))
        return Location(endpoint, False, entries, listing=listing, **more)

    def source(self, *days):
        return self.location(*map(self.entry, days), endpoint="/s")._replace(is_source=True)


class Rows(RowsTestCase):
    """What was seen becomes rows."""

    def states(self, locations, **task):
        rows = judged_rows(locations, Task(**task).backup_policy, LATER)
        return {int(row.name[10:12]): row.states[1:] for row in rows}

    def test_lines_go_by_identity(self):
        source = Location("/s", True, (self.entry(1), self.entry(2)))
        backups = Location("/b", False, (
            self.entry(2, name="renamed", received_uuid="s2"),
            self.entry(3, name="home20260101-000000", received_uuid="x", state="foreign"),
            self.entry(0, name="home20251231-000000", received_uuid="s0"),
            self.entry(9, name="alien", state="foreign")))
        rows = index_rows([source, backups])
        self.assertEqual([("home20251231-000000", [1]), ("home20260101-000000", [0, 1]),
                          ("home20260102-000000", [0, 1])], [(row.name, sorted(row.cells)) for row in rows])

    def test_an_error_is_not_an_empty_location(self):
        away = Location("/b", False, (), BackupError("away", "mount it"))
        shown = draw([self.source(1), away], LATER)
        self.assertEqual({"home20260101-000000": [WHOLE, UNKNOWN]}, table(shown))
        self.assertEqual("not listed", legend(shown)["/b"])
        said, = describe_locations([away], [], 0.0)["locations"]
        self.assertEqual(("/b", "away; mount it", []), (said["endpoint"], said["error"], said["snapshots"]))

    def test_names_from_the_future_are_not_the_newest(self):
        self.assertIn("newest 4 days ago", draw([self.source(1, 9)], START + 5 * DAY))
        shown = draw([self.source(9)], START + 5 * DAY)
        self.assertNotIn("newest", shown)
        self.assertRegex(shown, "home20260109-000000 +future +")

    def test_what_the_policy_does_not_send_is_not_missing(self):
        locations = [self.source(1, 2, 3, 4), self.location(self.backup(3))]
        missing, parent = ("missing",), ("complete", "parent")
        self.assertEqual({1: (missing,), 2: (missing,), 3: (parent,), 4: (missing,)}, self.states(locations))
        self.assertEqual({1: (("not sent",),), 2: (("not sent",),), 3: (parent,), 4: (missing,)},
                         self.states(locations, num_backups=2))
        self.assertIn("1 complete, 1 missing, 2 not kept by the policy", draw(locations, LATER, num_backups=2))
        self.assertNotIn("20260101", draw(locations, LATER, num_backups=2, only_missing=True))

    def test_the_policy_is_applied_to_each_prefix_by_itself(self):
        names = ["a20260101-000000", "b20260101-000000", "a20260102-000000", "b20260102-000000", "20260101-000000"]
        entries = [self.entry(day, name=name) for day, name in enumerate(names, 1)]
        source = self.location(*entries)._replace(is_source=True)
        rows = judged_rows([source, self.location()], Policy(newest=1), LATER)
        self.assertEqual([("not sent",)] * 2 + [("missing",)] * 3, [row.states[1] for row in rows])

    def test_nothing_is_missing_that_nobody_could_send(self):
        strange = self.entry(2, state="foreign", readonly=False)
        source = self.location(self.entry(1), strange)._replace(is_source=True)
        self.assertEqual({1: (("missing",),), 2: ((),), 3: (("complete",),)},
                         self.states([source, self.location(self.backup(3))]))
        for first in (self.location(self.backup(1)), self.source()._replace(error=BackupError("away"))):
            self.assertNotIn("missing", str(self.states([first, self.location(self.backup(2)), self.location()])))

    def test_the_size_is_that_of_the_smallest_transfer(self):
        rows = index_rows([self.source(1), self.location(self.backup(1)), self.location(self.backup(1, size=7)),
                           self.location(self.backup(1, size=5))])
        self.assertEqual(5, rows[0].size)
        self.assertNotIn("sent", draw([self.source(1), self.location(self.backup(1))], LATER).split("\n\n")[1])

    def test_rows_between_alike_ones_are_folded(self):
        def days(present):
            locations = [self.source(*range(1, 13)), self.location(*map(self.backup, present))]
            rows = judged_rows(locations, Policy(), LATER)
            return [[int(row.name[10:12]) for row in group] for group in folded(rows)]

        self.assertEqual([[1], [2, 3, 4, 5, 6, 7, 8, 9], [10], [11], [12]], days(range(1, 13)))
        self.assertEqual([[1], [2, 3], [4], [5], [6], [7, 8, 9], [10], [11], [12]],
                         days(set(range(1, 13)) - {5}))
        self.assertEqual([[1], [2], [3], [4], [5], [6], [7], [8], [9], [10], [11], [12]], days(range(1, 13, 2)))

    def test_what_is_said_of_folded_rows(self):
        days = range(1, 13)
        source, whole = self.source(*days), self.location(*(self.backup(day, size=1 << 20) for day in days))
        self.assertIn("\n... 8 more with all destinations complete, 8.0 MiB (--all shows them)\n",
                      draw([source, whole], LATER))
        self.assertIn("\n... 8 more like these (--all shows them)\n", draw([source, self.location()], LATER))
        self.assertIn("\n... 8 more like these (--all shows them)\n", draw([source], LATER))
        self.assertIn("\n... 8 more like these, 8.0 MiB (--all shows them)\n", draw([whole, whole], LATER))

    def test_some_are_chosen(self):
        rows = judged_rows([self.source(1, 2, 3, 4), self.location(self.backup(2), self.backup(3))], Policy(), LATER)

        def chosen(**task):
            return [int(row.name[10:12]) for row in chosen_rows(rows, Task(**task))]

        self.assertEqual([1, 2, 3, 4], chosen())
        self.assertEqual([3, 4], chosen(last=2))
        self.assertEqual([1, 4], chosen(only_missing=True))
        self.assertEqual([4], chosen(only_missing=True, last=1))
        self.assertEqual([1, 2, 3, 4], chosen(last=9))


class Drawing(RowsTestCase):
    """No line is wider than the terminal, whatever stands in it."""

    PREFIXES = ("", "laptop-", "workstation.example.org-" * 5, "ホーム-", "a b ", "é" * 60)
    ENDPOINTS = ("/mnt/backup/home", "ssh://root@nas.example.org:2222/srv/backups/" + "deep/" * 30,
                 "raw:///mnt/ナス/" + "長" * 60, "/mnt/" + "two words " * 12, "/mnt/\udce9")
    ERROR = BackupError("root@nas: connection refused", "is sshd running there, and the port right?",
                        "ssh: connect to host nas port 22: Connection refused " + "x" * 200 + "\nand more")

    def locations(self, prefix, count, has_source):
        def named(day):
            return prefix + "20260{}{:02}-000000".format(1 + day // 28, 1 + day % 28)

        days = range(60)
        found = [self.location(*(self.entry(day, name=named(day)) for day in days))._replace(is_source=has_source)]
        for number in range(count):
            endpoint = self.ENDPOINTS[number % len(self.ENDPOINTS)]
            here = [self.backup(day, name=named(day), size=10 ** (day % 15)) for day in days if day % (9 + number)]
            found.append(self.location(*here, endpoint=endpoint) if number % 4 != 3 else
                         Location(endpoint, False, (), self.ERROR))
        return found

    def test_at_each_width(self):
        for prefix, count, task in itertools.product(self.PREFIXES, (0, 1, 4, 13), (Task(), Task(num_backups=30))):
            locations = self.locations(prefix, count, has_source=bool(count % 3))
            rows = judged_rows(locations, task.backup_policy, LATER)
            for width, groups in itertools.product((40, 60, 80, 120), (folded(rows), [[row] for row in rows])):
                lines = format_locations(Table(locations, rows, groups, LATER), width).splitlines()
                with self.subTest(width=width, prefix=prefix, count=count, newest=task.num_backups):
                    self.assertLessEqual(max(map(shown_width, lines)), width)
                    self.assertEqual([], [line for line in lines if line != line.rstrip()])

    def test_what_is_higher_than_the_terminal_says_at_its_end_which_column_is_which(self):
        locations = self.locations("laptop-", 4, True)
        rows = judged_rows(locations, Policy(), LATER)
        drawn = Table(locations, rows, folded(rows), LATER)
        whole = format_locations(drawn, 80)
        height = whole.count("\n") + 1
        self.assertEqual(whole, format_locations(drawn, 80, height + 1))  # and a line for the next prompt
        places, shown, key = whole.split("\n\n")
        head = shown.splitlines()[0]
        self.assertEqual("\n\n".join([shown + "\n" + head, key, places]), format_locations(drawn, 80, height))

    def test_four_destinations_stand_side_by_side(self):
        for width in (80, 120):
            shown = draw(self.locations("laptop-", 4, True), LATER, width)
            heads = [line for line in shown.splitlines() if line.startswith("snapshot")]
            self.assertEqual(1, len(heads))
            self.assertRegex(heads[0], "^snapshot +age +sent +source +1 +2 +3 +4$")
            self.assertIn("laptop-20260301-000000", shown)
            self.assertEqual(1, shown.count("not listed"))

    def test_long_places_have_lines_of_their_own(self):
        near, far = "/mnt/b", "ssh://nas.example.org" + "/backups" * 9
        shown = draw([self.location(endpoint=near), self.location(endpoint=far)], LATER, 80)
        self.assertEqual(["1  /mnt/b  nothing", "2  " + far[:77], "   " + far[77:], 11 * " " + "nothing"],
                         shown.splitlines())
        shown = draw([self.location(endpoint=far)], LATER, 120)
        self.assertEqual(["1  " + far, "     nothing"], shown.splitlines())

    def test_more_than_fit_stand_in_further_tables(self):
        shown = draw(self.locations("laptop-", 40, True), LATER, 80)
        heads = [line for line in shown.splitlines() if line.startswith("snapshot")]
        self.assertEqual([str(number) for number in range(1, 41)],
                         [word for head in heads for word in head.split()[3:] if word != "source"])
        self.assertEqual([[0, 1], [2], [3]], bands([1, 1, 9, 1], 8))

    def test_names_give_way_and_keep_their_time(self):
        shown = draw(self.locations(self.PREFIXES[2], 4, True), LATER, 80)
        self.assertRegex(shown, r"(?m)^\.\.\.[a-z.-]*-20260301-000000  ")

    def test_wrapping(self):
        self.assertEqual(["a bb", "  cc", "  d"], wrapped("a bb cc d", 4, 2))
        self.assertEqual(["abcd", "  ef", "  gh"], wrapped("abcdefgh", 4, 2))
        self.assertEqual(["a", "  b"], wrapped("a\nb", 9, 2))
        self.assertEqual(["aa", "  b c"], wrapped("aa b\0c", 5, 2))
        self.assertEqual(["長", " 長"], wrapped("長長", 3, 1))


class ListTestCase(BackupTestCase):

    def list(self, *arguments, status=0, **more):
        return self.run_program("list", *arguments, status=status, **more)

    def locations(self, *arguments, status=0):
        found = json.loads(self.list("--json", *arguments, status=status).stdout)
        self.assertEqual(["locations"], list(found))
        for location in found["locations"]:
            self.assertEqual(["endpoint", "error", "snapshots", "missing", "not_sent", "parents"], list(location))
            for entry in location["snapshots"]:
                self.assertEqual(KEYS, list(entry))
        return found["locations"]

    def states(self, location):
        return {entry["name"]: entry["state"] for entry in location["snapshots"]}


class OnDisk(ListTestCase):

    def test_source_and_destination(self):
        one, two, three = self.take(1, 2, 3)
        self.transfer()
        delete(self.backup_path(one))
        four, = self.take(4)
        result = self.list(self.source, self.target)
        shown = table(result.stdout)
        self.assertEqual({one: [WHOLE, MISSING], two: [WHOLE, WHOLE], three: [WHOLE, PARENT], four: [WHOLE, MISSING]},
                         shown)
        self.assertEqual([one, two, three, four], list(shown))
        said = legend(result.stdout)
        self.assertRegex(said[self.source], "^4 complete, newest [0-9]+ days ago$")
        self.assertRegex(said[self.target], "^2 complete, 2 missing, newest [0-9]+ days ago$")
        self.assertEqual("", result.stderr)

    def test_what_the_policy_does_not_send(self):
        taken = self.take(*range(1, 7))
        self.transfer("-n", "2")
        eight, = self.take(8)
        shown = table(self.list("--all", "-n", "2", self.source, self.target).stdout)
        self.assertEqual([AWAY] * 4 + [WHOLE, PARENT, MISSING], [shown[name][1] for name in taken + [eight]])
        self.assertEqual({eight}, set(table(self.list("-n", "2", "--missing", self.source, self.target).stdout)))
        shown = table(self.list("--all", "--keep-backups", "all", self.source, self.target).stdout)
        self.assertEqual(4, sum(signs[1] == MISSING for signs in shown.values()) - 1)
        _, target = self.locations("-n", "2", self.source, self.target)
        self.assertEqual((taken[:4], [eight], [taken[5]]), (target["not_sent"], target["missing"], target["parents"]))
        self.assertEqual(0, self.list("-n", "2", "--missing", self.source, self.target).status)

    def test_some_of_many(self):
        taken = self.take(*range(1, 11))
        self.transfer()
        shown = self.list(self.source, self.target).stdout
        self.assertRegex(shown, r"\n\.\.\. 6 more with all destinations complete, [0-9.]+ KiB \(--all shows them\)\n")
        self.assertEqual([taken[0]] + taken[7:], list(table(shown)))
        self.assertEqual(taken, list(table(self.list("--all", self.source, self.target).stdout)))
        self.assertEqual(taken[4:], list(table(self.list("--last", "6", self.source, self.target).stdout)))
        for location in self.locations("--last", "2", self.source, self.target):
            self.assertEqual(taken[8:], list(self.states(location)))
        self.assertEqual("", self.list("--missing", self.source, self.target).stdout.partition("\n\n")[1])

    def test_json(self):
        one, two = self.take(1, 2)
        self.transfer()
        source, target = self.locations("-p", "home", self.source, self.target)
        self.assertEqual((self.source, None), (source["endpoint"], source["error"]))
        for location, folder in ((source, self.snapshots), (target, self.target)):
            self.assertEqual([one, two], [entry["name"] for entry in location["snapshots"]])
            for entry in location["snapshots"]:
                known = subvolume(os.path.join(folder, entry["name"]))
                self.assertEqual(os.path.join(folder, entry["name"]), entry["path"])
                self.assertEqual((known.uuid, known.parent_uuid, known.received_uuid, "complete"),
                                 tuple(entry[key] for key in KEYS[4:8]))
                self.assertEqual(([], []), (entry["locks"], entry["parent_locks"]))
                taken = time.mktime((2024, 1, int(entry["name"][10:12]), 0, 0, 0, 0, 0, -1))
                self.assertAlmostEqual(time.time() - taken, entry["age"], delta=600)
        moment = time.mktime((2024, 1, 1, 0, 0, 0, 0, 0, -1))
        offset = time.strftime("%z", time.localtime(moment))
        self.assertEqual("2024-01-01T00:00:00" + offset[:3] + ":" + offset[3:], target["snapshots"][0]["time"])

    def test_a_folder_of_backups_alone(self):
        taken = self.take(1, 2)
        self.transfer()
        create(self.backup_path("mine"))
        location, = self.locations(self.target)
        self.assertEqual({taken[0]: "complete", taken[1]: "complete", "mine": "foreign"}, self.states(location))
        location, = self.locations("-p", "home", self.target)
        self.assertEqual(dict.fromkeys(taken, "complete"), self.states(location))
        shown = table(self.list(self.target).stdout)
        self.assertEqual([WHOLE], shown[taken[0]])
        self.assertIn("2 complete, 1 other subvolume", legend(self.list(self.target).stdout)[self.target])
        two = self.locations(self.target, self.target)
        self.assertEqual(2, len(two))

    def test_a_disk_with_backups_at_its_top(self):
        """The top of a filesystem is a subvolume, but no source."""
        taken = self.take(1)
        self.transfer(to=[self.target_disk.path])
        location, = self.locations(self.target_disk.path)
        self.assertEqual("complete", self.states(location)[taken[0]])

    def test_disks_with_backups_at_their_tops(self):
        taken = self.take(1, 2)
        second = self.disk()
        self.transfer(to=[self.target_disk.path, second.path])
        for location in self.locations(self.target_disk.path, second.path):
            self.assertEqual(dict.fromkeys(taken, "complete"), self.states(location), location["endpoint"])
        shown = self.list(self.target_disk.path, second.path).stdout
        self.assertEqual({name: [WHOLE, WHOLE] for name in taken}, table(shown))
        self.assertEqual({self.target_disk.path, second.path}, set(legend(shown)))

    def test_a_source_that_was_never_backed_up(self):
        taken = self.take(1)
        self.transfer()
        delete(self.snapshot_path(taken[0]))
        for path in (self.snapshots, os.path.dirname(self.snapshots)):
            subprocess.check_call(["rm", "-r", path])
        source, target = self.locations(self.source, self.target)
        self.assertEqual([], source["snapshots"])
        self.assertEqual(taken, list(self.states(target)))
        self.assertEqual(["", WHOLE], table(self.list(self.source, self.target).stdout)[taken[0]])

    def test_a_snapshot_folder_that_may_not_be_read(self):
        """Neither where its folder may not be opened, nor where that may be read but not entered."""
        self.take(1)
        codecs.lookup("ascii")  # which that user might not find
        for path in (scratch_folder(), self.source_disk.path, self.source):
            os.chmod(path, 0o755)
        for mode, destinations in ((0o700, ()), (0o744, ()), (0o744, (self.target,))):
            os.chmod(os.path.dirname(self.snapshots), mode)
            survey = Survey(Task(verb="list", source=self.source, destinations=destinations), Events())
            os.seteuid(NOBODY)
            try:
                source = survey.locations()[0]
            finally:
                os.seteuid(0)
            self.assertEqual((self.source, True, ()), source[:3])
            self.assertIn("permission denied", source.error.message)

    def test_a_source_alone_and_its_snapshot_folder(self):
        taken = self.take(1, 2)
        write_locks(self.snapshots, {taken[1]: {"locks": ["/b"], "parent_locks": []},
                                     taken[0]: {"locks": [], "parent_locks": ["/b"]}})
        for path in (self.source, self.snapshots):
            location, = self.locations(path)
            self.assertEqual([([], ["/b"]), (["/b"], [])],
                             [(entry["locks"], entry["parent_locks"]) for entry in location["snapshots"]])
        shown = table(self.list(self.source).stdout)
        self.assertEqual([PARENT], shown[taken[0]])
        self.assertEqual([LOCKED], shown[taken[1]])

    def test_partial_locked_foreign(self):
        one, two, three = self.take(1, 2, 3)
        self.transfer("-n", "1")
        create(self.backup_path(".{}.partial".format(one)))
        create(self.backup_path("strange"))
        snapshot(self.backup_path("strange"), self.backup_path(two))
        write_locks(self.snapshots, {one: {"locks": [self.target], "parent_locks": []}})
        source, target = self.locations(self.source, self.target)
        self.assertEqual({".{}.partial".format(one): "partial", two: "foreign", three: "complete",
                          "strange": "foreign"}, self.states(target))
        locked = {entry["name"]: entry["locks"] for entry in target["snapshots"] if entry["locks"]}
        self.assertEqual({".{}.partial".format(one): [self.target]}, locked)
        self.assertEqual([[self.target], [], []], [entry["locks"] for entry in source["snapshots"]])
        shown = self.list(self.source, self.target).stdout
        self.assertEqual([LOCKED, PARTIAL], table(shown)[one])
        self.assertEqual([WHOLE, FOREIGN], table(shown)[two])
        self.assertIn("3 complete, 1 locked, ", legend(shown)[self.source])
        self.assertIn("1 complete, 1 partial, 1 foreign, 1 other subvolume, ", legend(shown)[self.target])
        self.assertEqual({one}, set(table(self.list("--missing", self.source, self.target).stdout)))

    def test_a_location_that_cannot_be_listed(self):
        one, = self.take(1)
        self.transfer()
        missing = self.target + "/missing"
        result = self.list(self.source, missing, self.target, status=1)
        self.assertEqual({one: [WHOLE, UNKNOWN, PARENT]}, table(result.stdout))
        self.assertEqual("not listed", legend(result.stdout)[missing])
        self.assertNotIn("error", result.stdout)
        self.assertErrorSays(result, "no such folder: {}; is its filesystem mounted?".format(missing))
        source, bad, good = self.locations(self.source, missing, self.target, status=1)
        self.assertIn(missing, bad["error"])
        self.assertEqual([None, None], [source["error"], good["error"]])
        self.assertEqual("complete", self.states(good)[one])

    def test_nothing_is_drawn_where_nothing_can_be_listed(self):
        for places in ([self.target + "/x"], [self.source + "x", self.target + "/x"]):
            result = self.list(*places, status=1)
            self.assertEqual("", result.stdout)
            self.assertEqual(len(places), len(result.errors))

    def test_a_source_that_is_gone(self):
        self.take(1)
        self.transfer()
        source, target = self.locations(self.source + "x", self.target, status=1)
        self.assertIn("no such source", source["error"])
        self.assertEqual(["complete"], list(self.states(target).values()))

    def test_damaged_locks(self):
        taken = self.take(1)
        write_locks(self.snapshots, b"{")
        source, _ = self.locations(self.source, self.target, status=1)
        self.assertIn(".outstanding_transfers", source["error"])
        self.assertEqual(taken, list(self.states(source)))

    def test_changes_nothing(self):
        self.take(1, 2)
        self.transfer()
        before = listing(self.source_disk.path, self.target_disk.path)
        self.list(self.source, self.target)
        self.list("--json", self.source, self.target)
        self.assertUnchanged(before, self.source_disk.path, self.target_disk.path)

    def test_a_prefix_of_each_kind(self):
        os.makedirs(self.snapshots)
        for name in ("a20240101-000000", "b20240101-000000", "20240101-000000", "x"):
            snapshot(self.source, self.snapshot_path(name))
        for prefix, expected in (("a", ["a20240101-000000"]), ("", ["20240101-000000"]), ("c", [])):
            location, = self.locations("-p", prefix, self.source)
            self.assertEqual(expected, list(self.states(location)))

    def test_usage(self):
        for arguments in ((), ("shell://cat",), ("/s", "shell://cat"), ("ftp://x/y",)):
            self.list(*arguments, status=2)

    def test_two_thousand_snapshots_at_two_locations(self):
        """Well under a second; what is limited is processor time, for the machine may be busy. The folder is its own
        destination.
        """
        os.makedirs(self.snapshots)
        for i in range(2000):
            snapshot_quickly(self.source, self.snapshots, "home20{:02}{:02}{:02}-{:02}0000".format(
                10 + i // 300, i // 25 % 12 + 1, i % 25 + 1, 12))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Begun by a program that is there only for us to be told of the time, as we are of those that we start.
        result = self.list(self.source, self.snapshots, wrapper=["env"])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.assertTrue(0.01 < took < 1.5, took)
        self.assertRegex(result.stdout, "(?m)^source .* 2000 complete,.*\n1 .* 2000 complete,")


class OnATerminal(ListTestCase):

    def test_sixty_snapshots_at_four_destinations(self):
        """No line is continued on the next."""
        os.makedirs(self.snapshots)
        for i in range(60):
            snapshot_quickly(self.source, self.snapshots, "home2025{:02}{:02}-020000".format(1 + i // 28, 1 + i % 28))
        raw, second = "raw://" + os.path.join(self.target_disk.path, "raw"), self.disk().path
        self.transfer(to=[self.target, second])
        self.transfer("-n", "30", to=[raw])
        delete(self.backup_path("home20250210-020000"))
        places = [self.source, self.target, second, raw, "ssh://127.0.0.1:1/backups/home"]
        for columns in (80, 120):
            running = OnTerminal("list", *places, columns=columns, lines=40, results=True)
            self.addCleanup(running.close)
            self.assertEqual(1, running.finish().status)
            screen = running.screen
            self.assertEqual((0, 0, []), (screen.wrapped, screen.dropped, screen.scrolled), screen.everything())
            text = re.sub(r"\n {4,}", " ", "\n".join(screen.text()))
            for words in ("59 complete, 1 missing, newest", "30 complete, 30 missing, newest", "error: 127.0.0.1:1: ",
                          r"home20250210-020000 +[0-9]+ days +[0-9]+ B +\* +! +\* +\* +\?\n",
                          r"\n\.\.\. [0-9]+ more like these, [0-9.]+ KiB \(--all shows them\)\n"):
                self.assertRegex(text, words)


class OverSsh(ListTestCase, remote.RemoteTestCase):
    """The same with the locations on another machine."""

    def test_a_remote_source_and_destination(self):
        one, two = self.take(1, 2)
        self.push("-S")
        write_locks(self.snapshots, {one: {"locks": [self.remote_target], "parent_locks": []}})
        for source in (self.source, self.remote_source):
            options = self.program_options()
            here, there = self.locations(*options + [source, self.remote_target])
            self.assertEqual((source, self.remote_target), (here["endpoint"], there["endpoint"]))
            self.assertEqual([[self.remote_target], []], [entry["locks"] for entry in here["snapshots"]])
            self.assertEqual([(one, "complete"), (two, "complete")], list(self.states(there).items()))
            self.assertEqual(self.target_there + "/backups/" + one, there["snapshots"][0]["path"])
            shown = table(self.list(*options + [source, self.remote_target]).stdout)
            self.assertEqual([LOCKED, LOCKED], shown[one])

    def test_a_host_that_is_away(self):
        one, = self.take(1)
        self.server.stop()
        here, there = self.locations(*self.program_options() + [self.source, self.remote_target], status=1)
        self.assertEqual([one], list(self.states(here)))
        self.assertIn("refused", there["error"].lower())
        self.assertEqual([], there["snapshots"])


if __name__ == "__main__":
    unittest.main()
