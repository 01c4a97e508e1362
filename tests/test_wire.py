"""Values and frames on the wire: what arrives is what was sent, and nothing else arrives."""

import json
import os
import sys
import threading
import types
import unittest
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support

import btrfs_backup_ng as program
from btrfs_backup_ng import (
    BackupError,
    Busy,
    Capabilities,
    Channel,
    ConnectionLost,
    Event,
    Listing,
    LocalHost,
    LockChange,
    Pin,
    Place,
    ReceiverFailed,
    SendOptions,
    Stalled,
    Subvolume,
    UsageError,
    is_of_type,
    pack_value,
    type_hints,
    unpack_value,
)

UUID = "01234567-89ab-cdef-0123-456789abcdef"


class Values(unittest.TestCase):
    """What travels arrives as it was, and nothing else arrives."""

    OF_AGENTS = {"release", "spread", "join"}  # no host has them

    GOOD = (None, True, 0, -1, 1 << 60, 1.5, float("inf"), "", "a\udcff\n\"", [], [1, "a", None], (), (1, (2,)), {},
            {"a": [1], "b": {"c": ()}}, frozenset(), frozenset(["a", "b"]),
            Subvolume("a", None), Listing((Subvolume("a", UUID),), frozenset(["c"])), Place("/", "folder"),
            Pin("a", UUID, "c"), LockChange("a", "b"), Capabilities(True, False, (6, 2)), SendOptions())

    BAD = ('{"is": "Subvolume", "of": []}',
           '{"is": "Subvolume", "of": [1, 2]}', '{"is": "os", "of": []}',
           '{"is": "a"}',
           '{"of": []}', "{}", '{"is": [], "of": []}', '{"is": "tuple", "of": {}}', '{"is": "dict", "of": [[1]]}',
           '{"is": "dict", "of": [[[], 1]]}', '{"is": "set", "of": [[]]}', '{"is": "error", "of": []}',
           "[" * 100 + "]" * 100,
           '{"is": "Listing", "of": [[1], []]}', '{"is": "Capabilities", "of": ["a", 1, 2]}')

    def test_there_and_back(self):
        for value in self.GOOD:
            with self.subTest(value=value):
                back = unpack_value(json.loads(json.dumps(pack_value(value))))
                self.assertEqual((value, type(value)), (back, type(back)))

    def test_each_rule_is_about_a_field(self):
        fields = {field for declared in program.WIRE_CLASSES.values() for field in declared._fields}
        self.assertEqual(set(), (set(program.TEXT_RULES) | set(program.BOUNDS)) - fields)

    def test_errors_keep_their_class_and_hint(self):
        for kind in (BackupError, UsageError, Busy, ReceiverFailed, Stalled, ConnectionLost, program.Refused):
            back = unpack_value(json.loads(json.dumps(pack_value(kind("what", "do", "said")))))
            self.assertEqual((kind, "what", "do", "said"), (type(back), back.message, back.hint, back.detail))

    def test_anything_else_is_refused(self):
        for text in self.BAD:
            with self.subTest(text=text):
                with self.assertRaises(ValueError):
                    unpack_value(json.loads(text))

    def test_what_is_out_of_the_bounds_of_its_field_is_refused(self):
        one, stream = Subvolume("a", UUID), program.ExpectedStream("a", UUID, None, 0, 0, 0o755)
        for bad in (one._replace(name="../a"), one._replace(name=".."), one._replace(name="n" * 256),
                    one._replace(uuid="../a"), one._replace(received_uuid=UUID + "\n"), one._replace(otime=-1),
                    one._replace(subvolid=1 << 64), Place("a", "folder"), Place("/", "pipe"),
                    Listing((), frozenset(["b/c"])), stream._replace(mode=0o10000), stream._replace(uid=1 << 32)):
            with self.subTest(bad), self.assertRaisesRegex(ValueError, "out of bounds"):
                unpack_value(pack_value(bad))

    def test_only_what_is_in_the_table_travels(self):
        for value in (object(), b"bytes", Event("a", "b", "c", {}), 1j):
            with self.assertRaises(TypeError):
                pack_value(value)

    def test_every_call_can_be_checked(self):
        """Its arguments are declared in terms that can be looked at."""
        for name in program.CALLS:
            hints = type_hints(program.declaration(name))
            self.assertIn("return", hints)
            self.assertEqual((hints["return"] is program.Sender, hints["return"] is program.Receiver),
                             (name in program.SENDERS, name in program.RECEIVERS), name)
            for argument, hint in hints.items():
                if argument != "return":
                    is_of_type(None, hint)

    def test_each_call_goes_by_its_own_name_with_all_its_arguments(self):
        asked: Any = []

        class Asked(program.Host):
            def call(self, name, *arguments):
                asked.append((name, arguments))

        for name in sorted(set(program.CALLS) - self.OF_AGENTS):
            arguments = tuple(range(len(type_hints(getattr(program.Host, name))) - 1))
            getattr(Asked(), name)(*arguments)
            self.assertEqual((name, arguments), asked.pop())
            with self.assertRaises(program.Refused) as caught:
                getattr(program.Host(), name)(*arguments)
            self.assertIn(name.replace("_", " "), caught.exception.message)

    def test_this_machine_has_each_call_itself(self):
        for name in set(program.CALLS) - self.OF_AGENTS:
            self.assertIsNot(getattr(program.Host, name), getattr(LocalHost, name), name)


class Frames(unittest.TestCase):

    def pair(self):
        ours, theirs = os.pipe(), os.pipe()
        one, other = Channel(ours[0], theirs[1], "one"), Channel(theirs[0], ours[1], "other")
        self.addCleanup(one.close)
        self.addCleanup(other.close)
        return one, other

    def test_noise_before_the_marker(self):
        chance = support.chance(self)
        for noise in (b"", b"hello\n", b"btrfs-backup-ng\n", program.MARKER[1:-2], b"\n\n\n", bytes(range(256)) * 500):
            one, other = self.pair()
            other.put(noise)
            other.put(program.MARKER)
            other.send_value(program.RESULT, chance.random())
            sender = threading.Thread(target=other.flush, args=(10.0,))
            sender.start()
            one.skip_noise(float("inf"))
            self.assertIsInstance(one.result(5.0), float)
            sender.join()

    def test_another_version(self):
        """It is told no field that it may not know, and what it says more is passed over."""
        place = Place("/", "folder", inside=Subvolume("a", UUID, ctransid=7), free=9)
        for says_so, expected in ((True, place), (False, Place("/", "folder", inside=Subvolume("a", UUID)))):
            one, other = self.pair()
            one.put(program.NOVELTIES * says_so + program.MARKER)
            one.flush(1.0)
            other.skip_noise(float("inf"))
            other.send_value(program.RESULT, place)
            other.flush(1.0)
            self.assertEqual(expected, one.result(1.0))
        packed = pack_value(place)
        packed["of"].append("of a later version")
        self.assertEqual(place, unpack_value(packed))
        self.assertEqual([8, 9], [len(pack_value(value, program.FIRST_FIELDS)["of"])
                                   for value in (place, place.inside)])

    def test_fields_that_come_later_are_told_to_those_alone_who_pass_over_them(self):
        """A class that grows gets the number that it had into FIRST_FIELDS."""
        first = {"Capabilities": 3, "Claim": 3, "ExpectedStream": 10, "FolderNotes": 4, "Greeting": 6, "Health": 5,
                 "HostFacts": 7, "Listing": 5, "LockChange": 3, "Mark": 2, "Pin": 5, "Place": 8, "RawBackup": 15,
                 "Change": 5, "Changes": 2, "FilesFound": 3, "HeldName": 2, "RawFile": 2, "RawFolder": 4, "Record": 12,
                 "ResumePoint": 3, "SendOptions": 3, "SendSize": 3, "Sighting": 12, "Subvolume": 9, "SwapJournal": 9,
                 "SwapOrder": 8, "SwapPlace": 4, "Cost": 4, "Estimate": 2, "HeldFile": 3, "Freed": 3, "Carriage": 9,
                 "Carried": 5, "Trail": 3, "TreeDigest": 3}
        classes = program.WIRE_CLASSES
        self.assertEqual(first, {name: program.FIRST_FIELDS.get(name, len(one._fields))
                                 for name, one in classes.items()})
        for name, count in program.FIRST_FIELDS.items():
            self.assertLessEqual(set(classes[name]._fields[count:]), set(classes[name]._field_defaults))

    def test_noise_without_end(self):
        one, other = self.pair()
        other.put(b"x" * (program.MOST_NOISE * 2))

        def send():
            try:
                other.flush(10.0)
            except BackupError:
                pass

        sender = threading.Thread(target=send)
        sender.start()
        with self.assertRaises(BackupError):
            one.skip_noise(float("inf"))
        os.close(one.read_end)
        sender.join()
        one.read_end = os.open(os.devnull, os.O_RDONLY)

    def test_a_frame_that_is_too_large(self):
        """Of any kind: what an agent of a restricted key is asked costs it no memory either."""
        for kind in (program.RESULT, program.CALL):
            with self.subTest(kind):
                one, other = self.pair()
                other.put(program.FRAME.pack(kind, program.LARGEST_CALL + 1))
                other.flush(1.0)
                with self.assertRaises(ConnectionLost) as caught:
                    one.result(1.0)
                self.assertIs(program.Nonsense, type(caught.exception))

    def test_what_comes_without_end_and_brings_nothing_keeps_no_reader(self):
        """Who could not look up from it would neither heed a signal nor see that the stream has stalled."""
        one, other = self.pair()
        for _ in range(3):
            other.send_value(program.EVENT, None)
        other.send(program.DATA, b"1234")
        other.send(program.DATA)
        other.flush(1.0)
        source, buffer = program.StreamSource(one, ""), bytearray(10)
        for number in range(3):
            self.assertIsNone(source.read(buffer))
            self.assertEqual(number + 1, one.events)
        self.assertEqual(4, source.read(buffer))
        with self.assertRaises(ConnectionLost):
            source.read(buffer)

    def test_what_is_held_back_of_a_stream_is_no_frame(self):
        """As all is before its first command was seen whole, which a first short read may not hold."""
        one, other = self.pair()
        source, sink = program.StreamSource(one, ""), program.StreamSink(other, "")
        for chunk in (b"", b"12", b"", b"34"):
            sink.offer(memoryview(chunk))
        other.flush(1.0)
        self.assertEqual(0, sink.pending)
        buffer, got = bytearray(10), b""
        while len(got) < 4:
            got += bytes(buffer[:source.read(buffer) or 0])
        self.assertEqual(b"1234", got)

    def test_after_a_call_that_ended_within_an_answer_the_connection_is_not_used_again(self):
        """What else comes would be taken for the answer to the next call."""
        for error, is_broken in ((MemoryError(), True), (OSError(24, "Too many open files"), True),
                                 (program.Interrupted(15), True), (Stalled("a"), True), (ConnectionLost("a"), True),
                                 (BackupError("a"), False)):
            for call in ("call", "open_sender", "hold"):
                with self.subTest(error=error, call=call):
                    self.assertEqual(is_broken, self.broken_by(error, call))

    def broken_by(self, error, call):
        """Whether a connection counts as broken when a call over it has ended with an error."""
        def ask(*_):
            raise error

        given: Any = []
        host: Any = object.__new__(program.AgentHost)
        connection = types.SimpleNamespace(is_broken=False)
        host.is_away = host.has_ended = True
        host.token, host.borrow, host.give_back, host.ask = "", lambda: connection, given.append, ask
        host.borrow_for_stream = host.borrow
        with self.assertRaises(type(error)):
            if call == "hold":
                host.hold("/", "a", 0.0).__enter__()
            else:
                getattr(host, call)("list", ("/",), "")
        self.assertEqual([connection], given)
        return connection.is_broken

    def test_nobody_answers(self):
        one, _ = self.pair()
        with self.assertRaises(Stalled):
            one.result(0.3)


if __name__ == "__main__":
    unittest.main()
