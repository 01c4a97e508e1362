"""Filesystems without free space: the source is freed by what its policy may delete, a destination is called full."""

import contextlib
import errno
import functools
import os
import shutil
import sys
import unittest
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support
from fakes import btrfs_where, fails
from support import command, names

import btrfs_backup_ng as program


def fill(path):
    """Takes all space for data that there is."""
    with open(path, "wb") as file:
        end = 0
        for size in (16 << 20, 1 << 20, 64 << 10, 4096):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), end, size)
                    end += size
    os.sync()


def fill_metadata(folder):
    """Takes the space for metadata by files so small that they are part of it."""
    os.mkdir(folder)
    with contextlib.suppress(OSError):
        for number in range(100000):
            with open(os.path.join(folder, "%06d" % number + "n" * 200), "wb", 0) as file:
                file.write(bytes(2000))


class Source(support.BackupTestCase):

    source_size = "128M"

    def setUp(self):
        super().setUp()
        for number in range(3):
            support.bulk(os.path.join(self.source, "bulk"), 2, number)
            self.backup()
        fill(os.path.join(self.source, "fill"))
        self.assertRaises(OSError, self.write, "small", "x" * 70000)
        self.before = names(self.snapshots)

    def test_the_policy_frees_it_before_the_snapshot_and_else_it_grows_no_worse(self):
        result = self.backup(status=1)
        self.assertErrorSays(result, "cannot write", ".outstanding_transfers: no space left on device",
                             "free some space there")
        self.assertEqual(self.before, names(self.snapshots))
        result = self.backup("-N", "1")
        self.assertIn("is full", result.stderr)
        self.assertLess(result.stderr.index("deleting " + self.before[0]), result.stderr.index("took snapshot"))
        self.assertEqual(1, len(names(self.snapshots)))
        self.assertEqual(4, len(names(self.target)))
        self.assertComplete(self.backup_path(names(self.target)[-1]), self.snapshot_path(names(self.snapshots)[0]))

    def test_room_that_was_asked_for_is_made_where_there_is_none_at_all(self):
        self.assertIn("deletes nothing", self.backup("--free-snapshots", "1M", status=1).stderr)
        self.assertEqual(self.before, names(self.snapshots))
        result = self.backup("--free-snapshots", "1M", "--at-least", "1")
        self.assertLess(result.stderr.index("deleting " + self.before[0]), result.stderr.index("took snapshot"))
        self.assertEqual(self.before[1:], names(self.snapshots)[:2])
        self.assertEqual(self.before, names(self.target)[:3])
        self.assertComplete(self.backup_path(names(self.target)[-1]), self.snapshot_path(names(self.snapshots)[-1]))

    def test_what_is_in_common_or_under_way_stays(self):
        """Also where nothing notes it: what the destinations hold is looked at first."""
        support.delete(self.backup_path(self.before[2]))
        for name in (".destinations.json", ".home.lock"):
            os.unlink(os.path.join(self.snapshots, name))
        self.backup("-S", "-N", "1")
        self.assertEqual(self.before[-1:], names(self.snapshots))
        self.assertEqual(names(self.target), self.before)
        self.assertIsNotNone(support.subvolume(self.backup_path(self.before[2])).parent_uuid)


class StaysFull(support.BackupTestCase):
    """A source whose room is too little for a snapshot, whatever is deleted."""

    def test_what_is_in_common_stays_for_a_destination_that_is_away_then(self):
        full = btrfs_where(fails("ERROR: No space left on device"), " subvolume snapshot ")
        self.take(1)
        self.transfer()
        with open(os.path.join(self.snapshots, ".destinations.json")) as file:
            noted = file.read()
        self.take(2)
        self.transfer()
        self.take(3)
        with open(os.path.join(self.snapshots, ".destinations.json"), "w") as file:
            file.write(noted)  # as where a full source took no more
        run = functools.partial(self.backup, "-N", "1", env=full, status=1)
        self.assertIn("making room", run().stderr)
        self.assertEqual([self.name(2), self.name(3)], names(self.snapshots))
        self.target_disk.unmount()
        run()
        self.assertEqual([self.name(2), self.name(3)], names(self.snapshots))


class NotesThatFindNoRoom(support.BackupTestCase):
    """There is room for what is small, and for a snapshot, but none to replace a file of notes durably."""

    def run_full(self, note, most, *options):
        """The status of a run that finds no room for this note as long as there are more snapshots than that."""
        replace, snapshots = program.LocalHost.replace_state, self.snapshots

        def full(host, folder, name, text):
            if name == note and text and len(names(snapshots)) > most:
                path = os.path.join(snapshots, name)
                raise program.file_error(path, "write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            replace(host, folder, name, text)

        pid = os.fork()
        if not pid:
            try:
                with mock.patch.object(program.LocalHost, "replace_state", full):
                    os._exit(program.main(["-q", "-S", "-p", "home"] + list(options) + [self.source, self.target]))
            finally:
                os._exit(99)
        return os.waitpid(pid, 0)[1] >> 8

    def test_the_policy_is_kept_and_what_is_in_common_or_was_noted_stays(self):
        self.take(1)
        self.transfer()
        for day in (2, 3, 4):
            self.take(day)
            self.assertEqual(1, self.run_full(".destinations.json", 0, "-N", "1"))
            self.assertEqual([self.name(1), self.name(day)], names(self.snapshots))
        self.transfer("-N", "1")
        self.assertEqual([self.name(4)], names(self.snapshots))

    def test_once_that_has_made_room_they_are_written(self):
        self.take(1)
        self.transfer()
        self.take(2, 3)
        self.assertEqual(0, self.run_full(".destinations.json", 2, "-N", "1"))
        self.take(4)
        self.assertEqual(0, self.run_full(".destinations.json", 2, "-N", "1"))
        self.assertEqual([self.name(3), self.name(4)], names(self.snapshots))

    def bring(self, first):
        """Three snapshots that were sent, and one that was not."""
        for day in range(first, first + 4):
            support.bulk(os.path.join(self.source, "bulk"), 2, day)
            os.sync()
            self.take(day)
            if day < first + 3:
                self.transfer()

    def test_a_lock_that_finds_no_room_has_some_made(self):
        for first, options in ((1, ["-N", "2"]), (11, ["--free-snapshots", "1M", "--at-least", "1"])):
            with self.subTest(options=options):
                self.bring(first)
                most = len(names(self.snapshots)) - 1
                self.assertEqual(0, self.run_full(".outstanding_transfers", most, *options))
                self.assertEqual([self.name(first + 2), self.name(first + 3)], names(self.snapshots)[-2:])
                self.assertLessEqual(len(names(self.snapshots)), most)
                self.assertComplete(self.backup_path(self.name(first + 3)), self.snapshot_path(self.name(first + 3)))


class Destination(support.BackupTestCase):

    target_size = "128M"

    def test_it_is_called_full_each_time_and_goes_on_afterwards(self):
        self.take(1)
        path, small = (os.path.join(self.target_disk.path, name) for name in ("fill", "small"))
        fill(path)
        fill_metadata(small)
        for _ in range(2):
            result = self.transfer(status=1)
            self.assertErrorSays(result, "no space left on device")
            self.assertNotIn("another run", result.stderr)
            self.assertEqual([], [name for name in os.listdir(self.target) if name.endswith(".lock")])
        os.unlink(path)
        command("btrfs", "filesystem", "sync", self.target_disk.path)
        shutil.rmtree(small)
        self.transfer()
        self.assertBackedUp([self.name(1)])


class ReadOnly(support.BackupTestCase):

    def test_a_dry_run_says_what_the_run_would(self):
        self.take(1)
        said = []
        self.source_disk.remount("ro")
        for options in (["--dry-run"], []):
            said.append(self.transfer(*options, status=1).errors)
        self.assertEqual(said[0], said[1])
        self.assertIn("read-only", said[0][0])


if __name__ == "__main__":
    unittest.main()
