"""Verifying: what differs in a backup is found and named, whatever its identity claims; what is equal passes."""

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import struct
import unittest
import uuid

import remote
import support
from support import bulk, create, names, snapshot, subvolume

import btrfs_backup_ng as program
from btrfs_backup_ng import (
    DIGEST_BLOCK,
    SMALL_FILE,
    STRETCH_SIZE,
    TreeReader,
    differing_aspects,
    differing_folders,
)

LARGEST_FILE = (1 << 63) - 1


class Repeating(program.Host):
    """Tells the same folders whatever it is asked for."""

    def folder_digests(self, folder, name, after, way=program.LISTED):
        return [("/{:05}".format(number), "0") for number in range(program.PAGE_OF_DIGESTS)]


class Pure(unittest.TestCase):

    def test_folders_that_go_in_circles(self):
        folders = program.TreeAt(Repeating(), "", "", "ssh://nas/b").folders()
        with self.assertRaisesRegex(program.BackupError, "ssh://nas/b tells of folders out of their order"):
            list(itertools.islice(folders, 3 * program.PAGE_OF_DIGESTS))

    def folders(self, one, other):
        return list(differing_folders(iter(one), iter(other)))

    def test_differing_folders(self):
        whole = [("/", "1"), ("/a", "2"), ("/a/b", "3"), ("/c", "4")]
        self.assertEqual([], self.folders(whole, whole))
        self.assertEqual([], self.folders([], whole))
        for path in ("/", "/a", "/a/b", "/c"):
            changed = [(p, "x" if p == path else digest) for p, digest in whole]
            self.assertEqual([path], self.folders(whole, changed))
            lacking = [(p, "x" if p == "/" else digest) for p, digest in whole if p != path or p == "/"]
            self.assertEqual(["/"], self.folders(whole, lacking))
            self.assertEqual(["/"], self.folders(lacking, whole))
        self.assertEqual(["/\udcff"], self.folders([("/\udcff", "1")], [("/a", "0"), ("/\udcff", "2")]))

    def test_words_for_what_differs(self):
        one = {"type": "file", "mode": "0644", "owner": "0:0", "time": "1", "attribute user.a": "1", "size": "1",
               "content": "1"}
        for change, words in (({}, ""), ({"type": "folder", "mode": "0755"}, "a folder instead of a file"),
                              ({"mode": "0600"}, "mode 0600 instead of 0644"), ({"time": "2"}, "time of change"),
                              ({"owner": "1:0"}, "owner 1:0 instead of 0:0"), ({"content": "2"}, "content"),
                              ({"size": "2", "content": "2"}, "size"), ({"links": "a"}, "hard links"),
                              ({"attribute user.a": "2"}, "attribute user.a"),
                              ({"attribute user.b": "2"}, "attribute user.b added")):
            with self.subTest(change=change):
                self.assertEqual(words, differing_aspects(one, dict(one, **change)))
        without = {key: value for key, value in one.items() if key != "attribute user.a"}
        self.assertEqual("attribute user.a missing", differing_aspects(one, without))
        self.assertEqual("missing", differing_aspects(one, None))
        self.assertEqual("only in the backup", differing_aspects(None, one))


class Digests(support.TestCase):
    """What a tree's digest depends on, and what it does not."""

    def setUp(self):
        self.top = os.path.join(self.disk("1G").path, "top")
        os.mkdir(self.top)

    def path(self, name):
        return os.path.join(self.top, name)

    def digest(self, way=program.COUNTED):
        return TreeReader(self.top, way).run()

    def write(self, name, *pieces):
        """A file of (offset, bytes)."""
        with open(self.path(name), "wb") as file:
            for offset, data in pieces:
                file.seek(offset)
                file.write(data)
        os.utime(self.path(name), ns=(1, 1))

    def test_sizes_around_the_limits(self):
        seen = set()
        for size in (0, 1, SMALL_FILE - 1, SMALL_FILE, SMALL_FILE + 1, DIGEST_BLOCK - 1, DIGEST_BLOCK, DIGEST_BLOCK + 1,
                     STRETCH_SIZE - 1, STRETCH_SIZE, STRETCH_SIZE + 1, 3 * STRETCH_SIZE + 5):
            self.write("file", (0, os.urandom(1024) * (size // 1024 + 1)))
            os.truncate(self.path("file"), size)
            os.utime(self.path("file"), ns=(1, 1))
            digest = self.digest()
            self.assertEqual(size, digest.size)
            self.assertEqual(digest, self.digest())
            seen.add(digest.digest)
            for at in {0, size // 2, size - 1} - {-1} if size else ():
                with open(self.path("file"), "r+b") as file:
                    file.seek(at)
                    byte = file.read(1)
                    file.seek(at)
                    file.write(bytes([byte[0] ^ 1]))
                os.utime(self.path("file"), ns=(1, 1))
                seen.add(self.digest().digest)
                with open(self.path("file"), "r+b") as file:
                    file.seek(at)
                    file.write(byte)
                os.utime(self.path("file"), ns=(1, 1))
                self.assertEqual(digest, self.digest())
        self.assertEqual(1 + 2 + 4 * 10, len(seen))

    def test_holes_are_zeros(self):
        size, data = 4 * STRETCH_SIZE + 12345, b"x" * 5000
        for at in (0, DIGEST_BLOCK - 100, 2 * STRETCH_SIZE + 7 * DIGEST_BLOCK, size - 5000):
            self.write("file", (at, data))
            os.truncate(self.path("file"), size)
            os.utime(self.path("file"), ns=(1, 1))
            sparse = list(map(self.digest, program.DIGEST_WAYS))
            self.write("file", (0, bytes(at)), (at, data), (at + 5000, bytes(size - at - 5000)))
            self.assertEqual(sparse, list(map(self.digest, program.DIGEST_WAYS)))
            support.command("fallocate", "-d", self.path("file"))
            os.utime(self.path("file"), ns=(1, 1))
            self.assertEqual(sparse, list(map(self.digest, program.DIGEST_WAYS)))

    def test_the_digest_of_release_070_lists_the_blocks(self):
        """Whoever has another version on the other side compares by it."""
        size = 3 * STRETCH_SIZE + 12345
        self.write("file", (7 * DIGEST_BLOCK + 5, b"x" * 5000), (size - 3, b"end"))
        with open(self.path("file"), "rb") as file:
            blocks = b"".join(hashlib.sha256(block).digest() for block in iter(lambda: file.read(DIGEST_BLOCK), b""))
        reader = TreeReader(self.top, program.LISTED)
        self.assertEqual(hashlib.sha256(blocks).hexdigest(), reader.describe("/")["file"]["content"])
        os.truncate(self.path("file"), program.LARGEST_LISTED + 1)
        with self.assertRaisesRegex(program.BackupError, "an older version of this program cannot compare"):
            self.digest(program.LISTED)

    def test_a_hole_takes_one_step_however_large_it_is(self):
        """Any user can make one of 8 EiB; several of them count more bytes than 64 bits hold."""
        seen = set()
        for pieces in ((), ((5 << 60, b"x"),), ((5 << 60, b"y"),), ((6 << 60, b"x"),), ((0, b"x"), (5 << 60, b"x"))):
            self.write("file", *pieces)
            os.truncate(self.path("file"), LARGEST_FILE)
            os.utime(self.path("file"), ns=(1, 1))
            seen.add(self.digest().digest)
        self.assertEqual(5, len(seen))
        for name in "abc":
            self.write(name)
            os.truncate(self.path(name), LARGEST_FILE)
        self.assertLess(self.digest().size, 1 << 64)

    def test_names_and_contents_cannot_be_mistaken_for_each_other(self):
        seen = set()
        for files in ((("a", b"b"), ("c", b"")), (("a", b""), ("bc", b"")), (("ab", b"c"),), (("a", b"bc"),),
                      (("d/a", b"b"),), (("d/a", b""), ("b", b""))):
            shutil.rmtree(self.top)
            os.mkdir(self.top)
            for name, content in files:
                os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
                self.write(name, (0, content))
            for folder, _, _ in os.walk(self.top):
                os.utime(folder, ns=(1, 1))
            seen.add(self.digest().digest)
        self.assertEqual(6, len(seen))

    def test_a_special_file_is_not_opened(self):
        os.mkfifo(self.path("fifo"))
        os.mknod(self.path("tape"), 0o20600, os.makedev(9, 0))
        os.symlink("/dev/zero", self.path("link"))
        self.assertEqual(0, self.digest().size)


class VerifyTestCase(support.BackupTestCase):

    def verify(self, *options, to=None, **more):
        targets = [self.target] if to is None else to
        return self.run_program("verify", *(list(options) + [self.source] + list(targets)), **more)

    def forge(self, name, change):
        """A backup with the right identity and other contents: `change` is done to a writable copy of it."""
        path = self.backup_path(name)
        identity = subvolume(path).received_uuid
        work = self.backup_path("work")
        snapshot(path, work, readonly=False)
        times = {folder: os.lstat(folder).st_mtime_ns for folder, _, _ in os.walk(work)}
        change(work)
        for folder, mtime in times.items():
            if os.path.isdir(folder):
                os.utime(folder, ns=(mtime, mtime))
        support.delete(path)
        support.set_received_uuid(work, uuid.UUID(identity).bytes)
        support.command("btrfs", "property", "set", "-ts", work, "ro", "true")
        os.rename(work, path)
        self.assertEqual(identity, subvolume(path).received_uuid)

    def assertDiffers(self, result, *words):
        self.assertIn("different", result.stdout)
        self.assertErrorSays(result, "different", *words)


class Forged(VerifyTestCase):
    """Each single difference, behind an identity that says all is well."""

    def setUp(self):
        super().setUp()
        os.makedirs(os.path.join(self.source, "a", "deep folder", "b"))
        self.inner = os.path.join("a", "deep folder", "b")
        self.write(os.path.join(self.inner, "file"), "content of the file\n")
        self.write("other", "x" * 1000)
        bulk(os.path.join(self.source, self.inner, "large"), 70)
        os.setxattr(os.path.join(self.source, self.inner, "file"), "user.note", b"keep me")
        os.link(os.path.join(self.source, self.inner, "file"), os.path.join(self.source, "a", "hard link"))
        os.symlink("file", os.path.join(self.source, self.inner, "symlink"))
        os.mkfifo(os.path.join(self.source, "fifo"))
        self.day, = self.take(1)
        self.transfer()

    def check(self, change, *words):
        self.forge(self.day, change)
        self.assertDiffers(self.verify(status=1), self.day, *words)
        self.assertIn("same identity", self.verify("--quick").stdout)

    def keeping_time(self, path, change):
        before = os.lstat(path).st_mtime_ns
        change(path)
        os.utime(path, ns=(before, before), follow_symlinks=False)

    def changed_byte(self, inner, at):
        def change(work):
            def flip(path):
                with open(path, "r+b") as file:
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ 1]))
            self.keeping_time(os.path.join(work, inner), flip)
        return change

    def test_a_byte_of_a_small_file(self):
        self.check(self.changed_byte("other", 500), "other: content")

    def test_a_byte_of_a_large_file(self):
        path = os.path.join(self.inner, "large")
        self.check(self.changed_byte(path, 69 * support.MIB + 4321), path + ": content")

    def test_an_owner(self):
        self.check(lambda work: os.chown(os.path.join(work, self.inner, "file"), 7, 8),
                   "file: owner 7:8 instead of 0:0")

    def test_the_owner_of_a_symlink_and_of_the_top(self):
        def change(work):
            os.lchown(os.path.join(work, self.inner, "symlink"), 5, 5)
            os.chown(work, 6, 6)
        self.check(change, self.inner + "/symlink: owner 5:5", ".: owner 6:6")

    def test_a_mode(self):
        self.check(lambda work: os.chmod(os.path.join(work, "other"), 0o4755), "other: mode 4755 instead of 0644")

    def test_a_missing_attribute(self):
        self.check(lambda work: os.removexattr(os.path.join(work, self.inner, "file"), "user.note"),
                   self.inner + "/file: attribute user.note missing")

    def test_a_capability(self):
        packed = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
        self.check(lambda work: os.setxattr(os.path.join(work, "other"), "security.capability", packed),
                   "other: attribute security.capability added")

    def test_a_missing_hard_link(self):
        self.check(lambda work: os.unlink(os.path.join(work, "a", "hard link")), "a/hard link: missing")

    def test_a_hard_link_that_is_a_copy(self):
        def change(work):
            path = os.path.join(work, "a", "hard link")
            shutil.copy2(path, path + ".copy")
            os.rename(path + ".copy", path)
        self.check(change, "a/hard link: hard links")

    def test_a_time(self):
        self.check(lambda work: os.utime(os.path.join(work, "other"), ns=(1, 1)), "other: time of change")

    def test_another_type(self):
        def change(work):
            os.unlink(os.path.join(work, "fifo"))
            os.mkdir(os.path.join(work, "fifo"))
        self.check(change, "fifo: a folder instead of a fifo")

    def test_a_symlink_that_leads_elsewhere(self):
        def change(work):
            path = os.path.join(work, self.inner, "symlink")
            before = os.lstat(path).st_mtime_ns
            os.unlink(path)
            os.symlink("elsewhere", path)
            os.utime(path, ns=(before, before), follow_symlinks=False)
        self.check(change, "symlink: target elsewhere instead of file")

    def test_a_whole_folder_missing_and_one_more(self):
        def change(work):
            shutil.rmtree(os.path.join(work, "a", "deep folder"))
            os.mkdir(os.path.join(work, "a", "new"))
        self.check(change, "a/deep folder: missing", "a/new: only in the backup")

    def test_not_all_of_many_are_named(self):
        def change(work):
            for number in range(50):
                with open(os.path.join(work, "new%02d" % number), "w"):
                    pass
        self.check(change, "new00: only in the backup", "new09", "and more")

    def test_zeros_instead_of_data(self):
        """What a power cut can leave: a hole in a file of the right size."""
        path = os.path.join(self.inner, "large")
        self.check(lambda work: self.keeping_time(os.path.join(work, path), lambda p: support.command(
            "fallocate", "-p", "-o", str(32 * support.MIB), "-l", "4096", p)), path + ": content")


class Results(VerifyTestCase):

    def test_equal_whatever_is_in_it(self):
        churn = support.Churn(self.source, seed=11)
        churn.fill()
        with open(os.path.join(self.source, "sparse"), "wb") as sparse:
            sparse.truncate(3 << 30)
            sparse.seek(2 << 30)
            sparse.write(b"x")
        bulk(os.path.join(self.source, "original"), 40)
        with open(os.path.join(self.source, "original"), "rb") as old:
            with open(os.path.join(self.source, "reflink"), "wb") as new:
                fcntl.ioctl(new, support.FICLONE, old.fileno())
        self.take(1)
        churn.change()
        create(os.path.join(self.source, "nested"))
        self.take(2)
        self.transfer()
        result = self.verify()
        self.assertEqual(2, result.stdout.count("  equal: "), result.stdout)
        self.assertIn("done: 2 equal", result.stderr)

    def test_which_ones(self):
        first, second, third = self.take(1, 2, 3)
        self.transfer()
        support.delete(self.snapshot_path(first))
        self.assertRegex(self.verify().stderr, "done: 2 equal, 1 not checked")
        for options, expected in ((["--latest"], [third]), (["--name", second], [second]),
                                  (["-p", "home", "--name", third], [third])):
            lines = self.verify(*options).stdout.splitlines()
            self.assertEqual(expected, [line.split("  ")[0] for line in lines])
            self.assertIn("  equal", lines[0])
        self.assertErrorSays(self.verify("--name", first, status=1), "no longer there")
        result = self.verify("--name", "nothing", status=1)
        self.assertErrorSays(result, "nothing to compare")
        self.assertEqual("-  {}  not checked\n".format(self.target), result.stdout)
        self.assertErrorSays(self.verify("-p", "root", status=1), "nothing to compare")

    def test_the_latest_of_names_that_are_in_another_order_than_they_were_taken(self):
        newest = [self.take(day)[0] for day in (2, 1)][-1]
        self.transfer()
        result = self.verify("--latest")
        self.assertEqual([newest], [line.split("  ")[0] for line in result.stdout.splitlines()])

    def test_a_newer_one_that_is_none_is_no_success(self):
        first, second = self.take(1, 2)
        self.transfer()
        path = self.backup_path(second)
        support.command("btrfs", "property", "set", "-f", path, "ro", "false")
        with open(os.path.join(path, "day2"), "w") as file:
            file.write("spoilt")
        for state, says in (("false", "writable, so it is not a complete backup"), ("true", "it is another subvolume")):
            support.command("btrfs", "property", "set", "-f", path, "ro", state)
            result = self.verify("--latest", status=1)
            self.assertRegex(result.stdout, first + ".*  equal")
            self.assertRegex(result.stdout, second + ".*" + says)
        support.delete(path)
        self.assertNotIn(second, self.verify("--latest").stdout)

    def test_nothing_to_compare_is_no_success(self):
        self.take(1)
        result = self.verify(status=1)
        self.assertErrorSays(result, "nothing to compare")
        self.assertErrorSays(self.verify("--quick", status=1), "nothing to compare")
        for arguments in ((), (self.source,), (self.source, "shell://cat"), (self.source, self.target, "--dry-run")):
            self.run_program("verify", *arguments, status=2)

    def test_what_only_has_the_name(self):
        name, = self.take(1)
        snapshot(create(os.path.join(self.target_disk.path, "else")), self.backup_path(name))
        self.assertErrorSays(self.verify(status=1), "different", "another subvolume")
        self.assertErrorSays(self.verify("--quick", status=1), "different", "another subvolume")

    def test_a_backup_that_was_made_writable_is_not_proven(self):
        self.take(1, 2)
        self.transfer()
        support.make_writable(self.backup_path(self.name(1)))
        with open(os.path.join(self.backup_path(self.name(1)), "day1"), "w") as file:
            file.write("changed")
        for options in ((), ("--quick",)):
            result = self.run_program("verify", "-p", "home", *options, self.source, self.target, status=1)
            self.assertErrorSays(result, self.name(1), "not checked", "writable")
            self.assertIn(self.name(2), result.stdout)

    def test_a_partial_is_not_checked(self):
        first, second = self.take(1, 2)
        self.transfer()
        create(os.path.join(self.target, ".home20240105-000000.partial"))
        result = self.verify()
        self.assertIn("not checked: it is partial", result.stdout)

    def test_several_destinations_one_away(self):
        second = self.disk()
        name, = self.take(1)
        self.transfer(to=[self.target, second.path])
        self.assertRegex(self.verify(to=[self.target, second.path]).stderr, "2 equal")
        there = os.path.join(second.path, "gone")
        result = self.verify(to=[self.target, there], status=1)
        self.assertErrorSays(result, there, "not checked", "no such folder")
        self.assertIn("  equal", result.stdout)

    def test_second_hand_backups_against_first_hand_ones(self):
        self.take(1)
        self.transfer()
        second = self.disk().path
        support.send_receive(self.backup_path(self.name(1)), second)
        self.assertIn("  equal", self.verify(to=[second]).stdout)
        result = self.run_program("verify", self.target, second)
        self.assertIn("1 equal", result.stderr)

    def test_a_disk_with_backups_at_its_top_is_a_folder_of_backups(self):
        self.take(1)
        self.transfer(to=[self.target_disk.path])
        second = self.disk().path
        support.send_receive(os.path.join(self.target_disk.path, self.name(1)), second)
        self.assertIn("1 equal", self.run_program("verify", self.target_disk.path, second).stderr)

    def test_a_damaged_disk(self):
        """Contents that btrfs itself knows to be wrong: not equal, not different, but not readable."""
        marker = os.urandom(64 << 10)
        with open(os.path.join(self.source, "file"), "wb") as file:
            file.write(marker * 16)
        self.take(1)
        self.transfer()
        self.target_disk.unmount()
        with open(self.target_disk.image, "r+b") as image:
            content = image.read()
            at = content.find(marker)
            self.assertGreater(at, 0)
            image.seek(at + 4096)
            image.write(b"damaged")
        self.target_disk.mount()
        result = self.verify(status=1)
        self.assertErrorSays(result, "not checked", "cannot read", "file", "input/output error")

    def test_nothing_is_written(self):
        support.Churn(self.source, seed=3).fill()
        self.take(1)
        self.transfer()
        before = support.listing(self.source, self.target)
        self.verify()
        self.assertUnchanged(before, self.source, self.target)

    def test_interrupted(self):
        bulk(os.path.join(self.source, "large"), 160)
        self.take(1)
        self.transfer()
        running = self.start("verify", "-v", "debug", self.source, self.target)
        running.wait_for("work", lambda: running.result().stderr.count("verifying"))
        os.kill(running.pid, 15)
        result = running.finish(10)
        self.assertIn(result.status, (143, 0))
        self.assertNotIn("Traceback", result.stderr)

    def test_json(self):
        first, second = self.take(1, 2)
        self.transfer()
        self.forge(second, lambda path: os.unlink(os.path.join(path, "day1")))
        result = self.verify("--json", status=1)
        good, bad = json.loads(result.stdout)["results"]
        self.assertEqual((first, self.target, "equal", [], False), tuple(
            good[key] for key in ("name", "endpoint", "result", "differences", "fault")))
        self.assertEqual((second, "different", True), (bad["name"], bad["result"], bad["fault"]))
        self.assertIn("day1", bad["differences"][0])
        self.assertErrorSays(result, "day1")

    def test_json_without_a_source(self):
        """That nothing could be looked at is a result, too."""
        for source in ("/no/such", self.source):  # the latter has no snapshots
            result = self.run_program("verify", "--json", source, self.target, status=1)
            (one,) = json.loads(result.stdout)["results"]
            self.assertEqual(("", "not checked", True), (one["name"], one["result"], one["fault"]))
        result = self.run_program("verify", "--json", "/no/such", self.target, status=1)
        self.assertEqual("/no/such", json.loads(result.stdout)["results"][0]["endpoint"])
        self.assertErrorSays(result, "no such source")


class Remote(remote.RemoteTestCase):

    def verify(self, *arguments, **more):
        return self.run_program("verify", *self.program_options() + list(arguments), **more)

    def test_both_ways_and_both_there(self):
        support.Churn(self.source, seed=6).fill()
        self.take(1, 2)
        self.transfer()
        for source, target in ((self.source, self.remote_target), (self.remote_source, self.target),
                               (self.remote_source, self.remote_target)):
            with self.subTest(source=source, target=target):
                result = self.verify(source, target)
                self.assertEqual(2, result.stdout.count("  equal: "))

    def test_only_digests_travel(self):
        bulk(os.path.join(self.source, "large"), 30)
        name, = self.take(1)
        self.transfer()
        support.delete(self.backup_path(name))
        # the same name and identity, but nothing in it
        work = create(self.backup_path("work"))
        support.set_received_uuid(work, uuid.UUID(subvolume(self.snapshot_path(name)).uuid).bytes)
        support.command("btrfs", "property", "set", "-ts", work, "ro", "true")
        os.rename(work, self.backup_path(name))
        result = self.verify(self.source, self.remote_target, status=1)
        self.assertErrorSays(result, "different", "large: missing")
        self.assertEqual([name], names(self.target))

    def test_a_host_that_is_away(self):
        self.take(1)
        self.transfer()
        self.server.stop()
        result = self.verify(self.source, self.remote_target, status=1)
        self.assertErrorSays(result, "not checked", "connection refused")


if __name__ == "__main__":
    unittest.main()
