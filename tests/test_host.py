"""One suite for every kind of host: this machine, an agent that is a child, an agent over a real sshd.

What a call gives or raises, and what its streams do, must not depend on where it is done.
"""

import contextlib
import functools
import os
import shlex
import signal
import sys
import threading
import unittest
from typing import Any
from unittest import mock

import remote
import support
from support import create, names, partials, wait_until

sys.path.insert(0, os.path.dirname(support.HERE))
import btrfs_backup_ng as program
from btrfs_backup_ng import BackupError, LockChange, Pin, SendOptions, Subvolume

ODD = "caf\udce9 \u00e9 \"quoted\" $HOME it's"
NOTHING = Subvolume("nothing", "01234567-89ab-cdef-0123-456789abcdef")


def agent_argv():
    """How an agent is begun over ssh, without the ssh."""
    return [support.PYTHON, "-I", "-c", program.STAGE_1]


class HostTestCase(remote.RemoteTestCase):
    """`host` is under test, `here` the host that it is held against."""

    def setUp(self):
        super().setUp()
        self.told = []
        self.events = program.Events(self.told.append)
        self.here: Any = program.LocalHost(program.Events(lambda event: None))
        self.host: Any = self.make_host()
        self.folder = self.target  # a folder as the host under test sees it
        self.churn = support.Churn(self.source)
        self.churn.fill(30)

    def make_host(self):
        raise NotImplementedError

    def there(self, path):
        """A path of this machine as the host under test sees it."""
        return path

    def found(self, folder, name):
        """A subvolume as the program knows it."""
        return self.here.list(folder).named(name)


class Suite:
    """The tests, for a HostTestCase to inherit."""

    def test_what_it_can(self):
        self.assertEqual(self.here.capabilities(), self.host.capabilities())
        self.assertEqual(os.uname().nodename, self.host.name())

    def test_looking(self):
        os.mkdir(os.path.join(self.target, "folder"))
        os.symlink("folder", os.path.join(self.target, "link"))
        remote.write_file(os.path.join(self.target, "file"), "")
        self.take(1)
        odd = create(os.path.join(self.target, ODD))
        for disk in (self.source_disk, self.target_disk):  # what is written between two looks changes a generation
            support.command("btrfs", "filesystem", "sync", disk.path)
        for path in (self.source, self.target, odd, self.snapshot_path(self.name(1)), self.target + "/folder",
                     self.target + "/link", self.target + "/file", self.target + "/missing/too"):
            with self.subTest(path=path):
                here, there = self.here.look(path), self.host.look(self.there(path))
                self.assertEqual(list(map(self.there, (here.path, here.top))), [there.path, there.top])
                self.assertEqual(self.nameless(here), self.nameless(there))

    @staticmethod
    def nameless(place):
        """Without what differs where a disk is mounted elsewhere."""
        return place._replace(path="", mount="", top="", inside=place.inside and place.inside._replace(name=""))

    def test_listing(self):
        self.take(1, 2)
        create(os.path.join(self.snapshots, ODD))
        os.mkdir(os.path.join(self.snapshots, "folder \udcff"))
        for folder in (self.snapshots, self.target):
            self.assertEqual(self.here.list(folder), self.host.list(self.there(folder)))
        self.assertEqual(3, len(self.host.list(self.there(self.snapshots)).subvolumes))

    def test_what_cannot_be_listed(self):
        for path in (self.target + "/missing", os.path.join(self.source, "plain")):
            remote.write_file(os.path.join(self.source, "plain"), "")
            with self.assertRaises(BackupError) as here:
                self.here.list(path)
            with self.assertRaises(BackupError) as there:
                self.host.list(self.there(path))
            self.assertIn("cannot list " + self.there(path), there.exception.message)
            self.assertEqual(here.exception.hint, there.exception.hint)
            self.assertEqual(here.exception.message.rpartition(":")[2], there.exception.message.rpartition(":")[2])
        self.assertEqual((), self.host.list(self.there(self.target)).subvolumes, "the host goes on after an error")

    def test_snapshot_and_delete(self):
        os.makedirs(self.snapshots)
        taken = self.host.snapshot(self.there(self.source), self.there(self.snapshots), self.name(1))
        self.assertEqual(self.found(self.snapshots, self.name(1)), taken)
        self.assertTreesEqual(self.source, self.snapshot_path(self.name(1)))
        gone = taken._replace(uuid=NOTHING.uuid)
        errors = self.host.delete(self.there(self.snapshots), [gone, NOTHING], False)
        self.assertEqual(2, len(errors))
        for error in errors:
            self.assertIn("no longer what it was", error.message)
        self.assertEqual([self.name(1)], names(self.snapshots))
        self.assertEqual([], self.host.delete(self.there(self.snapshots), [taken], True))
        self.assertEqual([], names(self.snapshots))
        self.host.wait_for_cleaning(self.there(self.snapshots))

    def test_a_snapshot_that_cannot_be_taken(self):
        self.take(1)
        with self.assertRaises(BackupError) as here:
            self.here.snapshot(self.source, self.snapshots, self.name(1))
        with self.assertRaisesRegex(BackupError, "cannot take a snapshot of") as there:
            self.host.snapshot(self.there(self.source), self.there(self.snapshots), self.name(1))
        self.assertEqual(here.exception.message.rpartition(":")[2], there.exception.message.rpartition(":")[2])

    def test_folders(self):
        self.host.make_folder(self.there(self.target + "/one/" + ODD))
        self.host.make_folder(self.there(self.target + "/one"))
        self.assertTrue(os.path.isdir(os.path.join(self.target, "one", ODD)))
        remote.write_file(os.path.join(self.target, "file"), "")
        with self.assertRaisesRegex(BackupError, "cannot make the folder"):
            self.host.make_folder(self.there(self.target + "/file/below"))

    def test_locks_and_pins(self):
        os.makedirs(self.snapshots)
        folder = self.there(self.snapshots)
        add = [LockChange("one", "/mnt/" + ODD, None), LockChange("two", "ssh://nas/b", "one")]
        after = self.host.change_locks(folder, add, [])
        self.assertEqual(after, self.host.read_locks(folder))
        self.assertEqual(after, self.here.read_locks(self.snapshots))
        self.host.change_locks(folder, [], add[:1])
        self.assertEqual({"one": {"locks": [], "parent_locks": ["ssh://nas/b"]},
                          "two": {"locks": ["ssh://nas/b"], "parent_locks": []}}, support.read_locks(self.snapshots))
        found = {"/mnt/b": Pin("home20240101-000000", NOTHING.uuid or "", "2024-01-01T00:00:00")}
        self.host.change_pins(folder, "home", found)
        self.assertEqual({"/mnt/b": {"home": (found["/mnt/b"],)}}, self.host.read_pins(folder))
        self.assertEqual(self.here.read_pins(self.snapshots), self.host.read_pins(folder))
        self.host.change_pins(folder, "home", {"/mnt/b": None})
        self.assertEqual({}, self.here.read_pins(self.snapshots))

    def test_damaged_locks(self):
        support.write_locks(self.snapshots, b"{")
        with self.assertRaises(BackupError) as here:
            self.here.read_locks(self.snapshots)
        with self.assertRaises(BackupError) as there:
            self.host.read_locks(self.there(self.snapshots))
        self.assertEqual(here.exception.hint, there.exception.hint)
        self.assertIn(".outstanding_transfers", there.exception.message)

    def test_the_lock_of_a_run(self):
        os.makedirs(self.snapshots)
        folder = self.there(self.snapshots)
        with self.host.hold(folder, "home", 0):
            with self.assertRaises(program.Busy), self.here.hold(self.snapshots, "home", 0):
                pass
            with self.here.hold(self.snapshots, "other", 0):
                self.assertEqual((), self.host.list(folder).subvolumes)
        with self.here.hold(self.snapshots, "home", 0):
            with self.assertRaises(program.Busy), self.host.hold(folder, "home", 0):
                pass
            with self.assertRaises(program.Busy), self.host.hold(folder, "home", 0.3):
                pass
            self.assertTrue(any("waiting for another run" in event.text for event in self.told))
        with self.host.hold(folder, "home", 0):
            pass

    def test_the_size_of_a_send(self):
        self.take(1, 2)
        folder = self.there(self.snapshots)
        for parent in (None, self.name(1)):
            measured = self.host.measured(folder, self.name(2), parent)
            self.assertEqual(self.here.measured(self.snapshots, self.name(2), parent), measured)
            measuring = self.host.measure_send(folder, self.name(2), parent)
            self.assertEqual(measured.stream_size, measuring.wait().stream_size)
            measuring.end()
        generation = self.found(self.snapshots, self.name(1)).generation
        path = self.snapshot_path(self.name(2))
        self.assertEqual(self.here.data_since(path, generation), self.host.data_since(self.there(path), generation))

    def test_nested_subvolumes(self):
        create(os.path.join(self.source, "nested one"))
        create(os.path.join(self.source, "plain" + ODD))
        self.take(1)
        found = self.host.nested_subvolumes(self.there(self.source), self.there(self.snapshots))
        self.assertEqual(sorted(["nested one", "plain" + ODD]), sorted(found))

    # -- streams

    def expected(self, name, parent=None):
        snapshot_, base = self.found(self.snapshots, name), parent and self.found(self.snapshots, parent)
        expected = self.host.expected_stream(self.there(self.snapshots), snapshot_, base)
        self.assertEqual(self.here.expected_stream(self.snapshots, snapshot_, base), expected)
        return expected._replace(base=self.found(self.target, parent).uuid) if parent else expected

    def relay(self, sender, receiver, name, parent=None, before_run=None):
        """One snapshot from a host to a host, each (host, its view of paths)."""
        expected = self.expected(name, parent)
        (receiving, view), (sending, view_of_source) = receiver, sender
        lane = receiving.open_receive(view(self.target), expected, False)
        source = sending.open_send(view_of_source(self.snapshots), name, parent, SendOptions())
        relay = program.Relay(source, {"": lane}, 20)
        if before_run:
            before_run(relay)
        return relay.run()

    def sides(self):
        return (self.host, self.there), (self.here, str)

    def test_streams_each_way(self):
        under_test, here = self.sides()
        for day, (sender, receiver) in enumerate([(under_test, here), (here, under_test), (under_test, under_test)], 1):
            self.churn.change(20)
            self.take(day)
            done = self.relay(sender, receiver, self.name(day), self.name(day - 1) if day > 1 else None)
            self.assertEqual({}, done.errors)
            self.assertEqual(self.found(self.target, self.name(day)).uuid, done.backups[""].uuid)
            self.assertGreater(done.size, 0)
        self.assertBackedUp([self.name(1), self.name(2), self.name(3)])

    def test_many_small_ones(self):
        under_test, here = self.sides()
        days = list(range(1, 13))
        self.take(*days)
        for day in days:
            done = self.relay(here, under_test, self.name(day), self.name(day - 1) if day > 1 else None)
            self.assertEqual({}, done.errors)
        self.assertBackedUp([self.name(day) for day in days])

    def test_a_large_one(self):
        support.bulk(os.path.join(self.source, "bulk"), 80)
        self.take(1)
        under_test, here = self.sides()
        self.assertEqual({}, self.relay(here, under_test, self.name(1)).errors)
        self.assertBackedUp([self.name(1)])

    def test_a_receiver_that_refuses(self):
        """A name that exists already: the sender is not left waiting, the host goes on."""
        support.bulk(os.path.join(self.source, "bulk"), 20)
        self.take(1)
        create(self.backup_path(self.name(1)))
        under_test, here = self.sides()
        with self.assertRaisesRegex(program.ReceiverFailed, "exists"):
            raise self.relay(here, under_test, self.name(1)).errors[""]
        self.assertEqual([], partials(self.target))
        support.delete(self.backup_path(self.name(1)))
        self.assertEqual({}, self.relay(here, under_test, self.name(1)).errors)
        self.assertBackedUp([self.name(1)])

    def test_a_sender_that_fails(self):
        self.take(1)
        with self.assertRaises(BackupError) as raised:
            sender = self.host.open_send(self.there(self.snapshots), self.name(9), None, SendOptions())
            try:
                buffer = bytearray(1000)
                while sender.read(buffer) != 0:
                    sender.wait_readable(0.1)
                sender.finish(5)
            finally:
                sender.end()
        self.assertIn("cannot send {}".format(self.there(self.snapshots)), raised.exception.message)
        under_test, here = self.sides()
        self.assertEqual({}, self.relay(under_test, here, self.name(1)).errors)

    def test_another_stream_than_planned(self):
        """The name is right, the content is not: nothing is received."""
        self.take(1, 2)
        expected = self.expected(self.name(2))
        lane = self.host.open_receive(self.there(self.target), expected, False)
        source = self.here.open_send(self.snapshots, self.name(1), None, SendOptions())
        done = program.Relay(source, {"": lane}, 20).run()
        self.assertEqual([""], list(done.errors))
        self.assertEqual([], names(self.target) + partials(self.target))

    def test_given_up_half_way(self):
        """A receiver that is ended early leaves no process, and the host goes on."""
        support.bulk(os.path.join(self.source, "bulk"), 40)
        self.take(1)
        for opened in range(2):
            lane = self.host.open_receive(self.there(self.target), self.expected(self.name(1)), False)
            source = self.here.open_send(self.snapshots, self.name(1), None, SendOptions())
            buffer = bytearray(1 << 20)
            got = 0
            while got < 5 << 20 and opened:
                size = source.read(buffer)
                if size:
                    got += size
                    lane.offer(memoryview(bytes(buffer[:size])))
                lane.pump()
            source.end()
            lane.end()
            lane.end()
            for left in partials(self.target):
                support.delete(os.path.join(self.target, left))
        sender = self.host.open_send(self.there(self.snapshots), self.name(1), None, SendOptions())
        sender.end()
        under_test, here = self.sides()
        self.assertEqual({}, self.relay(here, under_test, self.name(1)).errors)
        self.assertBackedUp([self.name(1)])

    def test_several_streams_at_once(self):
        """And calls between them."""
        support.bulk(os.path.join(self.source, "bulk"), 30)
        self.take(1, 2, 3)
        under_test, here = self.sides()
        done = []

        def work(day):
            done.append((day, self.relay(under_test if day == 2 else here, under_test, self.name(day)).errors))

        threads = [threading.Thread(target=work, args=(day,)) for day in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            self.assertEqual(3, len(self.host.list(self.there(self.snapshots)).subvolumes))
        for thread in threads:
            thread.join(60)
        self.assertEqual([(1, {}), (2, {}), (3, {})], sorted(done))
        self.assertBackedUp([self.name(1), self.name(2), self.name(3)])


class Here(Suite, HostTestCase):

    def make_host(self):
        return program.LocalHost(self.events)

    def test_a_base_in_another_folder(self):
        """It travels by its name; what a receiver must know of it is read at its path."""
        self.take(1)
        self.transfer()
        name, elsewhere = self.name(1), os.path.join(os.path.dirname(self.target), "elsewhere")
        base = self.found(self.target, name)
        os.mkdir(elsewhere)
        self.assertEqual((base.received_uuid, base), self.host.find_base(elsewhere, [base.received_uuid]))
        expected = self.host.expected_stream(self.snapshots, self.found(self.snapshots, name), None)
        expected = expected._replace(base=base.uuid, parent_name=name)
        self.assertEqual(self.backup_path(name), self.host.base_path(elsewhere, expected))


class AgentSuite(Suite):
    """What holds for hosts with an agent alone."""

    def argv(self):
        raise NotImplementedError

    def make_host(self):
        host = program.AgentHost("nas", lambda is_first: program.Connection("nas", self.argv()), self.events)
        self.addCleanup(host.end)
        return host

    def agents(self):
        """The pids of the agents at work."""
        return [pid for pid, process in remote.processes_with(b"").items()
                if any(argument == program.STAGE_1.encode() or argument.startswith(b"LINE = ")
                       for argument in process.argv)
                and self.is_ours(pid)]

    def is_ours(self, pid):
        raise NotImplementedError

    def test_each_error_names_the_machine(self):
        with self.assertRaisesRegex(BackupError, "^nas: cannot list"):
            self.host.list("/proc/nowhere")

    def test_calls_that_there_are_not(self):
        for name in ("command", "run", "make_writable", "__class__", "nothing"):
            with self.assertRaises(BackupError):
                self.host.call(name)
        for arguments in ((), (1,), ("a", "b", "c"), (["a"],), (None,)):
            with self.assertRaises(BackupError):
                self.host.call("list", *arguments)
        self.assertEqual((), self.host.list(self.there(self.target)).subvolumes)

    def test_a_call_that_is_too_large_to_be_told_keeps_no_connection(self):
        expected = program.ExpectedStream(self.name(1), "x" * program.LARGEST_CALL, None, 0, 0, 0)
        with self.assertRaisesRegex(BackupError, "too much to send"):
            self.host.open_receive(self.there(self.target), expected, False)
        self.assertEqual(self.host.all, self.host.idle)

    def test_none_is_connected_to_once_all_is_over(self):
        """A call whose connection is lost may wait for another one then, or to try once more."""
        for is_lost in (False, True):
            with self.subTest(is_lost=is_lost):
                host, begun, over = self.make_host(), threading.Event(), threading.Event()
                connect, host.retries, calls = host.connect, 1, []

                def slowly(is_first, connect=connect, calls=calls, begun=begun, over=over, is_lost=is_lost):
                    calls.append(is_first)
                    begun.set()
                    if is_lost and len(calls) == 1:
                        raise program.ConnectionLost("lost")
                    over.wait(60)
                    return connect(is_first)

                for pid in self.agents():
                    os.kill(pid, signal.SIGKILL)
                self.assertTrue(wait_until(lambda host=host: not any(one.is_alive() for one in host.all)))
                host.connect = slowly
                call: Any = program.Background(functools.partial(host.call, "facts"))
                self.assertTrue(begun.wait(60))
                host.end()
                over.set()
                with self.assertRaises(program.ConnectionLost):
                    call.result()
                self.assertEqual(1, len(calls))
                self.assertTrue(wait_until(lambda: not self.agents()), "agents are left")

    def test_a_killed_agent_is_replaced(self):
        os.makedirs(self.snapshots)
        folder = self.there(self.snapshots)
        with self.host.hold(folder, "home", 0):
            for pid in self.agents():
                os.kill(pid, signal.SIGKILL)
            self.assertTrue(wait_until(lambda: not self.agents()), "agents are left")
            # The news may come later than the death: ssh has to hear of it first.
            self.assertTrue(wait_until(lambda: not any(connection.is_alive() for connection in self.host.all)))
            self.assertEqual((), self.host.list(folder).subvolumes)
            # The lock of the run is held again.
            with self.assertRaises(program.Busy), self.here.hold(self.snapshots, "home", 0):
                pass
        with self.here.hold(self.snapshots, "home", 0):
            pass

    def test_without_its_run_lock_nothing_is_done(self):
        """The connection was lost, and another run has taken the lock meanwhile."""
        os.makedirs(self.snapshots)
        folder = self.there(self.snapshots)
        with mock.patch.object(program, "ENDING_TIMEOUT", 0.1), self.host.hold(folder, "home", 0):
            for pid in self.agents():
                os.kill(pid, signal.SIGKILL)
            self.assertTrue(wait_until(lambda: not self.agents()), "agents are left")
            self.assertTrue(wait_until(lambda: not any(connection.is_alive() for connection in self.host.all)))
            with self.here.hold(self.snapshots, "home", 0):
                for _ in range(3):
                    self.assertRaises(program.Busy, self.host.list, folder)
            self.assertEqual((), self.host.list(folder).subvolumes)
            with self.assertRaises(program.Busy), self.here.hold(self.snapshots, "home", 0):
                pass
        with self.here.hold(self.snapshots, "home", 0):  # it is let go by its own name
            pass
        self.assertEqual(1, len(self.host.all))

    def test_no_agent_outlives_the_host(self):
        self.take(1)
        self.host.open_send(self.there(self.snapshots), self.name(1), None, SendOptions())
        self.assertTrue(self.agents())
        self.host.end()
        self.assertTrue(wait_until(lambda: not self.agents()), "agents are left")

    def test_a_listing_of_many(self):
        os.makedirs(self.snapshots)
        for number in range(300):
            remote.write_file(os.path.join(self.snapshots, "%d" % number + "x" * 240), "")
        self.assertEqual(300, len(self.host.list(self.there(self.snapshots)).others))


class AgentHere(AgentSuite, HostTestCase):
    """A child in the place of ssh."""

    def argv(self):
        return ["env", "XDG_CACHE_HOME=" + self.server.cache] + agent_argv()

    def is_ours(self, pid):
        with contextlib.suppress(OSError):  # one of another test, which has ended since it was found
            with open("/proc/%d/stat" % pid, "rb") as stat:
                return int(stat.read().rpartition(b")")[2].split()[1]) == os.getpid()
        return False


    def test_an_old_python_says_what_it_is(self):
        pretend = "import sys; sys.version_info = (3, 5, 9); " + program.STAGE_1
        with self.assertRaisesRegex(program.NoPython, "nas has only Python 3.5"):
            program.Connection("nas", [support.PYTHON, "-I", "-c", pretend])


class AgentThere(AgentSuite, HostTestCase):
    """Over ssh, where the paths are others."""

    def argv(self):
        command = "python3 -I -c " + shlex.quote(program.STAGE_1)
        return self.server.argv(command)

    def there(self, path):
        for here, there in ((self.source_disk.path, self.source_there), (self.target_disk.path, self.target_there)):
            if path.startswith(here):
                return there + path[len(here):]
        return path

    def is_ours(self, pid):
        return pid in self.server.processes()


if __name__ == "__main__":
    unittest.main()
