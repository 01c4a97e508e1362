"""What must never be deleted is not: what absent disks, chains and other sources need. On real filesystems.

Environment: TORTURE=1 for all rounds.
"""

import os
import re
import shlex
import sys
import unittest
import uuid

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import support
from support import bulk, names, subvolume

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import btrfs_backup_ng as program
from btrfs_backup_ng import CHECKPOINT_DISTANCE

ROUNDS = 10 if os.environ.get("TORTURE") else 3


class InTurnTestCase(support.BackupTestCase):
    """Two disks that take turns at one mount point."""

    target_size = "128M"

    def setUp(self):
        super().setUp()
        self.other_disk = self.disk(self.target_size, at=self.target_disk.path + "-other")
        os.mkdir(os.path.join(self.other_disk.path, "backups"), self.target_mode)
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


class Renamed(support.BackupTestCase):
    """A backup that got a partial's name, by a slip or by who owns the folder, is told and stays."""

    def rename(self, day, name):
        path, hidden = self.backup_path(self.name(day)), os.path.join(self.target, name)
        os.rename(path, hidden)
        return path, hidden

    def type_remedy(self, text):
        """The command of the program's that gives the name back."""
        typed = re.findall(r"(mv -nT .+)$", text, re.MULTILINE)
        self.assertEqual(1, len(set(typed)), text)
        support.command("sh", "-c", typed[0])

    def test_beside_a_broken_transfer(self):
        """The lock says that something was being sent, not that all that bears its name was."""
        self.take(1, 2)
        self.transfer()
        third, = self.take(3)
        killed = support.killed_at(1, counted='"receive "*')
        self.start("-p", "home", "-S", self.source, self.target, env=killed).finish()
        self.assertIn(third, support.read_locks(self.snapshots))
        path, hidden = self.rename(1, ".{}.7.partial".format(third))
        for doing in (("--dry-run",), ("-n", "2")):
            result = self.transfer(*doing, status=None)
            self.assertTrue(os.path.isdir(hidden))
        self.assertErrorSays(result, "is read-only", "so nothing proves", "rename it back")
        self.type_remedy(result.stderr)
        self.assertComplete(path, self.snapshot_path(self.name(1)))
        self.transfer("-n", "2")
        self.assertEqual(({}, [self.name(2), third]), (support.read_locks(self.snapshots), names(self.target)))

    def test_while_another_is_sent(self):
        self.take(1, 2)
        self.transfer()
        self.take(3, 4)
        run = self.start("-p", "home", "-S", self.source, self.target, env=support.gate("receive"))
        held = run.met_at_gate("receive")
        path, hidden = self.rename(1, ".{}.2.partial".format(self.name(4)))
        support.go_on(held)
        result = run.finish()
        self.assertEqual(1, result.status)
        self.assertIn("is read-only", result.stderr)
        self.assertTrue(os.path.isdir(hidden))
        self.type_remedy(self.transfer(status=1).stderr)
        self.assertComplete(path, self.snapshot_path(self.name(1)))
        self.transfer()
        self.assertConverged()

    def test_without_a_lock(self):
        self.take(1, 2)
        self.transfer()
        third, = self.take(3)
        path, hidden = self.rename(1, ".{}.partial".format(third))
        found = self.run_program("doctor", "-p", "home", self.source, self.target, status=1)
        self.assertNotIn("subvolume delete", found.stdout)
        result = self.transfer(status=1)
        self.assertNotIn("subvolume delete", result.stderr)
        self.assertTrue(os.path.isdir(hidden))
        self.type_remedy(found.stdout)
        self.assertComplete(path, self.snapshot_path(self.name(1)))
        self.assertEqual(2, found.stdout.count("rename it back") + result.stderr.count("rename it back"))

    def test_prune_of_old_partials(self):
        self.take(1, 2, 3)
        self.transfer()
        _, hidden = self.rename(1, ".{}.partial".format(self.name(1)))
        support.create(os.path.join(self.target, ".{}.partial".format(self.name(2))))
        for doing in (("--dry-run",), ()):
            result = self.run_program("prune", "-n", "9", "--partials-older-than", "0s", *doing, self.target)
            self.assertIn("is read-only", result.stderr)
        self.assertEqual([os.path.basename(hidden)], support.partials(self.target))
        found = self.run_program("doctor", self.target, status=1)
        self.assertIn("btrfs subvolume show " + hidden, found.stdout)

    def test_by_a_partials_own_id_it_is_one(self):
        """What lacks nothing but its name is of a broken transfer under its lock."""
        name, = self.take(1)
        self.transfer()
        self.rename(1, ".{}.partial".format(name))
        support.write_locks(self.snapshots, {name: {"locks": [self.target]}})
        self.transfer()
        self.assertConverged()


class OtherFilesystemsInTurn(support.BackupTestCase):
    """Two disks without a btrfs take turns at one mount point."""

    @unittest.skipIf(sys.version_info < (3, 7), "before Python 3.7 nothing tells them apart where there is no udev")
    def test_each_further_backup_of_a_disk_is_incremental(self):
        point, images = os.path.join(support.scratch_folder(), "usb"), []
        os.mkdir(point)
        self.addCleanup(os.rmdir, point)
        for number in (0, 1):
            images.append(os.path.join(support.scratch_folder(), "usb{}.img".format(number)))
            support.command("truncate", "-s", "64M", images[-1])
            support.command("mkfs.ext4", "-q", "-F", images[-1])
            self.addCleanup(os.unlink, images[-1])
        for day in range(1, 2 * ROUNDS + 1):
            self.take(day)
            support.command("mount", "-o", "loop", images[day % 2], point)
            try:
                os.makedirs(os.path.join(point, "raw"), exist_ok=True)
                self.assertEqual(day <= 2, " in full" in self.transfer(
                    "-N", "1", to=["raw://{}/raw".format(point)]).stderr)
            finally:
                support.unmount(point)
        self.assertEqual(2, len(names(self.snapshots)))  # one for each disk


class BrokenOffInTurn(InTurnTestCase):
    """A transfer to one of the disks is killed, then the other has its turn."""

    usual_seconds = 9

    source_size = target_size = "1G"

    def kill_when(self, last, limit, to=None):
        """kill -9 once that piece is begun; what lies on the disk then."""
        run = self.start("-p", "home", "-S", "--limit", limit, self.source, *to or [self.target])
        run.wait_for(last, lambda: last in map(os.path.basename, support.partials(self.target)))
        run.kill()
        support.command("sync", "-f", self.target)  # a disk that is pulled out may lose it again
        self.assertIn(last, map(os.path.basename, support.partials(self.target)))
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
        if self.target_mode == 0o700:  # else its record is what others see of it
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
        self.check_end("resuming " + self.name(2))

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

    def test_where_the_other_cannot_be_told_again(self):
        """A disk of another kind, for stream files: its own broken transfers are found none the less."""
        to, partial = ["raw://" + self.target], ".{}.partial".format(self.name(1))
        bulk(os.path.join(self.source, "large"), 40)
        self.take(1)
        self.kill_when(partial, "20M", to)
        left = support.hidden(self.target)
        self.target_disk.unmount()
        image = os.path.join(support.scratch_folder(), "kept-ext4.img")
        support.command("truncate", "-s", "256M", image)
        support.command("mkfs.ext4", "-q", "-F", image)
        support.command("mount", "-o", "loop", image, self.target_disk.path)
        try:
            os.mkdir(self.target)
            self.kill_when(partial, "20M", to)
            self.transfer(to=to)
            self.assertEqual([], support.hidden(self.target))
        finally:
            support.command("umount", self.target_disk.path)
            self.target_disk.mount()
        self.assertEqual(left, support.hidden(self.target))
        self.transfer(to=to)
        self.assertEqual([], support.hidden(self.target))
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


class BrokenOffInOthersReach(BrokenOffInTurn):

    usual_seconds = 9

    target_mode = 0o755


class WithoutTransfer(support.BackupTestCase):

    target_size = "128M"

    def test_what_a_destination_has_in_common_is_looked_for(self):
        """No run has noted it yet, as after release 0.6.6."""
        self.take(1)
        self.transfer()
        for name in (".destinations.json", ".home.lock"):
            os.unlink(os.path.join(self.snapshots, name))
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


class FetchedMeanwhile(support.BackupTestCase):
    """Whoever only fetches snapshots is not waited for: what he needs he notes while a run is at work."""

    target_size = "128M"

    def test_what_is_noted_while_a_transfer_lasts_stays(self):
        taken = self.take(1, 2, 3, 4)
        self.transfer()
        self.take(5)
        run = self.start_backup("-S", "-N", "1", env=support.gate("receive"))
        held = run.met_at_gate("receive")
        there, far = program.LocalHost(program.Events()), "ssh://laptop/backups"
        there.change_locks(self.snapshots, [program.LockChange(taken[1], far, taken[0])], [])
        there.change_pins(self.snapshots, "home", {far: program.Pin(
            taken[2], subvolume(self.snapshot_path(taken[2])).uuid, "2024-01-03T00:00:00Z", str(uuid.uuid4()))})
        support.go_on(held)
        self.assertEqual(0, run.finish().status)
        self.assertEqual(taken[:3] + [self.name(5)], names(self.snapshots))


class LostNotes(support.BackupTestCase):
    """Of what destinations have in common nothing is known that is not seen, and any snapshot may be needed."""

    target_size = "128M"

    def setUp(self):
        super().setUp()
        self.other = self.disk(size="128M")
        self.others = os.path.join(self.other.path, "backups")
        self.take(1)
        self.transfer(to=[self.target, self.others])
        self.take(2, 3)
        self.other.unmount()

    def lose(self):
        os.unlink(os.path.join(self.snapshots, ".destinations.json"))

    def assertSpares(self, *more, count=3, **options):
        for dry in ("--dry-run",), ():
            result = self.transfer("-N", "1", *dry, *more, **options)
            self.assertNotIn("delet", result.stdout + result.stderr.replace("none is deleted", "").replace(
                "no snapshot is deleted", ""))
            self.assertIn("nothing is remembered of", result.stderr)
            self.assertEqual(count, len(names(self.snapshots)))

    def test_a_run_that_finds_them_lost_deletes_no_snapshot(self):
        self.lose()
        self.assertSpares()

    def test_nor_do_those_after_it_until_the_user_says_so(self):
        """A disk that is not named, and away, may need any of them."""
        self.lose()
        self.transfer("-N", "1")
        for day in (4, 5):
            self.take(day)
            for dry in ["--dry-run"], []:
                said = self.transfer("-N", "1", *dry).stderr
                self.assertNotIn("nothing is remembered", said)
                self.assertIn("3 snapshots, which one that is not remembered may need, stay", said)
            self.assertEqual([self.name(kept) for kept in (1, 2, 3, day)], names(self.snapshots))
        self.other.mount()
        self.transfer("-N", "1", to=[self.others])
        self.assertIsNotNone(subvolume(os.path.join(self.others, self.name(5))).parent_uuid)
        self.assertIn(self.name(1), names(self.snapshots))
        found = self.run_program("doctor", "-p", "home", self.source, status=1).stdout
        command = " ".join(shlex.quote(word) for word in ("-T", "--forget-destination", "unnamed://"))
        self.assertIn(command, found)
        self.assertIn(command, self.transfer("-N", "1").stderr)
        self.transfer("-T", "--forget-destination", "unnamed://", to=[])
        self.assertNotIn("not remembered", self.transfer("-N", "1").stderr)
        self.assertEqual([self.name(5)], names(self.snapshots))

    def test_nor_one_that_cannot_see_a_destination_of_which_nothing_is_known(self):
        """However often: the next run finds notes again, but none of that destination."""
        self.lose()
        for _ in range(2):
            self.assertSpares(to=[self.target, self.others], status=1)
        said = self.transfer("-N", "1", "--dry-run", to=[self.target, self.others], status=1).stderr
        self.assertIn("what has no backups yet can be left out until it is there", said)
        self.other.mount()
        self.transfer("-N", "1", to=[self.target, self.others])
        self.transfer("-N", "1", "--forget-destination", "unnamed://", to=[self.target, self.others])
        self.assertEqual([self.name(3)], names(self.snapshots))
        self.assertIsNotNone(support.subvolume(os.path.join(self.others, self.name(3))).parent_uuid)

    def test_the_first_destination_after_runs_without_one_is_no_loss(self):
        """What this run sends to it is in common in the end, and was not when it began."""
        self.source = support.create(os.path.join(self.source_disk.path, "alone"))
        self.snapshots = os.path.join(self.source, ".btrfs-backup-ng", "snapshots")
        self.take(1, 2, 3)
        self.transfer("-N", "3", to=[])
        first = [os.path.join(self.target_disk.path, "first")]
        for dry in ["--dry-run"], []:
            result = self.transfer("-N", "2", *dry, to=first)
            self.assertIn("delet", result.stdout + result.stderr)
        self.assertEqual([self.name(2), self.name(3)], names(self.snapshots))

    def test_a_destination_that_was_given_up_is_not_waited_for(self):
        self.transfer("-N", "1", "--forget-destination", self.others, to=[self.target, self.others], status=1)
        self.assertEqual([self.name(3)], names(self.snapshots))


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
        os.chmod(copy, 0o700)  # where others may enter it, parents tell nothing
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
