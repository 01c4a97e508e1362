"""Snapshots that were made writable, changed and set read-only again: nothing is built on them, and it is said."""

import json
import os
import unittest

import support
from support import names

from btrfs_backup_ng import read_subvolume


class Changed(support.BackupTestCase):

    def setUp(self):
        super().setUp()
        for name in ("thesis", "film", "notes"):
            self.write(name, name * 1000)
        self.taken = self.take(1, 2)
        self.transfer()
        self.trees = [support.tree(self.backup_path(name)) for name in self.taken]

    def change(self, *days):
        """Makes room: two files go from the snapshots of these days as well."""
        for day in days:
            path = self.snapshot_path(self.name(day))
            support.command("btrfs", "property", "set", path, "ro", "false")
            for name in ("thesis", "film"):
                os.unlink(os.path.join(path, name))
            support.command("btrfs", "property", "set", path, "ro", "true")

    def test_a_restore_brings_what_is_in_the_backup(self):
        self.change(1, 2)
        into = os.path.join(self.source_disk.path, "into")
        result = self.run_program("restore", self.target, "--latest", into)
        self.assertIn("changed since they were taken", result.stderr)
        self.assertIn("in full", result.stderr)
        self.assertTreesEqual(self.trees[1], os.path.join(into, self.taken[1]))

    def test_so_does_one_in_place(self):
        self.change(1, 2)
        self.run_program("restore", "--in-place", self.source, "--latest", self.target)
        self.assertTreesEqual(self.trees[1], self.source)

    def test_it_builds_on_a_sound_one(self):
        self.change(2)
        into = os.path.join(self.source_disk.path, "into")
        result = self.run_program("restore", self.target, "--latest", into)
        self.assertIn("incrementally from " + self.taken[0], result.stderr)
        self.assertTreesEqual(self.trees[1], os.path.join(into, self.taken[1]))

    def test_a_changed_one_is_not_already_there(self):
        self.change(1, 2)
        result = self.run_program("restore", self.backup_path(self.taken[1]), self.snapshots, status=1)
        self.assertErrorSays(result, "was changed since it was taken", "another folder")

    def test_backups_do_not_build_on_it(self):
        self.change(2)
        self.write("doc", "new")
        result = self.backup()
        self.assertIn("snapshots at {} that were changed since they were taken, so that nothing is built on them: {}"
                      .format(self.source, self.taken[1]), result.stderr)
        self.assertIn("incrementally from " + self.taken[0], result.stderr)
        newest = names(self.snapshots)[-1]
        self.assertComplete(self.backup_path(newest), self.snapshot_path(newest))
        self.assertNotIn("in full", self.transfer("--dry-run").stdout)

    def test_without_a_sound_one_they_are_sent_in_full(self):
        self.change(1, 2)
        self.assertRegex(self.backup("--dry-run").stdout, "send home.* in full")
        self.assertRegex(self.backup().stderr, "sending home.* in full")
        newest = names(self.snapshots)[-1]
        self.assertComplete(self.backup_path(newest), self.snapshot_path(newest))
        support.next_second()
        self.assertIn("incrementally from " + newest, self.backup().stderr)

    def test_who_looks_is_told(self):
        self.change(1)
        result = self.run_program("doctor", "-p", "home", self.source, self.target, status=1)
        self.assertRegex(result.stdout, "problem +backups.*changed since they were taken.*: " + self.taken[0])
        self.assertIn("if nobody needs what is in it, delete it: btrfs subvolume delete "
                      + self.snapshot_path(self.taken[0]), result.stdout)
        table = self.run_program("list", self.source, self.target).stdout
        self.assertIn("c changed since it was taken", table)
        locations = json.loads(self.run_program("list", "--json", self.source, self.target).stdout)["locations"]
        self.assertEqual([[True, False], [False, False]],
                         [[entry["changed"] for entry in location["snapshots"]] for location in locations])
        result = self.run_program("verify", "--quick", "-p", "home", self.source, self.target, status=1)
        self.assertIn("its snapshot was changed since it was taken", result.stdout)

    def test_what_was_changed_before_it_was_sent_can_be_built_on(self):
        name, = self.take(3)
        self.change(3)
        self.transfer()
        self.write("doc", "new")
        result = self.backup()
        self.assertIn("incrementally from " + name, result.stderr)
        self.assertNotIn("warning", result.stderr)

    def test_writable_ones_are_told(self):
        path = self.snapshot_path(self.taken[1])
        support.command("btrfs", "property", "set", path, "ro", "false")
        told = "writable, so that they are neither sent nor built on: " + self.taken[1]
        self.assertIn(told, self.transfer().stderr)
        result = self.run_program("doctor", "-p", "home", self.source, self.target, status=1)
        self.assertRegex(result.stdout, "problem +snapshots.*" + told)
        self.assertIn("if nobody needs what is in it, delete it: btrfs subvolume delete " + path, result.stdout)


class Untouched(support.BackupTestCase):
    """No honest snapshot is taken for a changed one, whatever goes on around it."""

    def setUp(self):
        super().setUp()
        self.kept = []

    def assertHonest(self):
        for path in self.kept:
            found = read_subvolume(path, "")
            self.assertLessEqual(found.ctransid, found.otransid, path)

    def keep(self, day):
        self.kept += [self.snapshot_path(name) for name in self.take(day)]
        self.assertHonest()

    def test_as_it_is_taken(self):
        open_file = open(os.path.join(self.source, "open"), "wb")
        self.addCleanup(open_file.close)
        open_file.write(os.urandom(1 << 20))
        open_file.flush()
        os.unlink(open_file.name)
        self.keep(1)
        os.sync()
        self.keep(2)
        open_file.write(b"more")
        open_file.flush()
        outside = os.path.join(self.source_disk.path, self.name(3))
        self.kept.append(support.snapshot(self.source, outside) or outside)
        self.kept.append(support.snapshot(outside, outside + "-again") or outside + "-again")
        os.listdir(outside)
        os.sync()
        self.assertHonest()

    def test_by_what_is_done_to_the_filesystem(self):
        support.bulk(os.path.join(self.source, "large"), 20)
        self.keep(1)
        self.transfer()
        mount = self.source_disk.path
        for words in (["filesystem", "defragment", "-r", self.source], ["balance", "start", "--full-balance", mount],
                      ["scrub", "start", "-B", mount], ["quota", "enable", mount]):
            support.command("btrfs", *words)
            os.sync()
            self.assertHonest()
        self.source_disk.remount("strictatime")
        support.tree(self.kept[0])
        os.sync()
        self.assertHonest()
        self.backup()
        self.assertNotIn("warning", self.transfer("-v", "debug").stderr)


if __name__ == "__main__":
    unittest.main()
