"""What must never be deleted is not: what absent disks, chains and other sources need. On real filesystems.

Environment: TORTURE=1 for all rounds.
"""

import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import support
from support import bulk, names, subvolume

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from btrfs_backup_ng import CHECKPOINT_DISTANCE

ROUNDS = 10 if os.environ.get("TORTURE") else 3


class InTurnTestCase(support.BackupTestCase):
    """Two disks that take turns at one mount point."""

    target_size = "128M"

    def setUp(self):
        super().setUp()
        self.other_disk = self.disk(self.target_size, at=self.target_disk.path + "-other")
        os.mkdir(os.path.join(self.other_disk.path, "backups"))
        self.other_disk.unmount()
        self.other_disk.path = self.target_disk.path

    def swap(self):
        self.target_disk.unmount()
        self.target_disk, self.other_disk = self.other_disk, self.target_disk
        self.target_disk.mount()


class DisksInTurn(InTurnTestCase):

    def test_each_further_backup_of_a_disk_is_incremental(self):
        for day in range(1, ROUNDS + 1):
            for half in (0, 1):
                newest, = self.take(2 * day + half)
                self.transfer("-N", "1", "-n", "2")
                if day > 1:
                    self.assertIsNotNone(subvolume(self.backup_path(newest)).parent_uuid, newest)
                self.swap()
        self.assertEqual(2, len(names(self.snapshots)))  # one for each disk

    def test_one_that_is_mounted_elsewhere_still_is_the_same(self):
        """As in another namespace: from Linux 6.7 on the mount has an id of its own then."""
        self.take(1)
        self.transfer()
        image, disk = self.target_disk.image, self.target_disk
        twin = self.disk("128M")  # where the first is held
        twin.unmount()
        twin.image, kept = image, twin.image
        disk.unmount()
        try:
            twin.mount()
            try:
                disk.mount()
            except RuntimeError as refusal:
                self.skipTest("this kernel mounts none twice: {}".format(refusal))
            self.take(2)
            self.transfer("-N", "1")
            self.assertEqual([self.name(2)], names(self.snapshots))
        finally:
            twin.unmount()
            twin.image = kept

    def test_a_dry_run_keeps_them_as_well(self):
        self.take(1)
        self.transfer("-N", "1")
        self.swap()
        self.take(2, 3)
        plan = self.transfer("-N", "1", "--dry-run").stdout
        self.assertIn("delete " + self.name(2), plan)
        self.assertNotIn("delete " + self.name(1), plan)

    def test_both_are_forgotten_at_once(self):
        self.take(1)
        self.transfer("-N", "1")
        self.swap()
        self.take(2)
        self.transfer("-N", "1")
        self.take(3)
        self.transfer("-T", "-N", "1", "--forget-destination", self.target, to=[])
        self.assertEqual([self.name(3)], names(self.snapshots))


class BrokenOffInTurn(InTurnTestCase):
    """A transfer to one of the disks is killed, then the other has its turn."""

    source_size = target_size = "1G"

    def kill_when(self, last, limit):
        """kill -9 once that piece is begun; what lies on the disk then."""
        run = self.start_backup("-S", "--limit", limit)
        run.wait_for(last, lambda: os.path.lexists(os.path.join(self.target, last)))
        run.kill()
        support.command("btrfs", "filesystem", "sync", self.target)  # a disk that is pulled out may lose it again
        self.assertIn(last, support.hidden(self.target))
        return support.hidden(self.target)

    def check_backups(self, *days):
        self.assertEqual([], support.hidden(self.target))
        self.assertEqual([self.name(day) for day in days], names(self.target))
        for day in days:
            self.assertComplete(self.backup_path(self.name(day)), self.snapshot_path(self.name(day)))

    def turn_of_the_other(self, *days):
        """It gets all that it lacks, and keeps what the first needs; what is on that is for no one to touch."""
        self.swap()
        self.transfer("-N", "1")
        self.check_backups(*days)
        self.assertNotIn("delete ", self.transfer("--dry-run", "-N", "1").stdout)
        self.assertIn("locked", self.run_program("list", "-p", "home", self.source).stdout)
        self.swap()

    def check_end(self, words):
        result = self.transfer()
        self.assertIn(words, result.stderr)
        self.check_backups(1, 2)
        self.assertEqual({}, support.read_locks(self.snapshots))

    def test_before_its_first_checkpoint(self):
        self.take(1)
        self.transfer()
        bulk(os.path.join(self.source, "large"), 40)
        self.take(2)
        left = self.kill_when(".{}.partial".format(self.name(2)), "20M")
        self.assertNotIn(".{}.partial.json".format(self.name(2)), left)
        self.turn_of_the_other(1, 2)
        self.assertEqual(left, support.hidden(self.target))
        self.check_end("deleted .{}.partial".format(self.name(2)))

    def test_after_its_first_checkpoint(self):
        self.take(1)
        self.transfer()
        bulk(os.path.join(self.source, "large"), CHECKPOINT_DISTANCE // support.MIB + 60)
        self.take(2)
        left = self.kill_when(".{}.2.partial".format(self.name(2)), "48M")
        self.assertIn(".{}.partial.json".format(self.name(2)), left)
        self.turn_of_the_other(1, 2)
        self.assertEqual(left, support.hidden(self.target))
        self.check_end("taking up " + self.name(2))

    def test_where_the_other_had_it_already(self):
        bulk(os.path.join(self.source, "large"), 40)
        self.take(1, 2)
        self.transfer()
        self.swap()
        self.kill_when(".{}.partial".format(self.name(1)), "20M")
        self.turn_of_the_other(1, 2)
        self.check_end("deleted .{}.partial".format(self.name(1)))

    def test_a_partial_of_somebody_else_on_the_other_is_left_alone(self):
        """The lock names what is on the first disk, and nothing here."""
        bulk(os.path.join(self.source, "large"), 40)
        self.take(1)
        partial = ".{}.partial".format(self.name(1))
        left = self.kill_when(partial, "20M")
        self.swap()
        support.create(os.path.join(self.target, partial))
        self.assertErrorSays(self.transfer(status=1), "a partial backup that no lock names")
        self.assertEqual([partial], support.hidden(self.target))
        self.swap()
        self.assertEqual(left, support.hidden(self.target))
        self.check_only(partial)

    def check_only(self, partial):
        self.assertIn("deleted " + partial, self.transfer().stderr)
        self.check_backups(1)
        self.assertEqual({}, support.read_locks(self.snapshots))

    def test_the_place_is_given_up(self):
        """All its disks are."""
        bulk(os.path.join(self.source, "large"), 40)
        self.take(1)
        self.kill_when(".{}.partial".format(self.name(1)), "20M")
        self.swap()
        self.transfer()
        self.assertNotEqual({}, support.read_locks(self.snapshots))
        for options in (["--dry-run"], []):
            self.transfer("-T", "--forget-destination", self.target, *options, to=[])
        self.assertEqual({}, support.read_locks(self.snapshots))


class WithoutTransfer(support.BackupTestCase):

    target_size = "128M"

    def test_what_a_destination_has_in_common_is_looked_for(self):
        """No run has noted it yet, as after release 0.6.6."""
        self.take(1)
        self.transfer()
        os.unlink(os.path.join(self.snapshots, ".destinations.json"))
        self.take(2, 3)
        for more in ((), ("--dry-run",)):
            result = self.transfer("-T", "-N", "1", *more)
            self.assertNotIn(self.name(1), result.stdout + result.stderr)
        self.assertEqual([self.name(1), self.name(3)], names(self.snapshots))

    def test_one_that_is_away_is_no_error(self):
        self.take(1)
        self.transfer()
        self.target_disk.unmount()
        self.take(2, 3)
        self.transfer("-T", "-N", "1")
        self.assertEqual([self.name(1), self.name(3)], names(self.snapshots))
        self.assertEqual([], names(self.target))


class Copies(support.BackupTestCase):

    target_size = "128M"

    def test_one_of_the_newest_backup_costs_no_full_transfer(self):
        self.take(1)
        self.transfer()
        kept = support.snapshot(self.backup_path(self.name(1)), self.backup_path("keep-" + self.name(1)))
        self.take(2)
        self.transfer()
        self.assertEqual(subvolume(self.backup_path(self.name(1))).uuid,
                         subvolume(self.backup_path(self.name(2))).parent_uuid)
        support.delete(self.backup_path(self.name(1)))
        support.delete(self.backup_path(self.name(2)))
        self.transfer("-n", "1")  # what is left will do
        self.assertEqual(subvolume(kept).uuid, subvolume(self.backup_path(self.name(2))).parent_uuid)

    def test_a_folder_of_backups_is_copied_in_the_order_of_time(self):
        """However it came about: here the oldest was sent last."""
        self.take(1, 3)
        self.transfer()
        self.take(2)
        self.transfer()
        copy = self.disk("128M").path
        self.run_program("-S", "-p", "home", "-f", self.target, self.target_disk.path, copy)
        backups = [subvolume(os.path.join(copy, self.name(day))) for day in (1, 2, 3)]
        self.assertEqual([None, backups[0].uuid, backups[1].uuid], [backup.parent_uuid for backup in backups])


class NothingThere(support.BackupTestCase):
    """What was asked for is not there: that is no success."""

    target_size = "128M"

    def test_a_mistyped_prefix(self):
        self.take(1, 2)
        for options in (["-S"], ["-S", "-T", "-N", "1"], ["-S", "--dry-run"]):
            result = self.run_program("-p", "hoem", *options + [self.source, self.target], status=1)
            self.assertErrorSays(result, "no snapshot of prefix 'hoem'", "2 of 'home'", "-p")

    def test_no_snapshots_at_all(self):
        self.assertErrorSays(self.transfer(status=1), "no snapshot of prefix 'home'")

    def test_a_snapshot_folder_that_is_not_there(self):
        result = self.transfer("-f", ".snapshot", status=1)
        self.assertErrorSays(result, "no such snapshot folder", ".snapshot")
        self.assertFalse(os.path.exists(os.path.join(self.source, ".snapshot")))

    def test_nothing_to_retry_is_well(self):
        self.transfer("--locked-destinations", to=[])
        self.transfer("-T", "--remove-locks")
        self.transfer("-T", "--forget-destination", "/nowhere")


if __name__ == "__main__":
    unittest.main()
