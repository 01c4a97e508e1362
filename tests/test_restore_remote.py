"""Restoring from and to another machine, over a real sshd."""

import json
import os
import unittest

import remote
import support
from support import names, subvolume


class Drills(remote.RemoteTestCase):

    def lose_the_source(self, to=None):
        """Three days are backed up, then the source is gone; the tree of the newest."""
        churn = support.Churn(self.source, seed=4)
        for day in (1, 2, 3):
            churn.fill(20)
            taken, = self.take(day)
            self.transfer(to=to)
        tree = support.tree(self.snapshot_path(taken))
        for name in names(self.snapshots):
            support.delete(self.snapshot_path(name))
        support.delete(self.source)
        return tree

    def restore(self, *arguments, **more):
        return self.run_program("restore", *self.program_options() + list(arguments), **more)

    def check(self, tree, *back_up):
        """The newest is back, and a backup taken now is incremental."""
        self.check_it_goes_on(tree, *back_up)
        newest = names(self.snapshots)[-1]
        self.assertComplete(self.backup_path(newest), self.snapshot_path(newest))

    def check_it_goes_on(self, tree, *back_up):
        self.assertTreesEqual(tree, self.source)
        self.assertEqual(["home"], names(self.source_disk.path))
        self.write("after", "x")
        known = self.remembered()
        result = self.run_remote("-p", "home", *back_up)
        self.assertIn("incrementally from " + self.name(3), result.stderr)
        self.assertEqual(known, self.remembered())  # the restore called it as backups do

    def remembered(self):
        with open(os.path.join(self.snapshots, ".destinations.json")) as pins:
            return set(json.load(pins)["destinations"])

    def test_pulled_back(self):
        tree = self.lose_the_source()
        self.restore(self.remote_target, "--latest", "--in-place", self.source)
        self.check(tree, self.source, self.remote_target)

    def test_pushed_back(self):
        tree = self.lose_the_source()
        self.restore(self.target, "--latest", "--in-place", self.remote_source)
        self.check(tree, self.remote_source, self.target)

    def test_from_one_machine_to_itself(self):
        tree = self.lose_the_source()
        self.restore(self.remote_target, "--latest", "--in-place", self.remote_source)
        self.check(tree, self.remote_source, self.remote_target)

    def test_stream_files_pushed_back(self):
        raw = "raw://" + self.target
        tree = self.lose_the_source(to=[raw])
        self.restore(raw, "--latest", "--in-place", self.remote_source)
        self.assertIn("raw+ssh://{}{}".format(os.uname().nodename, self.target), self.remembered())
        self.check_it_goes_on(tree, self.remote_source, raw)

    def test_a_dry_run_names_the_host_of_all_it_would_do(self):
        self.take(1)
        self.transfer()
        make, _, place, delete, load = self.restore(
            "--dry-run", self.target, "--latest", "--in-place", self.remote_source).stdout.splitlines()[1:]
        self.assertIn("make the folder ssh://", make)
        self.assertIn(" at {}, keep the old one as {}.old-DATE".format(*[self.remote_source.replace("root@", "")] * 2),
                      place.replace("root@", ""))
        self.assertIn("delete ssh://", delete)
        self.assertIn("ssh://", load)

    def test_one_old_snapshot_into_a_folder_there(self):
        self.take(1, 2)
        self.transfer()
        first, second = self.name(1), self.name(2)
        os.mkdir(os.path.join(self.source_disk.path, "restored"))
        support.delete(self.snapshot_path(first))
        there = self.server.endpoint(self.source_there + "/restored")
        result = self.restore(self.backup_path(first), there)
        self.assertIn("incrementally from " + second, result.stderr)
        into = os.path.join(self.source_disk.path, "restored")
        self.assertEqual([first], os.listdir(into))
        restored = os.path.join(into, first)
        self.assertTreesEqual(self.backup_path(first), restored)
        self.assertEqual(subvolume(self.backup_path(first)).received_uuid, subvolume(restored).received_uuid)

    def test_refused_there(self):
        self.take(1)
        self.transfer()
        result = self.restore(self.target, "--latest", "--in-place", self.server.endpoint(self.source_there), status=1)
        self.assertErrorSays(result, "mount point", "top level")

    def test_a_host_that_is_away(self):
        self.server.stop()
        self.assertErrorSays(self.restore(self.remote_target, "--latest", self.target, status=1), "connection refused")


if __name__ == "__main__":
    unittest.main()
