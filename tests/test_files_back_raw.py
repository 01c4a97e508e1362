"""Single files and folders out of stream files, without a btrfs, onto any filesystem, also by an ordinary user."""

import os
import subprocess
import tracemalloc
import unittest
import zlib

import remote
import support
import trees
from disks import ext4, tmpfs
from fakes import NOBODY, as_nobody
from support import Churn, chance, command, delete

import btrfs_backup_ng as program
from btrfs_backup_ng import NameTree

TORTURE = int(os.environ.get("TORTURE", "0"))
DAYS = (1, 2, 3, 4, 5)
PATHS = 20  # of one backup


class Parts(program.CommandParts):
    """A command's attributes, given as they are."""

    def __init__(self, **found):
        self.found = {getattr(program, name): value for name, value in found.items()}

    def of(self, attribute):
        return self.found.get(attribute, b"")


class WhoBearsWhichName(unittest.TestCase):
    """Pure: names that commands give and take."""

    def setUp(self):
        self.tree = NameTree()
        self.tree.begin()

    def do(self, command, path, **more):
        return self.tree.follow(command, Parts(A_PATH=path, **more))

    def names(self, inode=None, above=b""):
        found = {}
        for name, inner in ((inode or self.tree.top).names or {}).items():
            found[above + name] = inner.number
            found.update(self.names(inner, above + name + b"/") if inner.names else {})
        return found

    def test_an_inode_gets_its_name_later(self):
        self.do(program.MKDIR, b"o257-5-0")
        self.do(program.RENAME, b"o257-5-0", A_PATH_TO=b"d")
        self.do(program.MKFILE, b"o258-5-0")
        self.do(program.RENAME, b"o258-5-0", A_PATH_TO=b"d/f")
        self.do(program.LINK, b"d/g", A_PATH_LINK=b"d/f")
        self.assertEqual({b"d": 2, b"d/f": 3, b"d/g": 3}, self.names())
        self.do(program.UNLINK, b"d/f")
        self.do(program.RENAME, b"d", A_PATH_TO=b"e")
        self.assertEqual({b"e": 2, b"e/g": 3}, self.names())
        self.do(program.UNLINK, b"e/g")
        self.do(program.RMDIR, b"e")
        self.assertEqual({}, self.names())

    def test_the_parent_is_seen_as_it_was(self):
        for path in (b"a", b"b"):
            self.do(program.MKFILE, path)
        self.do(program.MKDIR, b"d")
        self.tree.begin()
        self.do(program.RENAME, b"a", A_PATH_TO=b"d/a")
        self.do(program.RENAME, b"b", A_PATH_TO=b"a")
        self.do(program.RENAME, b"d", A_PATH_TO=b"b")
        self.assertEqual([2, 3, 4], [self.tree.find(path, in_parent=True).number for path in (b"a", b"b", b"d")])
        self.assertEqual([3, 4, 2], [self.tree.find(path).number for path in (b"a", b"b", b"b/a")])
        self.tree.begin()
        self.assertEqual(3, self.tree.find(b"a", in_parent=True).number)

    def test_a_rename_onto_another_name_of_the_same_file_does_nothing(self):
        self.do(program.MKFILE, b"a")
        self.do(program.LINK, b"b", A_PATH_LINK=b"a")
        self.do(program.RENAME, b"a", A_PATH_TO=b"b")
        self.assertEqual({b"a": 2, b"b": 2}, self.names())

    def test_what_is_not_there(self):
        self.do(program.MKFILE, b"f")
        for act, path in ((program.MKFILE, b"no/f"), (program.MKFILE, b"f/f"), (program.RENAME, b"no")):
            with self.subTest(path=path), self.assertRaises(program.BackupError):
                self.do(act, path, A_PATH_TO=b"g")

    def test_data_that_is_written_again_counts_once_and_a_hole_not_at_all(self):
        filled = program.Filled()
        for start, end in ((0, 10), (100, 150), (0, 50), (120, 160)):
            filled.fill(start, end)
        self.assertEqual((70, 160), (filled.data, filled.end))
        punch = program.FALLOCATE_PUNCH.to_bytes(4, "little")
        filled.take(program.FALLOCATE, Parts(A_FALLOCATE_MODE=punch, A_SIZE=b"\x14"))
        self.assertEqual(50, filled.data)
        filled.take(program.TRUNCATE, Parts(A_SIZE=b"\x1e"))
        self.assertEqual((30, 30), (filled.data, filled.end))

    def test_no_folder_has_two_names(self):
        """The tree would have no end."""
        self.do(program.MKDIR, b"d")
        with self.assertRaisesRegex(program.BackupError, "second name of a folder"):
            self.do(program.LINK, b"d/d", A_PATH_LINK=b"d")

    def test_numbers_of_another_length(self):
        uuid = "11111111-2222-3333-4444-555555555555"
        expected = program.ExpectedStream("home20240101-000000", uuid, None, 0, 0, 0o755)
        begin = program.STREAM_HEADER.pack(program.STREAM_MAGIC, 1) + program.make_command(program.SUBVOL, [
            (program.A_PATH, b"home20240101-000000"), (program.A_UUID, program.parse_uuid(uuid)),
            (program.A_CTRANSID, bytes(8))])
        made = program.make_command(program.MKFILE, [(program.A_PATH, b"f"), (program.A_INO, bytes(8))])
        for number, attributes in (
                (program.UTIMES, [(program.A_ATIME, b"x"), (program.A_MTIME, b""), (program.A_CTIME, b"")]),
                (program.TRUNCATE, [(program.A_SIZE, b"\xff" * 100)]),
                (program.WRITE, [(program.A_FILE_OFFSET, b"\xff" * 100), (program.A_DATA, b"x")])):
            stream = begin + made + program.make_command(number, [(program.A_PATH, b"f")] + attributes)
            folder = os.open(support.scratch_folder(), os.O_RDONLY)
            self.addCleanup(os.close, folder)
            scratch = program.Scratch(folder)
            self.addCleanup(scratch.forget, "2")
            replay = program.ChainReplay(program.ChainTrace(), frozenset((2,)), scratch)
            replay.trace.begin(expected)
            replay.begin(expected)
            with self.subTest(command=number), self.assertRaisesRegex(program.BackupError, "another length"):
                program.follow_stream([stream], expected, replay.take, program.OF_CONCERN)

    def test_compressed_extents(self):
        plain = b"hello" * 1000
        for compression, data in ((0, plain), (1, zlib.compress(plain) + bytes(100))):
            self.assertEqual(plain, program.unpacked_extent(data, compression, len(plain)))
        packed = subprocess.run(["zstd", "-cq"], input=plain, stdout=subprocess.PIPE, check=True).stdout
        self.assertEqual(plain, program.unpacked_extent(packed + bytes(100), 2, len(plain)))
        for compression, size in ((1, 0), (1, 1 << 40), (2, 0), (2, 1 << 64)):
            with self.assertRaisesRegex(program.BackupError, "there cannot be"):
                program.unpacked_extent(b"", compression, size)
        with self.assertRaisesRegex(program.BackupError, "lzo"):
            program.unpacked_extent(b"", 3, 1)

    def test_no_more_is_unpacked_than_is_taken(self):
        with subprocess.Popen(["head", "-c", "400M", "/dev/zero"], stdout=subprocess.PIPE) as zeros:
            packed = subprocess.run(["zstd", "-cq"], stdin=zeros.stdout, stdout=subprocess.PIPE, check=True).stdout
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assertEqual(bytes(4096), program.unpacked_extent(packed, 2, 4096))
        self.assertLess(tracemalloc.get_traced_memory()[1], 4 << 20)

    def test_names_of_a_folder_are_copied_once_for_each_stream(self):
        copies = []

        class Counted(dict):
            def __iter__(self):
                return iter(self.keys())

            def keys(self):
                copies.append(len(self))
                return super().keys()

        tree = program.NameTree()
        tree.follow(program.MKDIR, Parts(A_PATH=b"d"))
        tree.find(b"d").names = Counted()
        for number in range(9):
            tree.follow(program.MKFILE, Parts(A_PATH=b"d/%d" % number))
        self.assertEqual([0], copies)

    def test_holes_are_copied_as_holes(self):
        folder = os.open(support.scratch_folder(), os.O_RDONLY)
        self.addCleanup(os.close, folder)
        scratch = program.Scratch(folder)
        self.addCleanup(scratch.end)
        scratch.shares = False
        source, size = scratch.open("1"), 256 << 20
        os.ftruncate(source, size)
        os.pwrite(source, b"data", 100 << 20)
        scratch.write("2", b"old" * (1 << 20), 0)
        scratch.copy("1", 0, size, "2", 4096)
        copy = scratch.open("2")
        self.assertEqual(size + 4096, os.fstat(copy).st_size)
        self.assertLess(os.fstat(copy).st_blocks * 512, 8 << 20)
        self.assertEqual(b"old", os.pread(copy, 3, 0))
        self.assertEqual(bytes(8 << 20), os.pread(copy, 8 << 20, 4096))
        self.assertEqual(b"data", os.pread(copy, 4, 4096 + (100 << 20)))
        with self.assertRaisesRegex(OSError, "behind the end"):
            scratch.copy("1", size - 1, 2, "2", 0)
        for name in ("1", "2"):
            scratch.forget(name)


class RawTestCase(support.BackupTestCase):

    usual_seconds = 8.0

    def setUp(self):
        super().setUp()
        self.folder = os.path.join(ext4(self, "512M"), "raw")
        os.mkdir(self.folder)
        self.into = os.path.join(self.source_disk.path, "into")

    @property
    def raw(self):
        return "raw://" + self.folder

    def churned(self, *options, seed=1):
        """Chains of churned snapshots."""
        churn = Churn(self.source, seed=seed)
        churn.fill(80)
        for day in DAYS:
            self.take(day)
            self.transfer(*options, to=[self.raw])
            churn.change(60)

    def restore(self, *arguments, **more):
        return self.run_program("restore", *arguments, **more)

    def some_paths(self, name, random):
        """Paths in a snapshot whose last parts differ."""
        top = os.fsencode(self.snapshot_path(name))
        found = {}
        for folder, folders, files in os.walk(top):
            if folder == top:
                folders[:] = [name for name in folders if name != trees.TOOL_FOLDER]
            found.update({name: os.path.relpath(os.path.join(folder, name), top) for name in folders + files})
        chosen = random.sample(sorted(found.values()), min(PATHS, len(found)))
        return [path for path in chosen if not any(path.startswith(other + b"/") for other in chosen)]

    def described(self, path):
        if os.path.isdir(path) and not os.path.islink(path):
            found = support.tree(path)
            found[b"."]["mtime_ns"] = os.lstat(path).st_mtime_ns
            return found
        return {b".": trees.describe(path)}

    def check(self, name, paths, into):
        for path in paths:
            self.assertTreesEqual(self.described(os.path.join(os.fsencode(self.snapshot_path(name)), path)),
                                  self.described(os.path.join(os.fsencode(into), os.path.basename(path))))
        self.assertEqual({os.path.basename(path) for path in paths}, set(os.listdir(os.fsencode(into))))

    def restore_some(self, name, random, *options, into=None, place=None, **more):
        paths, into = self.some_paths(name, random), into or self.into
        asked = [word for path in paths for word in ("--path", os.fsdecode(path))]
        result = self.restore(*list(options) + asked + [(place or self.raw) + "/" + name, into], **more)
        self.check(name, paths, into)
        return result


class OutOfChains(RawTestCase):
    """Equal to the snapshots that the chains were made of."""

    def every_day(self, *options):
        random = chance(self)
        for day, place in zip(DAYS, (None, tmpfs, None, ext4, None)):
            into = os.path.join(place(self), "into") if place else self.into + str(day)
            self.restore_some(self.name(day), random, *options, into=into)

    def test_plain(self):
        for seed in range(1, (TORTURE or 1) + 1):
            self.churned(seed=seed)
            self.every_day()

    def test_compressed(self):
        self.churned("--raw-compress", "gzip", seed=2)
        self.every_day()

    def test_encrypted(self):
        identity = os.path.join(self.source_disk.path, "age.txt")
        command("age-keygen", "-o", identity)
        key = command("age-keygen", "-y", identity).strip()
        self.churned("--raw-compress", "zstd", "--raw-encrypt", "age:" + key, seed=3)
        self.every_day("--raw-identity", identity)
        result = self.restore("--path", "day1", self.raw + "/" + self.name(2), self.into + "x", status=1)
        self.assertErrorSays(result, "encrypted with age", "--raw-identity")
        self.assertFalse(os.path.exists(self.into + "x"))

    def test_without_a_btrfs_by_an_ordinary_user(self):
        for name in ("f", "large"):
            self.write(name, name * 50000)
            os.chown(os.path.join(self.source, name), NOBODY, NOBODY)
        os.chmod(os.path.join(self.source, "f"), 0o640)
        self.take(1)
        with open(os.path.join(self.source, "large"), "r+b") as file:
            file.seek(5000)
            file.write(b"changed")
        self.take(2)
        self.transfer(to=[self.raw])
        into = ext4(self)
        os.chown(into, NOBODY, NOBODY)
        result = self.restore("--no-elevate", "--path", "f", "--path", "large", self.raw + "/" + self.name(2),
                              into + "/into", wrapper=as_nobody())
        self.assertNotIn("warning", result.stderr)
        self.check(self.name(2), [b"f", b"large"], into + "/into")

    def test_holes_need_no_room(self):
        """Only the data of a file must fit, however large it is and however often it was written."""
        path = os.path.join(self.source, "large")
        self.write("large", "")
        for day in (1, 2, 3):
            with open(path, "r+b") as file:
                file.truncate((1 << 63) - 1)
                os.pwrite(file.fileno(), os.urandom(8 << 20), 1 << 62)
                os.pwrite(file.fileno(), b"%d" % day, (1 << 63) - 4096)
            self.take(day)
        self.transfer(to=[self.raw])
        self.restore(self.raw + "/" + self.name(3) + "/large", self.into)
        found = os.stat(os.path.join(self.into, "large"))
        self.assertEqual(((1 << 63) - 1, True), (found.st_size, found.st_blocks * 512 < 9 << 20))
        with open(os.path.join(self.into, "large"), "rb") as file:
            self.assertEqual(b"3", os.pread(file.fileno(), 1, (1 << 63) - 4096))

    def test_clones_of_what_the_parent_had(self):
        """A file is cloned from one that is changed, renamed and removed in the same increment."""
        data = {name: os.urandom(1 << 18) for name in ("a", "b", "c")}
        for name, content in data.items():
            with open(os.path.join(self.source, name), "wb") as file:
                file.write(content)
        self.take(1)
        for name in "abc":
            command("cp", "--reflink=always", os.path.join(self.source, name), os.path.join(self.source, "of-" + name))
        with open(os.path.join(self.source, "a"), "r+b") as file:
            file.write(os.urandom(1 << 17))
        os.rename(os.path.join(self.source, "b"), os.path.join(self.source, "renamed"))
        os.unlink(os.path.join(self.source, "c"))
        self.take(2)
        self.transfer(to=[self.raw])
        for path in ("of-a", "of-b", "of-c", "a", "renamed"):
            into = os.path.join(tmpfs(self), "into")
            self.restore(self.raw + "/" + self.name(2) + "/" + path, into)
            self.check(self.name(2), [os.fsencode(path)], into)


class WhatIsWrong(RawTestCase):

    def test_what_is_not_there(self):
        self.write("f", "x")
        self.take(1)
        self.transfer(to=[self.raw])
        for inner in ("never", "f/x", "f/../f"):
            result = self.restore(self.raw + "/" + self.name(1) + "/" + inner, self.into, status=1)
            self.assertFalse(os.path.exists(self.into))
        self.assertErrorSays(result, "no path in a backup")

    def test_a_damaged_stream_file(self):
        self.churned()
        path = os.path.join(self.folder, self.name(2) + ".btrfs")
        with open(path, "r+b") as file:
            file.seek(os.path.getsize(path) // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        result = self.restore("--path", "day1", self.raw + "/" + self.name(3), self.into, status=1)
        self.assertEqual(1, len(result.errors))
        self.assertFalse(os.path.exists(self.into))
        self.restore("--path", "day1", self.raw + "/" + self.name(1), self.into)
        os.unlink(path)
        result = self.restore("--path", "day1", self.raw + "/" + self.name(3), self.into, status=1)
        self.assertErrorSays(result, "cannot be restored", "missing")

    def test_a_file_larger_than_the_filesystem_can_hold(self):
        """Nor is one that shares data with it brought back with holes in their place."""
        os.mkdir(os.path.join(self.source, "d"))
        huge, like, other = (os.path.join(self.source, "d", name) for name in ("huge", "like", "i"))
        with open(huge, "wb") as file:
            file.write(os.urandom(1 << 20))
            file.truncate(1 << 60)
        command("cp", "--reflink=always", huge, like)
        os.truncate(like, 1 << 20)
        os.link(huge, other)
        self.write("d/z", "x")
        name, = self.take(1)
        self.transfer(to=[self.raw])
        into = os.path.join(ext4(self), "into")
        result = self.restore("--path", "d", self.raw + "/" + name, into, status=1)
        for words in ("d/huge of {} was left out: file too large", "d/i of {} was left out: "):
            self.assertIn(words.format(name), result.stderr)
        if "d/like of" not in result.stderr:
            self.assertTreesEqual(*(self.described(top + "/d/like") for top in (self.snapshot_path(name), into)))
        self.assertIn("z", os.listdir(os.path.join(into, "d")))
    def test_killed_it_begins_again_rightly(self):
        self.churned(seed=4)
        top = os.fsencode(self.snapshot_path(self.name(4)))
        paths = [name for name in os.listdir(top) if name != trees.TOOL_FOLDER]
        words = [word for path in sorted(paths) for word in ("--path", os.fsdecode(path))]
        for _ in range(3):
            run = self.start("restore", "--limit", "3M", *words + [self.raw + "/" + self.name(4), self.into])
            support.wait_until(lambda run=run: run.process.poll() is not None, timeout=1.5)
            run.kill()
        if not os.path.isdir(self.into) or any(name.startswith(".restoring") for name in os.listdir(self.into)):
            self.restore(*words + [self.raw + "/" + self.name(4), self.into])
        self.check(self.name(4), paths, self.into)


    def test_other_stream_files_than_those_that_were_looked_at(self):
        name, other = self.name(1), self.folder + "-other"
        os.mkdir(other)
        for folder, inner in ((self.folder, "one"), (other, "two")):
            os.mkdir(os.path.join(self.source, "d"))
            for number in range(3 if inner == "one" else 1):
                self.write("d/{}{}".format(inner, number), "x")
            self.take(1)
            self.transfer(to=["raw://" + folder])
            command("rm", "-r", os.path.join(self.source, "d"))
            delete(self.snapshot_path(name))
        place = program.RawPlace(program.LocalHost(program.Events()), [], "")
        place.look_at_files(self.folder, name, ["d"])
        os.rename(self.folder, self.folder + "-before")
        os.rename(other, self.folder)
        taking = program.Taking(program.AT_START, 60, self.source)
        with self.assertRaises(program.BackupError), place.files(self.folder, name, ["d"], taking) as items:
            list(items)


class FromAHost(remote.SshdTestCase, RawTestCase):

    def test_a_raw_folder_on_another_machine(self):
        server = self.sshd({self.folder: "/srv"} if os.path.isdir("/srv") else {})
        self.churned(seed=5)
        there = server.endpoint("/srv" if os.path.isdir("/srv") else self.folder)
        options = remote.as_program_options(remote.ssh_options())
        self.restore_some(self.name(5), chance(self), *options, place="raw+" + there)


if __name__ == "__main__":
    unittest.main()
