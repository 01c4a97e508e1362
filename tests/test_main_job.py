"""The main job on real filesystems: snapshot, incremental transfer, retention, and what stays."""

import os
import re
import socket
import subprocess
import tempfile
import time
import unittest
import uuid

import support
from support import bulk, create, names, partials, snapshot, subvolume

REAL_NAME = re.compile(r"^home\d{8}-\d{6}$")
ANY_NAME = re.compile(r"home\d{8}-\d{6}")
FUTURE = "home20990101-000000"


class TreesAreEqual(support.BackupTestCase):
    """After a full run and eight incremental ones over random changes."""

    usual_seconds = 15

    def back_up_churn(self, targets, back_up):
        churn = support.Churn(self.source, seed=len(targets))
        churn.fill()
        for round_ in range(9):
            newest = back_up(round_)
            for target in targets:
                backup = os.path.join(target, newest)
                self.assertComplete(backup, self.snapshot_path(newest))
                self.assertTreesEqual(self.source, backup)
                self.assertEqual(round_ > 0, subvolume(backup).parent_uuid is not None)
            churn.change()
        for target in targets:
            self.assertBackedUp(names(self.snapshots), target)
            self.assertEqual(9, len(names(target)))

    def test_one_destination(self):
        def back_up(_):
            self.backup()
            return names(self.snapshots)[-1]
        self.back_up_churn([self.target], back_up)

    def back_up_to(self, count):
        targets = [self.target] + [self.disk().path for _ in range(count - 1)]
        for target in targets:
            os.chmod(target, 0o700)  # where others may enter it, parents tell nothing

        def back_up(round_):
            newest = self.take(round_ + 1)[0]
            self.transfer(to=targets)
            return newest
        self.back_up_churn(targets, back_up)

    def test_two_destinations(self):
        self.back_up_to(2)

    def test_three_destinations(self):
        self.back_up_to(3)


class Incremental(support.BackupTestCase):

    def test_the_parent_is_the_backup_before(self):
        first, second, third = self.take(1, 2, 3)
        self.transfer()
        self.assertBackedUp([first, second, third])
        chain = [subvolume(self.backup_path(name)) for name in (first, second, third)]
        self.assertIsNone(chain[0].parent_uuid)
        self.assertEqual(chain[0].uuid, chain[1].parent_uuid)
        self.assertEqual(chain[1].uuid, chain[2].parent_uuid)

    def test_what_did_not_change_does_not_travel(self):
        bulk(os.path.join(self.source, "large"), 64)
        self.take(1)
        self.transfer()
        before = self.target_disk.used()
        self.take(2)
        self.transfer()
        self.assertLess(self.target_disk.used() - before, 8 * support.MIB)

    def test_no_incremental_sends_all_of_it(self):
        bulk(os.path.join(self.source, "large"), 64)
        self.take(1)
        self.transfer()
        before = self.target_disk.used()
        second, = self.take(2)
        self.transfer("-I")
        self.assertGreater(self.target_disk.used() - before, 60 * support.MIB)
        self.assertIsNone(subvolume(self.backup_path(second)).parent_uuid)
        self.assertComplete(self.backup_path(second), self.snapshot_path(second))

    def test_older_missing_ones_are_sent_in_order(self):
        taken = self.take(1, 2, 3, 4)
        self.transfer()
        ids = [subvolume(self.backup_path(name)).id for name in taken]
        self.assertEqual(sorted(ids), ids)

    def test_a_gap_is_filled_from_the_nearest_older_one(self):
        first, second, third = self.take(1, 2, 3)
        self.transfer()
        support.delete(self.backup_path(second))
        self.transfer()
        self.assertBackedUp([first, second, third])
        self.assertEqual(subvolume(self.backup_path(first)).uuid,
                         subvolume(self.backup_path(second)).parent_uuid)

    def test_the_nearest_newer_one_is_the_parent_where_none_is_older(self):
        first, second = self.take(1, 2)
        self.transfer()
        support.delete(self.backup_path(first))
        self.transfer()
        self.assertBackedUp([first, second])
        self.assertEqual(subvolume(self.backup_path(second)).uuid,
                         subvolume(self.backup_path(first)).parent_uuid)

    def test_a_second_run_without_news_sends_nothing(self):
        self.take(1, 2)
        self.transfer()
        before = support.listing(self.target)
        self.transfer()
        self.assertUnchanged(before, self.target)


class Options(support.BackupTestCase):

    def test_no_snapshot(self):
        taken = self.take(1)
        self.backup("-S")
        self.assertEqual(taken, names(self.snapshots))
        self.assertBackedUp(taken)

    def test_no_transfer(self):
        self.backup("-T")
        self.assertEqual(1, len(names(self.snapshots)))
        self.assertEqual([], names(self.target))

    def test_without_destination_there_are_snapshots_only(self):
        self.backup(to=[])
        taken, = names(self.snapshots)
        self.assertTrue(subvolume(self.snapshot_path(taken)).readonly)
        self.assertTreesEqual(self.source, self.snapshot_path(taken))

    def test_a_name_is_the_prefix_and_local_time(self):
        before = time.strftime("%Y%m%d-%H%M%S")
        self.backup()
        taken, = names(self.target)
        self.assertRegex(taken, REAL_NAME)
        self.assertTrue(before <= taken[len("home"):] <= time.strftime("%Y%m%d-%H%M%S"))

    def test_the_second_of_two_runs_in_one_second_waits(self):
        for _ in range(3):
            self.backup(to=[])
        self.assertEqual(3, len(names(self.snapshots)))

    def test_relative_snapshot_folder(self):
        self.backup("-f", "some/where")
        self.assertEqual(names(os.path.join(self.source, "some/where")), names(self.target))
        self.assertFalse(os.path.exists(self.snapshots))

    def test_absolute_snapshot_folder(self):
        folder = os.path.join(self.source_disk.path, "snapshots")
        self.backup("-f", folder)
        self.backup("-f", folder)
        self.assertEqual(2, len(names(self.target)))
        self.assertEqual(names(folder), names(self.target))

    def test_prefixes_are_taken_literally(self):
        for argument, prefix in [(["-p", "work"], "work"), (["-p", ""], ""), (["-p", "@home"], "@home"),
                                 (["--snapshot-prefix=-x"], "-x"), (["--snapshot-prefix", "a b"], "a b")]:
            with self.subTest(prefix=prefix):
                before = set(names(self.target))
                self.run_program(*(argument + [self.source, self.target]))
                made, = set(names(self.target)) - before
                self.assertRegex(made, "^" + re.escape(prefix) + r"\d{8}-\d{6}$")

    def test_the_default_prefix_is_the_host_name(self):
        self.run_program(self.source, self.target)
        made, = names(self.target)
        self.assertRegex(made, "^" + re.escape(socket.gethostname()) + r"-\d{8}-\d{6}$")

    def test_options_and_positionals_mix(self):
        for arguments in (["-S", self.source, "-p", "home", self.target, "-N", "5"],
                          [self.source, self.target, "--snapshot-prefix", "home", "-S"],
                          ["-N5", self.source, "-Sp", "home", self.target],
                          ["-S", "--wait", self.source, self.target, "-phome"]):
            with self.subTest(arguments=arguments):
                taken = self.take(len(names(self.snapshots)) + 1)
                self.run_program(*arguments)
                self.assertIn(taken[0], names(self.target))

    def test_sync_leaves_no_deleted_subvolume_behind(self):
        self.take(1, 2, 3)
        self.transfer()
        self.transfer("-s", "-N", "1", "-n", "1")
        for disk in (self.source_disk, self.target_disk):
            self.assertEqual("", support.command("btrfs", "subvolume", "list", "-d", disk.path))

    def test_convert_rw_deletes(self):
        taken = self.take(1, 2, 3)
        self.transfer()
        self.transfer("-w", "-N", "1", "-n", "1")
        self.assertEqual(taken[-1:], names(self.snapshots))
        self.assertBackedUp(taken[-1:])

    def test_convert_rw_lets_an_ordinary_user_delete(self):
        self.source_disk.remount("user_subvol_rm_allowed")
        os.chown(self.source, support.NOBODY, support.NOBODY)
        taken = self.take(1, 2, 3)
        for folder in (self.snapshots, os.path.dirname(self.snapshots)):
            os.chown(folder, support.NOBODY, support.NOBODY)
        self.transfer("--no-elevate", "-T", "-w", "-N", "1", to=[], wrapper=support.as_nobody())
        self.assertEqual(taken[-1:], names(self.snapshots))

    def test_quiet_and_debug(self):
        self.take(1)
        self.assertEqual("", self.transfer("-q", "--dry-run").stderr)
        self.assertNotEqual("", self.transfer("-v", "debug").stderr)

    def test_help_and_version(self):
        self.assertIn("--snapshot-prefix", self.run_program("--help").stdout)
        self.assertRegex(self.run_program("--version").stdout, r"\d+\.\d+")


class Retention(support.BackupTestCase):

    def test_the_newest_are_kept_on_either_side(self):
        taken = self.take(1, 2, 3, 4, 5)
        self.transfer()
        result = self.transfer("-N", "2", "-n", "3")
        self.assertEqual(taken[-2:], names(self.snapshots))
        self.assertEqual(taken[-3:], names(self.target))
        for name in taken[:3]:
            self.assertRegex(result.stderr, "(?i)delet.*" + name)

    def test_zero_keeps_all(self):
        taken = self.take(1, 2, 3)
        self.transfer("-N", "0", "-n", "0")
        self.assertEqual(taken, names(self.snapshots))
        self.assertBackedUp(taken)

    def test_latest_only_is_one(self):
        taken = self.take(1, 2, 3)
        self.transfer("--latest-only")
        self.assertEqual(taken[-1:], names(self.snapshots))
        self.assertEqual(taken, names(self.target))

    def test_what_would_be_deleted_at_once_is_not_sent(self):
        taken = self.take(1, 2, 3, 4, 5)
        self.transfer("-n", "2")
        self.assertBackedUp(taken[-2:])
        # The subvolumes of a new filesystem are numbered from 256 on: there were no others.
        self.assertEqual([256, 257], [subvolume(self.backup_path(name)).id for name in taken[-2:]])

    def test_a_disk_that_was_away_for_five_runs_gets_an_incremental_send(self):
        bulk(os.path.join(self.source, "large"), 32)
        common, = self.take(1)
        self.transfer("-N", "1")
        self.target_disk.unmount()
        for day in range(2, 7):
            newest, = self.take(day)
            self.transfer("-N", "1", status=1)
            self.assertEqual([common, newest], names(self.snapshots))
        self.target_disk.mount()
        before = self.target_disk.used()
        self.transfer("-N", "1")
        self.assertComplete(self.backup_path(newest), self.snapshot_path(newest))
        self.assertEqual(subvolume(self.backup_path(common)).uuid,
                         subvolume(self.backup_path(newest)).parent_uuid)
        self.assertLess(self.target_disk.used() - before, 8 * support.MIB)
        self.assertEqual([newest], names(self.snapshots))

    def test_the_common_snapshot_of_an_unnamed_destination_is_kept(self):
        other = self.disk().path
        common, = self.take(1)
        self.transfer(to=[other])
        newest = self.take(2, 3)[-1]
        self.transfer("-N", "1")
        self.assertEqual([common, newest], names(self.snapshots))

    def test_the_newest_common_backup_is_kept_at_the_destination(self):
        _, common, gone = self.take(1, 2, 3)
        self.transfer()
        support.delete(self.snapshot_path(gone))
        self.transfer("-n", "1")
        self.assertEqual([common, gone], names(self.target))

    def test_forget_destination_releases_what_was_kept_for_it(self):
        common, = self.take(1)
        self.transfer()
        self.target_disk.unmount()
        newest, = self.take(2)
        self.transfer("-N", "1", to=[])
        self.assertEqual([common, newest], names(self.snapshots))
        self.transfer("-T", "--forget-destination", self.target, to=[])
        self.transfer("-N", "1", to=[])
        self.assertEqual([newest], names(self.snapshots))

    def test_a_name_from_the_future_is_kept_reported_and_not_counted(self):
        self.take(1)
        snapshot(self.source, self.snapshot_path(FUTURE))
        self.take(2)
        newest, = self.take(3)
        result = self.transfer("-N", "1")
        self.assertEqual([newest, FUTURE], names(self.snapshots))
        self.assertRegex(result.stderr, "(?i)%s.*future|future.*%s" % (FUTURE, FUTURE))

    def test_what_a_lock_names_is_kept(self):
        first, second, third, fourth = self.take(1, 2, 3, 4)
        entries = {second: {"locks": ["/mnt/other"], "parent_locks": []},
                   first: {"locks": [], "parent_locks": ["/mnt/other"]}}
        support.write_locks(self.snapshots, entries)
        self.transfer("-N", "1")
        self.assertEqual([first, second, fourth], names(self.snapshots))
        self.assertEqual(entries, support.read_locks(self.snapshots))

    def test_the_only_one_left_is_kept(self):
        taken = self.take(1)
        self.transfer("-N", "1", "-n", "1")
        self.transfer("-T", "-N", "1", "-n", "1")
        self.assertEqual(taken, names(self.snapshots))
        self.assertBackedUp(taken)

    def test_nothing_is_deleted_where_the_transfer_failed(self):
        old = self.take(1, 2)
        self.transfer()
        self.take(3)
        os.mkdir(self.backup_path(self.name(3)))
        self.transfer("-n", "1", status=1)
        self.assertEqual(old + [self.name(3)], names(self.target))


class OthersAreLeftAlone(support.BackupTestCase):

    FOREIGN = ["home-20200101-000000", "home-data20200101-000000", "home2020111-1111", "home20200230-000000",
               "home20200101-000000.old", "xhome20200101-000000", "20200101-000000", "HOME20200101-000000"]

    def test_other_names(self):
        self.take(1, 2, 3)
        for name in self.FOREIGN:
            snapshot(self.source, self.snapshot_path(name))
            snapshot(self.target_disk.path, self.backup_path(name))
        os.mkdir(self.backup_path("home20200102-000000"))
        os.mkdir(self.snapshot_path("home20200102-000000"))
        kept = self.FOREIGN + ["home20200102-000000"]
        self.transfer("-N", "1", "-n", "1")
        for folder in (self.snapshots, self.target):
            self.assertLessEqual(set(kept), set(names(folder)))

    def test_the_empty_prefix_does_not_take_others(self):
        taken = self.take(1, 2, 3)
        self.run_program("-S", "-T", "-p", "", "-N", "1", "-n", "1", self.source, self.target, status=1)
        self.assertEqual(taken, names(self.snapshots))
        self.run_program("-T", "-p", "", "-N", "1", "-n", "1", self.source, self.target)
        self.assertEqual(set(taken), set(taken) & set(names(self.snapshots)))

    def test_a_writable_subvolume_that_no_lock_names(self):
        taken, = self.take(1)
        create(self.backup_path(taken))
        before = support.listing(self.target)
        result = self.transfer("-n", "1", status=1)
        self.assertIn(taken, result.stderr)
        self.assertUnchanged(before, self.target)

    def test_a_partial_that_no_lock_names(self):
        stray = "." + self.name(9) + ".partial"
        create(self.backup_path(stray))
        taken = self.take(1)
        self.transfer("-n", "1")
        self.assertEqual(taken, names(self.target))
        self.assertEqual([stray], partials(self.target))


class DryRunAfterABrokenRun(support.BackupTestCase):
    """What the run clears from the locks keeps nothing in its dry run either."""

    def break_off(self):
        bulk(os.path.join(self.source, "large"), 1)
        self.take(1)
        self.transfer()
        bulk(os.path.join(self.source, "large"), 8, seed=2)
        self.take(2)
        run = self.start("-p", "home", "-S", "--limit", "1M", self.source, self.target)
        run.wait_for("a partial", lambda: support.partials(self.target))
        run.kill()
        self.assertEqual(["parent_locks"], [kind for kind, noted in support.read_locks(self.snapshots)[
            self.name(1)].items() if noted])

    def assertDeletesWhatItSays(self, *options):
        lines = self.transfer(*options + ("--dry-run",)).stdout.splitlines()
        said = [line.split()[1].rstrip(":") for line in lines[:[
            line.startswith("destination") for line in lines].index(True)] if line.startswith("  delete ")]
        before = support.names(self.snapshots)
        self.transfer(*options)
        self.assertEqual(said, [name for name in before if name not in support.names(self.snapshots)])
        return said

    def test_that_is_taken_up(self):
        self.break_off()
        self.assertEqual([self.name(1)], self.assertDeletesWhatItSays("-N", "1"))

    def test_that_begins_anew(self):
        self.break_off()
        self.take(3)
        self.assertEqual([self.name(1), self.name(2)], self.assertDeletesWhatItSays("-N", "1", "--no-resume"))

    def test_that_is_not_sent_any_more(self):
        self.break_off()
        self.take(3)
        self.assertEqual([self.name(1), self.name(2)], self.assertDeletesWhatItSays("-N", "1", "-n", "1"))


class DryRun(support.BackupTestCase):

    def test_it_makes_nothing_at_all_at_first(self):
        before = support.listing(self.source_disk.path, self.target_disk.path)
        result = self.backup("--dry-run")
        self.assertUnchanged(before, self.source_disk.path, self.target_disk.path)
        self.assertRegex(result.stdout, ANY_NAME)

    def plan_and_run(self, *options):
        """What a dry run announces and what the run does: sent, deleted at the source, at the target."""
        before = support.listing(self.source_disk.path, self.target_disk.path)
        plan = self.transfer("--dry-run", *options).stdout
        self.assertUnchanged(before, self.source_disk.path, self.target_disk.path)
        at_source, at_target = plan.split("\ndestination ")
        announced = [self.named(at_target, "send"), self.named(at_source, "delet"), self.named(at_target, "delet")]
        snapshots, backups = names(self.snapshots), names(self.target)
        self.transfer(*options)
        done = [set(names(self.target)) - set(backups), set(snapshots) - set(names(self.snapshots)),
                set(backups) - set(names(self.target))]
        return announced, [sorted(each) for each in done]

    def test_it_says_what_the_real_run_then_does(self):
        bulk(os.path.join(self.source, "large"), 8)
        first, second, third = self.take(1, 2, 3)
        self.transfer()
        fourth, fifth = self.take(4, 5)
        announced, done = self.plan_and_run("-N", "2", "-n", "3")
        self.assertEqual([[fourth, fifth], [first, second, third], [first, second]], done)
        self.assertEqual(done, announced)

    def test_a_lock_that_the_run_will_clear_keeps_nothing_in_the_plan(self):
        first, second = self.take(1, 2)
        self.transfer()
        third, = self.take(3)
        support.write_locks(self.snapshots, {first: {"locks": [self.target], "parent_locks": []}})
        announced, done = self.plan_and_run("-N", "1", "-n", "1")
        self.assertEqual([[third], [first, second], [first, second]], done)
        self.assertEqual(done, announced)

    def test_what_is_forgotten_and_unlocked_protects_nothing_in_the_plan(self):
        first, second = self.take(1, 2)
        self.transfer()
        self.take(3)
        support.write_locks(self.snapshots, {first: {"locks": ["/mnt/other"], "parent_locks": []}})
        before = support.listing(self.source_disk.path, self.target_disk.path)
        plan = self.transfer("--dry-run", "-T", "-N", "1", "--remove-locks", "--forget-destination", self.target,
                             to=["/mnt/other"]).stdout
        self.assertUnchanged(before, self.source_disk.path, self.target_disk.path)
        self.assertRegex(plan, r"(?m)^ *remove the locks of /mnt/other$")
        self.assertRegex(plan, r"(?m)^ *forget " + re.escape(self.target) + "$")
        self.assertEqual([first, second], self.named(plan, "delet"))

    @staticmethod
    def lines(plan, verb):
        """The lines that say what happens to a snapshot, by their verb."""
        return [line for line in plan.splitlines()
                if re.search(r"\b" + verb, line, re.I) and ANY_NAME.search(line)]

    def named(self, plan, verb):
        """The names that those lines begin with."""
        return [ANY_NAME.findall(line)[0] for line in self.lines(plan, verb)]

    def test_it_names_parents_and_reasons(self):
        first, second, third = self.take(1, 2, 3)
        self.transfer()
        fourth, = self.take(4)
        plan = self.transfer("--dry-run", "-N", "2").stdout
        send, = self.lines(plan, "send")
        self.assertEqual([fourth, third], ANY_NAME.findall(send)[:2])
        for line in self.lines(plan, "delet"):
            self.assertRegex(line, r"-N 2|newest|num-snapshots|2 ")

    def test_the_expected_size_is_about_right(self):
        bulk(os.path.join(self.source, "large"), 8)
        self.take(1)
        send = self.transfer("--dry-run").stdout.splitlines()[-2]
        sizes = re.findall(r"(\d+(?:\.\d+)?) ?([KMG]?)i?B", send)
        self.assertEqual(1, len(sizes), send)
        number, unit = sizes[0]
        size = float(number) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[unit]
        self.assertTrue(8 * 10 ** 6 <= size <= 9 * support.MIB, send)


class Identity(support.BackupTestCase):

    def test_a_foreign_subvolume_of_the_same_name(self):
        taken, = self.take(1)
        snapshot(create(os.path.join(self.target_disk.path, "other")), self.backup_path(taken))
        before = support.listing(self.target)
        result = self.transfer(status=1)
        self.assertIn(taken, result.stderr)
        self.assertUnchanged(before, self.target)

    def test_a_snapshot_made_anew_under_its_old_name(self):
        taken, = self.take(1)
        self.transfer()
        support.delete(self.snapshot_path(taken))
        self.write("more", "other content")
        snapshot(self.source, self.snapshot_path(taken))
        before = support.listing(self.target)
        result = self.transfer(status=1)
        self.assertIn(taken, result.stderr)
        self.assertUnchanged(before, self.target)

    def test_a_renamed_snapshot_is_known_by_its_uuid(self):
        first, = self.take(1)
        self.transfer()
        os.rename(self.snapshot_path(first), self.snapshot_path(self.name(2)))
        third, = self.take(3)
        self.transfer()
        self.assertEqual([first, third], names(self.target))
        self.assertEqual(subvolume(self.backup_path(first)).uuid,
                         subvolume(self.backup_path(third)).parent_uuid)

    def test_a_backup_that_was_made_writable_is_no_parent(self):
        first, = self.take(1)
        self.transfer()
        support.make_writable(self.backup_path(first))
        os.unlink(os.path.join(self.backup_path(first), "day1"))
        second, = self.take(2)
        self.transfer(status=1)
        for name in set(names(self.target)) & {second}:
            self.assertIsNone(subvolume(self.backup_path(name)).parent_uuid)
            self.assertComplete(self.backup_path(name), self.snapshot_path(name))

    def forge(self, name, path):
        """A read-only subvolume that claims to be a copy of the snapshot, but holds something else."""
        folder = tempfile.mkdtemp(dir=self.target_disk.path)
        support.send_receive(self.snapshot_path(name), folder)
        forged = os.path.join(folder, name)
        support.make_writable(forged)
        bulk(os.path.join(forged, "large"), 1, seed="forged")
        support.set_received_uuid(forged, uuid.UUID(subvolume(self.snapshot_path(name)).uuid).bytes)
        os.rename(forged, path)
        support.command("btrfs", "property", "set", "-ts", path, "ro", "true")

    def assertNextBackupIsRight(self, first):
        """Or it is refused, in a way that says what to do."""
        # As the file is gone, its contents are cloned out of the parent.
        large = os.path.join(self.source, "large")
        support.command("cp", "--reflink=always", large, large + "-cloned")
        os.unlink(large)
        second, = self.take(2)
        result = self.transfer(status=None)
        if result.status:
            self.assertErrorSays(result, second, "parent", "-I")
            self.assertEqual([first], names(self.target))
        self.transfer("-I")
        self.assertBackedUp([first, second])

    def test_a_forged_copy_elsewhere_that_is_older_than_the_backup(self):
        """`btrfs receive` looks for the parent on the whole filesystem, and takes the oldest."""
        bulk(os.path.join(self.source, "large"), 1)
        first, = self.take(1)
        self.forge(first, os.path.join(self.target_disk.path, "forged"))
        self.transfer()
        self.assertNextBackupIsRight(first)

    def test_a_forged_copy_elsewhere_that_is_younger_than_the_backup(self):
        bulk(os.path.join(self.source, "large"), 1)
        first, = self.take(1)
        self.transfer()
        self.forge(first, os.path.join(self.target_disk.path, "forged"))
        self.assertNextBackupIsRight(first)

    def test_of_two_backups_with_one_received_uuid_the_one_with_the_name_is_the_parent(self):
        first, second = self.take(1, 2)
        self.transfer()
        self.forge(second, self.backup_path("forged"))
        third, = self.take(3)
        self.transfer()
        self.assertComplete(self.backup_path(third), self.snapshot_path(third))
        self.assertEqual(subvolume(self.backup_path(second)).uuid, subvolume(self.backup_path(third)).parent_uuid)

    def test_two_copies_neither_of_which_has_the_name_are_no_parent(self):
        first, second = self.take(1, 2)
        self.transfer()
        self.forge(second, self.backup_path("forged"))
        os.rename(self.backup_path(second), self.backup_path("another"))
        third, = self.take(3)
        self.transfer()
        self.assertComplete(self.backup_path(third), self.snapshot_path(third))
        self.assertEqual(subvolume(self.backup_path(first)).uuid, subvolume(self.backup_path(third)).parent_uuid)

    def test_two_folders_on_one_disk(self):
        """Each backup is there twice, so that a parent need not be the one in the same folder."""
        folders = [os.path.join(self.target_disk.path, name) for name in ("one", "two")]
        for day in (1, 2, 3):
            self.take(day)
            self.transfer(to=folders)
        for folder in folders:
            self.assertBackedUp([self.name(1), self.name(2), self.name(3)], folder)

    def test_backups_of_backups(self):
        self.take(1, 2)
        store = create(os.path.join(self.target_disk.path, "store"))
        self.transfer(to=[store])
        third = self.disk().path
        os.chmod(third, 0o700)  # where others may enter it, parents tell nothing
        back_up_the_store = ["-S", "-p", "home", "-f", store, store, third]
        self.run_program(*back_up_the_store)
        self.assertBackedUp([self.name(1), self.name(2)], third)

        self.take(3)
        self.transfer(to=[store])
        self.run_program(*back_up_the_store)
        self.assertBackedUp([self.name(1), self.name(2), self.name(3)], third)
        chain = [subvolume(os.path.join(third, name)) for name in names(third)]
        self.assertEqual([None, chain[0].uuid, chain[1].uuid], [each.parent_uuid for each in chain])

        before = support.listing(third)
        self.transfer(to=[third])
        self.assertUnchanged(before, third)

    def test_after_a_restore_by_hand_it_goes_on_incrementally(self):
        taken = self.take(1)
        self.transfer()
        new = self.disk().path
        folder = os.path.join(new, "snapshots")
        os.mkdir(folder)
        support.send_receive(self.backup_path(taken[0]), folder)
        self.source = snapshot(os.path.join(folder, taken[0]), os.path.join(new, "home"), readonly=False)
        self.write("after", "the restore")
        self.backup("-f", folder)
        newest = names(folder)[-1]
        self.assertEqual([taken[0], newest], names(self.target))
        self.assertComplete(self.backup_path(newest), os.path.join(folder, newest))
        self.assertEqual(subvolume(self.backup_path(taken[0])).uuid,
                         subvolume(self.backup_path(newest)).parent_uuid)


class Places(support.BackupTestCase):

    def test_nested_subvolumes_are_named_in_a_warning(self):
        self.take(1)
        os.mkdir(os.path.join(self.source, "folder"))
        create(os.path.join(self.source, "one"))
        create(os.path.join(self.source, "folder", "two"))
        result = self.backup()
        self.assertRegex(result.stderr, r"warning: .*\bone\b")
        self.assertRegex(result.stderr, r"warning: .*\bfolder/two\b")
        self.assertNotRegex(result.stderr, r"warning: .*\.btrfs-backup-ng")

    def test_a_missing_destination_folder_is_made(self):
        target = os.path.join(self.target_disk.path, "a", "b", "c")
        self.take(1)
        self.transfer(to=[target])
        self.assertBackedUp([self.name(1)], target)

    def test_it_is_not_made_on_the_filesystem_of_the_source(self):
        target = os.path.join(self.source_disk.path, "mnt", "backups")
        self.take(1)
        result = self.transfer(to=[target], status=1)
        self.assertIn(target, result.stderr)
        self.assertFalse(os.path.exists(os.path.dirname(target)))

    def test_an_existing_folder_on_the_filesystem_of_the_source_brings_a_warning(self):
        target = os.path.join(self.source_disk.path, "backups")
        os.mkdir(target)
        self.take(1)
        result = self.transfer(to=[target])
        self.assertIn("warning", result.stderr)
        self.assertBackedUp([self.name(1)], target)

    def test_hostile_paths(self):
        odd = os.fsdecode(b"-a b\xff'\"$HOME\\")
        self.source = create(os.path.join(self.source_disk.path, odd))
        self.snapshots = os.path.join(self.source, ".btrfs-backup-ng", "snapshots")
        target = os.path.join(self.target_disk.path, odd)
        taken = self.take(1, 2)
        self.transfer("-n", "1", to=[target])
        self.assertBackedUp(taken[1:], target)
        self.assertEqual({}, support.read_locks(self.snapshots))

    def test_relative_paths_symlinks_and_trailing_slashes(self):
        links = tempfile.mkdtemp(dir=support.scratch_folder())
        os.symlink(self.source, os.path.join(links, "source"))
        os.symlink(self.target, os.path.join(links, "target"))
        taken = self.take(1)
        argv = [*support.PROGRAM_ARGV,
                "-S", "-p", "home", "./source/", "target/"]
        subprocess.check_call(argv, cwd=links, stderr=subprocess.DEVNULL)
        self.assertBackedUp(taken)

    def test_the_top_level_subvolume_as_source(self):
        self.source = self.source_disk.path
        self.snapshots = os.path.join(self.source, ".btrfs-backup-ng", "snapshots")
        self.write("file", "on the top level")
        self.backup("-q")
        self.assertBackedUp(names(self.snapshots))
        self.assertEqual(1, len(names(self.target)))


if __name__ == "__main__":
    unittest.main()
