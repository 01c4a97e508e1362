"""`prune`: retention of folders of backups by themselves."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import remote
import support
from support import (
    BackupTestCase,
    bulk,
    command,
    create,
    delete,
    listing,
    names,
    partials,
    read_locks,
    set_received_uuid,
    snapshot,
    write_locks,
)

from btrfs_backup_ng import (
    Events,
    FolderNotes,
    Listing,
    LocalHost,
    Pin,
    Policy,
    Record,
    Subvolume,
    UsageError,
    abandoned_partials,
    check_prune,
    folder_prefixes,
    known_protections,
    parse_policy,
    plan_prune,
)

TORTURE = int(os.environ.get("TORTURE") or 0)
NOW = time.mktime((2026, 2, 1, 0, 0, 0, 0, 0, -1))


def backup(day, prefix="home", **changes):
    name = "{}202601{:02}-000000".format(prefix, day)
    return Subvolume(name, "b{}".format(day), received_uuid="s{}".format(day))._replace(**changes)


class Usage(unittest.TestCase):

    def test_something_says_what_to_keep(self):
        for arguments in ((), ("-n", "0"), ("--dry-run",), ("-p", "home")):
            with self.subTest(arguments=arguments), self.assertRaises(UsageError) as caught:
                check_prune(support.task_of(("prune",) + arguments + ("/b",)))
            self.assertIn("what to keep", caught.exception.message)
        for arguments in (("-n", "1"), ("--keep-backups", "1d"), ("--keep-backups", "all"),
                          ("--partials-older-than", "7d")):
            check_prune(support.task_of(("prune",) + arguments + ("/b",)))

    def test_a_folder(self):
        for arguments in (("-n", "1"), ("-n", "1", "shell://cat"), ("-n", "1", "/b", "shell://cat")):
            with self.subTest(arguments=arguments), self.assertRaises(UsageError):
                check_prune(support.task_of(("prune",) + arguments))

    def test_ages(self):
        for text, seconds in (("0s", 0), ("90s", 90), ("30min", 1800), ("26h", 93600), ("3d", 259200), ("2w", 1209600)):
            self.assertEqual(seconds, support.task_of(["prune", "--partials-older-than", text]).partials_older_than)
        for text in ("", "3", "h", "3 d", "-3d", "3m", "1.5h", "3D", "3d\n"):
            with self.subTest(text=text), self.assertRaises(UsageError):
                support.task_of(["prune", "--partials-older-than", text])


class Plan(unittest.TestCase):

    def kept(self, subvolumes, policy=None, prefix="home", locks=None, pins=None, records=()):
        there = Listing(tuple(subvolumes), records=records)
        protected = known_protections(there, prefix, FolderNotes((), locks or {}, pins or {}))
        verdicts = plan_prune(there, prefix, policy or Policy(1), protected, NOW)
        return [v.name[-9:-7] for v in verdicts if v.keep]

    def test_only_complete_backups_of_the_prefix(self):
        others = [backup(1, readonly=False), backup(2, received_uuid=None), backup(3, prefix="root"),
                  backup(4, name=".home20260104-000000.partial"), backup(5, name="home")]
        self.assertEqual(["11"], self.kept(others + [backup(10), backup(11)]))
        self.assertEqual(["03"], self.kept(others, prefix="root"))

    def test_by_time(self):
        # January 2026: Sundays are the 4th, 11th, 18th, 25th
        found = self.kept([backup(day) for day in range(1, 32)], parse_policy("2d 3w"))
        self.assertEqual(["18", "25", "30", "31"], found)

    def test_the_future(self):
        future = backup(28, name="home20270128-000000")
        self.assertEqual(["03", "28"], self.kept([backup(1), backup(2), backup(3), future]))

    def test_what_a_partial_builds_on(self):
        partial = Subvolume(".home20260109-000000.partial", "p", parent_uuid="b2", readonly=False)
        self.assertEqual(["02", "05"], self.kept([backup(1), backup(2), backup(5), partial]))
        left = backup(9, uuid="h", received_uuid=None, readonly=False, parent_uuid="b1")  # as 0.6.6 leaves it
        self.assertEqual(["01", "05"], self.kept([backup(1), backup(2), backup(5), left]))
        record = Record("home20260109-000000", "s9", "s3", "b3")  # its partial is a later piece, on one that is gone
        self.assertEqual(["03", "05"], self.kept([backup(1), backup(3), backup(5)], records=(record,)))
        work = Subvolume("work", "w", parent_uuid="b2", readonly=False)
        self.assertEqual(["05"], self.kept([backup(1), backup(2), backup(5), work]))

    def test_locks_and_pins_in_the_folder(self):
        """The folder may be the snapshot folder of a run that hands the backups on."""
        backups = [backup(day) for day in (1, 2, 3, 4, 5)]
        locks = {backups[0].name: {"locks": ["/x"]}, backups[1].name: {"parent_locks": ["/x"]}}
        pins = {"/x": (Pin("any", "s3", ""),)}
        self.assertEqual(["01", "02", "03", "05"], self.kept(backups, locks=locks, pins=pins))

    def test_prefixes(self):
        there = Listing((backup(1), backup(1, prefix=""), backup(2, prefix="a-"), backup(3, "w", readonly=False),
                         backup(4, name=".x20260104-000000.partial", readonly=False), backup(5, name="home")))
        self.assertEqual(["", "a-", "home", "x"], folder_prefixes(there, None))
        self.assertEqual(["b"], folder_prefixes(there, "b"))

    def test_partials(self):
        def partial(name):
            return Subvolume(name, name, readonly=False)
        found = [partial(".home20260104-000000.partial"), partial(".home20260104-000000.2.partial"),
                 partial(".root20260104-000000.partial"), partial(".mine.partial"), partial(".home.partial"),
                 partial(".home20260105-000000.partial"), partial(".home20260106-000000.partial")]
        idle = {s.name: 100.0 for s in found}
        idle[".home20260105-000000.partial"] = 99.0
        del idle[".home20260106-000000.partial"]
        there = Listing(tuple(found) + (backup(1),))
        self.assertEqual({".home20260104-000000.partial", ".home20260104-000000.2.partial"},
                         {s.name for s in abandoned_partials(there, "home", idle, 100.0)})


class OnDisk(BackupTestCase):

    def prune(self, *arguments, status=0, folder=None):
        return self.run_program("prune", *(arguments + (folder or self.target,)), status=status)

    def test_by_number_and_by_time(self):
        # January 2024 begins with a Monday: weeks end with the 7th, the 14th, the 21st
        taken = self.take(3, 7, 10, 14, 17, 20, 21, 22)
        self.transfer()
        self.prune("-n", "7")
        self.assertBackedUp(taken[1:])
        result = self.prune("--keep-backups", "3w 1d", "-n", "2")
        self.assertBackedUp([self.name(day) for day in (14, 21, 22)])
        self.assertIn("deleting {} at {}: older than the newest 2, and not the newest in any of the last 3 weeks, 1 day"
                      .format(self.name(20), self.target), result.stderr)
        self.assertIn("done: 4 subvolumes deleted, 3 backups kept", result.stderr)
        self.assertEqual(taken, names(self.snapshots))

    def test_names_that_were_chosen_push_none_out(self):
        good = self.take(1, 2, 3, 4, 5)
        good.append(time.strftime("home%Y%m%d-%H%M%S"))
        snapshot(self.source, self.snapshot_path(good[-1]))
        self.transfer()
        for name in good[:-1]:
            snapshot(self.source, self.snapshot_path(name.replace("-000000", "-235959")))
        self.transfer()
        for policy in (("--keep-backups", "14d 8w 12m"), ("-n", "6")):
            shown = self.prune("--dry-run", *policy)
            result = self.prune(*policy)
            self.assertLessEqual(set(good), set(names(self.target)))
        words = "--by-names would let them go"
        self.assertIn("3 backups at {} stay beyond the policy: ".format(self.target), result.stderr)
        for said in (shown.stdout, result.stderr):
            self.assertIn(words, said)
        result = self.prune("--by-names", "-n", "6")
        self.assertEqual(6, len(names(self.target)))
        self.assertNotIn("beyond the policy", result.stderr)

    def test_dry_run_tells_and_changes_nothing(self):
        self.take(1, 2, 3)
        self.transfer()
        before = listing(self.target_disk.path)
        result = self.prune("--dry-run", "-v", "debug", "-n", "1", "--partials-older-than", "0s")
        self.assertUnchanged(before, self.target_disk.path)
        self.assertEqual(["folder " + self.target,
                          "  keep {}: among the newest 1".format(self.name(3)),
                          "  delete {}: older than the newest 1".format(self.name(1)),
                          "  delete {}: older than the newest 1".format(self.name(2)),
                          "  2 to delete, 1 backup kept"], result.stdout.splitlines())
        result = self.prune("--dry-run", "-n", "3")
        self.assertEqual("folder {}\n  nothing to delete, 3 backups kept\n".format(self.target), result.stdout)

    def test_each_prefix_by_itself(self):
        self.take(1, 2, 3)
        self.transfer()
        for name in names(self.snapshots):
            snapshot(self.snapshot_path(name), self.snapshot_path(name.replace("home", "root-")))
        self.run_program("-S", "-p", "root-", self.source, self.target)
        self.prune("-n", "2", "-p", "root-")
        self.assertEqual(3 + 2, len(names(self.target)))
        self.prune("-n", "1")
        self.assertEqual([self.name(3), self.name(3).replace("home", "root-")], names(self.target))

    def test_strangers_stay(self):
        self.take(1, 2, 3)
        self.transfer()
        create(self.backup_path(self.name(10)))  # writable
        create(self.backup_path("work"))
        snapshot(self.backup_path("work"), self.backup_path("home20240104-000000"))  # was not received
        os.mkdir(self.backup_path("home20240105-000000"))
        os.rename(self.backup_path(self.name(1)), self.backup_path("for-good"))
        self.prune("-n", "1")
        self.assertEqual(["for-good", self.name(3), self.name(4), self.name(5), self.name(10), "work"],
                         names(self.target))

    def test_nothing_to_keep_by_is_refused(self):
        taken = self.take(1, 2)
        self.transfer()
        for arguments in ((), ("-n", "0"), ("--keep-backups", "0d"), ("--keep-backups", "")):
            self.prune(*arguments, status=2)
        self.assertBackedUp(taken)

    def test_several_folders(self):
        self.take(1, 2)
        second = self.target_disk.path + "/second"
        os.mkdir(second)
        self.transfer(to=[self.target, second])
        result = self.prune("-n", "1", self.target, self.target + "/missing", folder=second, status=1)
        self.assertErrorSays(result, self.target + "/missing", "mounted?")
        for folder in (self.target, second):
            self.assertBackedUp([self.name(2)], folder)
        self.assertIn("finished with errors", result.stderr)

    def test_no_backups_is_said(self):
        self.assertIn("no backups in " + self.target, self.prune("-n", "1").stderr)

    def test_two_prunes_do_not_collide(self):
        self.take(1, 2)
        self.transfer()
        lock = os.path.join(self.target, ".home.lock")
        with open(lock, "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            result = self.prune("-n", "1", status=75)
            self.assertErrorSays(result, self.target, "another run")
            self.assertEqual(2, len(names(self.target)))
            waiting = self.start("prune", "--wait", "30", "-n", "1", self.target)
            waiting.wait_to_say("waiting for another run")
            self.assertEqual(2, len(names(self.target)))
        self.assertEqual(0, waiting.finish().status)
        self.assertBackedUp([self.name(2)])

    def test_damaged_locks_in_the_folder(self):
        taken = self.take(1, 2)
        self.transfer()
        write_locks(self.target, b"{")
        self.assertErrorSays(self.prune("-n", "1", status=1), ".outstanding_transfers")
        self.assertEqual(taken, names(self.target))

    def test_in_the_middle_of_a_chain(self):
        """A folder of backups that are handed on: what the next one needs stays."""
        self.take(1, 2, 3)
        self.transfer()
        third = self.disk()
        self.run_program("-S", "-p", "home", "-f", self.target, create(self.target_disk.path + "/live"), third.path)
        self.take(4)
        self.transfer()
        self.prune("-n", "1")
        self.assertEqual([self.name(3), self.name(4)], names(self.target))

    def test_the_next_backup_is_incremental(self):
        self.take(1, 2, 3)
        self.transfer()
        self.prune("-n", "1")
        self.take(4)
        result = self.transfer("-n", "2")
        self.assertIn("incrementally from " + self.name(3), result.stderr)
        self.assertBackedUp([self.name(3), self.name(4)])

    def test_convert_and_sync(self):
        self.take(1, 2)
        self.transfer()
        self.prune("-n", "1", "-w", "-s")
        self.assertBackedUp([self.name(2)])

    def test_what_is_being_sent_stays_and_the_error_says_so(self):
        support.bulk(os.path.join(self.source, "large"), 4)
        taken = self.take(1, 2, 3)
        self.transfer()
        sent = self.backup_path(taken[0])
        with subprocess.Popen(["btrfs", "send", "-q", sent], stdout=subprocess.PIPE, bufsize=0) as sender:
            sender.stdout.read(1)  # it has begun, and waits for more to be read
            result = self.prune("-n", "1", status=1)
            sender.kill()
        self.assertErrorSays(result, sent, "being sent")
        self.assertEqual([taken[0], taken[2]], names(self.target))
        self.prune("-n", "1")
        self.assertEqual(taken[2:], names(self.target))


class Partials(BackupTestCase):

    def prune(self, *arguments, status=0):
        return self.run_program("prune", *(arguments + (self.target,)), status=status)

    def partial(self, day, base=None):
        path = self.backup_path(".{}.partial".format(self.name(day)))
        if base is None:
            return create(path)
        return snapshot(base, path, readonly=False)

    def test_only_where_asked_for_and_old_enough(self):
        self.take(1)
        self.transfer()
        self.partial(5)
        create(self.backup_path(".mine.partial"))
        self.prune("-n", "1")
        self.prune("-n", "1", "--partials-older-than", "1h")
        self.assertEqual(2, len(partials(self.target)))
        result = self.prune("--partials-older-than", "0s")
        self.assertEqual([".mine.partial"], partials(self.target))
        self.assertIn("broken off, unchanged for", result.stderr)
        self.assertBackedUpOnly(1)

    def assertBackedUpOnly(self, *days):
        self.assertEqual([self.name(day) for day in days], names(self.target))

    def test_a_change_makes_it_young(self):
        """What counts is the last change, not when the transfer began."""
        path = self.partial(5)
        host, name = LocalHost(Events()), os.path.basename(path)
        command("btrfs", "filesystem", "sync", self.target)
        time.sleep(2.2)
        self.assertGreaterEqual(host.idle_partials(self.target)[name], 2.0)
        os.makedirs(path + "/a/b")
        with open(path + "/a/b/file", "w") as file:
            file.write("x")
        self.assertLess(host.idle_partials(self.target)[name], 2.0)

    def test_one_that_is_being_received_stays(self):
        bulk(self.source + "/data", 100)
        self.take(1)
        run = self.start_backup("-S")
        run.wait_for("a partial", lambda: partials(self.target))
        run.hold("receive")
        self.prune("-n", "1", "--partials-older-than", "0s")
        self.assertEqual(1, len(partials(self.target)))
        run.kill()
        self.prune("-n", "1", "--partials-older-than", "0s")
        self.assertEqual([], partials(self.target))
        self.transfer()  # and its lock is no obstacle
        self.assertBackedUp([self.name(1)])
        self.assertEqual({}, read_locks(self.snapshots))

    def test_one_that_its_writer_holds_stays(self):
        """Between two pieces no `btrfs receive` is at work."""
        path = self.partial(5)
        with open(path + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.prune("--partials-older-than", "0s")
            self.assertEqual(1, len(partials(self.target)))
        self.prune("--partials-older-than", "0s")
        self.assertEqual([], [name for name in os.listdir(self.target) if "partial" in name])

    def test_one_to_be_taken_up(self):
        """What it builds on stays as long as it is there, and it goes with its record."""
        self.take(1, 2)
        self.transfer()
        delete(self.snapshot_path(self.name(2)))
        bulk(self.source + "/data", 100)
        self.take(3)
        run = self.start_backup("-S")
        run.wait_for("a partial", lambda: partials(self.target))
        receiver = run.hold("receive")
        os.kill(run.pid, signal.SIGTERM)
        os.kill(receiver, signal.SIGCONT)
        self.assertEqual(143, run.finish().status)
        self.assertTrue(os.path.exists(self.backup_path(".{}.partial.json".format(self.name(3)))))
        self.prune("-n", "1")
        self.assertBackedUpOnly(1, 2)
        self.assertEqual(1, len(partials(self.target)))
        self.prune("-n", "1", "--partials-older-than", "0s")
        self.assertEqual([], [name for name in os.listdir(self.target) if "partial" in name])
        self.prune("-n", "1")
        self.assertBackedUpOnly(2)
        self.transfer()  # in full, as nothing is in common any more
        self.assertBackedUpOnly(1, 2, 3)

    def test_what_one_builds_on_stays(self):
        self.take(1, 2, 3)
        self.transfer()
        self.partial(4, base=self.backup_path(self.name(1)))
        self.prune("-n", "1")
        self.assertBackedUpOnly(1, 3)
        self.prune("-n", "1", "--partials-older-than", "0s")
        self.prune("-n", "1")
        self.assertBackedUpOnly(3)


class OverSsh(remote.RemoteTestCase):

    def prune(self, *arguments, status=0):
        return self.run_program("prune", *self.program_options() + list(arguments) + [self.remote_target],
                                status=status)

    def test_on_another_host(self):
        self.take(1, 2, 3)
        self.transfer()
        path = self.backup_path(".{}.partial".format(self.name(9)))
        create(path)
        result = self.prune("--dry-run", "-n", "1", "--partials-older-than", "0s")
        self.assertEqual(3, result.stdout.count("  delete "))
        self.assertEqual(3, len(names(self.target)))
        self.prune("-n", "1", "--partials-older-than", "0s")
        self.assertBackedUp([self.name(3)])

    def test_one_that_is_being_received_there_stays(self):
        """The path of the folder is another one there than here."""
        bulk(self.source + "/data", 100)
        self.take(1)
        run = self.start("-S", "-p", "home", *self.program_options() + [self.source, self.remote_target])
        run.wait_for("a partial", lambda: partials(self.target))
        receiver, = self.server.find("receive")
        os.kill(receiver, signal.SIGSTOP)
        self.prune("-n", "1", "--partials-older-than", "0s")
        self.run_program("prune", "-n", "1", "--partials-older-than", "0s", self.target)  # seen from here
        self.assertEqual(1, len(partials(self.target)))
        os.kill(receiver, signal.SIGCONT)
        self.assertEqual(0, run.finish().status)
        self.assertBackedUp([self.name(1)])

    def test_a_prune_there_and_one_here_do_not_collide(self):
        self.take(1, 2)
        self.transfer()
        with open(os.path.join(self.target, ".home.lock"), "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            self.prune("-n", "1", status=75)
        self.prune("-n", "1")
        self.assertBackedUp([self.name(2)])


class KilledAtAnyMoment(BackupTestCase):

    usual_seconds = 15

    def backups(self, days):
        """Read-only subvolumes with received UUIDs, made without transfers and, as it is done often, by ioctl."""
        subvol_create, subvol_setflags, readonly = 0x5000940E, 0x4008941A, 2
        target = os.open(self.target, os.O_RDONLY)
        self.addCleanup(os.close, target)
        for day in days:
            name = "home2023{:02}{:02}-000000".format(1 + day // 28, 1 + day % 28)
            fcntl.ioctl(target, subvol_create, bytearray(struct.pack("<q4088s", 0, name.encode())))
            set_received_uuid(self.backup_path(name), os.urandom(16))
            fd = os.open(self.backup_path(name), os.O_RDONLY)
            fcntl.ioctl(fd, subvol_setflags, struct.pack("<Q", readonly))
            os.close(fd)

    def test_the_next_one_converges(self):
        """What the policy keeps is there at every moment; what goes, goes from the oldest."""
        choose = support.chance(self)
        for _ in range(max(30, TORTURE) if TORTURE else 12):
            self.backups(range(12))
            before = names(self.target)
            run, most = self.start("prune", "-n", "3", self.target), choose.randint(4, 12)
            run.wait_for("a deletion", lambda most=most: len(names(self.target)) <= most)
            time.sleep(choose.uniform(0, 0.01 if most < 12 else 0.3))
            run.kill()
            left = names(self.target)
            self.assertEqual(before[len(before) - len(left):], left)
            self.assertLessEqual(set(before[-3:]), set(left))
            self.run_program("prune", "-n", "3", self.target)
            self.assertEqual(before[-3:], names(self.target))
            command("btrfs", "subvolume", "delete", *map(self.backup_path, names(self.target)))


if __name__ == "__main__":
    unittest.main()
