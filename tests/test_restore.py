"""Restoring: drills in which data was lost, each followed by an incremental backup; and what is refused."""

import fcntl
import json
import os
import shutil
import signal
import time
import unittest
import uuid
from unittest import mock

import support
from fakes import CALLS_THAT_CHANGE, killed_at, swapped_and_killed
from support import bulk, create, names, partials, snapshot, subvolume

import btrfs_backup_ng as program
from btrfs_backup_ng import (
    Listing,
    Mount,
    Subvolume,
    choose_newest,
    mount_around,
    parents_in_order,
    parse_moment,
    parse_mountinfo,
    reachable_path,
)

ROUNDS = int(os.environ.get("TORTURE", "0")) or 5


class Choosing(unittest.TestCase):
    """Pure: which backup is meant, and what it can build on."""

    @staticmethod
    def listing(*names_, **more):
        return Listing(tuple(Subvolume(name, "u" + name, None, "r" + name, **more) for name in names_))

    DAYS = ("home20240101-000000", "home20240103-120000", "home20240102-000000")

    def newest(self, before, *names_):
        return choose_newest(self.listing(*(names_ or self.DAYS)), None, before, "/b").name

    def test_latest_goes_by_the_time_in_the_name(self):
        self.assertEqual(self.DAYS[1], self.newest(float("inf")))

    def test_before(self):
        for text, expected in (("2024-01-03", self.DAYS[2]), ("2024-01-03 12:00", self.DAYS[2]),
                               ("2024-01-03T12:00:01", self.DAYS[1]), ("20240101-000001", self.DAYS[0])):
            with self.subTest(text=text):
                self.assertEqual(expected, self.newest(parse_moment(text)))
        with self.assertRaisesRegex(Exception, "before that time"):
            self.newest(parse_moment("2024-01-01"))

    def test_times_that_are_none(self):
        for text in ("", "today", "2024-13-01", "2024-02-30", "2024-01-01 25:00", "2024-01", "12:00", "2024-01-01x"):
            with self.subTest(text=text), self.assertRaises(ValueError):
                parse_moment(text)

    def test_several_prefixes_are_not_mixed(self):
        with self.assertRaisesRegex(Exception, "'home', 'root-'"):
            self.newest(float("inf"), "home20240101-000000", "root-20240102-000000")

    def test_what_is_partial_is_no_backup(self):
        listing = Listing((Subvolume(".home20240105-000000.partial", "u", None, "r"),
                           Subvolume("home20240104-000000", "v", None, None, readonly=False))
                          + self.listing(*self.DAYS).subvolumes)
        self.assertEqual(self.DAYS[1], choose_newest(listing, None, float("inf"), "/b").name)

    def test_the_nearest_older_ones_come_first(self):
        listing = self.listing("home20240101-000000", "home20240102-000000", "home20240103-000000",
                               "home20240104-000000", "root20240102-000000")
        backup = listing.named("home20240103-000000")
        self.assertEqual(["home20240102-000000", "home20240101-000000", "home20240104-000000"],
                         [b.name for b in parents_in_order(backup, listing)])

    MOUNTS = ("22 1 0:20 / / rw - ext4 /dev/a rw\n"
              "43 22 0:39 /home /mnt/two\\040words rw shared:1 - btrfs /dev/b rw,subvolid=256,subvol=/home\n"
              "44 22 0:39 / /mnt/top rw - btrfs /dev/b rw\n"
              "45 22 0:40 / /mnt/top rw - btrfs /dev/c rw\n")

    def test_mounts(self):
        mounts = parse_mountinfo(self.MOUNTS)
        self.assertEqual(Mount("/mnt/two words", "/home", "btrfs", "/dev/b"), mounts[1])
        self.assertEqual(mounts[3], mount_around("/mnt/top/x", mounts))
        self.assertEqual(mounts[0], mount_around("/mnt/topless", mounts))
        self.assertEqual("/mnt/two words/s/x", reachable_path("home/s/x", mounts[1]))
        self.assertEqual("/mnt/two words", reachable_path("home", mounts[1]))
        self.assertIsNone(reachable_path("homely/x", mounts[1]))
        self.assertEqual("/mnt/top/home/x", reachable_path("home/x", mounts[2]))


class RestoreTestCase(support.BackupTestCase):

    def setUp(self):
        super().setUp()
        self.into = os.path.join(self.source_disk.path, "restored")

    def restore(self, *arguments, **more):
        return self.run_program("restore", *arguments, **more)

    def back_up_days(self, *days):
        """Snapshots of these days, each with changes, all backed up; {name: tree}."""
        trees = {}
        churn = support.Churn(self.source, seed=days[0])
        churn.fill(30)
        for day in days:
            churn.change(20)
            name = self.take(day)[0]
            trees[name] = support.tree(self.snapshot_path(name))
        self.transfer()
        return trees

    def replaced(self):
        """The subvolumes that a restore in place has put aside."""
        folder, name = os.path.split(self.source)
        return [os.path.join(folder, n) for n in names(folder) if n.startswith(name + ".old-")]

    def hidden(self, folder=None):
        return sorted(n for n in os.listdir(folder or os.path.dirname(self.source)) if n.startswith("."))

    def assertGoesOn(self, restored, *targets):
        """A backup taken now is sent incrementally on top of the restored one."""
        self.write("after", "written after the restore\n")
        targets = targets or (self.target,)
        before = [set(names(target)) for target in targets]
        result = self.backup(to=targets)
        self.assertEqual(len(targets), result.stderr.count("incrementally from " + restored), result.stderr)
        for target, there in zip(targets, before):
            new, = set(names(target)) - there
            self.assertComplete(os.path.join(target, new), self.snapshot_path(new))
            self.assertEqual(subvolume(os.path.join(target, restored)).uuid,
                             subvolume(os.path.join(target, new)).parent_uuid)


class ToAFolder(RestoreTestCase):

    def test_by_path_by_name_and_by_time(self):
        trees = self.back_up_days(1, 2, 3)
        first, second, third = sorted(trees)
        for number, (arguments, expected) in enumerate((
                ([self.backup_path(second)], second), ([self.target, "--latest"], third),
                ([self.target, "--name", first], first), ([self.target, "--before", "2024-01-03"], second),
                ([self.target, "--before", "2024-01-02 23:59:59", "-p", "home"], second))):
            with self.subTest(arguments=arguments):
                into = "{}{}".format(self.into, number)
                self.restore(*(arguments + [into]))
                self.assertEqual([expected], os.listdir(into))
                self.assertComplete(os.path.join(into, expected), self.snapshot_path(expected))
                self.assertTreesEqual(trees[expected], os.path.join(into, expected))

    def test_what_the_target_has_in_common_is_not_sent(self):
        bulk(os.path.join(self.source, "large"), 64)
        first, second = self.take(1, 2)
        self.transfer()
        support.delete(self.snapshot_path(second))
        used = self.source_disk.used()
        result = self.restore(self.backup_path(second), self.snapshots)
        self.assertIn("incrementally from " + first, result.stderr)
        self.assertLess(self.source_disk.used() - used, 8 * support.MIB)
        self.assertTreesEqual(self.backup_path(second), self.snapshot_path(second))
        self.assertEqual({}, support.read_locks(self.snapshots))
        result = self.transfer()  # and the snapshot is known to be that of the backup
        self.assertIn("nothing to do", result.stderr)

    def test_no_incremental(self):
        first, second = self.take(1, 2)
        self.transfer()
        support.delete(self.snapshot_path(second))
        result = self.restore("-I", self.backup_path(second), self.into)
        self.assertIn(" in full", result.stderr)
        self.assertIsNone(subvolume(os.path.join(self.into, second)).parent_uuid)

    def test_into_an_empty_filesystem(self):
        trees = self.back_up_days(1, 2)
        other = self.disk().path
        self.restore(self.target, "--latest", other)
        self.assertTreesEqual(trees[self.name(2)], os.path.join(other, self.name(2)))

    def test_empty_folders_of_nested_subvolumes_in_the_parent(self):
        """The snapshot at the source has them, the backup has not: the stream may not fit the snapshot."""
        nested = os.path.join(self.source, "nested", "one")
        os.makedirs(os.path.dirname(nested))
        create(nested)
        self.take(1)
        support.delete(nested)
        os.rmdir(os.path.dirname(nested))
        second, = self.take(2)
        self.transfer()
        support.delete(self.snapshot_path(second))
        result = self.restore(self.backup_path(second), self.snapshots)
        self.assertIn("in full: the parent", result.stderr)
        self.assertTreesEqual(self.backup_path(second), self.snapshot_path(second))
        self.assertEqual([], partials(self.snapshots))

    def test_a_second_time_nothing_is_done(self):
        name, = self.take(1)
        self.transfer()
        self.restore(self.target, "--latest", self.into)
        before = support.listing(self.into)
        self.assertEqual([name], os.listdir(self.into))
        result = self.restore(self.target, "--latest", self.into)
        self.assertIn("already in", result.stderr)
        self.assertUnchanged(before, self.into)

    def test_what_keeps_others_out_is_gone_at_the_end_and_no_earlier(self):
        name, = self.take(1)
        self.transfer()
        os.mkdir(self.into)
        restoring = self.start("restore", self.backup_path(name), self.into, env=support.gate("receive"))
        receive, = restoring.met_at_gate("receive")
        self.assertErrorSays(self.restore(self.backup_path(name), self.into, status=75), "another run")
        self.assertIn(".home.lock", os.listdir(self.into))
        waiting = self.start("restore", "--wait", "60", self.backup_path(name), self.into)
        waiting.wait_to_say("waiting for another run")
        os.kill(receive, signal.SIGCONT)
        self.assertEqual(0, restoring.finish().status)
        self.assertIn("already in", waiting.finish().stderr)
        self.assertEqual([name], os.listdir(self.into))

    def test_a_parent_that_goes_while_it_is_waited_for(self):
        first, second = self.take(1, 2)
        self.transfer()
        os.mkdir(self.into)
        support.delete(self.snapshot_path(second))
        with open(os.path.join(self.into, ".home.lock"), "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = self.start("restore", "--wait", "60", self.backup_path(second), self.into)
            waiting.wait_to_say("waiting for another run")
            support.delete(self.snapshot_path(first))
        result = waiting.finish()
        self.assertEqual(0, result.status, result.stderr)
        self.assertTreesEqual(self.backup_path(second), os.path.join(self.into, second))

    def test_files_of_others_stay(self):
        first, second = self.take(1, 2)
        self.transfer()
        support.delete(self.snapshot_path(second))
        locks = {first: {"locks": ["/elsewhere"], "parent_locks": []}}
        support.write_locks(self.snapshots, locks)
        before = set(os.listdir(self.snapshots)) - {".home.lock"}
        self.restore(self.backup_path(second), self.snapshots)
        self.assertEqual(before | {second}, set(os.listdir(self.snapshots)))
        self.assertEqual(locks, support.read_locks(self.snapshots))

    def test_the_backups_are_not_touched(self):
        self.back_up_days(1, 2)
        before = support.listing(self.target)
        self.restore(self.target, "--latest", self.into)
        self.assertUnchanged(before, self.target)

    def test_from_backups_that_cannot_be_written(self):
        trees = self.back_up_days(1)
        self.target_disk.remount("ro")
        self.restore(self.target, "--latest", self.into)
        self.assertTreesEqual(trees[self.name(1)], os.path.join(self.into, self.name(1)))

    def test_a_backup_under_a_name_of_its_own(self):
        name, = self.take(1)
        self.transfer()
        os.rename(self.backup_path(name), self.backup_path("before the move"))
        self.restore(self.backup_path("before the move"), self.into)
        self.assertTreesEqual(self.snapshot_path(name), os.path.join(self.into, "before the move"))

    def test_dry_run_changes_nothing(self):
        first, second = self.take(1, 2)
        self.transfer()
        support.delete(self.snapshot_path(second))
        folders = (self.source_disk.path, self.target)
        before = support.listing(*folders)
        for more, words in (((self.into,), ("make the folder", "incrementally from " + first, "about")),
                            (("--in-place", self.source), ("incrementally from " + first, "at " + self.source,
                                                           self.source + ".old-"))):
            result = self.restore("--dry-run", self.target, "--latest", *more)
            for word in words:
                self.assertIn(word, result.stdout)
        self.assertUnchanged(before, *folders)


class Refused(RestoreTestCase):

    def refuse(self, *arguments, says=(), status=1):
        before = support.listing(self.source_disk.path, self.target)
        result = self.restore(*arguments, status=status)
        self.assertErrorSays(result, *says)
        self.assertUnchanged(before, self.source_disk.path, self.target)

    def test_what_cannot_be_restored(self):
        name, = self.take(1)
        self.transfer()
        os.mkdir(self.into)
        for arguments, says in (
                ((self.target, self.into), ("is a folder, not a backup", "--latest")),
                ((self.backup_path("nothing"), self.into), ("no such backup",)),
                ((self.target, "--name", "nothing", self.into), ("no backup nothing", name)),
                ((self.target, "--before", "2023-12-31", self.into), ("before that time", name)),
                ((self.target, "--latest", "-p", "root", self.into), ("no backups of prefix 'root'",)),
                ((self.target, "--latest", os.path.join(self.into, "a", "b")), ("no such folder",)),
                ((self.target, "--latest", "/proc"), ("not on btrfs",)),
                ((self.target, "--latest", self.backup_path(name)), ("read-only",)),
                ((self.target, "--latest", self.into, "--in-place", os.path.join(self.target, "home")),
                 ("not on the filesystem",)),
                ((self.target, "--latest", "--in-place", self.source_disk.path), ("mount point", "top level")),
                ((self.target, "--latest", "--in-place", self.into), ("not a subvolume",))):
            with self.subTest(arguments=arguments):
                self.refuse(*arguments, says=says)

    def test_command_lines_that_mean_nothing(self):
        for arguments in ((), ("/b",), ("/b", "/i", "/j"), ("/b", "--latest", "--name", "x", "/i"),
                          ("/b", "--name", "a/b", "/i"), ("shell://x", "/i"), ("/b", "shell://x"),
                          ("/b", "ssh://h/i", "--in-place", "/x"), ("/b", "--before", "noon", "/i")):
            with self.subTest(arguments=arguments):
                self.restore(*arguments, status=2)

    def test_nothing_is_overwritten(self):
        name, = self.take(1)
        self.transfer()
        os.mkdir(self.into)
        path = os.path.join(self.into, name)
        for make, remove in ((lambda: os.mkdir(path), lambda: os.rmdir(path)),
                             (lambda: create(path), lambda: support.delete(path)),
                             (lambda: snapshot(self.source, path), lambda: support.delete(path)),
                             (lambda: create(os.path.join(self.into, "." + name + ".partial")), lambda: None)):
            make()
            self.refuse(self.target, "--latest", self.into, says=(name,))
            remove()

    def test_a_writable_backup(self):
        create(self.backup_path(self.name(1)))
        self.refuse(self.backup_path(self.name(1)), self.into, says=("writable",))
        self.refuse(self.target, "--latest", self.into, says=("no backups",))


    def test_a_backup_or_snapshot_gives_no_way(self):
        name, = self.take(1)
        self.transfer()
        for place in (self.backup_path(name), self.snapshot_path(name)):
            for more in ((), ("--dry-run",)):
                self.refuse(self.target, "--latest", "--in-place", place, *more, says=("read-only subvolume", "worked"))


class Interrupted(RestoreTestCase):

    def test_a_restore_that_was_killed_is_begun_again(self):
        bulk(os.path.join(self.source, "large"), 100)
        name, = self.take(1)
        self.transfer()
        support.delete(self.snapshot_path(name))
        running = self.start("restore", self.target, "--latest", self.into)
        running.wait_for("a partial", lambda: os.path.isdir(self.into) and partials(self.into))
        running.kill()
        self.assertEqual([], names(self.into))
        self.assertEqual(1, len(partials(self.into)))
        self.restore(self.target, "--latest", self.into)
        self.assertEqual([name], names(self.into))
        self.assertEqual([], partials(self.into))
        self.assertTreesEqual(self.backup_path(name), os.path.join(self.into, name))
        self.assertEqual({}, support.read_locks(self.into))


    def test_into_the_snapshot_folder_backups_go_on_meanwhile(self):
        bulk(os.path.join(self.source, "large"), 100)
        name, = self.take(1)
        self.transfer()
        support.delete(self.snapshot_path(name))
        running = self.start("restore", self.target, "--latest", self.snapshots)
        running.wait_for("a partial", lambda: partials(self.snapshots))
        running.kill()
        self.backup("--locked-destinations", "-N", "5")
        self.assertEqual(1, len(partials(self.snapshots)))
        self.restore(self.target, "--name", name, self.snapshots)
        self.assertEqual([], partials(self.snapshots))
        self.assertTreesEqual(self.backup_path(name), self.snapshot_path(name))


class InPlace(RestoreTestCase):

    def test_a_whole_subvolume_lost(self):
        trees = self.back_up_days(1, 2)
        for name in trees:
            support.delete(self.snapshot_path(name))
        support.delete(self.source)
        result = self.restore(self.target, "--latest", "--in-place", self.source)
        self.assertNotIn("warning", result.stderr)
        self.assertTreesEqual(trees[self.name(2)], self.source)
        self.assertFalse(subvolume(self.source).readonly)
        self.assertIsNone(subvolume(self.source).received_uuid)
        self.assertEqual(["home"], names(self.source_disk.path))
        self.assertEqual([], self.hidden())
        self.assertGoesOn(self.name(2))

    def test_an_empty_disk_instead_of_the_old_one(self):
        trees = self.back_up_days(1, 2)
        self.source_disk.unmount()
        fresh = self.disk()
        self.source = os.path.join(fresh.path, "home")
        self.snapshots = os.path.join(self.source, ".btrfs-backup-ng", "snapshots")
        self.restore(self.target, "--before", "2024-01-02", "--in-place", self.source)
        self.assertTreesEqual(trees[self.name(1)], self.source)
        self.assertGoesOn(self.name(1))

    def test_back_to_an_older_state(self):
        trees = self.back_up_days(1, 2, 3)
        was = support.tree(self.source)
        old = subvolume(self.source)
        result = self.restore(self.target, "--name", self.name(2), "--in-place", self.source)
        self.assertIn("incrementally from " + self.name(1), result.stderr)
        self.assertTreesEqual(trees[self.name(2)], self.source)
        aside, = self.replaced()
        self.assertEqual(old.uuid, subvolume(aside).uuid)
        self.assertTreesEqual(was, aside)
        self.assertEqual(sorted(trees), names(os.path.join(aside, ".btrfs-backup-ng", "snapshots")))
        self.assertEqual([self.name(2)], names(self.snapshots))
        self.assertEqual([], self.hidden())
        self.assertGoesOn(self.name(2))

    def killed_after_the_exchange(self):
        self.assertEqual(9, swapped_and_killed(self.backup_path(self.name(1)), self.source))

    def test_killed_after_the_exchange_it_is_the_restore_that_is_asked_for(self):
        trees = self.back_up_days(1, 2)
        self.killed_after_the_exchange()
        self.restore(self.target, "--name", self.name(1), "--in-place", self.source)
        self.assertTreesEqual(trees[self.name(1)], self.source)
        self.assertEqual(1, len(self.replaced()))
        self.assertEqual([], self.hidden())

    def test_what_was_written_since_such_a_kill_is_replaced_and_kept(self):
        trees = self.back_up_days(1, 2)
        self.killed_after_the_exchange()
        self.write("since", "weeks of work")
        self.restore(self.target, "--name", self.name(1), "--in-place", self.source)
        self.assertTreesEqual(trees[self.name(1)], self.source)
        self.assertEqual(1, sum(os.path.exists(os.path.join(path, "since")) for path in self.replaced()))
        self.assertEqual([], self.hidden())

    def test_what_goes_while_it_is_looked_at_was_written_to(self):
        os.mkdir(os.path.join(self.source, "d"))
        self.write("d/file", "")
        self.back_up_days(1)
        self.killed_after_the_exchange()
        journal = program.read_swap_journal(self.source)._replace(new_ctransid=0)  # as where something was read
        program.write_swap_journal(self.source, journal)
        lstat = os.lstat

        def going(path, *arguments, **more):
            if os.path.basename(path) == "file":
                os.unlink(path)
            return lstat(path, *arguments, **more)

        with mock.patch.object(os, "lstat", going):
            self.assertIsNone(program.finish_swap(self.source).new_ctransid)
        self.assertEqual([".home.restoring.lock"], self.hidden())

    def check_no_empty_folders(self, parent, restored):
        """None in the place of snapshots, where the parent is one that others were nested in."""
        self.take(1, 2, 3)
        self.transfer()
        for name in names(self.snapshots):
            if name != self.name(parent):
                support.delete(self.snapshot_path(name))
        result = self.restore(self.target, "--name", self.name(restored), "--in-place", self.source)
        self.assertIn("incrementally from " + self.name(parent), result.stderr)
        self.assertEqual([self.name(restored)], names(self.snapshots))
        self.assertGoesOn(self.name(restored))

    def test_no_empty_folders_from_an_older_parent(self):
        self.check_no_empty_folders(2, 3)

    def test_no_empty_folders_from_a_newer_parent(self):
        self.check_no_empty_folders(3, 2)

    def test_with_a_folder_the_restored_one_stays_there(self):
        trees = self.back_up_days(1)
        os.mkdir(self.into)
        self.restore(self.target, "--latest", self.into, "--in-place", self.source)
        self.assertTreesEqual(trees[self.name(1)], os.path.join(self.into, self.name(1)))
        self.assertGoesOn(self.name(1))

    def test_a_snapshot_folder_outside(self):
        self.snapshots = os.path.join(self.source_disk.path, "snapshots")
        for _ in range(2):
            support.next_second()
            self.backup("-f", self.snapshots)
        first, second = names(self.snapshots)
        support.delete(self.snapshot_path(second))
        self.restore(self.target, "--latest", "--in-place", self.source, "-f", self.snapshots)
        self.assertEqual([first, second], names(self.snapshots))
        self.assertTreesEqual(self.backup_path(second), self.source)
        self.write("after", "x")
        support.next_second()
        result = self.backup("-f", self.snapshots)
        self.assertIn("incrementally from " + second, result.stderr)

    def test_another_of_the_name_in_a_snapshot_folder_outside(self):
        self.snapshots = os.path.join(self.source_disk.path, "snapshots")
        name, = self.take(1)
        self.transfer("-f", self.snapshots)
        support.delete(self.snapshot_path(name))
        for make in (support.create, os.mkdir):
            make(self.snapshot_path(name))
            before = support.listing(self.source_disk.path)
            for options in (["--dry-run"], []):
                result = self.restore(self.target, "--latest", "--in-place", self.source, "-f", self.snapshots,
                                      *options, status=1)
                self.assertErrorSays(result, self.snapshot_path(name), "is not the snapshot that would be kept")
            self.assertUnchanged(before, self.source_disk.path)
            support.delete(self.snapshot_path(name)) if make is support.create else os.rmdir(self.snapshot_path(name))

    def test_what_is_mounted_below_is_not_taken_along(self):
        self.back_up_days(1)
        point = os.path.join(self.source, "inner disk")
        os.mkdir(point)
        support.command("mount", "-t", "tmpfs", "none", point)
        self.addCleanup(support.unmount, point)
        for options in (["--dry-run"], []):
            result = self.restore(self.target, "--latest", "--in-place", self.source, *options, status=1)
            self.assertErrorSays(result, "something is mounted below", point, "umount -- '" + point + "'")
        self.assertTrue(os.path.ismount(point))
        self.assertEqual([], [name for name in os.listdir(os.path.dirname(self.source)) if ".old-" in name])

    def test_from_a_second_hand_backup(self):
        """A to B, B to C, back to A; and then on to both."""
        trees = self.back_up_days(1, 2)
        second = self.disk().path
        os.chmod(second, 0o700)  # where others may enter it, parents tell nothing
        self.run_program("-S", "-p", "home", "-f", ".", self.target_top(), second)
        self.assertEqual(sorted(trees), names(second))
        shutil.rmtree(os.path.join(self.source, ".btrfs-backup-ng"), ignore_errors=True)
        for name in trees:
            support.delete(self.snapshot_path(name))
        support.delete(self.source)
        self.restore(second, "--latest", "--in-place", self.source)
        self.assertTreesEqual(trees[self.name(2)], self.source)
        self.assertGoesOn(self.name(2), self.target, second)

    def target_top(self):
        """The backups as a source: the target folder as a subvolume."""
        top = create(os.path.join(self.target_disk.path, "top"))
        for name in names(self.target):
            snapshot(self.backup_path(name), os.path.join(top, name))
        return top

    def test_twice_in_turn(self):
        trees = self.back_up_days(1, 2)
        self.restore(self.target, "--name", self.name(1), "--in-place", self.source)
        self.assertTreesEqual(trees[self.name(1)], self.source)
        self.restore(self.target, "--name", self.name(2), "--in-place", self.source)
        self.assertTreesEqual(trees[self.name(2)], self.source)
        self.assertEqual(2, len(self.replaced()))
        self.assertGoesOn(self.name(2))

    def test_what_absent_destinations_need_is_kept(self):
        """A disk that was away during restore and later runs still gets its next backup incrementally."""
        away = self.disk()
        self.take(1, 2, 3)
        self.transfer(to=[self.target, away.path])
        away.unmount()
        self.restore(self.target, "--name", self.name(2), "--in-place", self.source)
        self.write("later", "x")
        self.backup("-N", "1")
        support.next_second()
        self.backup("-N", "1")
        self.assertIn(self.name(2), names(self.snapshots))
        away.mount()
        result = self.transfer(to=[away.path])
        self.assertIn("incrementally from " + self.name(2), result.stderr)

    def test_the_disk_restored_from_is_remembered(self):
        """Nothing is left of the old state, and then the backups are away as well."""
        self.back_up_days(1)
        support.delete(self.snapshot_path(self.name(1)))
        support.delete(self.source)
        self.restore(self.target, "--latest", "--in-place", self.source)
        for _ in range(2):
            self.backup("-N", "1", to=[])
            support.next_second()
        self.assertIn(self.name(1), names(self.snapshots))
        self.assertIn("incrementally from " + self.name(1), self.transfer().stderr)

    def test_back_to_a_snapshot_without_its_backup(self):
        """Backups go on incrementally, and the snapshot's folder is no destination afterwards."""
        trees = self.back_up_days(1, 2)
        self.restore(self.snapshots, "--latest", "--in-place", self.source)
        self.assertTreesEqual(trees[self.name(2)], self.source)
        with open(os.path.join(self.snapshots, ".destinations.json")) as file:
            self.assertEqual([self.target], list(json.load(file)["destinations"]))
        self.assertGoesOn(self.name(2))

    def test_locks_move_on(self):
        """A partial that was under way when the source was replaced is cleared by the next run."""
        name, second = self.take(1, 2)
        self.transfer()
        os.makedirs(os.path.join(self.target, ".x"), exist_ok=True)
        partial = create(os.path.join(self.target, "." + self.name(9) + ".partial"))
        support.write_locks(self.snapshots, {self.name(9): {"locks": [self.target], "parent_locks": []}})
        self.restore(self.target, "--latest", "--in-place", self.source)
        self.assertIn(self.name(9), support.read_locks(self.snapshots))
        self.assertGoesOn(second)
        self.assertFalse(os.path.exists(partial))
        self.assertEqual({}, support.read_locks(self.snapshots))

    def test_a_torn_lock_file_of_the_old_one_is_no_obstacle(self):
        self.take(1)
        self.transfer()
        support.write_locks(self.snapshots, b"{torn")
        result = self.restore(self.target, "--latest", "--in-place", self.source)
        self.assertIn("warning: ", result.stderr)
        self.assertGoesOn(self.name(1))

    def test_nested_subvolumes_and_mounts_are_named(self):
        self.take(1)
        self.transfer()
        create(os.path.join(self.source, "nested"))
        point = os.path.join(support.scratch_folder(), "mounted")
        os.mkdir(point)
        self.addCleanup(os.rmdir, point)
        support.command("mount", "-o", "subvol=home", self.source_disk.loop, point)
        self.addCleanup(support.unmount, point)
        for options in ["--dry-run"], []:
            result = self.restore(self.target, "--latest", "--in-place", self.source, *options)
            self.assertRegex(result.stderr, "warning: subvolumes nested in .* nested")
            self.assertIn("still mounted at " + point, result.stdout + result.stderr)
        result = self.restore(self.target, "--latest", "--in-place", point, status=1)
        self.assertErrorSays(result, "mount point", "/home")

    def test_a_backup_at_work_is_waited_for_or_refused(self):
        bulk(os.path.join(self.source, "large"), 16)
        self.take(1)
        self.transfer()
        self.take(2)
        running = self.start_backup("-S", env=support.gate("receive"))
        running.met_at_gate("receive")
        result = self.restore(self.target, "--latest", "--in-place", self.source, status=75)
        self.assertErrorSays(result, "another run")
        running.kill()
        self.restore(self.target, "--name", self.name(1), "--in-place", self.source)
        self.assertGoesOn(self.name(1))

    def stopped_in_swap(self, *arguments):
        """A restore in place that waits until the new one beside the place is durable; and the file that lets it go."""
        waits, go = (os.path.join(support.scratch_folder(), "%s-%d" % (word, id(self))) for word in ("waits", "go"))
        script = "touch {0}; while [ ! -e {1} ]; do sleep 0.05; done; rm -f {0} {1}".format(waits, go)
        run = self.start("restore", *arguments, env=support.btrfs_where(script, "filesystem sync", "home.restoring"))
        run.wait_for("the sync", lambda: os.path.exists(waits))
        return run, go

    def test_another_one_of_the_same_place_is_waited_for_or_refused(self):
        """What it has beside the place was not left by a broken one."""
        trees = self.back_up_days(1, 2)
        into = self.target, "--name", self.name(1), "--in-place", self.source
        run, go = self.stopped_in_swap(*into)
        self.assertErrorSays(self.restore(*into, status=75), "another run is at work", "use --wait")
        other = self.start("restore", self.target, "--latest", self.into, "--in-place", self.source, "--wait", "60")
        other.wait_to_say("waiting for another run")
        os.mknod(go)
        self.assertEqual([0, 0], [run.finish().status, other.finish().status])
        self.assertTreesEqual(trees[self.name(2)], self.source)
        self.assertEqual(2, len(self.replaced()))
        self.assertEqual([], self.hidden())

    def test_what_stands_there_by_then_is_kept_whatever_it_was_made_of(self):
        trees = self.back_up_days(1)
        run, go = self.stopped_in_swap(self.target, "--latest", self.into, "--in-place", self.source)
        os.rename(self.source, self.source + "-by-hand")
        support.command("btrfs", "subvolume", "snapshot", os.path.join(self.into, self.name(1)), self.source)
        self.write("mine", "written meanwhile")
        os.mknod(go)
        self.assertEqual(0, run.finish().status)
        self.assertTreesEqual(trees[self.name(1)], self.source)
        self.assertTrue(os.path.exists(os.path.join(self.replaced()[0], "mine")))
        self.assertEqual([], self.hidden())

    def test_without_exchange(self):
        """The ordered two renames, and what they leave when they are broken off between."""
        self.back_up_days(1)
        self.restore(self.target, "--latest", "--in-place", self.source)
        folder, base = os.path.split(self.source)
        aside, = self.replaced()
        self.assertGoesOn(self.name(1))
        # as after a crash between the two: the old one has left, the new one waits
        new, old = subvolume(self.source).uuid, subvolume(aside).uuid
        restored = subvolume(os.path.join(self.snapshots, self.name(1))).received_uuid
        os.rename(self.source, os.path.join(folder, "." + base + ".restoring"))
        with open(os.path.join(folder, "." + base + ".restoring.json"), "w") as notes:
            json.dump({"name": self.name(1), "stream_id": restored, "restored": os.path.join(self.into, "x"),
                       "restored_uuid": str(uuid.uuid4()), "temporary": False,
                       "kept": os.path.relpath(self.snapshot_path(self.name(1)), self.source), "old_uuid": old,
                       "old_name": os.path.basename(aside), "new_uuid": new}, notes)
        result = self.restore(self.target, "--name", self.name(1), "--in-place", self.source)
        self.assertIn("is now as in", result.stderr)
        self.assertEqual(new, subvolume(self.source).uuid)
        self.assertEqual([], self.hidden())


class Killed(RestoreTestCase):
    """kill -9 at any moment: the old or the new one stands there, and the next call converges."""

    usual_seconds = 15

    source_size = target_size = "1G"

    def check(self, moment, old, trees):
        name, into = self.name(1), [self.target, "--name", self.name(1), "--in-place", self.source]
        running = self.start("restore", *into)
        started = time.monotonic()
        while time.monotonic() - started < moment and running.process.poll() is None:
            self.assertTrue(os.path.isdir(self.source), "nothing stands at the place")
        result = running.kill()
        standing = subvolume(self.source)
        is_old = standing.uuid == old
        if not is_old:
            self.assertTreesEqual(trees[name], self.source)
        self.restore(*into)
        self.assertTreesEqual(trees[name], self.source)
        self.assertEqual([], self.hidden(), result.stderr)
        self.assertEqual([name], names(self.snapshots))
        # whatever the moment, the old one was put aside exactly once
        self.assertIn(old, [subvolume(path).uuid for path in self.replaced()])
        return is_old

    def test_at_any_moment(self):
        bulk(os.path.join(self.source, "some"), 4)
        trees = self.back_up_days(1, 2)
        started = time.monotonic()
        self.restore(self.target, "--name", self.name(1), "--in-place", self.source)
        took = time.monotonic() - started
        chance, seen = support.chance(self), []
        for number in range(ROUNDS):
            moment = took * (number + chance.random()) / ROUNDS
            with self.subTest(moment=moment):
                old = subvolume(self.source).uuid
                before = len(self.replaced())
                is_old = self.check(moment, old, trees)
                seen.append(is_old)
                # after the swap was done and forgotten the same call is a restore of its own
                self.assertLessEqual(len(self.replaced()) - before, 1 if is_old else 2)
        self.assertIn(True, seen)


class KilledAtEachStep(RestoreTestCase):
    """kill -9 between any two calls that change something, one after the other."""

    usual_seconds = 15

    def killed_at(self, number, *arguments):
        """Whether the program was killed at that step; it has ended in any case."""
        result = self.start("restore", *arguments, env=killed_at(number, counted=CALLS_THAT_CHANGE)).finish()
        self.assertIn(result.status, (0, -9), result.stderr)
        return result.status == -9

    def converge(self, arguments, expected):
        """Kills at each step in turn, and lets the next call bring it to its end."""
        for number in range(1, 40):
            old = subvolume(self.source).uuid
            before = set(self.replaced())
            was = support.tree(self.source)
            was_killed = self.killed_at(number, *arguments)
            if subvolume(self.source).uuid == old:
                self.assertTreesEqual(was, self.source)
            else:
                self.assertTreesEqual(expected, self.source)
            if was_killed:
                self.restore(*arguments)
            self.assertTreesEqual(expected, self.source)
            aside, = set(self.replaced()) - before
            self.assertEqual(old, subvolume(aside).uuid)
            self.assertEqual([self.name(1)], names(self.snapshots))
            self.assertEqual([], self.hidden())
            if not was_killed:
                return number
        raise AssertionError("more steps than thought of")

    def test_in_place(self):
        trees = self.back_up_days(1, 2)
        steps = self.converge([self.target, "--name", self.name(1), "--in-place", self.source], trees[self.name(1)])
        self.assertGreater(steps, 7)
        self.assertGoesOn(self.name(1))

    def test_where_the_subvolume_was_lost(self):
        trees = self.back_up_days(1)
        support.delete(self.snapshot_path(self.name(1)))
        arguments = [self.target, "--latest", "--in-place", self.source]
        for number in range(1, 40):
            for path in (self.snapshot_path(self.name(1)), self.source):
                if os.path.exists(path):
                    support.delete(path)
            was_killed = self.killed_at(number, *arguments)
            if os.path.exists(self.source):
                self.assertTreesEqual(trees[self.name(1)], self.source)
            self.restore(*arguments) if was_killed else None
            self.assertTreesEqual(trees[self.name(1)], self.source)
            self.assertEqual(["home"], names(self.source_disk.path))
            self.assertEqual([], self.hidden())
            if not was_killed:
                break
        self.assertGreater(number, 6)
        self.assertGoesOn(self.name(1))


if __name__ == "__main__":
    unittest.main()
