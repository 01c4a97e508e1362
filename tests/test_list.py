"""`list`: which snapshots are where, as a table and as JSON."""

import codecs
import fcntl
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
    command,
    create,
    delete,
    listing,
    scratch_folder,
    snapshot,
    subvolume,
    write_locks,
)
from test_names import InZone

from btrfs_backup_ng import (
    BackupError,
    Entry,
    Events,
    Location,
    Subvolume,
    Survey,
    Task,
    backup_state,
    describe_locations,
    format_locations,
    name_moment,
    prefix_of,
    snapshot_state,
    table_rows,
)

KEYS = ["name", "path", "time", "uuid", "parent_uuid", "received_uuid", "state", "size", "locks", "parent_locks"]


def table(text):
    """The table's lines as {first column: [other columns]}; columns are apart by two blanks or more."""
    lines = [re.split(r"  +", line) for line in text.splitlines() if line.strip()]
    return {line[0]: line[1:] for line in lines}


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


class Table(unittest.TestCase):

    def entry(self, day, state="complete", **changes):
        name = changes.pop("name", "home202601{:02}-000000".format(day))
        value = Subvolume(name, "s{}".format(day), **changes)
        return Entry(value, "/" + name, state, float(day))

    def test_lines_go_by_identity(self):
        source = Location("/s", True, (self.entry(1), self.entry(2)))
        backups = Location("/b", False, (
            self.entry(2, name="renamed", received_uuid="s2"),
            self.entry(3, name="home20260101-000000", received_uuid="x", state="foreign"),
            self.entry(0, name="home20251231-000000", received_uuid="s0"),
            self.entry(9, name="alien", state="foreign")))
        rows = table_rows([source, backups])
        self.assertEqual([("home20251231-000000", [1]), ("home20260101-000000", [0, 1]),
                          ("home20260102-000000", [0, 1])], [(row.name, sorted(row.cells)) for row in rows])

    def test_an_error_is_not_an_empty_location(self):
        source = Location("/s", True, (self.entry(1),))
        shown = table(format_locations([source, Location("/b", False, (), BackupError("away"))], 100.0))
        self.assertEqual(["present", "?"], shown["home20260101-000000"])
        self.assertEqual(["1 present", "not listed"], shown["total"])
        said = describe_locations([Location("/b", False, (), BackupError("away", "mount it"))])
        self.assertEqual({"locations": [{"endpoint": "/b", "error": "away; mount it", "snapshots": []}]}, said)

    def test_names_from_the_future_are_not_the_newest(self):
        shown = table(format_locations([Location("/s", True, (self.entry(1), self.entry(2)))], 1.0 + 3600 * 100))
        self.assertEqual(["4 days ago"], shown["newest"])
        shown = table(format_locations([Location("/s", True, (self.entry(9),))], 1.0))
        self.assertEqual(["-"], shown["newest"])


class ListTestCase(BackupTestCase):

    def list(self, *arguments, status=0):
        return self.run_program("list", *arguments, status=status)

    def locations(self, *arguments, status=0):
        found = json.loads(self.list("--json", *arguments, status=status).stdout)
        self.assertEqual(["locations"], list(found))
        for location in found["locations"]:
            self.assertEqual(["endpoint", "error", "snapshots"], list(location))
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
        self.assertEqual([self.source, self.target], shown["snapshot"])
        self.assertEqual(["present", "missing"], shown[one])
        self.assertEqual(["present", "present"], shown[two])
        self.assertEqual(["present", "present, parent"], shown[three])
        self.assertEqual(["present", "missing"], shown[four])
        self.assertEqual(["4 present", "2 present, 2 missing"], shown["total"])
        self.assertEqual([one, two, three, four], [name for name in shown if name.startswith("home")])
        self.assertEqual("", result.stderr)

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
                self.assertEqual((known.uuid, known.parent_uuid, known.received_uuid, "complete", None, [], []),
                                 tuple(entry[key] for key in KEYS[3:]))
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
        self.assertEqual(["present"], shown[taken[0]])
        self.assertEqual(["2 present, 1 other subvolume"], shown["total"])
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
        shown = table(self.list(self.target_disk.path, second.path).stdout)
        self.assertEqual(["2 present", "2 present"], shown["total"])

    def test_a_source_that_was_never_backed_up(self):
        taken = self.take(1)
        self.transfer()
        delete(self.snapshot_path(taken[0]))
        for path in (self.snapshots, os.path.dirname(self.snapshots)):
            subprocess.check_call(["rm", "-r", path])
        source, target = self.locations(self.source, self.target)
        self.assertEqual([], source["snapshots"])
        self.assertEqual(taken, list(self.states(target)))
        self.assertEqual(["-", "present"], table(self.list(self.source, self.target).stdout)[taken[0]])

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
        self.assertEqual(["present, parent"], shown[taken[0]])
        self.assertEqual(["present, locked"], shown[taken[1]])

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
        shown = table(self.list(self.source, self.target).stdout)
        self.assertEqual(["present, locked", "partial"], shown[one])
        self.assertEqual(["present", "foreign"], shown[two])
        self.assertEqual(["3 present", "1 present, 1 partial, 1 foreign, 1 other subvolume"], shown["total"])

    def test_a_location_that_cannot_be_listed(self):
        one, = self.take(1)
        self.transfer()
        missing = self.target + "/missing"
        result = self.list(self.source, missing, self.target, status=1)
        shown = table(result.stdout)
        self.assertEqual(["present", "?", "present, parent"], shown[one])
        self.assertEqual(["1 present", "not listed", "1 present"], shown["total"])
        self.assertErrorSays(result, missing, "mounted?")
        source, bad, good = self.locations(self.source, missing, self.target, status=1)
        self.assertIn(missing, bad["error"])
        self.assertEqual([None, None], [source["error"], good["error"]])
        self.assertEqual("complete", self.states(good)[one])

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

    def test_sizes_where_quotas_are_on(self):
        self.take(1)
        self.transfer()
        self.assertNotRegex(self.list(self.target).stdout, "KiB|MiB")
        command("btrfs", "quota", "enable", self.target_disk.path)
        command("btrfs", "quota", "rescan", "-w", self.target_disk.path)
        self.assertRegex(self.list(self.target).stdout, r"present  [0-9.]+ KiB")

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
        result = self.list(self.source, self.snapshots)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.assertLess(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1.5)
        self.assertEqual(["2000 present", "2000 present"], table(result.stdout)["total"])


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
            self.assertEqual(["present, locked", "present, locked"], shown[one])

    def test_a_host_that_is_away(self):
        one, = self.take(1)
        self.server.stop()
        here, there = self.locations(*self.program_options() + [self.source, self.remote_target], status=1)
        self.assertEqual([one], list(self.states(here)))
        self.assertIn("refused", there["error"].lower())
        self.assertEqual([], there["snapshots"])


if __name__ == "__main__":
    unittest.main()
