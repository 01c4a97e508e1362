"""What must never be deleted is not: what absent disks, chains and other sources need. On real filesystems.

Environment: TORTURE=1 for all rounds.
"""

import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import support
from support import names, subvolume

ROUNDS = 10 if os.environ.get("TORTURE") else 3


class DisksInTurn(support.BackupTestCase):
    """Two disks that take turns at one mount point."""

    target_size = "128M"

    def setUp(self):
        super().setUp()
        self.other_disk = self.disk("128M", at=self.target_disk.path + "-other")
        os.mkdir(os.path.join(self.other_disk.path, "backups"))
        self.other_disk.unmount()
        self.other_disk.path = self.target_disk.path

    def swap(self):
        self.target_disk.unmount()
        self.target_disk, self.other_disk = self.other_disk, self.target_disk
        self.target_disk.mount()

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


if __name__ == "__main__":
    unittest.main()
