"""Single files and folders back from another machine, over a real sshd; and what that machine cannot do here."""

import os
import shlex
import sys
import unittest

import remote
import support
import trees
from support import Churn, bulk

from btrfs_backup_ng import BackupError

SCRIPT = os.path.join(support.HERE, "hostile_files.py")


class FromAnotherMachine(remote.RemoteTestCase):

    def setUp(self):
        super().setUp()
        self.into = os.path.join(self.source_disk.path, "into")

    def back_up(self):
        name = self.take(1)[0]
        self.transfer()
        self.backed_up, self.there = self.backup_path(name), self.remote_target + "/" + name
        return name

    def restore(self, *arguments, options=None, **more):
        return self.run_program("restore", *self.program_options(options) + list(arguments), **more)

    def all_of_it(self):
        return [word for name in sorted(os.listdir(self.backed_up)) for word in ("--path", name)] + [self.there]

    def check_whole(self):
        expected, found = support.tree(self.backed_up), support.tree(self.into)
        for one in (expected, found):
            del one[b"."]
        self.assertTreesEqual(expected, found)
        self.assertEqual([], [name for name in os.listdir(self.into) if name.startswith(".restoring")])

    def test_churned_trees_come_back_as_they_were(self):
        Churn(self.source, seed=11).fill(200)
        self.back_up()
        self.restore(*self.all_of_it() + [self.into])
        self.check_whole()
        self.assertNothingLeft(self.server)

    def test_compressed_on_the_way(self):
        Churn(self.source, seed=12).fill(60)
        self.back_up()
        self.restore("--compress", "gzip", *self.all_of_it() + [self.into])
        self.check_whole()

    def test_more_attributes_than_one_record_holds(self):
        for name in ("f", "d"):
            (os.mkdir if name == "d" else lambda path: self.write("f", "x"))(os.path.join(self.source, name))
            for number in range(260):
                os.setxattr(os.path.join(self.source, name), "user.%d" % number, bytes([number % 256]) * 15000)
        self.back_up()
        self.restore(*self.all_of_it() + [self.into])
        self.check_whole()

    def test_what_is_not_there(self):
        self.write("f", "x")
        os.symlink("/etc", os.path.join(self.source, "etc"))
        self.back_up()
        for inner, words in (("never", "there is no never"), ("etc/passwd", "leads through a link")):
            result = self.restore(self.there + "/" + inner, self.into, status=1)
            self.assertErrorSays(result, words, "127.0.0.1")
            self.assertFalse(os.path.exists(self.into))

    def test_a_connection_that_breaks_is_taken_up(self):
        Churn(self.source, seed=13).fill(60)
        bulk(os.path.join(self.source, "large"), 48)
        self.back_up()
        between = self.proxy(self.server.port)
        self.there = self.server.endpoint(self.target_there + "/backups/" + self.name(1), port=between.port)
        between.cut_after(9 << 20, 30 << 20)
        result = self.restore(*self.all_of_it() + [self.into])
        self.assertIn("trying again", result.stderr)
        self.check_whole()
        self.assertLess(between.down, 75 << 20, "what had come came again")

    def test_another_that_bears_its_name_once_the_connection_breaks(self):
        for number in range(40):
            self.write("{:02}".format(number), "x" * 400000)
        self.back_up()
        between = self.proxy(self.server.port)
        self.there = self.server.endpoint(self.target_there + "/backups/" + self.name(1), port=between.port)
        for is_deleted in (False, True):
            run = self.start("restore", *self.program_options() + ["--limit", "4M"] + self.all_of_it() + [self.into])
            run.wait_for("some of it", lambda: sum(len(files) for _, _, files in os.walk(self.into)) > 5)
            if is_deleted:
                support.delete(self.backed_up)
            else:
                os.rename(self.backed_up, self.backed_up + "-aside")
                support.snapshot(self.backed_up + "-aside", self.backed_up)
            between.cut()
            result = run.finish()
            self.assertEqual(1, result.status, result.stderr)
            self.assertErrorSays(result, "while it was read")
            self.assertEqual([], os.listdir(self.into))

    def test_killed_it_goes_on(self):
        bulk(os.path.join(self.source, "large"), 48)
        self.back_up()
        run = self.start("restore", *self.program_options() + ["--limit", "10M"] + self.all_of_it() + [self.into])
        run.wait_for("some of it", lambda: self.part() > 6 << 20)
        run.kill()
        between = self.proxy(self.server.port)
        self.there = self.server.endpoint(self.target_there + "/backups/" + self.name(1), port=between.port)
        self.restore(*self.all_of_it() + [self.into])
        self.check_whole()
        self.assertLess(between.down, 45 << 20)

    def part(self):
        for folder, _, files in os.walk(self.into):
            for name in files:
                if name.startswith("part-") and os.path.exists(os.path.join(folder, name)):
                    return os.path.getsize(os.path.join(folder, name))
        return 0


class WithARestrictedKey(remote.RestrictedTestCase):

    allow = "send,list"

    def setUp(self):
        super().setUp()
        self.into = os.path.join(self.source_disk.path, "into")
        self.write("f", "content")
        self.take(1)
        self.transfer()

    def restore(self, *arguments, **more):
        return self.run_program("restore", *self.program_options() + list(arguments), **more)

    def test_one_that_may_send(self):
        self.restore(self.remote_target + "/" + self.name(1) + "/f", self.into)
        self.assertEqual(trees.describe(os.path.join(self.backup_path(self.name(1)), "f")),
                         trees.describe(os.path.join(self.into, "f")))

    def test_what_it_may_ask_for(self):
        host, folder = self.connect(), self.under
        self.assertEqual(1, host.look_at_files(folder, self.name(1), ["f"]).entries)
        for where, name, paths in ((folder, self.name(1), ["../f"]), (folder, self.name(1), ["/etc/passwd"]),
                                   (folder, "..", ["etc"]), (folder, "../backups", ["f"]), ("/etc", "ssh", ["x"]),
                                   (folder + "/..", "backups", ["f"])):
            with self.subTest(paths=paths, name=name), self.assertRaises(BackupError):
                host.look_at_files(where, name, paths)
            with self.subTest(paths=paths, name=name), self.assertRaises(BackupError):
                host.open_files(where, name, paths, "", "", 0)


class WithAKeyThatMayOnlyAdd(remote.RestrictedTestCase):

    def test_it_reads_nothing(self):
        self.write("f", "content")
        self.take(1)
        self.transfer()
        into = os.path.join(self.source_disk.path, "into")
        result = self.run_program("restore", *self.program_options() + [
            self.remote_target + "/" + self.name(1) + "/f", into], status=1)
        self.assertErrorSays(result, "may not", "allow")
        self.assertFalse(os.path.exists(into))


class FromAHostileOne(remote.RemoteTestCase):
    """What it sends instead of what was asked for comes to nothing, and nowhere."""

    ITEMS = (
        'FileEntry(b"../x", 0o100644)', 'FileEntry(b"/tmp/x", 0o100644)', 'FileEntry(b"x", 0o100644)',
        'FileEntry(b"a/../../x", 0o100644)', 'FileEntry(b"a", 0o40755)', 'FileEntry(b"a/b/c", 0o100644)',
        'FileEntry(b"a/f", 0o100644, size=1), FilePart(0, b"xyz")', 'FilePart(0, b"x")',
        'FileEntry(b"a/l", 0o120777, link=b"/etc"), FileEntry(b"a/l/x", 0o100644)',
        'FileEntry(b"a/l", 0o120777, link=b"/etc"), FileEntry(b"a/l", 0o100644)',
        'FileEntry(b"a/f", 0o100644, same=True, link=b"../../../../etc/passwd")',
        'FileEntry(b"a/f", 0o100644, same=True, link=b"/etc/passwd")', 'FileEntry(b"a/f", 0o170000)',
        'FileEntry(b"a/f", 0o100644, xattrs=((b"x", b"y"),))', 'FileEntry(b"a/f", 0o100644, size=1 << 63)',
        'LeftOut(b"../x", "left out")')

    def setUp(self):
        super().setUp()
        os.mkdir(os.path.join(self.source, "a"))
        self.write("a/f", "content")
        self.name_there = self.take(1)[0]
        self.transfer()
        self.into = os.path.join(self.source_disk.path, "into")
        os.mkdir(self.into)

    def restore_from(self, words, *options):
        words = map(shlex.quote, [sys.executable, SCRIPT] + words)
        self.server.authorize("root", 'restrict,command="{}"'.format(" ".join(words).replace('"', '\\"')))
        return self.run_program("restore", *self.program_options() + list(options) + [
            self.remote_target + "/" + self.name_there + "/a", self.into], status=1)

    def test_what_it_sends(self):
        before = support.listing(self.into)
        for items in self.ITEMS:
            with self.subTest(items=items):
                result = self.restore_from(["[{}]".format(items)])
                self.assertErrorSays(result, "what arrives holds", "nothing was put in its place")
                self.assertEqual(set(before), set(support.listing(self.into)))

    def test_what_it_says_that_it_has(self):
        for mode in ("0170000", "0"):
            self.assertErrorSays(self.restore_from(["[]", mode], "--dry-run"), "tells of other files")


if __name__ == "__main__":
    unittest.main()
