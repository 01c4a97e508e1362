"""What a stream that this machine's kernel did not write may hold."""

import itertools
import os
import struct
import sys
import tempfile
import unittest
import unittest.mock
import uuid
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support

import btrfs_backup_ng as program
from btrfs_backup_ng import (
    A_CLONE_PATH,
    A_CLONE_UUID,
    A_DATA,
    A_FILE_OFFSET,
    A_INO,
    A_MODE,
    A_PATH,
    A_PATH_LINK,
    A_PATH_TO,
    A_SIZE,
    A_XATTR_DATA,
    A_XATTR_NAME,
    CHMOD,
    CLONE,
    ENCODED_WRITE,
    END,
    LINK,
    MKDIR,
    MKFILE,
    MKNOD,
    RENAME,
    RMDIR,
    SET_XATTR,
    SNAPSHOT,
    SUBVOL,
    SYMLINK,
    TRUNCATE,
    UNLINK,
    UPDATE_EXTENT,
    UTIMES,
    WRITE,
    BackupError,
    ExpectedStream,
    Hazards,
    StreamGate,
    make_command,
    parse_uuid,
)

OWN, PARENT = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
EXPECTED = ExpectedStream("home20260201-093000", OWN, PARENT, 0, 0, 0o755)
BAD_PATHS = (b"..", b"../x", b"a/..", b"a/../../x", b"/x", b"/", b"a//b", b"a/", b".", b"./x", b"a/./b", b"a\0b", b"\0",
             b"a\0/../x", b"n" * 256, b"n/" * 2048 + b"n")
GOOD_PATHS = (b"x", b"...", b"..x", b"x..", b"a/.b/..c", b"caf\xe9 \n", b"o257-5-0", b"n" * 255, b"a/b/c/d")


def number(value=0):
    return struct.pack("<Q", value)


def judge(command, attributes, version=1, hazards=None):
    """Lets a gate judge one command."""
    whole = make_command(command, attributes)
    gate = StreamGate(EXPECTED, hazards)
    gate.open(version)
    gate.judge(whole, 0, len(whole), command)


class Verdicts(unittest.TestCase):

    def refused(self, command, attributes, version=1):
        with self.assertRaises(BackupError, msg=(command, attributes)) as caught:
            judge(command, attributes, version)
        return caught.exception.message

    def forms(self, path):
        """Commands that name a path, in every place that one can stand in."""
        offset, ino = (A_FILE_OFFSET, number()), (A_INO, number(257))
        for command in (MKFILE, MKDIR, UNLINK, RMDIR, UTIMES, MKNOD):
            yield command, [(A_PATH, path)]
            yield command, [(A_PATH, path), ino]
        yield MKFILE, [(A_PATH, b"x"), ino, (A_PATH_TO, path)]
        yield TRUNCATE, [(A_PATH, path), (A_SIZE, number())]
        yield SYMLINK, [(A_PATH, path), ino, (A_PATH_LINK, b"/etc")]
        yield RENAME, [(A_PATH, path), (A_PATH_TO, b"x")]
        yield RENAME, [(A_PATH, b"x"), (A_PATH_TO, path)]
        yield LINK, [(A_PATH, path), (A_PATH_LINK, b"x")]
        yield LINK, [(A_PATH, b"x"), (A_PATH_LINK, path)]
        yield WRITE, [(A_PATH, path), offset, (A_DATA, b"evil")]
        clone = [(A_FILE_OFFSET, number()), (A_CLONE_UUID, parse_uuid(OWN))]
        yield CLONE, clone + [(A_PATH, path), (A_CLONE_PATH, b"x")]
        yield CLONE, clone + [(A_PATH, b"x"), (A_CLONE_PATH, path)]

    def test_paths(self):
        for path in GOOD_PATHS:
            for command, attributes in self.forms(path):
                judge(command, attributes)
        for path in BAD_PATHS:
            for command, attributes in self.forms(path):
                self.refused(command, attributes)

    def test_any_order_and_repetition(self):
        """Receive takes attributes in any order, and the last of two."""
        chance = support.chance(self)
        for path in BAD_PATHS[:6]:
            for command, attributes in self.forms(path):
                for order in itertools.permutations(attributes):
                    self.refused(command, order)
                mixed = [(kind, b"x" if kind in program.PATHS else data) for kind, data in attributes] + attributes
                chance.shuffle(mixed)
                self.refused(command, mixed)

    def test_the_path_comes_first(self):
        self.refused(WRITE, [(A_FILE_OFFSET, number()), (A_PATH, b"x"), (A_DATA, b"d")])
        self.refused(CHMOD, [(A_MODE, number(0o777)), (A_PATH, b"")])
        judge(CHMOD, [(A_PATH, b""), (A_MODE, number(0o777))])

    def test_the_top_folder_is_not_made_opened_or_moved(self):
        for command, attributes in self.forms(b""):
            if command not in program.OF_ANY_FOLDER:
                self.refused(command, attributes)

    def test_the_data_of_protocol_2_has_no_length(self):
        head = struct.pack("<HH1sHH8sH", A_PATH, 1, b"x", A_FILE_OFFSET, 8, number(), A_DATA)
        for command in (WRITE, ENCODED_WRITE):
            payload = head + b"data that may look like attributes" + struct.pack("<HH4s", A_PATH, 4, b"../x")
            whole = program.COMMAND_HEADER.pack(len(payload), command, 0) + payload
            gate = StreamGate(EXPECTED)
            gate.open(2)
            gate.judge(whole, 0, len(whole), command)
            gate = StreamGate(EXPECTED)
            gate.open(1)
            self.assertRaises(BackupError, gate.judge, whole, 0, len(whole), command)

    def test_symbolic_links_may_say_anything_but_nul(self):
        for target in (b"/", b"../..", b"a//b", b"x" * 4000):
            judge(SYMLINK, [(A_PATH, b"s"), (A_INO, number()), (A_PATH_LINK, target)])
        self.refused(SYMLINK, [(A_PATH, b"s"), (A_PATH_LINK, b"a\0b")])

    def test_clones(self):
        for source, is_fine in ((OWN, True), (PARENT, True), (str(uuid.uuid4()), False)):
            attributes = [(A_CLONE_UUID, parse_uuid(source)), (A_PATH, b"x"), (A_CLONE_PATH, b"y")]
            judge(CLONE, attributes) if is_fine else self.refused(CLONE, attributes)
        self.refused(CLONE, [(A_PATH, b"x"), (A_CLONE_PATH, b"y")])
        self.refused(CLONE, [(A_CLONE_UUID, parse_uuid(OWN)), (A_PATH, b"x"), (A_CLONE_UUID, uuid.uuid4().bytes)])

    def test_commands_attributes_and_protocols_that_nobody_asked_for(self):
        self.refused(UPDATE_EXTENT, [(A_PATH, b"x")])
        for command in (0, 23, 25, 26, 99, 65535):
            self.refused(command, [(A_PATH, b"x")])
        for command in (0, 26, 99):
            self.refused(command, [(A_PATH, b"x")], version=2)
        self.refused(MKFILE, [(A_PATH, b"x"), (25, b"")])
        self.refused(MKFILE, [(A_PATH, b"x"), (0, b"")])
        self.refused(MKFILE, [(A_PATH, b"x"), (32, b"")], version=2)
        self.assertIn("second subvolume", self.refused(SUBVOL, [(A_PATH, b"x")]))
        self.assertIn("second subvolume", self.refused(SNAPSHOT, [(A_PATH, b"x")]))
        for version in (0, 3, 4, 1 << 31):
            self.assertRaises(BackupError, StreamGate(EXPECTED).open, version)

    def test_what_is_cut_off(self):
        whole = make_command(RENAME, [(A_PATH, b"x"), (A_PATH_TO, b"y")])
        for end in range(11, len(whole)):
            gate = StreamGate(EXPECTED)
            gate.open(1)
            if end != 15:  # a whole attribute
                self.assertRaises(BackupError, gate.judge, whole, 0, end, RENAME)

    def test_a_nul_in_the_name_of_an_attribute(self):
        self.refused(SET_XATTR, [(A_PATH, b""), (A_XATTR_NAME, b"system.posix_acl_default\0"), (A_XATTR_DATA, b"")])

    def test_the_quick_way_lets_pass_what_the_slow_one_does(self):
        chance = support.chance(self)
        for _ in range(3000):
            path = chance.choice(GOOD_PATHS + BAD_PATHS + (b"",))
            command, kinds = chance.choice(
                [(MKFILE, (A_INO,)), (CHMOD, (A_MODE,)), (program.CHOWN, (6, 7)), (UTIMES, (11, 10, 9)), (RMDIR, ()),
                 (WRITE, (A_FILE_OFFSET, A_DATA)), (RENAME, (A_PATH_TO,))])
            attributes = [(A_PATH, path)] + [(kind, bytes(chance.choice([8, 12, 0]))) for kind in kinds]
            if command == RENAME:
                attributes[1] = A_PATH_TO, chance.choice(GOOD_PATHS + BAD_PATHS + (b"",))
            whole, quick, slow = make_command(command, attributes), StreamGate(EXPECTED), StreamGate(EXPECTED)
            verdicts = []
            for act in (quick.judge, slow.judge_slowly):
                quick.version = slow.version = 1
                try:
                    act(whole, 0, len(whole), command)
                    verdicts.append(True)
                except BackupError:
                    verdicts.append(False)
            self.assertEqual(verdicts[0], verdicts[1], (command, attributes))


class Planned(unittest.TestCase):
    """Names and ids are those of the plan, whatever the machine that sends says."""

    SNAPSHOT = program.Subvolume("home20260201-093000", OWN)

    def planned(self, snapshot=SNAPSHOT, parent=None, **told):
        shipment = program.Shipment(program.UNREACHED, "/f", snapshot, parent, program.SendOptions(compressed=True))
        return program.planned_stream(shipment, EXPECTED._replace(**told))

    def test_what_is_told_is_taken_from_the_plan(self):
        evil = {"name": "/../cron.d/x", "uuid": "* * * * * root evil\n", "parent_uuid": "../x", "parent_name": "/x",
                "base": "x"}
        self.assertEqual(ExpectedStream("home20260201-093000", OWN, None, 1, 2, 0o750, compressed=True),
                         self.planned(uid=1, gid=2, mode=0o750, **evil))
        parent = program.Subvolume("home20260101-093000", PARENT)
        planned = self.planned(parent=parent, **evil)
        self.assertEqual((PARENT, "home20260101-093000", None),
                         (planned.parent_uuid, planned.parent_name, planned.base))

    def test_a_plan_of_names_and_ids_that_are_none(self):
        for change in ({"name": "../x"}, {"name": ".."}, {"name": ""}, {"name": ".hidden"}, {"name": "a\0b"},
                       {"name": "n" * 256}, {"uuid": "evil\n"}, {"uuid": None}, {"uuid": OWN + "\n"}):
            with self.assertRaises(BackupError, msg=change):
                self.planned(self.SNAPSHOT._replace(**change))
        for told in ({"uid": -1}, {"gid": 1 << 32}, {"mode": 0o100644}, {"mode": -1}):
            with self.assertRaises(BackupError, msg=told):
                self.planned(**told)

    def test_a_receiver_opens_nothing_for_them(self):
        with tempfile.TemporaryDirectory() as folder:
            hostile = EXPECTED._replace(name="/../x", uuid="* * * * * root evil\n")
            self.assertRaises(BackupError, program.LocalHost(program.Events()).open_receive, folder, hostile, False)
            self.assertEqual([], os.listdir(folder))

    def test_the_first_command_says_nothing_twice(self):
        first = [(A_PATH, EXPECTED.name.encode()), (program.A_UUID, parse_uuid(OWN)), (program.A_UUID, bytes(16))]
        opening = program.STREAM_HEADER.pack(program.STREAM_MAGIC, 1) + make_command(SUBVOL, first)
        self.assertRaises(BackupError, program.parse_first_command, opening)


class Trusted(unittest.TestCase):
    """Only a stream that this machine's kernel writes, and this process receives here, passes unseen."""

    class Target(program.LocalHost):
        def open_receive(self, *_):
            raise BackupError("judged")

        def open_own_receive(self, *_):
            raise BackupError("trusted")

    def opened(self, source):
        target = program.Target("k", "t", self.Target(program.Events()), "/f", None, program.ANEW)
        shipment = program.Shipment(source, "/s", Planned.SNAPSHOT, None, program.SendOptions())
        delivery = program.Delivery(shipment, [target], program.Task(stall_timeout=1, retries=0), program.Events())
        delivery.expected = EXPECTED
        with self.assertRaises(BackupError) as caught:
            delivery.open(target)
        return caught.exception.message

    def test_who_is(self):
        here = program.LocalHost(program.Events())
        self.assertEqual("trusted", self.opened(here))
        self.assertEqual("judged", self.opened(program.RawPlace(here, [], "")))
        self.assertEqual("judged", self.opened(mock.Mock(spec=program.AgentHost)))
        self.assertEqual("judged", self.opened(mock.Mock(spec=program.PlainHost)))


class WithoutTheKernelsHelp(unittest.TestCase):
    """Links and devices, where the kernel cannot be told not to follow and open them."""

    def setUp(self):
        self.hazards = Hazards([(b"old/link", program.A_LINK), (b"dev", program.SPECIAL)],
                               [(b"old/link", program.A_LINK), (b"dev", program.SPECIAL)])

    def judge(self, command, *attributes):
        judge(command, attributes, hazards=self.hazards)

    def refused(self, command, *attributes):
        with self.assertRaises(BackupError, msg=(command, attributes)):
            self.judge(command, *attributes)

    def write(self, path):
        return WRITE, (A_PATH, path), (A_FILE_OFFSET, number()), (A_DATA, b"evil")

    def test_what_the_parent_has(self):
        for path in (b"old/link", b"old/link/x", b"dev", b"dev/x"):
            self.refused(*self.write(path))
        self.judge(*self.write(b"old/other"))
        self.judge(CHMOD, (A_PATH, b"dev"), (A_MODE, number()))
        self.refused(CHMOD, (A_PATH, b"old/link"), (A_MODE, number()))
        self.refused(MKFILE, (A_PATH, b"old/link"), (A_INO, number()))

    def test_what_the_stream_makes_and_moves(self):
        self.judge(SYMLINK, (A_PATH, b"o1"), (A_PATH_LINK, b"/etc"))
        self.refused(*self.write(b"o1"))
        self.judge(RENAME, (A_PATH, b"o1"), (A_PATH_TO, b"a/s"))
        self.judge(*self.write(b"o1"))
        self.refused(*self.write(b"a/s/passwd"))
        self.judge(RENAME, (A_PATH, b"a"), (A_PATH_TO, b"b"))
        self.judge(*self.write(b"a/s"))
        self.refused(*self.write(b"b/s"))
        self.judge(LINK, (A_PATH, b"t"), (A_PATH_LINK, b"b/s"))
        self.refused(*self.write(b"t"))
        self.judge(UNLINK, (A_PATH, b"t"))
        self.judge(MKFILE, (A_PATH, b"t"), (A_INO, number()))
        self.judge(*self.write(b"t"))

    def test_a_rename_between_names_of_one_file_is_none(self):
        self.judge(SYMLINK, (A_PATH, b"s"), (A_PATH_LINK, b"/etc"))
        self.judge(LINK, (A_PATH, b"t"), (A_PATH_LINK, b"s"))
        self.refused(RENAME, (A_PATH, b"s"), (A_PATH_TO, b"t"))

    def test_what_is_said_of_a_link_does_not_make_it_plain(self):
        self.judge(SYMLINK, (A_PATH, b"s"), (A_PATH_LINK, b"/etc"))
        for command, *more in ((program.CHOWN, (6, number()), (7, number())), (UTIMES,),
                               (SET_XATTR, (A_XATTR_NAME, b"user.x"), (A_XATTR_DATA, b"1")),
                               (program.REMOVE_XATTR, (A_XATTR_NAME, b"user.x"))):
            self.judge(command, (A_PATH, b"s"), *more)
            self.refused(*self.write(b"s"))

    def test_commands_of_protocol_2(self):
        for command in (ENCODED_WRITE, program.FALLOCATE):
            for path, is_fine in ((b"old/link", False), (b"dev", False), (b"old/link/x", False), (b"old/x", True)):
                whole = make_command(command, [(A_PATH, path), (A_FILE_OFFSET, number())])
                gate = StreamGate(EXPECTED, self.hazards)
                gate.open(2)
                with self.subTest(command=command, path=path):
                    if is_fine:
                        gate.judge(whole, 0, len(whole), command)
                    else:
                        self.assertRaises(BackupError, gate.judge, whole, 0, len(whole), command)

    def test_devices(self):
        self.judge(MKNOD, (A_PATH, b"sda"), (A_MODE, number(0o60600)))
        for command in (WRITE, TRUNCATE, MKFILE):
            self.refused(command, (A_PATH, b"sda"))

    def test_clones_from_the_parent_go_by_what_is_there(self):
        def clone(source, path):
            return CLONE, (A_PATH, b"x"), (A_CLONE_UUID, parse_uuid(source)), (A_CLONE_PATH, path)

        self.judge(UNLINK, (A_PATH, b"old/link"))
        self.judge(*clone(OWN, b"old/link/x"))
        self.refused(*clone(PARENT, b"old/link/x"))
        self.judge(END)


class WithoutCtypes(unittest.TestCase):

    def test_nothing_is_confined(self):
        with unittest.mock.patch.dict(sys.modules, {"ctypes": None}):
            self.assertIsNone(program.confine("/"))


class AtTheEdges(unittest.TestCase):
    """What passes and what does not, on both sides of each limit."""

    def verdict(self, command, attributes, version=1):
        try:
            judge(command, attributes, version)
        except BackupError:
            return False
        return True

    def test_kinds_of_attributes(self):
        for version, last in ((1, 24), (2, 31)):
            for kind in (0, 1, 2, last - 1, last, last + 1, 65535):
                with self.subTest(version=version, kind=kind):
                    self.assertEqual(1 <= kind <= last, self.verdict(MKFILE, [(A_PATH, b"x"), (kind, b"")], version))

    def test_kinds_of_commands(self):
        known = set(range(MKFILE, END + 1)) - {UPDATE_EXTENT}
        for version, also in ((1, set()), (2, {program.FALLOCATE, program.FILEATTR, ENCODED_WRITE})):
            for command in range(30):
                path = b"" if command == END else b"x"
                attributes = {SYMLINK: [(A_PATH_LINK, b"y")], LINK: [(A_PATH_LINK, b"y")], RENAME: [(A_PATH_TO, b"y")],
                              CLONE: [(A_CLONE_UUID, parse_uuid(OWN)), (A_CLONE_PATH, b"y")]}.get(command, [])
                with self.subTest(version=version, command=command):
                    self.assertEqual(command in known | also, self.verdict(
                        command, ([] if command == END else [(A_PATH, path)]) + attributes, version))

    def test_cut_off_at_the_end_of_what_there_is(self):
        for version in (1, 2):
            whole = make_command(RENAME, [(A_PATH, b"x"), (A_PATH_TO, b"y")])
            for end in set(range(11, len(whole))) - {15}:
                gate = StreamGate(EXPECTED)
                gate.open(version)
                with self.subTest(version=version, end=end), self.assertRaises(BackupError):
                    gate.judge(whole[:end], 0, end, RENAME)

    def test_what_only_looks_usual(self):
        """Of the shape that the quick way knows, but of other attributes."""
        for command, (_, wanted) in program.USUAL.items():
            rest = [(kind, b"../../../etc"[-size:]) for kind, size in zip(wanted[::2], wanted[1::2])]
            self.assertTrue(self.verdict(command, [(A_PATH, b"x")] + rest))
            self.assertFalse(self.verdict(command, [(A_PATH, b"../x")] + rest))
            for first in (A_PATH_LINK, A_PATH_TO, A_INO + 1, A_PATH - 1, A_PATH + 1):
                with self.subTest(command=command, first=first):
                    self.assertFalse(self.verdict(command, [(first, b"../x")] + rest))
                    self.assertFalse(self.verdict(command, [(first, b"x")] + rest))
            for number_, (_, data) in enumerate(rest):
                for other in {0, wanted[0], A_PATH_TO, A_PATH_LINK, program.A_CLONE_PATH} - {wanted[2 * number_]}:
                    changed = rest[:number_] + [(other, data)] + rest[number_ + 1:]
                    with self.subTest(command=command, number=number_, other=other):
                        self.assertFalse(self.verdict(command, [(A_PATH, b"x")] + changed))

    # What Linux writes after the path in the commonest commands: kind and length.
    COMMON = ((MKFILE, (3, 8)), (MKDIR, (3, 8)), (TRUNCATE, (4, 8)), (CHMOD, (5, 8)), (program.CHOWN, (6, 8), (7, 8)),
              (UTIMES, (11, 12), (10, 12), (9, 12)), (UNLINK,), (RMDIR,), (RENAME, (16, 1)), (RENAME, (16, 4095)),
              (WRITE, (18, 8), (19, 0)), (WRITE, (18, 8), (19, 1)), (WRITE, (18, 8), (19, 48 << 10)),
              (WRITE, (18, 8), (19, 65535)))

    class Slow(StreamGate):
        """One that tells what it has not judged at a glance."""

        def __init__(self):
            super().__init__(EXPECTED)
            self.slow, self.checked = [], []

        def judge_slowly(self, data, start, end, command):
            self.slow.append(command)
            super().judge_slowly(data, start, end, command)

        def check_path(self, command, path):
            self.checked.append(path)
            super().check_path(command, path)

    def test_what_linux_writes_is_judged_at_a_glance(self):
        for version in (1, 2):
            for before in (0, 5):
                for command, *rest in self.COMMON:
                    gate = self.Slow()
                    gate.open(version)
                    whole = make_command(command, [(A_PATH, b"some/path")] + [
                        (kind, (b"ab/" * size)[:size].rstrip(b"/").ljust(size, b"n")) for kind, size in rest])
                    gate.judge(bytes(before) + whole + bytes(9), before, before + len(whole), command)
                    with self.subTest(version=version, command=command, rest=rest):
                        self.assertEqual([WRITE] if command == WRITE and version == 2 else [], gate.slow)
                        self.assertEqual({RENAME: 2}.get(command, 1), len(gate.checked))

    def test_anything_else_is_looked_at(self):
        """A second path in the place of what Linux writes there, and what is longer or shorter than it says."""
        for command, attributes in (
            (RENAME, [(A_PATH, b"x"), (A_PATH, b"y")]), (RENAME, [(A_PATH, b"x"), (A_PATH_LINK, b"y")]),
            (RENAME, [(A_PATH, b"x"), (A_PATH_TO, b"y"), (A_INO, number())]), (RENAME, [(A_PATH, b"x")]),
            (WRITE, [(A_PATH, b"x"), (A_FILE_OFFSET, number())]), (WRITE, [(A_PATH, b"x"), (A_DATA, b"d")]),
            (LINK, [(A_PATH, b"x"), (A_PATH_LINK, b"y")]), (SYMLINK, [(A_PATH, b"x"), (A_PATH_LINK, b"y")]),
            (CHMOD, [(A_PATH, b"x")]), (CHMOD, [(A_PATH, b"x"), (A_MODE, number()), (A_INO, number())]),
            (UNLINK, [(A_PATH, b"x"), (A_INO, number())]), (MKNOD, [(A_PATH, b"x"), (A_INO, number())]),
        ):
            for is_cut in (False, True):
                gate = self.Slow()
                gate.open(1)
                whole = make_command(command, attributes)
                end = len(whole) - is_cut
                with self.subTest(command=command, attributes=attributes, is_cut=is_cut):
                    try:
                        gate.judge(whole[:end], 0, end, command)
                    except BackupError:
                        self.assertTrue(is_cut or attributes[1:] == [(A_PATH, b"y")])
                    else:
                        self.assertFalse(is_cut)
                    self.assertEqual([command], gate.slow)

    def test_paths_that_have_passed_are_not_looked_at_again(self):
        gate = self.Slow()
        gate.open(1)
        for path in (b"x", b"y", b"x", b"y", b"x"):
            whole = make_command(UNLINK, [(A_PATH, path)])
            gate.judge(whole, 0, len(whole), UNLINK)
        self.assertEqual([b"x", b"y"], gate.checked)
        for count in range(5000):
            whole = make_command(UNLINK, [(A_PATH, str(count).encode())])
            gate.judge(whole, 0, len(whole), UNLINK)
            self.assertLess(len(gate.passed), 1100)

    def test_the_top_folder_has_not_passed_for_all(self):
        gate = StreamGate(EXPECTED)
        gate.open(1)
        for command, attributes, is_fine in ((CHMOD, [(A_PATH, b""), (A_MODE, number())], True),
                                             (UNLINK, [(A_PATH, b"")], False)):
            whole = make_command(command, attributes)
            if is_fine:
                gate.judge(whole, 0, len(whole), command)
            else:
                self.assertRaises(BackupError, gate.judge, whole, 0, len(whole), command)

    def test_what_is_told_of_a_stream(self):
        """On both sides of each limit of what may become name, ids, owner and mode of a partial."""
        most = (1 << 32) - 1
        for change, is_fine in (
            ({}, True), ({"name": "n" * 255}, True), ({"name": "n" * 256}, False), ({"name": "\u00e9" * 127}, True),
            ({"name": "\u00e9" * 128}, False), ({"name": "a.b"}, True), ({"name": ".a"}, False),
            ({"name": "a/b"}, False), ({"name": "."}, False), ({"name": "a\n"}, True),
            ({"uid": 0}, True), ({"uid": most}, True), ({"uid": most + 1}, False), ({"uid": -1}, False),
            ({"uid": 1 << 40}, False), ({"gid": 1 << 40}, False), ({"mode": 1 << 40}, False),
            ({"gid": 0}, True), ({"gid": most}, True), ({"gid": most + 1}, False), ({"gid": -1}, False),
            ({"mode": 0}, True), ({"mode": 0o7777}, True), ({"mode": 0o10000}, False), ({"mode": -1}, False),
            ({"parent_uuid": None}, True), ({"parent_uuid": ""}, True), ({"parent_uuid": OWN}, True),
            ({"parent_uuid": "x"}, False), ({"base": OWN}, True), ({"base": "x"}, False), ({"base": None}, True),
            ({"uuid": ""}, False), ({"uuid": OWN.upper()}, True), ({"uuid": OWN[:-1] + "A"}, False),
            ({"uuid": OWN[:-1]}, False), ({"uuid": OWN + "0"}, False), ({"uuid": OWN.replace("-", "")}, False),
        ):
            with self.subTest(change=change):
                expected = EXPECTED._replace(**change)
                if is_fine:
                    program.check_expected(expected)
                else:
                    self.assertRaises(BackupError, program.check_expected, expected)

    def test_what_has_the_shape_of_a_write(self):
        attributes = [(A_PATH, b"x"), (A_FILE_OFFSET, number()), (A_DATA, b"")]
        for command in range(30):
            with self.subTest(command=command):
                self.assertEqual(MKFILE <= command <= END and command != CLONE, self.verdict(command, attributes))
        whole = make_command(WRITE, attributes)
        for end in range(len(whole) - 3, len(whole)):
            gate = StreamGate(EXPECTED)
            gate.open(1)
            self.assertRaises(BackupError, gate.judge, whole[:end], 0, end, WRITE)

    def test_a_second_path_where_none_belongs(self):
        for command in set(range(MKFILE, END)) - {RENAME, CLONE}:
            for kind in (A_PATH_TO, A_PATH_LINK, program.A_CLONE_PATH):
                is_text = command == SYMLINK and kind == A_PATH_LINK
                with self.subTest(command=command, kind=kind):
                    self.assertEqual(is_text, self.verdict(command, [(A_PATH, b"x"), (kind, b"../y")]))

    def test_wherever_it_stands_in_what_has_come(self):
        before = bytes(program.LARGEST_COMMAND + 1)
        for command, attributes in ((MKFILE, [(A_PATH, b"x"), (A_INO, number())]), (MKFILE, [(A_PATH, b"../x")]),
                                    (WRITE, [(A_PATH, b"x"), (A_FILE_OFFSET, number()), (A_DATA, b"d")]),
                                    (MKFILE, [(A_PATH, b"../x"), (A_INO, number())]), (RMDIR, [(A_PATH, b"x")])):
            whole = make_command(command, attributes)
            verdicts = []
            for data, start in ((whole, 0), (before + whole + before, len(before))):
                gate = StreamGate(EXPECTED)
                gate.open(1)
                try:
                    gate.judge(data, start, start + len(whole), command)
                    verdicts.append("")
                except BackupError as error:
                    verdicts.append(error.message)
            with self.subTest(command=command, attributes=attributes):
                self.assertEqual(verdicts[0], verdicts[1])
                self.assertEqual(b".." in attributes[0][1], bool(verdicts[0]))

    def test_no_data(self):
        head = struct.pack("<HH1sHH8sH", A_PATH, 1, b"x", A_FILE_OFFSET, 8, number(), A_DATA)
        whole = program.COMMAND_HEADER.pack(len(head), WRITE, 0) + head
        gate = StreamGate(EXPECTED)
        gate.open(2)
        gate.judge(whole, 0, len(whole), WRITE)

    def test_the_longest_path(self):
        for more, is_fine in ((0, True), (1, False)):  # PATH_MAX with its NUL is 4096
            path = (b"n/" * 4095)[:4092] + b"nnn" + b"n" * more
            self.assertEqual(is_fine, self.verdict(RMDIR, [(A_PATH, path)]), len(path))

    def test_the_largest_command(self):
        head = struct.pack("<HH1sHH8sH", A_PATH, 1, b"x", A_FILE_OFFSET, 8, number(), A_DATA)
        for more, is_fine in ((0, True), (1, False)):
            size = (1 << 20) - 10 - len(head) + more
            whole = program.COMMAND_HEADER.pack(len(head) + size, WRITE, 0) + head + bytes(size)
            gate = StreamGate(EXPECTED)
            gate.open(2)
            with self.subTest(more=more):
                if is_fine:
                    gate.judge(bytes(7) + whole, 7, 7 + len(whole), WRITE)
                else:
                    with self.assertRaisesRegex(BackupError, "a command of 1048577 bytes"):
                        gate.judge(bytes(7) + whole, 7, 7 + len(whole), WRITE)

    def test_what_is_said(self):
        with self.assertRaises(BackupError) as caught:
            judge(WRITE, [(A_PATH, b"../\xff"), (A_FILE_OFFSET, number()), (A_DATA, b"evil")])
        self.assertIn(": ../\\xff", caught.exception.message)
        self.assertIn("check the machine that it comes from", caught.exception.hint)
        self.assertEqual("the stream holds a second subvolume", program.hostile("a second subvolume").message)


if __name__ == "__main__":
    unittest.main()
