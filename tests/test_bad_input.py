"""Bad input gets one clear line, and nothing is lost or changed."""

import os
import shutil
import tempfile
import unittest

import support
from support import create, names, snapshot, subvolume


class BadInputTestCase(support.BackupTestCase):
    """With a backup of two snapshots already there, which must stay as it is."""

    def setUp(self):
        super().setUp()
        self.take(1, 2)
        self.transfer("-q")

    def plain_folder(self):
        """A folder that is not on btrfs."""
        return tempfile.mkdtemp(dir=support.scratch_folder())

    def assertRefused(self, arguments, status, *words, **more):
        """The run fails with one error line that holds the words, and has changed nothing."""
        disks = self.source_disk.path, self.target_disk.path
        before = support.listing(*disks)
        result = self.run_program(*arguments, status=status, **more)
        self.assertErrorSays(result, *words)
        self.assertUnchanged(before, *disks)
        self.assertEqual("", result.stdout)

    def assertRefusedSource(self, source, *words, status=1):
        self.assertRefused(["-p", "home", source, self.target], status, source, *words)

    def assertDestinationFails(self, target, *words):
        """The destination's error, status 1, and nothing deleted; the snapshot may have been taken."""
        before = support.listing(self.target_disk.path)
        result = self.backup("-N", "1", "-n", "1", to=[target], status=1)
        self.assertErrorSays(result, *words)
        self.assertUnchanged(before, self.target_disk.path)
        # The newest that the good destination has in common stays.
        self.assertIn(self.name(2), names(self.snapshots))


class CommandLine(BadInputTestCase):

    def refuse(self, *words, arguments=(), positionals=None):
        positionals = [self.source, self.target] if positionals is None else positionals
        self.assertRefused(["-p", "home"] + list(arguments) + list(positionals), 2, *words)

    def test_nothing_to_back_up(self):
        self.refuse("source", positionals=[])

    def test_unknown_options(self):
        for option in ("--no-such-option", "-y", "--num-snapshot-s"):
            with self.subTest(option=option):
                self.refuse(option, arguments=[option])

    def test_numbers(self):
        for option in ("--num-snapshots", "--num-backups", "--stall-timeout"):
            for value in ("-1", "x", "1.5x", ""):
                with self.subTest(option=option, value=value):
                    self.refuse(option, arguments=[option + "=" + value])
        for short in ("-N", "-n"):
            with self.subTest(option=short):
                self.refuse(short, arguments=[short, "x"])

    def test_wait_takes_seconds(self):
        for value in ("-1", "x"):
            with self.subTest(value=value):
                self.refuse("--wait", arguments=["--wait=" + value])

    def test_verbosity(self):
        self.refuse("verbosity", "loud", arguments=["-v", "loud"])

    def test_an_option_without_its_value(self):
        self.refuse("-f", positionals=[self.source, self.target, "-f"])

    def test_a_prefix_that_is_no_part_of_a_file_name(self):
        for prefix in ("a/b", "../", "a\nb"):
            with self.subTest(prefix=prefix):
                self.refuse("prefix", arguments=["-p", prefix])

    def test_unknown_schemes(self):
        for endpoint in ("ftp://host/path", "file:///mnt/backups", "btrfs://x"):
            with self.subTest(endpoint=endpoint):
                self.refuse(endpoint, positionals=[self.source, endpoint])
                self.refuse(endpoint, positionals=[endpoint, self.target])


class Source(BadInputTestCase):

    def test_missing(self):
        missing = os.path.join(self.source_disk.path, "missing")
        self.assertRefusedSource(missing)
        self.assertFalse(os.path.exists(missing))

    def test_an_ordinary_folder(self):
        folder = os.path.join(self.source_disk.path, "folder")
        os.mkdir(folder)
        self.assertRefusedSource(folder, "subvolume")

    def test_a_folder_inside_a_subvolume(self):
        folder = os.path.join(self.source, "documents")
        os.mkdir(folder)
        self.assertRefusedSource(folder, "subvolume")

    def test_not_on_btrfs(self):
        folder = self.plain_folder()
        self.assertRefusedSource(folder, "btrfs")
        self.assertEqual([], os.listdir(folder))

    def test_a_file(self):
        self.assertRefusedSource(os.path.join(self.source, "day1"))

    def test_a_read_only_snapshot(self):
        self.assertRefusedSource(self.snapshot_path(self.name(1)))

    def test_writable_with_a_received_uuid(self):
        received = snapshot(self.snapshot_path(self.name(1)), os.path.join(self.source_disk.path, "back"),
                            readonly=False)
        support.set_received_uuid(received, os.urandom(16))
        self.assertIsNotNone(subvolume(received).received_uuid)
        self.assertRefusedSource(received, "received", "snapshot")

    def test_on_a_disk_mounted_read_only(self):
        self.source_disk.remount("ro")
        self.assertRefusedSource(self.source, "read-only")


class SnapshotFolder(BadInputTestCase):

    def refuse(self, folder, *words):
        self.assertRefused(["-p", "home", "-f", folder, self.source, self.target], 1, folder, *words)

    def test_in_a_read_only_subvolume(self):
        inside = create(os.path.join(self.source_disk.path, "frozen"))
        os.mkdir(os.path.join(inside, "snapshots"))
        support.command("btrfs", "property", "set", inside, "ro", "true")
        self.refuse(os.path.join(inside, "snapshots"), "read-only")

    def test_where_nothing_may_be_made(self):
        folder = os.path.join(self.source_disk.path, "sealed")
        os.mkdir(folder)
        support.command("chattr", "+i", folder)
        self.addCleanup(support.command, "chattr", "-i", folder)
        self.refuse(folder, "not permitted")

    def test_on_another_filesystem(self):
        folder = os.path.join(self.target_disk.path, "snapshots")
        os.mkdir(folder)
        self.refuse(folder, "filesystem")

    def test_a_file(self):
        self.refuse(os.path.join(self.source, "day1"))


class Destination(BadInputTestCase):

    def test_not_on_btrfs(self):
        folder = self.plain_folder()
        self.assertDestinationFails(folder, folder, "btrfs")
        self.assertEqual([], os.listdir(folder))

    def test_the_skipped_check_does_not_make_it_work(self):
        folder = self.plain_folder()
        result = self.transfer("--skip-fs-checks", to=[folder], status=1)
        self.assertIn(folder, result.stderr)
        self.assertEqual([], names(folder))

    def test_a_file(self):
        path = os.path.join(self.target_disk.path, "file")
        open(path, "w").close()
        self.assertDestinationFails(path, path)

    def test_a_backup(self):
        backup = self.backup_path(self.name(1))
        for path, told in ((backup, "is a backup"), (os.path.join(backup, "new"), "new is in a read-only subvolume")):
            self.assertDestinationFails(path, told)
            self.assertErrorSays(self.transfer("--dry-run", to=[path], status=1), told)
            self.assertIn(told, self.run_program("doctor", "-p", "home", self.source, path, status=1).stdout)

    def test_a_file_on_the_way(self):
        path = os.path.join(self.target_disk.path, "file")
        open(path, "w").close()
        self.assertDestinationFails(os.path.join(path, "backups"), path)

    def test_inside_the_source(self):
        inside = os.path.join(self.source, "backups")
        os.mkdir(inside)
        result = self.transfer(to=[inside], status=None)
        self.assertIn(result.status, (1, 2))
        self.assertErrorSays(result, inside, "source")
        self.assertEqual([], os.listdir(inside))

    def test_the_source_itself(self):
        result = self.transfer(to=[self.source], status=None)
        self.assertIn(result.status, (1, 2))
        self.assertErrorSays(result, self.source)

    def test_read_only(self):
        self.target_disk.remount("ro")
        self.assertDestinationFails(self.target, self.target, "read-only")

    def test_a_read_only_subvolume(self):
        frozen = create(os.path.join(self.target_disk.path, "frozen"))
        support.command("btrfs", "property", "set", frozen, "ro", "true")
        self.assertDestinationFails(frozen, frozen, "read-only")

    def test_an_unmounted_mount_point_outside_btrfs(self):
        self.target_disk.unmount()
        result = self.backup("-N", "1", "-n", "1", status=1)
        self.assertErrorSays(result, self.target, "mount")
        self.assertEqual([], os.listdir(self.target_disk.path))
        self.check_that_the_run_went_on()

    def test_an_unmounted_mount_point_on_the_disk_of_the_source(self):
        mount_point = os.path.join(self.source_disk.path, "mnt")
        away = self.disk("128M", at=mount_point)
        target = os.path.join(mount_point, "backups")
        self.transfer(to=[target])
        away.unmount()
        result = self.backup("-N", "1", to=[target], status=1)
        self.assertErrorSays(result, target, "mount")
        self.assertEqual([], os.listdir(mount_point))
        self.check_that_the_run_went_on()

    def check_that_the_run_went_on(self):
        """A snapshot was taken, and the common one kept."""
        kept, new = names(self.snapshots)
        self.assertEqual(self.name(2), kept)
        self.assertGreater(new, kept)

    def test_a_foreign_subvolume_of_the_same_name(self):
        taken, = self.take(3)
        create(self.backup_path(taken))
        before = support.listing(self.target)
        self.assertErrorSays(self.transfer("-n", "1", status=1), taken, self.target)
        self.assertUnchanged(before, self.target)

    def test_an_ordinary_folder_of_the_same_name(self):
        taken, = self.take(3)
        os.mkdir(self.backup_path(taken))
        before = support.listing(self.target)
        self.assertErrorSays(self.transfer("-n", "1", status=1), taken, self.target)
        self.assertUnchanged(before, self.target)


class Programs(BadInputTestCase):

    def test_btrfs_missing(self):
        self.assertRefused(["-p", "home", self.source, self.target], 1, "btrfs", "btrfs-progs",
                           wrapper=support.without_programs("btrfs"))

    def test_an_ordinary_user_is_told_that_it_takes_root(self):
        disks = self.source_disk.path, self.target_disk.path
        before = support.listing(*disks)
        result = self.run_program("--no-elevate", "-p", "home", self.source, self.target,
                                  status=1, wrapper=support.as_nobody())
        self.assertRegex("\n".join(result.errors), "(?i)root|privilege|permi")
        self.assertUnchanged(before, *disks)


class Future(BadInputTestCase):

    def test_a_name_from_the_future_is_reported_and_kept(self):
        future = "home20991231-235959"
        snapshot(self.source, self.snapshot_path(future))
        result = self.transfer("-N", "1", "-n", "1")
        self.assertIn(future, result.stderr)
        self.assertIn(future, names(self.snapshots))
        self.assertIn(future, names(self.target))

    def test_many_are_one_warning(self):
        """As after an evening with a clock that was off."""
        futures = ["home209912{}-235959".format(day) for day in range(10, 20)]
        for future in futures:
            snapshot(self.source, self.snapshot_path(future))
        result = self.transfer()
        self.assertEqual(1, result.stderr.count("warning:"), result.stderr)
        self.assertIn("home20991212-235959 and 7 more", result.stderr)

    def test_it_does_not_keep_the_next_snapshot_from_being_taken(self):
        snapshot(self.source, self.snapshot_path("home20991231-235959"))
        self.backup()
        self.assertEqual(4, len(names(self.snapshots)))
        self.assertEqual(4, len(names(self.target)))


class Names(support.BackupTestCase):
    """What others have named reaches nobody's terminal as it is, and is no line of ours."""

    forged = "all is lost"
    strange = ("nl\nerror: " + forged, "cr\rerror: " + forged, "esc\x1b[2Jx", "title\x1b]0;x\x07",
               "bidi\u202etxt.exe",
               "c1\x9b31m", "bytes\udcff\udc80", "separator\u2028error: " + forged, "long" * 60)

    def setUp(self):
        super().setUp()
        self.take(1)
        os.mkdir(os.path.join(self.source, "evil"))
        for name in self.strange:
            self.write(os.path.join("evil", name), "x" * 5000)
        self.take(2)
        self.transfer("-q")

    def assertHarmless(self, *arguments, status=0, **more):
        result = self.run_program(*arguments, status=status, **more)
        said = result.stdout + result.stderr
        for line in said.split("\n"):
            self.assertTrue(line.isprintable(), repr(line))
            self.assertFalse(line.startswith("error: " + self.forged), line)
        return said

    def test_files(self):
        old, new = self.backup_path(self.name(1)), self.backup_path(self.name(2))
        into = os.path.join(self.source_disk.path, "into\x1b[2J")
        self.assertIn(r"nl\nerror: ", self.assertHarmless("diff", old, new))
        self.assertIn(r"nl\nerror: ", self.assertHarmless("diff", new, old))
        shutil.rmtree(os.path.join(self.source, "evil"))
        self.assertIn(r"nl\nerror: ", self.assertHarmless("history", "--deleted", os.path.join(self.source, "evil")))
        self.assertIn(r"nl\nerror: ", self.assertHarmless("space", "--top", "20", self.target))
        for name in self.strange[:2]:
            paths = ["--path", os.path.join("evil", name), new, os.path.join(self.source_disk.path, "into")]
            for options in ["--dry-run"], [], ["--dry-run", "--replace"], ["--replace"], ["-v", "debug", "--replace"]:
                self.assertHarmless("restore", *options, *paths)
            self.assertHarmless("restore", *paths, status=1)
        self.assertHarmless("restore", "--path", "evil/nosuch\nerror: " + self.forged, new, into, status=1)

    def test_subvolumes(self):
        for name in self.strange[:-1]:
            create(os.path.join(self.target, name + "20240101-000000"))
            create(os.path.join(self.target, "." + name + "20240102-000000.partial"))
            create(os.path.join(self.source, name))
        self.assertIn(r"esc\x1b", self.assertHarmless("list", self.source, self.target))
        self.assertHarmless("list", self.target)
        self.assertIn(r"esc\x1b", self.assertHarmless("doctor", self.source, self.target, status=1))
        self.assertHarmless("doctor", "--max-age", "1h", self.source, self.target, status=1)
        self.assertHarmless("-p", "home", "-v", "debug", self.source, self.target)
        self.assertHarmless("prune", "-v", "debug", "--dry-run", "-n", "1", self.target)
        self.assertHarmless("restore", "--latest", self.target, self.source_disk.path)

    def test_what_is_typed(self):
        for dry_run in [], ["--dry-run"]:
            self.assertHarmless("-p", "home", *dry_run, self.source,
                                "shell://cat >/dev/null # \x1b[2J\nerror: " + self.forged, status=None)
            self.assertHarmless("-p", "home", *dry_run, self.source, os.path.join(self.target_disk.path, "\x1b[2J"))


if __name__ == "__main__":
    unittest.main()
