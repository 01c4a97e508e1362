"""The calls of a host: the same tests on this machine, over a wire to a child process, and through a real sshd."""

import json
import os
import random
import sys
import threading
import unittest

import remote
import support

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import btrfs_backup_ng as program
from btrfs_backup_ng import (
    STAGE_1,
    AgentHost,
    BackupError,
    Busy,
    Capabilities,
    Channel,
    Connection,
    ConnectionLost,
    Event,
    Events,
    ExpectedStream,
    Listing,
    LocalHost,
    LockChange,
    Pin,
    Place,
    ReceiverFailed,
    Relay,
    SendOptions,
    Stalled,
    Subvolume,
    UsageError,
    is_of_type,
    pack_value,
    type_hints,
    unpack_value,
)


class Calls:
    """What every host can do. `here(path)` is where the host's path is for us."""

    def make_host(self, events):
        raise NotImplementedError

    def there(self, path):
        """A path of ours as the host calls it."""
        return path

    def setUp(self):
        super().setUp()
        self.said = []
        self.host = self.make_host(Events(self.said.append))
        self.folder = os.path.join(self.source_disk.path, "snapshots")
        os.mkdir(self.folder)
        self.folder_there = self.there(self.folder)

    def take_one(self, name="one"):
        support.snapshot(self.source, os.path.join(self.folder, name))
        return self.host.list(self.folder_there).named(name)

    def refuse(self, kind, act, *words):
        with self.assertRaises(kind) as caught:
            act()
        for word in words:
            self.assertIn(word, caught.exception.message)
        return caught.exception

    def test_look(self):
        place = self.host.look(self.there(self.source))
        self.assertIsInstance(place, Place)
        self.assertEqual(("folder", True, False), (place.kind, place.is_top, place.readonly))
        self.assertEqual(support.subvolume(self.source).uuid, place.inside.uuid)
        self.assertEqual("missing", self.host.look(self.folder_there + "/gone").kind)
        self.assertEqual(self.host.look(self.folder_there).filesystem, place.filesystem)

    def test_list(self):
        taken = self.take_one("a b\udcff'")
        with open(os.path.join(self.folder, "file"), "w"):
            pass
        listing = self.host.list(self.folder_there)
        self.assertEqual(Listing((taken,), frozenset(["file"])), listing)
        self.assertEqual(support.subvolume(os.path.join(self.folder, taken.name)).uuid, taken.uuid)
        self.assertEqual(LocalHost(Events()).list(self.folder), listing)

    def test_a_folder_that_is_not_there_is_an_error(self):
        error = self.refuse(BackupError, lambda: self.host.list(self.folder_there + "/x"), "no such file", "/x")
        self.assertEqual(1, error.status)

    def test_snapshot_and_delete(self):
        taken = self.host.snapshot(self.there(self.source), self.folder_there, "x")
        self.assertTrue(taken.readonly)
        errors = self.host.delete(self.folder_there, [taken._replace(uuid="another")], False)
        self.assertEqual([BackupError], [type(error) for error in errors])
        self.assertIn("no longer what it was", errors[0].message)
        self.assertEqual([], self.host.delete(self.folder_there, [taken], False))
        self.assertEqual([], os.listdir(self.folder))

    def test_make_folder(self):
        for _ in range(2):
            self.host.make_folder(self.folder_there + "/a/b")
        self.assertTrue(os.path.isdir(os.path.join(self.folder, "a/b")))

    def test_capabilities(self):
        able = self.host.capabilities()
        self.assertIsInstance(able, Capabilities)
        self.assertEqual(LocalHost(Events()).capabilities(), able)

    def test_locks_and_pins(self):
        changed = self.host.change_locks(self.folder_there, [LockChange("a", "/b\udcff", "p")], [])
        self.assertEqual(changed, self.host.read_locks(self.folder_there))
        self.assertEqual({"a": {"locks": ["/b\udcff"], "parent_locks": []}, "p": {"locks": [], "parent_locks": ["/b\udcff"]}},
                         support.read_locks(self.folder))
        self.host.change_locks(self.folder_there, [], [LockChange("a", "/b\udcff", "p")])
        self.assertEqual({}, self.host.read_locks(self.folder_there))
        self.host.change_pins(self.folder_there, "home", {"/b": Pin("a", "uuid", "time", "fs")})
        self.assertEqual({"/b": {"home": Pin("a", "uuid", "time", "fs")}}, self.host.read_pins(self.folder_there))
        self.host.change_pins(self.folder_there, "home", {"/b": None})
        self.assertEqual({}, self.host.read_pins(self.folder_there))

    def test_a_torn_lock_file_is_the_same_error(self):
        support.write_locks(self.folder, b"{torn")
        error = self.refuse(BackupError, lambda: self.host.read_locks(self.folder_there), "damaged or not ours")
        self.assertIn("mend it", error.hint)

    def test_hold(self):
        with self.host.hold(self.folder_there, "home", 0.0):
            with self.assertRaises(Busy) as caught:
                with LocalHost(Events()).hold(self.folder, "home", 0.0):
                    pass
            self.assertEqual(75, caught.exception.status)
            self.host.list(self.folder_there)
        with LocalHost(Events()).hold(self.folder, "home", 0.0):
            with self.assertRaises(Busy):
                with self.host.hold(self.folder_there, "home", 0.0):
                    pass
        with self.host.hold(self.folder_there, "home", 0.0):
            pass

    def test_measured(self):
        self.write("data", "x" * 100000)
        self.take_one()
        size = self.host.measured(self.folder_there, "one", None)
        self.assertTrue(size.ended)
        self.assertGreaterEqual(size.file_data, 100000)

    def test_what_happens_is_told(self):
        self.host.snapshot(self.there(self.source), self.folder_there, "x")
        self.assertTrue(any(event.kind == "command" and "subvolume snapshot" in event.text for event in self.said))

    def transfer(self, snapshot, parent=None, base=None):
        """From this host to this host, through two streams."""
        target = self.there(self.target)
        expected = self.host.expected_stream(self.folder_there, snapshot, parent)._replace(base=base)
        receiver = self.host.open_receive(target, expected, False)
        sender = self.host.open_send(self.folder_there, snapshot.name, parent.name if parent else None, SendOptions())
        relayed = Relay(sender, {"x": receiver}, 60.0, lambda *_: None).run()
        self.assertEqual({}, relayed.errors)
        return relayed.backups["x"]

    def test_streams(self):
        churn = support.Churn(self.source)
        churn.fill()
        first = self.take_one("one")
        backup = self.transfer(first)
        self.assertEqual(first.uuid, backup.received_uuid)
        churn.change()
        second = self.take_one("two")
        self.transfer(second, first, backup.uuid)
        for name in ("one", "two"):
            self.assertComplete(os.path.join(self.target, name), os.path.join(self.folder, name))

    def test_a_stream_that_is_given_up_leaves_the_host_usable(self):
        self.write("data", os.urandom(1 << 22).hex())
        first = self.take_one()
        expected = self.host.expected_stream(self.folder_there, first, None)
        sender = self.host.open_send(self.folder_there, "one", None, SendOptions())
        buffer = bytearray(1 << 16)
        while sender.read(buffer) is None:
            sender.wait_readable(0.1)
        sender.end()
        receiver = self.host.open_receive(self.there(self.target), expected, False)
        receiver.offer(memoryview(bytes(buffer)))
        receiver.pump()
        receiver.end()
        self.assertEqual([], support.names(self.target))
        self.assertEqual(["one"], [s.name for s in self.host.list(self.folder_there).subvolumes])

    def test_what_cannot_be_received_is_said(self):
        self.take_one()
        expected = ExpectedStream("one", "00000000-0000-0000-0000-000000000001", None, 0, 0, 0o755)
        receiver = self.host.open_receive(self.there(self.target), expected, False)
        sender = self.host.open_send(self.folder_there, "one", None, SendOptions())
        relayed = Relay(sender, {"x": receiver}, 60.0, lambda *_: None).run()
        self.assertIn("not the planned one", relayed.errors["x"].message)
        self.host.list(self.folder_there)


class Here(Calls, support.BackupTestCase):

    def make_host(self, events):
        return LocalHost(events)


class OverAWire(Calls, support.BackupTestCase):

    noise = "echo 'Welcome!'; "

    def connect(self, _first):
        return Connection("child", ["sh", "-c", self.noise + "exec {} -E -s -c '{}'".format(support.PYTHON, STAGE_1)])

    def make_host(self, events):
        host = AgentHost("child", self.connect, events)
        self.addCleanup(host.end)
        return host

    def test_two_calls_at_once(self):
        """Each has a connection of its own, and the first one stays as it was."""
        found = []
        with self.host.hold(self.folder_there, "home", 0.0):
            threads = [threading.Thread(target=lambda: found.append(self.host.look("/"))) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(4, len(found))

    def test_a_connection_that_breaks_is_replaced_and_holds_again(self):
        with self.host.hold(self.folder_there, "home", 0.0):
            for connection in self.host.all:
                connection.stage.process.kill()
            with self.assertRaises(ConnectionLost):
                self.host.look("/")
            self.host.look("/")
            with self.assertRaises(Busy):
                with LocalHost(Events()).hold(self.folder, "home", 0.0):
                    pass

    def test_the_agent_ends_with_its_channel(self):
        pids = [connection.stage.process.pid for connection in self.host.all]
        self.host.end()
        for pid in pids:
            self.assertFalse(os.path.exists("/proc/{}".format(pid)))

    def test_unknown_calls_and_wrong_arguments(self):
        for name, arguments in (("system", ("true",)), ("__init__", ()), ("command", (["true"], "x")), ("list", (3,)),
                                ("list", ()), ("list", ("/", "/")), ("delete", ("/", [1], False)),
                                ("hold", ("/", "x", "1")), ("look", (None,))):
            with self.subTest(name=name, arguments=arguments):
                self.refuse(BackupError, lambda name=name, arguments=arguments: self.host.call(name, *arguments))
        self.host.look("/")


class OverSsh(Calls, remote.RemoteTestCase):

    def make_host(self, events):
        task = program.Task(ssh_options=tuple(remote.ssh_options()))
        hosts = program.Hosts(task, events)
        self.addCleanup(hosts.end)
        return hosts.of(program.parse_endpoint(self.remote_source))

    def there(self, path):
        for here, there in ((self.source_disk.path, self.source_there), (self.target_disk.path, self.target_there)):
            if path.startswith(here):
                return there + path[len(here):]
        return path


class Values(unittest.TestCase):
    """What travels arrives as it was, and nothing else arrives."""

    GOOD = (None, True, 0, -1, 1 << 60, 1.5, float("inf"), "", "a\udcff\n\"", [], [1, "a", None], (), (1, (2,)), {},
            {"a": [1], "b": {"c": ()}}, frozenset(), frozenset(["a", "b"]),
            Subvolume("a", None), Listing((Subvolume("a", "b"),), frozenset(["c"])), Place("/", "folder"),
            Pin("a", "b", "c"), LockChange("a", "b"), Capabilities(True, False, (6, 2)), SendOptions())

    BAD = ('{"is": "Subvolume", "of": []}', '{"is": "Subvolume", "of": [1, 2]}', '{"is": "os", "of": []}', '{"is": "a"}',
           '{"of": []}', "{}", '{"is": [], "of": []}', '{"is": "tuple", "of": {}}', '{"is": "dict", "of": [[1]]}',
           '{"is": "dict", "of": [[[], 1]]}', '{"is": "set", "of": [[]]}', '{"is": "error", "of": []}', "[" * 100 + "]" * 100,
           '{"is": "Listing", "of": [[1], []]}', '{"is": "Capabilities", "of": ["a", 1, 2]}')

    def test_there_and_back(self):
        for value in self.GOOD:
            with self.subTest(value=value):
                back = unpack_value(json.loads(json.dumps(pack_value(value))))
                self.assertEqual((value, type(value)), (back, type(back)))

    def test_errors_keep_their_class_and_hint(self):
        for kind in (BackupError, UsageError, Busy, ReceiverFailed, Stalled, ConnectionLost, program.Refused):
            back = unpack_value(json.loads(json.dumps(pack_value(kind("what", "do", "said")))))
            self.assertEqual((kind, "what", "do", "said"), (type(back), back.message, back.hint, back.detail))

    def test_anything_else_is_refused(self):
        for text in self.BAD:
            with self.subTest(text=text):
                with self.assertRaises(ValueError):
                    unpack_value(json.loads(text))

    def test_only_what_is_in_the_table_travels(self):
        for value in (object(), b"bytes", Event("a", "b", "c", {}), 1j):
            with self.assertRaises(TypeError):
                pack_value(value)

    def test_every_call_can_be_checked(self):
        """Its arguments are declared in terms that can be looked at."""
        for name in program.CALLS:
            hints = type_hints(getattr(LocalHost, {"release": "hold"}.get(name, name)))
            self.assertIn("return", hints)
            for argument, hint in hints.items():
                if argument != "return":
                    is_of_type(None, hint)


class Frames(unittest.TestCase):

    def pair(self):
        ours, theirs = os.pipe(), os.pipe()
        one, other = Channel(ours[0], theirs[1], "one"), Channel(theirs[0], ours[1], "other")
        self.addCleanup(one.close)
        self.addCleanup(other.close)
        return one, other

    def test_noise_before_the_marker(self):
        chance = random.Random(1)
        for noise in (b"", b"hello\n", b"btrfs-backup-ng\n", program.MARKER[1:-2], b"\n\n\n", bytes(range(256)) * 500):
            one, other = self.pair()
            other.send_raw(noise)
            other.send_raw(program.MARKER)
            other.send_value(program.RESULT, chance.random())
            sender = threading.Thread(target=other.flush, args=(10.0,))
            sender.start()
            one.skip_noise(float("inf"))
            self.assertIsInstance(one.result(5.0), float)
            sender.join()

    def test_noise_without_end(self):
        one, other = self.pair()
        other.send_raw(b"x" * (program.MOST_NOISE * 2))

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
        one, other = self.pair()
        other.send_raw(program.FRAME.pack(program.RESULT, program.LARGEST_FRAME + 1))
        other.flush(1.0)
        with self.assertRaises(ConnectionLost):
            one.result(1.0)

    def test_nobody_answers(self):
        one, _ = self.pair()
        with self.assertRaises(Stalled):
            one.result(0.3)


if __name__ == "__main__":
    unittest.main()
