"""Single files and folders out of backups: what comes back, where to, and what no backup and no neighbour can do."""

import contextlib
import encodings.ascii  # noqa: F401
import encodings.idna  # noqa: F401 -- an ordinary user may not be able to read them
import errno
import glob
import hashlib  # noqa: F401
import itertools
import json
import os
import resource
import shutil
import signal
import stat
import struct
import subprocess
import tempfile
import unittest
from typing import Any
from unittest import mock

import support
import trees
from disks import ext4, tmpfs
from fakes import NOBODY, as_nobody, in_own_mounts, without_rights
from running import PYTHON
from support import Churn, bulk, chance, command, create, delete, snapshot, wait_until

import btrfs_backup_ng as program
from btrfs_backup_ng import (
    EntryGate,
    FileEntry,
    FilePart,
    LeftOut,
    TreePosition,
    inner_splits,
    pack_items,
    unpack_items,
    wanted_names,
)

TORTURE = int(os.environ.get("TORTURE", "0"))
FILE, FOLDER, LINK = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777


class Records(unittest.TestCase):
    """Pure: entries as bytes and back, and what of them passes."""

    ITEMS: Any = [FileEntry(b"a", FOLDER, 1, 2, -1 << 92, 1 << 92,
                            xattrs=((b"user.x", b""), (b"security.capability", b"\0\1"))),
             FileEntry(b"a/b\n\xff", FILE, size=5, flags=0x800000), FilePart(0, b"hello"),
             LeftOut(b"a/c", "permission denied"), FileEntry(b"a/d", FILE, same=True, link=b"a/b\n\xff"),
             FileEntry(b"a/l", LINK, link=b"../../x"), LeftOut(b"a/n", "x", True),
             FileEntry(b"b", stat.S_IFBLK | 0o600, rdev=259)]

    @staticmethod
    def plain(items):
        return [item._replace(data=bytes(item.data)) if isinstance(item, FilePart) else item for item in items]

    def test_they_come_out_as_they_went_in_however_they_are_cut(self):
        data = b"".join(map(bytes, pack_items(self.ITEMS)))
        random = chance(self)
        for _ in range(50):
            cuts = sorted(random.randrange(len(data)) for _ in range(random.randrange(20)))
            chunks = [data[a:b] for a, b in zip([0] + cuts, cuts + [len(data)])]
            self.assertEqual(self.ITEMS, self.plain(unpack_items(chunks)))

    def test_what_is_cut_off_or_damaged_is_told(self):
        data = b"".join(map(bytes, pack_items(self.ITEMS)))
        for size in range(len(data)):
            with self.assertRaises(program.BackupError):
                list(unpack_items([data[:size]]))
        with self.assertRaisesRegex(program.BackupError, "more than its end"):
            list(unpack_items([data + b"x"]))
        with self.assertRaisesRegex(program.BackupError, "a record of"):
            list(unpack_items([struct.pack(">cI", b"D", 1 << 30)]))

    def test_attributes_that_no_record_has_room_for(self):
        large = [FileEntry(b"a", FOLDER, xattrs=tuple((b"user.%d" % number, bytes([number]) * (1 << 16))
                                                      for number in range(50))), FileEntry(b"b", FILE)]
        data = list(map(bytes, pack_items(large)))
        self.assertEqual(large, list(unpack_items(data)))
        record = next(at for at, part in enumerate(data) if part[:1] == program.XATTRS_RECORD)
        for wrong in (data[record:record + 2] * 70 + data, data[record:record + 2] + data[-1:],
                      data[record:record + 2] + list(pack_items([LeftOut(b"a", "x")]))):
            with self.assertRaisesRegex(program.BackupError, "attributes"):
                list(unpack_items(wrong))

    def passes(self, *items, **more):
        gate = EntryGate({b"a", b"b"}, **more)
        for item in items:
            gate.check(item)

    def test_what_is_honest_passes(self):
        self.passes(*self.ITEMS)
        self.passes(FileEntry(b"a", FOLDER), FileEntry(b"a/y", FILE),
                    position=TreePosition(b"a/x/z"))
        self.passes(FileEntry(b"a", FOLDER), FileEntry(b"a/x", FOLDER), FileEntry(b"a/x/z", FOLDER),
                    FileEntry(b"a/x/z/1", FILE), position=TreePosition(b"a/x/z"))

    def test_what_is_hostile_does_not(self):
        top, file = FileEntry(b"a", FOLDER), FileEntry(b"a/f", FILE, size=5)
        for words, items in (
                ("leads elsewhere", [FileEntry(b"../a", FILE)]), ("leads elsewhere", [FileEntry(b"/a", FILE)]),
                ("leads elsewhere", [FileEntry(b"c", FILE)]), ("leads elsewhere", [FileEntry(b"", FOLDER)]),
                ("leads elsewhere", [top, FileEntry(b"a/../../x", FILE)]),
                ("leads elsewhere", [top, FileEntry(b"a//x", FILE)]), ("leads elsewhere", [FileEntry(b"a\0", FILE)]),
                ("leads elsewhere", [top, FileEntry(b"a/" + b"n" * 256, FILE)]),
                ("leads elsewhere", [LeftOut(b"../x", "")]),
                ("out of its order", [top, top]), ("out of its order", [top, file, file]),
                ("out of its order", [FileEntry(b"b", FOLDER), top]),
                ("without its folder", [FileEntry(b"a/x", FILE)]),
                ("without its folder", [FileEntry(b"a", LINK, link=b"/etc"), FileEntry(b"a/x", FILE)]),
                ("without its folder", [FileEntry(b"a", FILE), FileEntry(b"a/x", FILE)]),
                ("without its folder", [top, FileEntry(b"a/x", FOLDER), FileEntry(b"a/y", FILE),
                                        FileEntry(b"a/y/z", FILE)]),
                ("unknown kind", [FileEntry(b"a", 0o644)]), ("unknown kind", [FileEntry(b"a", FILE | 1 << 20)]),
                ("unknown kind", [FileEntry(b"a", FILE, size=1 << 63)]),
                ("unknown kind", [FileEntry(b"a", FILE, mtime=-1 << 93)]),
                ("another name", [top, FileEntry(b"a/x", FILE, same=True, link=b"a/y")]),
                ("another name", [top, FileEntry(b"a/x", FOLDER, same=True, link=b"a")]),
                ("leads elsewhere", [top, FileEntry(b"a/x", FILE, same=True, link=b"../etc/passwd")]),
                ("leads elsewhere", [top, FileEntry(b"a/x", FILE, same=True, link=b"/etc/passwd")]),
                ("invalid link", [FileEntry(b"a", LINK)]), ("invalid link", [FileEntry(b"a", FILE, link=b"x")]),
                ("invalid attribute", [FileEntry(b"a", FILE, xattrs=((b"system.x", b""),))]),
                ("invalid attribute", [FileEntry(b"a", FILE, xattrs=((b"user.x", bytes(65537)),))]),
                ("belong to no file", [FilePart(0, b"x")]), ("belong to no file", [top, FilePart(0, b"x")]),
                ("belong to no file", [top, file, FilePart(0, b"123456")]),
                ("belong to no file", [top, file, FilePart(3, b"12"), FilePart(0, b"1")]),
                ("belong to no file", [top, file, FilePart(0, b"")]),
                ("belong to no file", [top, file, LeftOut(b"a/f", ""), FilePart(0, b"1")]),
                ("belong to no file", [top, file, FileEntry(b"a/g", FILE, same=True, link=b"a/f"), FilePart(0, b"1")])):
            with self.subTest(items=items), self.assertRaisesRegex(program.BackupError, words):
                self.passes(*items)

    def test_what_was_there_before_does_not_come_again(self):
        for entry in (FileEntry(b"a/x", FILE), FileEntry(b"a/w", FOLDER)):
            with self.assertRaisesRegex(program.BackupError, "out of its order"):
                self.passes(FileEntry(b"a", FOLDER), entry, position=TreePosition(b"a/x"))


class Again(unittest.TestCase):
    """A tree that comes over two connections, the first of which breaks."""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        self.addCleanup(os.close, fd)
        self.staging = program.Staging(fd, self.folder, "key")
        self.staging.open()
        self.staging.take_up(anew=True, is_again=False)
        self.addCleanup(self.staging.end)
        self.putter = program.Putter(self.staging, {b"a", b"b", b"c", b"d"}, lambda *_: None)

    @staticmethod
    def broken(*items):
        yield from items
        raise program.ConnectionLost("lost")

    def test_what_was_left_out_before_is_still_known_but_what_has_come_since(self):
        gone, later = LeftOut(b"a", "input/output error"), LeftOut(b"d", "input/output error")
        with self.assertRaises(program.ConnectionLost):
            self.putter.run(self.broken(gone, FileEntry(b"b", FILE), FileEntry(b"c", FILE), later))
        self.staging.find_position()
        self.putter.run([FileEntry(b"d", FILE)])
        self.assertEqual([gone], list(self.putter.shortfalls.left.values()))

    def test_a_folder_that_bears_its_name_stays_as_it_is(self):
        """Whoever owns the folder around can have another of root's bear it."""
        other = program.Staging(self.staging.folder, self.folder, "other")
        os.makedirs(os.path.join(self.folder, other.name, "content"), 0o755)
        with self.assertRaisesRegex(program.BackupError, "was not left by such a restore"):
            self.addCleanup(other.end)
            other.open()
        self.assertEqual(0o40755, os.stat(os.path.join(self.folder, other.name)).st_mode)

    def test_any_number_of_names_can_be_gone_on_with(self):
        self.staging.placing = {"{:0200}".format(number): program.Placing(number, 0, 0) for number in range(20000)}
        self.staging.write_note()
        self.staging.end()
        again = program.Staging(self.staging.folder, self.folder, "key")
        self.addCleanup(again.end)
        again.open()
        self.assertEqual(self.staging.placing, again.placing)

    def test_killed_anywhere_in_clearing_it_is_still_known(self):
        remove_tree = program.remove_tree
        for step in itertools.count(1):
            for name in ("part-1", "scratch"):
                os.makedirs(os.path.join(self.staging.path, name), exist_ok=True)
            calls = itertools.count(1)

            def removed(folder, name, step=step, calls=calls):
                if next(calls) == step:
                    raise InterruptedError
                remove_tree(folder, name)

            with mock.patch.object(program, "remove_tree", removed), contextlib.suppress(InterruptedError):
                self.staging.clear()
                break
            self.staging.end()
            self.staging.open()
            self.staging.take_up(anew=False, is_again=False)
        self.assertGreater(step, 5)

    def test_synced_also_where_this_python_cannot_ask_for_one_filesystem(self):
        import ctypes
        for error in (OSError("no dynamic loading"), AttributeError("syncfs")):
            with mock.patch.object(ctypes, "CDLL", side_effect=error), mock.patch.object(os, "sync") as sync:
                program.sync_open(self.staging.fd)
            sync.assert_called_once_with()

    def test_of_what_is_left_out_without_end_little_is_kept(self):
        self.putter.run(LeftOut(b"a/%d" % number, "why") for number in range(2 * program.MOST_LEFT_OUT))
        self.assertEqual(program.MOST_LEFT_OUT + 1, len(self.putter.shortfalls.left))
        self.assertIn("more than is named", self.putter.shortfalls.left[b""].why)

    def test_of_attributes_without_end_little_is_kept(self):
        for number in range(2 * program.MOST_UNSET):
            self.putter.unset.note("attribute user.{}".format(number), b"a", "why")
        lines = self.putter.unset.lines()
        self.assertEqual(program.MOST_UNSET + 1, len(lines))
        self.assertIn("another attribute of {} entries".format(program.MOST_UNSET), lines[0])


class Words(unittest.TestCase):
    """Pure: what is asked for."""

    def test_where_a_place_parts(self):
        name = "home20240101-000000"
        for text, expected in (
                ("/b/" + name + "/etc/fstab", [("/b/" + name, "etc/fstab")]),
                ("/b/" + name, []), ("/b/" + name + "/", []),
                ("ssh://h/b/" + name + "//a/", [("ssh://h/b/" + name, "a")]),
                ("raw:///r/" + name + ".btrfs.zst/a", [("raw:///r/" + name + ".btrfs.zst", "a")]),
                ("/x-" + name + "/b/" + name + "/a\nb", [("/x-" + name, "b/" + name + "/a\nb"),
                                                           ("/x-" + name + "/b/" + name, "a\nb")])):
            with self.subTest(text=text):
                self.assertEqual(expected, list(inner_splits(text)))

    def test_what_is_a_whole_backup_though_the_way_there_leads_through_such_a_name(self):
        way, name = "/m/20240101-000000/b", "home20240102-000000"
        for arguments, expected in (([way, "--latest"], False), ([way, "--name", name], False),
                                    ([way, "--before", "2024-01-31"], False), ([way + "/" + name], False),
                                    (["raw://" + way + "/" + name + ".btrfs.zst"], False),
                                    ([way + "/" + name + "/a"], True), ([way, "--latest", "--path", "a"], True)):
            with self.subTest(arguments):
                task = support.task_of(["restore"] + arguments + ["/t"])
                program.check_restore(task)
                self.assertEqual(expected, program.wants_files(task))

    def test_names_that_meet(self):
        self.assertEqual({b"b": b"a/b", b"c": b"c"}, wanted_names(["a/b", "c", "c"]))
        for paths in (["a/b", "c/b"], ["a", "a/b"], ["a/b/c", "a"], ["../b"], ["/b"], [""], ["a/./b"], ["a\0"]):
            with self.subTest(paths=paths), self.assertRaises(program.BackupError):
                wanted_names(paths)

    def test_wrong_command_lines(self):
        backup = "/b/home20240101-000000"
        for arguments, words in (
                ([backup + "/a"], "takes the folder"), (["--path", "a", "/b", "--latest"], "takes the folder"),
                (["--path", "../a", backup, "/t"], "not a path in a backup"),
                ([backup + "/a", "/b/x", "/t"], "/b/x names no path in a backup"),
                ([backup + "/a", "ssh://h/t"], "folder of this machine"),
                ([backup + "/a", "raw:///t"], "folder of this machine"),
                ([backup + "/a", "--in-place", "/s", "/t"], "--in-place"),
                (["--path", "a", backup, backup, "/t"], "--path takes"),
                ([backup, "--replace", "/t"], "--replace goes with files")):
            with self.subTest(arguments=arguments), self.assertRaisesRegex(program.UsageError, words):
                program.check_restore(support.task_of(["restore"] + arguments))


class FilesTestCase(support.BackupTestCase):
    """A backup to take from, and a folder to put into, on another filesystem."""

    def setUp(self):
        super().setUp()
        self.into = os.path.join(self.source_disk.path, "into")

    def restore(self, *arguments, **more):
        return self.run_program("restore", *arguments, **more)

    def back_up(self, day=1):
        name = self.take(day)[0]
        self.transfer()
        self.backed_up = self.backup_path(name)
        return self.backed_up

    def churned(self, seed=1, count=120):
        churn = Churn(self.source, seed=seed)
        churn.fill(count)
        return self.back_up()

    def assertNothingAside(self, folder=None):
        self.assertEqual([], [name for name in os.listdir(folder or self.into) if name.startswith(".restoring")])

    def paths(self, *texts):
        return [os.path.join(self.backed_up, text) for text in texts]

    def all_of_it(self):
        """The words that ask for all that lies at the top of the backup; names there are of every kind."""
        return [word for name in sorted(os.listdir(self.backed_up)) for word in ("--path", name)] + [self.backed_up]


class FromABackup(FilesTestCase):

    def check_all(self, into):
        """All that lies at the top of the backup, restored at once, is what it was."""
        result = self.restore(*self.all_of_it() + [into])
        self.assertTreesEqual(self.without_top(self.backed_up), self.without_top(into))
        self.assertNothingAside(into)
        self.assertNotIn("warning", result.stderr)
        return result

    @staticmethod
    def without_top(folder):
        found = support.tree(folder)
        del found[b"."]
        return found

    def test_churned_trees_come_back_as_they_were(self):
        for seed in range(1, (TORTURE or 3) + 1):
            with self.subTest(seed=seed):
                Churn(self.source, seed=seed).fill(150)
                self.back_up(seed)
                for place in (os.path.join(self.target_disk.path, "into%d" % seed), self.into + str(seed)):
                    self.check_all(place)

    def test_onto_other_filesystems(self):
        self.churned()
        self.check_all(os.path.join(ext4(self), "into"))

    def test_random_paths(self):
        self.churned(seed=7, count=200)
        random = chance(self)
        paths = [os.path.relpath(os.path.join(folder, name), os.fsencode(self.backed_up))
                 for folder, folders, files in os.walk(os.fsencode(self.backed_up)) for name in folders + files]
        for number in range(30):
            inner = random.choice(paths)
            into = self.into + str(number)
            self.restore("--path", os.fsdecode(inner), self.backed_up, into)
            self.assertSame(os.path.join(os.fsencode(self.backed_up), inner),
                            os.path.join(os.fsencode(into), os.path.basename(inner)))

    def assertSame(self, one, other):
        both = []
        for path in (one, other):
            found = {b".": trees.describe(path)} if not os.path.isdir(path) or os.path.islink(path) else \
                dict(support.tree(path))
            if os.path.isdir(path):
                found[b"."]["mtime_ns"] = os.lstat(path).st_mtime_ns
            both.append(found)
        self.assertTreesEqual(*both)

    def test_data_is_shared_on_one_filesystem(self):
        bulk(os.path.join(self.source, "large"), 64)
        self.back_up()
        before = self.target_disk.used()
        into = os.path.join(self.target_disk.path, "into")
        self.restore(*self.paths("large") + [into])
        command("btrfs", "filesystem", "sync", into)
        self.assertLess(self.target_disk.used() - before, 8 << 20)
        self.assertEqual(trees.digest(os.path.join(self.source, "large")),
                         trees.digest(os.path.join(into, "large")))

    def test_holes_stay_holes(self):
        with open(os.path.join(self.source, "sparse"), "wb") as file:
            file.seek(1 << 30)
            file.write(b"end")
            file.truncate(2 << 30)
        self.back_up()
        for into in (self.into, os.path.join(self.target_disk.path, "into"), ext4(self)):
            self.restore(*self.paths("sparse") + [into])
            found = os.stat(os.path.join(into, "sparse"))
            self.assertEqual(2 << 30, found.st_size)
            self.assertLess(found.st_blocks, 1000)

    def test_a_hole_costs_nothing_however_large_it_is(self):
        """Any user can make one of 8 EiB."""
        for name in ("all", "some"):
            with open(os.path.join(self.source, name), "wb") as file:
                file.truncate((1 << 63) - 1)
        self.back_up()
        with open(os.path.join(self.source, "some"), "r+b") as file:
            file.seek(1 << 62)
            file.write(b"x")
        self.back_up(2)
        first, last = (self.backup_path(name) for name in support.names(self.target))
        into = os.path.join(self.target_disk.path, "into")
        for words, said in ((["verify", self.source, self.target], "2 equal"), (["diff", first, last], "some"),
                            (["history", os.path.join(self.source, "some"), self.target], os.path.basename(last)),
                            (["restore", last + "/some", last + "/all", into], "2 paths restored")):
            with self.subTest(verb=words[0]):
                result = self.run_program(*words)
                self.assertIn(said, result.stdout + result.stderr)

    def test_attributes_of_chattr(self):
        for name, attributes in (("fixed", "+i"), ("grows", "+a"), ("nocow", "+C"), ("quiet", "+A")):
            path = os.path.join(self.source, name)
            self.write(name, "")
            command("chattr", attributes, path)
            if attributes != "+i":
                with open(path, "a") as file:
                    file.write("x" * 10000)
        os.mkdir(os.path.join(self.source, "d"))
        self.write("d/in", "x")
        command("chattr", "+i", os.path.join(self.source, "d"))
        self.addCleanup(command, "chattr", "-R", "-ia", self.source)
        snapshot(self.source, os.path.join(self.source_disk.path, self.name(1)))
        self.backed_up = os.path.join(self.source_disk.path, self.name(1))
        self.restore(*self.paths("fixed", "grows", "nocow", "quiet", "d") + [self.into])
        self.addCleanup(command, "chattr", "-R", "-ia", self.into)
        for name in ("fixed", "grows", "nocow", "quiet", "d"):
            flags = [command("lsattr", "-d", os.path.join(top, name)).split()[0] for top in (self.source, self.into)]
            self.assertEqual(flags[0], flags[1], name)

    def test_a_deep_tree(self):
        path = os.path.join(self.source, "deep")
        for _ in range(700):
            os.mkdir(path)
            path += "/d"
        self.back_up()
        self.restore("--path", "deep", self.backed_up, self.into)
        self.assertSame(os.path.join(self.backed_up, "deep"), os.path.join(self.into, "deep"))

    def test_an_acl_of_the_folder_is_not_handed_down(self):
        self.write("file", "x")
        self.back_up()
        os.mkdir(self.into, 0o2775)
        os.chmod(self.into, 0o2775)
        acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in (
            (0x01, 7, 2 ** 32 - 1), (0x02, 7, 1234), (0x04, 7, 2 ** 32 - 1), (0x10, 7, 2 ** 32 - 1),
            (0x20, 7, 2 ** 32 - 1)))
        os.setxattr(self.into, b"system.posix_acl_default", acl)
        self.restore(*self.paths("file") + [self.into])
        self.assertSame(os.path.join(self.backed_up, "file"), os.path.join(self.into, "file"))


class PowerCut(FilesTestCase):

    def test_what_was_said_to_be_restored_is_there_as_it_was(self):
        """With the modes and attributes that folders and files get behind their names."""
        for number in range(3):
            os.makedirs(os.path.join(self.source, "folder%d" % number, "inner"))
            os.chmod(os.path.join(self.source, "folder%d" % number), 0o2751)
        self.write("fixed", "x")
        command("chattr", "+i", os.path.join(self.source, "fixed"))
        self.addCleanup(command, "chattr", "-i", os.path.join(self.source, "fixed"))
        self.backed_up = self.snapshot_path(self.take(1)[0])
        disk = self.disk("256M", image_in=self.disk("1G").path)
        into = os.path.join(disk.path, "into")
        os.mkdir(into)
        command("btrfs", "filesystem", "sync", into)
        self.restore(*self.all_of_it() + [into])
        disk.cut_power()
        self.addCleanup(command, "chattr", "-i", os.path.join(into, "fixed"))
        self.assertTreesEqual(FromABackup.without_top(self.backed_up), FromABackup.without_top(into))
        with open(os.path.join(into, "fixed")) as file:
            self.assertTrue(program.read_flags(file.fileno()) & program.FIXED_FLAGS)


class Choosing(FilesTestCase):

    def test_by_path_and_by_time(self):
        os.mkdir(os.path.join(self.source, "d"))
        for day in (1, 2):
            self.write("d/f", "of day %d" % day)
            self.back_up(day)
        for arguments, expected in (
                ([self.paths("d/f")[0]], "of day 2"), (["--latest", "--path", "d/f", self.target], "of day 2"),
                (["--before", "2024-01-02", "--path", "/d/f", self.target], "of day 1"),
                (["--name", self.name(1), "--path", "d/f", self.target], "of day 1")):
            with self.subTest(arguments=arguments):
                self.restore(*arguments + [self.into])
                with open(os.path.join(self.into, "f")) as file:
                    self.assertEqual(expected, file.read())
                shutil.rmtree(self.into)

    def test_of_several_backups(self):
        for day in (1, 2):
            self.write("f%d" % day, "x")
            self.back_up(day)
        result = self.restore("--json", self.backup_path(self.name(1)) + "/f1", self.backup_path(self.name(2)) + "/f2",
                              self.into)
        self.assertEqual(["f1", "f2"], sorted(os.listdir(self.into)))
        at, = json.loads(result.stdout)["tasks"][0]["destinations"]
        self.assertEqual([{"path": self.into + "/f%d" % day, "backup": self.name(day), "source": "f%d" % day,
                           "kept": None} for day in (1, 2)], at["files"])
        self.assertEqual([self.into, []], [at["endpoint"], at["errors"]])
        self.assertIn("done: 2 paths restored", result.stderr)

    def test_of_a_backup_whose_name_does_not_tell_that_it_is_one(self):
        self.write("f", "x")
        odd = os.path.join(self.source_disk.path, "odd one")
        snapshot(self.source, odd)
        result = self.restore(odd + "/f", self.into, status=1)
        self.assertErrorSays(result, "is a part of a backup", "restore --path f '{}' {}".format(odd, self.into))
        self.restore("--path", "f", odd, self.into)
        self.assertEqual(["f"], os.listdir(self.into))

    def test_names_that_would_meet(self):
        for day in (1, 2):
            self.write("f", "x")
            self.back_up(day)
        result = self.restore(self.backup_path(self.name(1)) + "/f", self.backup_path(self.name(2)) + "/f", self.into,
                              status=1)
        self.assertErrorSays(result, "several backups have f")
        self.assertFalse(os.path.exists(self.into))

    def test_the_dry_run_writes_nothing(self):
        self.write("f", "x" * 5000)
        self.back_up()
        result = self.restore("--dry-run", *self.paths("f") + [self.into])
        self.assertIn(f"restore the file f of {self.name(1)} to {self.into}/f", result.stdout)
        self.assertIn("in all: 1 files and folders, 4.9 KiB", result.stdout)
        self.assertFalse(os.path.exists(self.into))
        document = json.loads(self.restore("--dry-run", "--json", *self.paths("f") + [self.into]).stdout)
        self.assertTrue(document["dry_run"])
        at, = document["tasks"][0]["destinations"]
        self.assertEqual([self.into + "/f", 5000], [at["files"][0]["path"], at["bytes"]])


class NotThere(FilesTestCase):
    """Paths that lead nowhere, or elsewhere; nothing is written."""

    def refused(self, *arguments, words=(), status=1):
        self.assertErrorSays(self.restore(*list(arguments) + [self.into], status=status), *words)
        self.assertFalse(os.path.exists(self.into))

    def test_what_was_never_there(self):
        self.write("f", "x")
        self.back_up()
        self.refused(*self.paths("never"), words=["there is no never in " + self.name(1)])
        self.refused(*self.paths("f/x"), words=["there is no f/x"])
        self.refused(*self.paths("f", "never"), words=["never"])
        self.refused(self.backup_path(self.name(2)) + "/f", words=["no backup " + self.name(2)])

    def test_links_are_not_followed(self):
        os.symlink("/etc", os.path.join(self.source, "etc"))
        os.symlink("/etc/passwd", os.path.join(self.source, "last"))
        self.back_up()
        self.refused(*self.paths("etc/passwd"), words=["leads through a link"])
        self.restore(*self.paths("last", "etc") + [self.into])
        self.assertEqual(["/etc", "/etc/passwd"], [os.readlink(os.path.join(self.into, n)) for n in ("etc", "last")])

    def test_nested_subvolumes_and_mounts_are_left_out(self):
        os.mkdir(os.path.join(self.source, "d"))
        create(os.path.join(self.source, "d", "nested"))
        self.write("d/nested/in", "x")
        self.write("d/f", "x")
        os.makedirs(self.snapshots)
        snapshot(self.source, self.snapshot_path(self.name(1)))
        result = self.restore(self.snapshot_path(self.name(1)) + "/d", self.into)
        self.assertEqual(["f"], os.listdir(self.into + "/d"))
        self.assertIn(f"d/nested of {self.name(1)} was left out: a subvolume", result.stderr)
        shutil.rmtree(self.into)
        self.refused(self.snapshot_path(self.name(1)) + "/d/nested/in", words=["d/nested/in"])

    def test_a_writable_subvolume_is_no_backup(self):
        self.write("f", "x")
        path = os.path.join(self.target, self.name(1))
        snapshot(self.source, os.path.join(self.source_disk.path, self.name(1)), readonly=False)
        self.refused(os.path.join(self.source_disk.path, self.name(1), "f"), words=["is writable"])
        self.assertFalse(os.path.exists(path))


class WhatIsThere(FilesTestCase):
    """Nothing is overwritten; what is replaced is kept."""

    def setUp(self):
        super().setUp()
        os.mkdir(os.path.join(self.source, "d"))
        self.write("d/f", "from the backup")
        self.write("g", "from the backup")
        self.back_up()
        os.makedirs(os.path.join(self.into, "d"))
        for name in ("d/f", "g"):
            with open(os.path.join(self.into, name), "w") as file:
                file.write("there before")

    def read(self, name):
        with open(os.path.join(self.into, name)) as file:
            return file.read()

    def test_refused_before_anything_is_written(self):
        self.write("h", "x")
        self.back_up(2)
        before = support.listing(self.into)
        result = self.restore(*self.paths("h", "d", "g") + [self.into], status=1)
        self.assertErrorSays(result, "d, g exists in", "--replace")
        self.assertUnchanged(before, self.into)

    def test_replaced_and_kept(self):
        result = self.restore("--replace", *self.paths("d", "g") + [self.into])
        self.assertEqual(["from the backup"] * 2, [self.read("d/f"), self.read("g")])
        kept = sorted(name for name in os.listdir(self.into) if ".before-" in name)
        self.assertEqual(["d", "g"], [name.partition(".before-")[0] for name in kept])
        self.assertEqual(["there before"] * 2, [self.read(kept[0] + "/f"), self.read(kept[1])])
        self.assertIn("; what was there is " + kept[1], result.stderr)
        self.assertNothingAside()

    def test_a_link_is_replaced_itself(self):
        os.unlink(os.path.join(self.into, "g"))
        os.symlink(os.path.join(self.into, "d", "f"), os.path.join(self.into, "g"))
        self.restore("--replace", *self.paths("g") + [self.into])
        self.assertEqual("there before", self.read("d/f"))
        os.unlink(os.path.join(self.into, "g"))
        os.symlink(self.source_disk.path, os.path.join(self.into, "g"))  # something is mounted where it leads
        self.restore("--replace", *self.paths("g") + [self.into])
        self.assertFalse(os.path.islink(os.path.join(self.into, "g")))

    def test_killed_where_a_file_gets_its_size(self):
        """What is there of it tells how far it has come: no size that is not earned can be found."""
        bulk(os.path.join(self.source, "g"), 3)
        self.back_up(2)
        command("rm", "-rf", self.into)
        for number in itertools.count(1):
            os.makedirs(self.into)
            if not self.killed(number, names=("ftruncate",), module=os):
                break
            self.restore("--limit", "1G", "--replace", *self.paths("d", "g") + [self.into])
            self.assertEqual(trees.digest(os.path.join(self.source, "g")), trees.digest(os.path.join(self.into, "g")))
            shutil.rmtree(self.into)
        self.assertGreater(number, 3)

    def test_killed_in_the_exchange(self):
        """At each call of the last step: what was there is somewhere, and the next run does the rest."""
        for number in range(1, 8):
            with self.subTest(call=number):
                shutil.rmtree(self.into)
                os.makedirs(os.path.join(self.into, "d"))
                for name in ("d/f", "g"):
                    with open(os.path.join(self.into, name), "w") as file:
                        file.write("there before")
                self.killed(number)
                result = self.restore("--replace", *self.paths("d", "g") + [self.into], status=None)
                self.assertEqual(0, result.status, result.stderr)
                self.assertEqual(["from the backup"] * 2, [self.read("d/f"), self.read("g")])
                texts = [self.read(os.path.join(folder[len(self.into) + 1:], name))
                         for folder, _, files in os.walk(self.into) for name in files]
                self.assertEqual(2, texts.count("there before"))
                self.assertNothingAside()

    def test_killed_with_files_of_several_backups(self):
        """The same command goes on, wherever that was; what was there before is moved away once."""
        self.write("h", "from the backup")
        files = self.paths("g")
        self.back_up(2)
        for options in [], ["--replace"]:
            for number in itertools.count(1):
                shutil.rmtree(self.into)
                os.mkdir(self.into)
                for name in "gh" * bool(options):
                    with open(os.path.join(self.into, name), "w") as file:
                        file.write("there before")
                words = options + files + self.paths("h")
                if not self.killed(number, words=words):
                    break
                with self.subTest(options=options, call=number):
                    is_over = all(os.path.exists(os.path.join(self.into, name)) and
                                  self.read(name) == "from the backup" for name in "gh") and not any(
                                      glob.glob(self.into + "/.restoring-*/new/*"))
                    result = self.restore(*words + [self.into], status=None)
                    self.assertEqual(0, result.status, result.stderr)
                    self.assertNothingAside()
                    texts = sorted(self.read(name) for name in os.listdir(self.into))
                    again = ["from the backup"] * 2 * (is_over and bool(options))
                    self.assertEqual(["from the backup"] * 2 + again + ["there before"] * 2 * bool(options), texts)
            self.assertGreater(number, 6)

    def test_what_came_before_a_backup_that_cannot_be_read_is_restored(self):
        self.write("h", "from the backup")
        files = self.paths("d")
        self.back_up(2)
        shutil.rmtree(self.into)
        gone = "mv {0} {0}.moved".format(self.backed_up)
        taken = program.FilesRun.take_files

        def moved(run, wanted, staging):
            if wanted.backup.name == self.name(2):
                command("sh", "-c", gone)
            return taken(run, wanted, staging)

        pid = os.fork()
        if not pid:
            try:
                with mock.patch.object(program.FilesRun, "take_files", moved):
                    os._exit(program.main(["restore", "-q"] + files + self.paths("h") + [self.into]))
            finally:
                os._exit(9)
        self.assertEqual(1, os.waitpid(pid, 0)[1] >> 8)
        self.assertEqual(["d"], os.listdir(self.into))
        self.assertEqual("from the backup", self.read("d/f"))

    def killed_before_it_clears(self):
        pid = os.fork()
        if not pid:
            try:
                mock.patch.object(program.Staging, "remove", lambda _: os._exit(9)).start()
                program.main(["restore", "-q", "--replace"] + self.paths("d", "g") + [self.into])
            finally:
                os._exit(8)
        self.assertEqual(9, os.waitpid(pid, 0)[1] >> 8)

    def test_what_was_changed_since_it_was_whole_is_replaced(self):
        """The run before was killed as all had its name; what bears a name now is nobody's but the user's."""
        self.killed_before_it_clears()
        with open(os.path.join(self.into, "g"), "w") as file:
            file.write("changed since")
        shutil.rmtree(os.path.join(self.into, "d"))
        self.restore("--replace", *self.paths("d", "g") + [self.into])
        self.assertEqual(["from the backup"] * 2, [self.read("d/f"), self.read("g")])
        self.assertIn("changed since", [self.read(name) for name in os.listdir(self.into) if name.startswith("g.")])
        self.assertNothingAside()

    def test_a_dry_run_and_one_that_is_refused_leave_what_a_killed_run_has_brought(self):
        self.killed(1)
        before = support.tree(self.into)
        self.assertTrue([name for name in before if name.startswith(b".restoring-")])
        self.restore("--dry-run", "--no-resume", *self.paths("d", "g") + [self.into], status=1)
        self.restore("--no-resume", *self.paths("d", "g") + [self.into], status=1)
        self.restore("--dry-run", "--no-resume", "--replace", *self.paths("d", "g") + [self.into])
        self.assertTreesEqual(before, support.tree(self.into))

    def test_what_cannot_be_moved_away_is_told_before_anything_is_brought(self):
        path = os.path.join(self.into, "d")
        fixed = os.path.join(self.into, "g")
        command("chattr", "+i", fixed)
        self.addCleanup(command, "chattr", "-i", fixed)
        command("mount", "-t", "tmpfs", "none", path)
        self.addCleanup(subprocess.run, ["umount", path], stderr=subprocess.DEVNULL, check=False)
        for name, why, remedy in (("d", "something is mounted there", "umount " + path),
                                  ("g", "its attributes (chattr) forbid it", "chattr -i -a " + fixed)):
            result = self.restore("--replace", *self.paths(name) + [self.into], status=1)
            self.assertErrorSays(result, name + " cannot be replaced: " + why, remedy)
            self.assertNothingAside()
        command("umount", path)
        os.rmdir(path) if not os.listdir(path) else shutil.rmtree(path)
        create(path)
        command("btrfs", "property", "set", "-ts", path, "ro", "true")
        result = self.restore("--replace", *self.paths("d") + [self.into], status=1)
        self.assertErrorSays(result, "d cannot be replaced: it is a read-only subvolume", "ro false")
        subprocess.run(["sh", "-c", result.errors[0].rpartition("; ")[2]], check=True)
        self.restore("--replace", *self.paths("d") + [self.into])

    def killed(self, number, names=("rename_with", "settle_placed", "sync_open", "about_placing"), module=program,
               words=()):
        """Runs a restore in this process, which ends after the Nth of these calls; whether it came to that."""
        pid = os.fork()
        if not pid:
            calls = []

            def counted(act):
                def call(*arguments, **more):
                    done = act(*arguments, **more)
                    calls.append(act)
                    if len(calls) == number:
                        os._exit(9)
                    return done
                return call

            try:
                for name in names:
                    setattr(module, name, counted(getattr(module, name)))
                program.main(["restore", "-q", "--limit", "1G"] + list(words or ["--replace"] + self.paths("d", "g"))
                             + [self.into])
            finally:
                os._exit(8)
        status = os.waitpid(pid, 0)[1] >> 8
        self.assertIn(status, (8, 9))
        return status == 9


class Broken(FilesTestCase):
    """Killed, refused, full: what is partial is named so, and is gone on from or goes."""

    def large(self, mib=96):
        for number in range(3):
            self.write("a%d" % number, "small")
        bulk(os.path.join(self.source, "large"), mib)
        self.write("z", "last")
        return self.back_up()

    def killed_midway(self):
        """Killed while the large file is being copied; how much of it there is."""
        run = self.start("restore", "--limit", "20M", *self.paths("a0", "a1", "a2", "large", "z") + [self.into])
        run.wait_for("some of it", lambda: self.part() > 8 << 20)
        run.kill()
        return self.part()

    def part(self):
        for folder, _, files in os.walk(self.into):
            for name in files:
                if name.startswith("part-"):
                    with contextlib.suppress(FileNotFoundError):
                        return os.path.getsize(os.path.join(folder, name))
        return 0

    def check_whole(self):
        for name in ("a0", "a1", "a2", "large", "z"):
            self.assertEqual(trees.describe(os.path.join(self.backed_up, name)),
                             trees.describe(os.path.join(self.into, name)))
        self.assertNothingAside()

    def test_killed_in_a_file_it_goes_on_there(self):
        self.large()
        done = self.killed_midway()
        self.assertEqual([name for name in os.listdir(self.into) if not name.startswith(".restoring-")], [])
        self.assertGreater(done, 8 << 20)
        aside, = os.listdir(self.into)
        part = next(name for name in os.listdir(os.path.join(self.into, aside)) if name.startswith("part-"))
        with open(os.path.join(self.into, aside, part), "r+b") as file:
            file.write(b"as it was found there")
        self.restore(*self.paths("a0", "a1", "a2", "large", "z") + [self.into])
        with open(os.path.join(self.backed_up, "large"), "rb") as whole, open(
                os.path.join(self.into, "large"), "r+b") as file:
            self.assertEqual(b"as it was found there", file.read(21))
            file.seek(0)
            file.write(whole.read(21))
        shutil.copystat(os.path.join(self.backed_up, "large"), os.path.join(self.into, "large"))
        self.check_whole()

    def test_anew_where_that_is_asked_for_or_the_machine_was_started_again(self):
        for options in (["--no-resume"], []):
            with self.subTest(options=options):
                self.large(24)
                self.killed_midway()
                aside, = os.listdir(self.into)
                aside = os.path.join(self.into, aside)
                part = next(name for name in os.listdir(aside) if name.startswith("part-"))
                with open(os.path.join(aside, part), "r+b") as file:
                    file.write(bytes(1 << 20))  # as if it had not come to the disk
                if not options:
                    with open(os.path.join(aside, "restoring.json"), "w") as file:
                        file.write('{"name": "%s", "boot": "another", "placing": {}}' % os.path.basename(aside))
                self.restore(*options + self.paths("a0", "a1", "a2", "large", "z") + [self.into])
                self.check_whole()
                shutil.rmtree(self.into)
                for path in (self.backed_up, self.snapshot_path(self.name(1))):
                    delete(path)

    def killed_after(self, seconds):
        run = self.start("restore", "--limit", "4M", *self.all_of_it() + [self.into])
        wait_until(lambda: run.process.poll() is not None, timeout=seconds)
        run.kill()

    def test_killed_anywhere(self):
        self.churned(seed=3, count=200)
        expected = support.tree(self.backed_up)
        del expected[b"."]
        random = chance(self)
        for _ in range(TORTURE or 4):
            os.makedirs(self.into)
            for _ in range(3):
                self.killed_after(0.2 + random.random())
            if not os.listdir(self.into) or any(name.startswith(".restoring-") for name in os.listdir(self.into)):
                self.restore(*self.all_of_it() + [self.into])
            found = support.tree(self.into)
            del found[b"."]
            self.assertTreesEqual(expected, found)
            self.assertNothingAside()
            shutil.rmtree(self.into)

    def test_stopped_by_a_signal_it_says_that_it_goes_on(self):
        self.large()
        run = self.start("restore", "--limit", "20M", *self.paths("a0", "a1", "a2", "large", "z") + [self.into])
        run.wait_for("some of it", lambda: self.part() > 4 << 20)
        os.kill(run.pid, signal.SIGTERM)
        result = run.finish()
        self.assertEqual(143, result.status)
        self.assertIn("the next run goes on", result.stderr)
        self.restore(*self.paths("a0", "a1", "a2", "large", "z") + [self.into])
        self.check_whole()

    def test_two_at_once(self):
        self.large()
        run = self.start("restore", "--limit", "10M", *self.paths("large") + [self.into])
        run.wait_for("some of it", lambda: self.part() > 1 << 20)
        result = self.restore(*self.paths("large") + [self.into], status=75)
        self.assertErrorSays(result, "another run")
        run.kill()

    def test_a_full_disk(self):
        self.large()
        full = tmpfs(self)
        command("mount", "-o", "remount,size=32M", full)
        result = self.restore(*self.paths("large") + [full], status=1)
        self.assertErrorSays(result, "96.0 MiB", "free")
        self.assertEqual([], os.listdir(full))

    def test_a_disk_that_becomes_full(self):
        self.large()
        full = tmpfs(self)
        run = self.start("restore", "--limit", "40M", *self.paths("a0", "large") + [full])
        run.wait_for("a beginning", lambda: os.listdir(full))
        command("mount", "-o", "remount,size=40M", full)
        result = run.finish()
        self.assertEqual(1, result.status)
        self.assertErrorSays(result, "no space left")
        self.assertEqual([], os.listdir(full))

    def test_a_backup_that_goes_meanwhile(self):
        for number in range(40):
            os.makedirs(os.path.join(self.source, "d", "{:02}".format(number)))
            self.write("d/{:02}/f".format(number), "x" * 400000)
        self.back_up()
        aside = self.backed_up + "-aside"
        for how in ("another bears its name", "deleted"):
            run = self.start("restore", "--limit", "8M", *self.paths("d") + [self.into])
            run.wait_for("some of it", lambda: sum(len(files) for _, _, files in os.walk(self.into)) > 5)
            if how == "deleted":
                delete(self.backed_up)
            else:
                os.rename(self.backed_up, aside)
                snapshot(aside, self.backed_up)
            result = run.finish()
            self.assertEqual(1, result.status, result.stderr)
            self.assertErrorSays(result, "while it was read")
            self.assertEqual([], os.listdir(self.into))

    def test_what_it_reads_is_not_deleted_meanwhile(self):
        """But nobody else can keep it."""
        os.mkdir(os.path.join(self.source, "d"))
        for number in range(30):
            self.write("d/{}".format(number), "x" * (1 << 20))
        self.back_up()
        self.take(2)
        self.transfer()
        run = self.start("restore", "--limit", "8M", *self.paths("d") + [self.into])
        run.wait_for("some of it", lambda: sum(len(files) for _, _, files in os.walk(self.into)) > 5)
        result = self.run_program("prune", "-n", "1", self.target, status=1)
        self.assertErrorSays(result, "files are being restored from " + self.backed_up, str(run.process.pid))
        self.assertEqual(0, run.finish().status)
        self.assertTreesEqual(os.path.join(self.backed_up, "d"), os.path.join(self.into, "d"))
        keep = ("import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); os.setuid(65534); "
                "fcntl.flock(fd, fcntl.LOCK_SH); print(flush=True); sys.stdin.read()")
        with subprocess.Popen([PYTHON, "-c", keep, self.backed_up], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as keeper:
            keeper.stdout.readline()
            self.run_program("prune", "-n", "1", self.target)
        self.assertEqual([self.name(2)], support.names(self.target))

    def test_a_tree_that_is_deleted_while_it_is_read(self):
        for name in ("a", "b"):
            os.makedirs(os.path.join(self.source, "d", name))
            self.write(os.path.join("d", name, "f"), "x")
        self.back_up()
        folder, name = os.path.split(self.backed_up)
        with program.opened_tree(folder, name) as top, program.OpenTree(folder, name) as tree:
            items = iter(program.TreeTaker(top, {b"d": b"d"}))
            self.assertEqual(b"d", next(items).path)
            delete(self.backed_up)
            with self.assertRaisesRegex(program.BackupError, "deleted"):
                list(items)
            with self.assertRaises(FileNotFoundError):
                tree.__exit__(None)
            tree.top = os.open("/", os.O_RDONLY)

    def test_what_something_is_mounted_over(self):
        os.makedirs(os.path.join(self.source, "d", "inner"))
        self.write("d/inner/f", "x")
        self.back_up()
        over = os.path.join(self.backed_up, "d", "inner")
        command("mount", "-t", "tmpfs", "none", over)
        self.addCleanup(command, "umount", over)
        result = self.restore(*self.paths("d") + [self.into], status=1)
        self.assertErrorSays(result, "d/inner of", "left out: something is mounted there")

    def test_a_disk_that_becomes_full_of_attributes(self):
        os.mkdir(os.path.join(self.source, "d"))
        for number in range(200):
            self.write("d/{}".format(number), "")
            os.setxattr(os.path.join(self.source, "d", str(number)), "user.large", os.urandom(3000))
        self.back_up()
        full = ext4(self, "16M")
        with contextlib.suppress(OSError), open(os.path.join(full, "fill"), "wb", 0) as fill:
            while True:
                fill.write(bytes(1 << 16))
        os.truncate(os.path.join(full, "fill"), os.path.getsize(os.path.join(full, "fill")) - (200 << 10))
        os.sync()
        result = self.restore(*self.paths("d") + [full], status=1)
        self.assertErrorSays(result, "no space left")
        self.assertEqual({"fill", "lost+found"}, set(os.listdir(full)))

    def test_an_attribute_that_is_too_large_there(self):
        self.write("f", "x")
        os.setxattr(os.path.join(self.source, "f"), "user.large", os.urandom(9000))
        self.back_up()
        result = self.restore(*self.paths("f") + [ext4(self)])
        self.assertIn("attribute user.large of 1 entry could not be set, first of f: it is too large", result.stderr)

    def test_where_a_disk_should_be_mounted(self):
        self.write("f", "x")
        self.back_up()
        away = os.path.join(support.scratch_folder(), "away-files")
        os.mkdir(away)
        self.addCleanup(os.rmdir, away)
        fstab = os.path.join(support.scratch_folder(), "fstab-files")
        with open(fstab, "w") as file:
            file.write("/dev/none {} ext4 defaults 0 0\n".format(away))
        self.addCleanup(os.unlink, fstab)
        result = self.restore(*self.paths("f") + [away + "/into"], status=1, wrapper=in_own_mounts(
            'mount --bind "$0" /etc/fstab && exec "$@"')[:-1] + [fstab])
        self.assertErrorSays(result, "no such folder", "nothing is mounted at " + away)

    def test_where_nothing_can_be_written(self):
        self.large(1)
        folder = ext4(self)
        command("mount", "-o", "remount,ro", folder)
        for into, words in ((folder, "read-only"), (self.backed_up, "read-only"),
                            ("/no/such/x", "cannot open /no/such"), (os.path.join(self.source, "z"), "not a folder")):
            self.assertErrorSays(self.restore(*self.paths("z") + [into], status=1), words)


class KilledAtEachStep(FilesTestCase):
    """At each call that changes anything: the next run brings the rest, and tells what the first would have told."""

    CHANGES = ("mkdir", "rename", "unlink", "rmdir", "link", "symlink", "mknod", "chown", "chmod", "fchmod", "utime",
               "setxattr", "ftruncate", "pwrite", "write", "fsync")

    def setUp(self):
        super().setUp()
        os.mkdir(os.path.join(self.source, "d"))
        for name in ("a", "r"):
            self.write("d/" + name, name * 9000)
            os.setxattr(os.path.join(self.source, "d", name), "user.x", b"y")
            os.chmod(os.path.join(self.source, "d", name), 0o444)
        os.link(os.path.join(self.source, "d", "r"), os.path.join(self.source, "d", "s"))
        os.mkdir(os.path.join(self.source, "d", "z"))
        os.chmod(os.path.join(self.source, "d", "z"), 0o3751)
        self.write("d/z/last", "last")
        os.mknod(os.path.join(self.source, "d", "c"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
        for name in ("d", "d/a", "d/c", "d/r", "d/z/last"):
            os.chown(os.path.join(self.source, name), NOBODY, NOBODY)

    def run_in_fork(self, user, killed_at=0, *options, killed_in=""):
        """Status and errors of a restore in a fork of this process; the status is 9 where it was killed.

        killed_in: where that file is about to get its name, instead of at a step.
        """
        with tempfile.TemporaryFile() as errors:
            pid = os.fork()
            if not pid:
                try:
                    os.dup2(errors.fileno(), 2)
                    if user:
                        os.setgroups([])
                        os.setgid(user)
                        os.setuid(user)
                    calls = itertools.count(1)
                    for name in self.CHANGES:
                        setattr(os, name, self.counted(getattr(os, name), calls, killed_at))
                    program.set_flags = self.counted(program.set_flags, calls, killed_at)
                    if killed_in:
                        program.Putter.finish_file = self.dying(program.Putter.finish_file, os.fsencode(killed_in))
                    os._exit(program.main(["restore", "-q", "--no-elevate", *options, *self.paths("d"), self.into]))
                finally:
                    os._exit(8)
            status = os.waitpid(pid, 0)[1] >> 8
            return status, os.pread(errors.fileno(), 1 << 20, 0).decode()

    @staticmethod
    def counted(act, calls, killed_at):
        def call(*arguments, **more):
            if killed_at and next(calls) == killed_at:
                os._exit(9)
            return act(*arguments, **more)
        return call

    @staticmethod
    def dying(finish_file, path):
        def call(putter):
            if putter.file is not None and putter.file.path == path:
                os._exit(9)
            finish_file(putter)
        return call

    def check(self, user):
        expected, outcome = None, None
        for step in itertools.count():
            os.mkdir(self.into)
            os.chown(self.into, user, user)
            status, errors = self.run_in_fork(user, step)
            if status == 9:
                status, errors = self.run_in_fork(user)
            elif step:
                self.assertGreater(step, 40, errors)
                return expected
            with self.subTest(step=step):
                if "d exists in" not in errors:  # as where it was killed when all was done
                    expected = expected or (status, errors)
                    self.assertEqual(expected, (status, errors))
                self.assertNothingAside()
                outcome = outcome or support.tree(self.into)
                self.assertTreesEqual(outcome, support.tree(self.into))
                if not user:  # another may not set all, nor read it
                    self.assertEqual(self.flags(self.backed_up), self.flags(self.into))
            self.loosen(self.into)
            shutil.rmtree(self.into)

        raise AssertionError("no end")

    def test_in_clearing_what_is_not_gone_on_from(self):
        """What is half removed is not gone on from as if all before its last entry were there."""
        self.backed_up = snapshot(self.source, os.path.join(self.source_disk.path, self.name(1)))
        expected = support.tree(os.path.join(self.backed_up, "d"))
        for step in itertools.count(1):
            os.mkdir(self.into)
            self.assertEqual(9, self.run_in_fork(0, killed_in="d/z/last")[0])
            status, errors = self.run_in_fork(0, step, "--no-resume")
            with self.subTest(step=step):
                if status == 9:
                    again, told = self.run_in_fork(0)
                    if "d exists in" not in told:  # as where it was killed when all was done
                        self.assertEqual((0, ""), (again, told))
                self.assertTreesEqual(expected, support.tree(os.path.join(self.into, "d")))
                self.assertNothingAside()
            shutil.rmtree(self.into)
            if status != 9:
                self.assertEqual((0, ""), (status, errors))
                break

    @staticmethod
    def loosen(folder):
        subprocess.call(["chattr", "-ia"] + [os.path.join(folder, "d", name) for name in "ab"],
                        stderr=subprocess.DEVNULL)

    @staticmethod
    def flags(folder):
        lines = subprocess.run(["lsattr", os.path.join(folder, "d")], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, universal_newlines=True).stdout.splitlines()  # not of links
        return sorted((os.path.basename(name), flags) for flags, name in map(str.split, lines))

    def test_by_root(self):
        """A snapshot is the backup, for attributes of chattr do not travel in a stream."""
        self.addCleanup(self.loosen, self.source)
        self.addCleanup(self.loosen, self.into)
        for name, flags in (("a", "+i"), ("b", "+a"), ("e", "+A")):
            path = os.path.join(self.source, "d", name)
            if name != "a":
                self.write("d/" + name, name)
            os.link(path, path + "2")
            command("chattr", flags, path)
        self.backed_up = snapshot(self.source, os.path.join(self.source_disk.path, self.name(1)))
        self.assertEqual((0, ""), self.check(0))

    def test_by_an_ordinary_user(self):
        for path in (support.scratch_folder(), self.target, self.target_disk.path, self.source_disk.path):
            os.chmod(path, 0o755)
        self.back_up()
        status, errors = self.check(NOBODY)
        self.assertEqual(1, status)
        self.assertIn("d/c of {} was left out: a character device cannot be made here".format(self.name(1)), errors)


class OtherRulesOfNames(FilesTestCase):
    """A filesystem that holds no colon in a name, no long ones, and does not tell small letters from capitals.

    As no such one is at hand everywhere, calls of this process are answered as there.
    """

    def setUp(self):
        super().setUp()
        os.mkdir(self.into)

    def answered(self, act, at, says):
        """The function of os, whose argument number `at` is a name in `dir_fd` of that filesystem."""
        device = os.stat(self.into).st_dev

        def call(*arguments, **more):
            folder = more.get("dst_dir_fd" if at else "dir_fd")
            if folder is None or os.fstat(folder).st_dev != device:
                return act(*arguments, **more)
            name = os.fsencode(arguments[at])
            if len(name) > 60:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
            if b":" in name and says:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return act(*arguments[:at] + (name.lower(),) + arguments[at + 1:], **more)

        return call

    def run_in_fork(self, *words):
        with tempfile.TemporaryFile() as errors:
            pid = os.fork()
            if not pid:
                try:
                    os.dup2(errors.fileno(), 2)
                    for name in ("stat", "open", "unlink", "rmdir", "chown", "chmod", "utime"):
                        setattr(os, name, self.answered(getattr(os, name), 0, False))
                    os.mkdir, os.rename = self.answered(os.mkdir, 0, True), self.answered(os.rename, 1, True)
                    os.link = self.answered(os.link, 1, True)
                    os._exit(program.main(["restore", "-q", *words, self.backed_up, self.into]))
                finally:
                    os._exit(8)
            status = os.waitpid(pid, 0)[1] >> 8
            return status, os.pread(errors.fileno(), 1 << 20, 0).decode()

    def test_what_it_cannot_hold_is_left_out_by_name(self):
        large = "n" * 61
        for folder in ("d", "d/" + large, "d/x:y", "d/x:y/in", "d/y", "d/Y"):
            os.mkdir(os.path.join(self.source, folder))
        for name in ("a", "A", "b", large + "/f", "x:y/in/f", "c:d", "z", "y/f", "Y/f"):
            self.write("d/" + name, name)
        os.link(os.path.join(self.source, "d/b"), os.path.join(self.source, "d/b:c"))
        os.symlink("x", os.path.join(self.source, "d", "l:"))
        self.write("e:", "x")
        self.back_up()
        status, errors = self.run_in_fork("--path", "d", "--path", "e:")
        self.assertEqual(1, status, errors)
        left = {line.split(" of ")[0].split(": ")[1] + line.rpartition(":")[2] for line in errors.splitlines()}
        other, invalid = " this filesystem takes its name for that of another one", " invalid argument"
        self.assertEqual({"d/a" + other, "d/y" + other, "d/" + large + " file name too long", "d/x:y" + invalid,
                          "d/c:d" + invalid, "d/b:c" + invalid, "d/l:" + invalid, "e:" + invalid},
                         {line.replace("error: ", "") for line in left})
        with open(os.path.join(self.into, "d", "a"), encoding="ascii") as file:
            self.assertEqual("A", file.read())
        self.assertEqual(["a", "b", "y", "z"], sorted(os.listdir(os.path.join(self.into, "d"))))
        self.assertEqual(["d"], os.listdir(self.into))


class Removed(support.TestCase):
    """What a restore has left aside."""

    def test_a_tree_of_3000_levels_with_few_open_files(self):
        top = os.open(tempfile.mkdtemp(dir=support.scratch_folder()), os.O_RDONLY)
        self.addCleanup(os.close, top)
        at = os.dup(top)
        for _ in range(3000):
            for name in ("deep", "e", "f"):
                os.mkdir(name, dir_fd=at)
            os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=at))
            below = os.open("deep", os.O_RDONLY, dir_fd=at)
            os.fchmod(at, 0o500)
            os.close(at)
            at = below
        os.close(at)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, before[1]))
        for name in ("deep", "e", "f", "file", "not there"):
            program.remove_tree(top, name)
        self.assertEqual([], os.listdir(top))


class AsOrdinaryUser(FilesTestCase):

    def setUp(self):
        super().setUp()
        os.mkdir(self.into)
        os.chown(self.into, NOBODY, NOBODY)

    def restore_as_nobody(self, *arguments, **more):
        return self.restore("--no-elevate", *arguments, wrapper=as_nobody(), **more)

    def test_what_is_his_own_comes_back_whole(self):
        os.mkdir(os.path.join(self.source, "d"), 0o555)
        self.write("d/f", "x")
        os.setxattr(os.path.join(self.source, "d/f"), "user.x", b"y")
        for name in ("d", "d/f"):
            os.chown(os.path.join(self.source, name), NOBODY, NOBODY)
        os.chmod(os.path.join(self.source, "d/f"), 0o400)
        self.back_up()
        result = self.restore_as_nobody(*self.paths("d") + [self.into])
        self.assertNotIn("warning", result.stderr)
        self.assertTreesEqual(os.path.join(self.backed_up, "d"), os.path.join(self.into, "d"))
        self.assertNothingAside()

    def test_what_he_may_not_set_is_told_and_never_widened(self):
        for name, mode in (("setuid", 0o4755), ("plain", 0o640)):
            self.write(name, "x")
            os.chmod(os.path.join(self.source, name), mode)
        Churn.capability.__get__(Churn(self.source))
        os.mknod(os.path.join(self.source, "null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mkfifo(os.path.join(self.source, "fifo"))
        self.back_up()
        result = self.restore_as_nobody(*self.paths("setuid", "plain", "null", "fifo") + [self.into], status=1)
        self.assertIn("the owner of 3 entries could not be set, first of fifo", result.stderr)
        self.assertIn("setuid or setgid of 1 entry could not be set, first of setuid", result.stderr)
        self.assertIn(f"null of {self.name(1)} was left out: a character device cannot be made here",
                      result.stderr)
        self.assertEqual(0o755, stat.S_IMODE(os.lstat(os.path.join(self.into, "setuid")).st_mode))
        self.assertEqual(["fifo", "plain", "setuid"], sorted(os.listdir(self.into)))

    def test_what_he_may_not_read_is_left_out_and_told(self):
        os.mkdir(os.path.join(self.source, "d"))
        for name, mode in (("d/his", 0o644), ("d/not", 0o600)):
            self.write(name, "x")
            os.chmod(os.path.join(self.source, name), mode)
        os.mkdir(os.path.join(self.source, "d", "closed"), 0o700)
        self.back_up()
        os.chmod(self.target, 0o755)
        result = self.restore("--no-elevate", *self.paths("d") + [self.into], wrapper=without_rights(), status=1)
        self.assertEqual(["his"], os.listdir(os.path.join(self.into, "d")))
        self.assertIn(f"d/not of {self.name(1)} was left out: permission denied", result.stderr)
        self.assertIn(f"d/closed of {self.name(1)} was left out", result.stderr)


class WhatAnyUserCanMake(FilesTestCase):
    """None of it keeps the rest of a folder from coming back."""

    def put(self, name, text):
        os.makedirs(os.path.dirname(os.path.join(self.source, name)), exist_ok=True)
        self.write(name, text)

    @staticmethod
    def text(path):
        with open(path) as file:
            return file.read()

    def test_times_that_no_calendar_has(self):
        for name, seconds in (("late", 1 << 62), ("next", 5 * 10 ** 9), ("early", -(1 << 62))):
            self.put("d/" + name, name)
            os.utime(os.path.join(self.source, "d", name), ns=(seconds * 10 ** 9 + 1, seconds * 10 ** 9 + 2))
        self.back_up()
        self.restore(*self.paths("d") + [self.into])
        self.assertTreesEqual(support.tree(os.path.join(self.backed_up, "d")),
                              support.tree(os.path.join(self.into, "d")))

    def test_a_tree_that_no_path_leads_to_the_end_of(self):
        self.put("d/file", "x")
        at = os.open(os.path.join(self.source, "d"), os.O_RDONLY)
        for _ in range(300):
            os.mkdir("n" * 250, dir_fd=at)
            inner = os.open("n" * 250, os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = inner
        os.close(at)
        self.backed_up = os.path.join(self.source_disk.path, self.name(1))
        snapshot(self.source, self.backed_up)
        result = self.restore(*self.paths("d") + [self.into], status=1)
        self.assertIn("was left out: file name too long", result.stderr)
        self.assertEqual("x", self.text(os.path.join(self.into, "d", "file")))
        self.assertNothingAside()

    def test_a_file_larger_than_the_filesystem_can_hold(self):
        self.put("d/after", "x")
        with open(os.path.join(self.source, "d", "huge"), "wb") as file:
            file.write(b"begin")
            file.truncate(1 << 60)
        self.back_up()
        into = os.path.join(ext4(self), "into")
        result = self.restore(*self.paths("d") + [into], status=1)
        self.assertIn("d/huge of {} was left out: file too large".format(os.path.basename(self.backed_up)),
                      result.stderr)
        self.assertEqual(["after"], os.listdir(os.path.join(into, "d")))
        self.assertNothingAside(into)

    def test_what_comes_of_a_file_after_it_was_left_out(self):
        """Its second stretch cannot be read; the third comes all the same."""
        folder = os.open(support.scratch_folder(), os.O_RDONLY)
        self.addCleanup(os.close, folder)
        staging = program.Staging(folder, "folder", "key")
        staging.open()
        staging.take_up(anew=False, is_again=False)
        self.addCleanup(staging.end)
        putter = program.Putter(staging, {b"a", b"b"}, lambda *_: None)
        with open(self.write_large(1 << 20), "rb") as file:
            putter.run([FileEntry(b"a", FILE, size=9 << 20), program.Extent(file.fileno(), 0, 1 << 20),
                        program.Extent(file.fileno(), 2 << 20, 5), program.Extent(file.fileno(), 4 << 20, 5),
                        FileEntry(b"b", FILE, size=1), FilePart(0, b"x")])
        self.assertEqual([LeftOut(b"a", "it became shorter while it was read")], list(staging.shortfalls.left.values()))
        self.assertEqual([b"b"], program.list_sorted(staging.new))

    def write_large(self, size):
        bulk(os.path.join(self.source, "large"), 1)
        os.truncate(os.path.join(self.source, "large"), size)
        return os.path.join(self.source, "large")

    def test_a_name_that_leaves_no_room_for_an_ending(self):
        name = "n" * 254
        self.write(name, "old")
        self.back_up()
        os.mkdir(self.into)
        self.write(os.path.join(self.into, name), "mine")
        self.restore(*self.paths(name) + ["--replace", self.into])
        self.assertEqual("old", self.text(os.path.join(self.into, name)))
        kept, = set(os.listdir(self.into)) - {name}
        self.assertEqual("mine", self.text(os.path.join(self.into, kept)))
        self.assertIn(".before-", kept)


class WithoutAttributes(FilesTestCase):

    def test_what_the_filesystem_cannot_hold_is_told(self):
        """An ACL that cannot be set must not leave its mask to the group."""
        self.write("f", "x")
        path = os.path.join(self.source, "f")
        entries = [(0x01, 6, 2 ** 32 - 1), (0x02, 7, 1000), (0x04, 4, 2 ** 32 - 1), (0x10, 6, 2 ** 32 - 1),
                   (0x20, 0, 2 ** 32 - 1)]
        os.setxattr(path, b"system.posix_acl_access",
                    struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries))
        self.assertEqual(0o660, stat.S_IMODE(os.stat(path).st_mode))
        self.back_up()
        os.mkdir(self.into)
        result = self.restore(*self.paths("f") + [self.into], wrapper=self.WITHOUT_XATTRS)
        self.assertIn("an ACL of 1 entry could not be set, first of f: operation not supported", result.stderr)
        self.assertEqual(0o640, stat.S_IMODE(os.stat(os.path.join(self.into, "f")).st_mode))

    # as on a filesystem without extended attributes: setxattr(2) and lsetxattr(2) say EOPNOTSUPP
    WITHOUT_XATTRS = [PYTHON, "-c", """
import ctypes, os, platform, struct, sys
numbers = {"x86_64": (188, 189), "aarch64": (5, 6)}[platform.machine()]
steps = [(0x20, 0, 0, 0), (0x15, 1, 0, numbers[0]), (0x15, 0, 1, numbers[1]), (0x06, 0, 0, 0x00050000 | 95),
         (0x06, 0, 0, 0x7fff0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
program = struct.pack("HP", len(steps), ctypes.addressof(code))
if ctypes.CDLL(None, use_errno=True).prctl(22, 2, program):
    sys.exit("seccomp: " + os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[1], sys.argv[1:])
"""]


class Hostile(FilesTestCase):
    """FOLDER is another user's, who exchanges it and all in it for links while root restores."""

    EXCHANGE = """
import os, sys
into, victim = sys.argv[1:]
while True:
    for act in (lambda: os.rename(into, into + ".aside"), lambda: os.symlink(victim, into),
                lambda: [(os.rename(os.path.join(into + ".aside", name), os.path.join(into + ".aside", "x" + name)),
                          os.symlink(victim, os.path.join(into + ".aside", name)))
                         for name in os.listdir(into + ".aside") if name.startswith(".restoring-")],
                lambda: os.unlink(into), lambda: os.rename(into + ".aside", into)):
        try:
            act()
        except OSError:
            pass
"""

    def test_a_folder_that_is_exchanged_for_a_link(self):
        Churn(self.source, seed=5).fill(60)
        self.back_up()
        victim = os.path.join(self.source_disk.path, "victim")
        around = os.path.join(self.source_disk.path, "his")
        into = os.path.join(around, "into")
        os.makedirs(into)
        os.mkdir(victim)
        for path in (around, into):
            os.chown(path, NOBODY, NOBODY)
        os.chmod(support.scratch_folder(), 0o755)
        before = support.listing(victim)
        exchanging = subprocess.Popen(["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups",
                                       "python3", "-c", self.EXCHANGE, into, victim])
        self.addCleanup(exchanging.wait)
        self.addCleanup(exchanging.kill)
        for _ in range(TORTURE or 12):
            self.restore(*self.all_of_it() + [into], status=None)
            self.assertUnchanged(before, victim)
            for folder in (into, into + ".aside"):
                with contextlib.suppress(OSError):
                    for name in os.listdir(folder):
                        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)

    def test_a_folder_aside_that_another_has_made(self):
        self.write("f", "x")
        self.back_up()
        os.makedirs(self.into)
        self.restore(*self.paths("f") + [self.into])
        os.unlink(os.path.join(self.into, "f"))
        wanted = program.WantedFiles(program.Host(), "", program.Subvolume(
            self.name(1), None, None, support.subvolume(self.backed_up).received_uuid), None, ("f",),
            program.FilesFound((), 0, 0))
        aside = os.path.join(self.into, ".restoring-" + wanted.key)
        os.mkdir(aside)
        os.chown(aside, NOBODY, NOBODY)
        self.assertErrorSays(self.restore(*self.paths("f") + [self.into], status=1), "belongs to another user")
        os.rmdir(aside)
        os.mkdir(aside)  # one of root's, which its neighbour has moved here
        open(os.path.join(aside, "precious"), "w").close()
        self.assertErrorSays(self.restore(*self.paths("f") + [self.into], status=1), "was not left by such a restore")
        self.assertEqual(["precious"], os.listdir(aside))
        shutil.rmtree(aside)
        os.symlink("/", aside)
        self.restore(*self.paths("f") + [self.into], status=1)
        self.assertEqual([os.path.basename(aside)], os.listdir(self.into))


if __name__ == "__main__":
    unittest.main()
