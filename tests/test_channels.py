"""Streams to far hosts, over several channels of one connection."""

import os
import re
import signal
import subprocess
import sys
import unittest

import remote
import support
from fakes import as_nobody
from support import MIB, bulk, find_program, wait_until

sys.path.insert(0, os.path.dirname(support.HERE))
import btrfs_backup_ng as program
from btrfs_backup_ng import Carrier, Channel, ConnectionLost, Meeting, Nonsense, StreamSink, StreamSource

TORTURE = int(os.environ.get("TORTURE", 0))
TIMES = TORTURE or 2


def two_ways():
    """The descriptors of both ends of a way of bytes there and back."""
    there, back = os.pipe(), os.pipe()
    return (back[0], there[1]), (there[0], back[1])


class Spread(unittest.TestCase):
    """What is spread over carriers is one stream at the other side."""

    def pair(self, carriers):
        here, there = two_ways()
        one, other = Channel(here[0], here[1], "one"), Channel(there[0], there[1], "other")
        for number in range(1, carriers + 1):
            here, there = two_ways()
            other.carriers[number] = Carrier(*there)
            one.joined.append((number, Carrier(*here)))
        for channel in (one, other):
            for carrier in list(channel.carriers.values()) + [carrier for _, carrier in channel.joined]:
                self.addCleanup(carrier.close)
        return one, other

    def go_through(self, one, other, data, compression=""):
        """What arrives of `data`; the memory of each chunk is another's as soon as that is written."""
        sink, source = StreamSink(one, compression), StreamSource(other, compression)
        self.addCleanup(sink.end)
        self.addCleanup(source.end)
        chance, arrived, held, at = support.chance(self), b"", [], 0
        while True:
            if at < len(data) and sink.pending < 4:
                held.append(bytearray(data[at:at + chance.choice((1, 5000, 70000, MIB))]))
                at += len(held[-1])
                sink.offer(memoryview(held[-1]))
            elif at >= len(data):
                sink.close_pipe()
            sink.pump()
            while len(held) > sink.pending:
                done = held.pop(0)
                done[:] = bytes(len(done))
            buffer = bytearray(chance.choice((1, 3000, MIB)))
            got = source.read(buffer)
            if got == 0:
                return arrived
            arrived += buffer[:got or 0]

    def test_in_order_whatever_the_sizes(self):
        for carriers in (0, 1, 3, 7):
            one, other = self.pair(carriers)
            data = os.urandom(3 * MIB)
            self.assertTrue(data == self.go_through(one, other, data))
            self.assertEqual(list(range(carriers + 1)), one.wide)
            for carrier in list(one.carriers.values())[1:]:
                self.assertGreater(carrier.written, MIB // (carriers + 1))

    def test_one_stream_after_another(self):
        one, other = self.pair(3)
        for _ in range(3):
            data = os.urandom(MIB)
            self.assertTrue(data == self.go_through(one, other, data))

    @unittest.skipUnless(find_program("gzip"), "needs the program gzip")
    def test_compressed(self):
        one, other = self.pair(3)
        data = os.urandom(4 * MIB)
        self.assertTrue(data == self.go_through(one, other, data, "gzip"))

    def test_a_side_that_has_a_carrier_is_told_before_it_is_used(self):
        one, other = self.pair(2)
        one.flush_some()
        self.assertEqual([0], other.wide)
        self.assertIsNone(other.next_frame())
        self.assertIsNone(other.next_frame())
        self.assertEqual([0, 1, 2], other.wide)

    def test_the_fullest_gets_the_least(self):
        one, other = self.pair(1)
        one.flush_some()
        one.carriers[1].put(bytes(MIB))
        one.send_data(memoryview(bytes(300000)))
        self.assertEqual(MIB, one.carriers[1].queued)

    def test_nonsense(self):
        for tag, payload in ((program.ELSEWHERE, b""), (program.ELSEWHERE, b"\0\0\0\0\5"),
                             (program.ELSEWHERE, b"\2\0\0\0\5"), (program.ELSEWHERE, b"\1\0\0\0\0"),
                             (program.ELSEWHERE, b"\1\xff\0\0\5"), (program.WIDER, b"\2"), (program.WIDER, b"\0"),
                             (program.WIDER, b""), (program.WIDER, b"\1\1")):
            one, other = self.pair(1)
            one.send(tag, payload)
            one.joined.clear()
            one.flush(1.0)
            with self.subTest(tag=tag, payload=payload), self.assertRaises(Nonsense):
                other.next_frame()

    def test_a_carrier_that_is_lost_is_a_lost_connection(self):
        one, other = self.pair(1)
        one.flush_some()
        one.send(program.ELSEWHERE, program.WHERE_AND_LENGTH.pack(1, 5))
        one.flush(1.0)
        one.carriers[1].close()
        source = StreamSource(other, "")
        self.assertIsNone(source.read(bytearray(9)))  # that there is a carrier
        with self.assertRaises(ConnectionLost):
            source.read(bytearray(9))
        one, other = self.pair(1)
        one.flush_some()
        other.carriers[1].close()
        one.carriers[1].put(b"12345")
        with self.assertRaises(ConnectionLost):
            one.flush_some()


class Meetings(unittest.TestCase):
    """An agent takes the channels of those alone that have its token and the same rules."""

    def meeting(self, rules="None"):
        here, there = two_ways()
        channel = Channel(here[0], here[1], "other")
        self.addCleanup(channel.close)
        other = Channel(there[0], there[1], "one")
        self.addCleanup(other.close)
        meeting = Meeting(channel, rules)
        self.addCleanup(meeting.end)
        return meeting, other

    def test_a_channel_is_handed_over(self):
        first, _ = self.meeting()
        token = first.spread()
        self.assertEqual(token, first.spread())
        self.assertNotEqual(token, self.meeting()[0].spread())
        for number in (1, 2):
            second, far_end = self.meeting()
            self.assertEqual(number, second.join(token))
            first.channel.carriers[number].put(b"hello")
            first.channel.carriers[number].write_some()
            self.assertEqual(b"hello", far_end.read_some(9))
            self.assertFalse(os.get_inheritable(first.channel.carriers[number].read_end))

    def test_others_are_not_let_in(self):
        first, _ = self.meeting("a key")
        token = first.spread()
        for rules, said in (("a key", "0" * 32), ("another key", token), ("None", token), ("a key", "")):
            with self.subTest(rules=rules, said=said), self.assertRaises(OSError):
                self.meeting(rules)[0].join(said)
        second, _ = self.meeting("a key")
        second.address = lambda token: first.address(first.token)
        with self.assertRaisesRegex(program.BackupError, "takes no more"):
            second.join("0" * 32)
        self.assertEqual({0: first.channel}, first.channel.carriers)
        self.assertEqual(1, self.meeting("a key")[0].join(token))

    def test_there_is_an_end_to_it(self):
        first, _ = self.meeting()
        token, joined = first.spread(), []
        for _ in range(program.MOST_CARRIERS - 1):
            joined.append(self.meeting()[0].join(token))
        self.assertEqual(list(range(1, program.MOST_CARRIERS)), joined)
        wait_until(lambda: first.listener.fileno() < 0)
        with self.assertRaises(OSError):
            self.meeting()[0].join(token)

    def test_a_stranger_who_says_nothing_keeps_nobody_waiting(self):
        first, _ = self.meeting()
        token = first.spread()
        script = "import socket, sys; ways = [socket.socket(socket.AF_UNIX) for _ in range(3)]; " \
                 "[way.connect(chr(0) + sys.argv[1]) for way in ways]; print(flush=True); sys.stdin.read()"
        with subprocess.Popen(as_nobody() + [sys.executable, "-c", script, first.address(token)[1:]],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
            stranger.stdout.readline()
            self.assertEqual(1, self.meeting()[0].join(token))
            stranger.stdin.close()

    def test_agents_of_other_users_are_strangers(self):
        first, _ = self.meeting()
        token = first.spread()
        euid = os.geteuid
        self.addCleanup(setattr, os, "geteuid", euid)
        os.geteuid = lambda: euid() + 1
        with self.assertRaises(program.Refused):
            self.meeting()[0].join(token)


class FarTestCase(remote.RemoteTestCase):

    mib = 48
    SLOWLY = ("--limit", "10M", "-v", "debug")

    def setUp(self):
        super().setUp()
        self.random = support.chance(self)
        self.between = self.proxy(self.server.port, 0.01)
        self.set_endpoints(port=self.between.port)
        bulk(os.path.join(self.source, "bulk"), self.mib)
        self.taken = self.take(1)

    def assertSpread(self, result, channels, logins=1):
        self.assertEqual([], result.errors)
        reached = [int(count) for count in re.findall(r": ([0-9]+) channels$", result.stderr, re.MULTILINE)]
        self.assertEqual(list(range(2, channels + 1)), sorted(set(reached)), result.stderr)
        self.assertEqual(logins, self.server.accepted())
        self.assertBackedUp(self.taken)
        self.assertNothingLeft(self.server)


class OverSeveral(FarTestCase):

    def test_a_push(self):
        self.assertSpread(self.push("-S", "--channels", "4", *self.SLOWLY), 4)

    def test_a_pull(self):
        self.assertSpread(self.pull("-S", "--channels", "4", *self.SLOWLY), 4)

    def test_compressed(self):
        self.assertSpread(self.push("-S", "--channels", "3", "--compress", "gzip", *self.SLOWLY), 3)

    def test_pulled_compressed(self):
        self.assertSpread(self.pull("-S", "--channels", "3", "--compress", "gzip", *self.SLOWLY), 3)

    def test_from_one_host_to_another(self):
        other = self.sshd({self.target_disk.path: self.target_there})
        self.assertSpread(self.pull("-S", "--channels", "3", *self.SLOWLY,
                                    to=[other.endpoint(self.target_there + "/backups")]), 3)
        self.assertEqual(1, other.accepted())
        self.assertNothingLeft(other)

    def test_two_folders_of_one_host_share_the_sessions(self):
        result = self.push("-S", "--channels", "6", *self.SLOWLY, to=[
            self.remote_target, self.remote_target + "-2"])
        self.assertSpread(result, 3)
        self.assertBackedUp(self.taken, self.target + "-2")

    def test_one_channel_is_asked_for(self):
        self.between.delay = 0.05
        self.assertSpread(self.push("-S", "--channels", "1", "-v", "debug"), 1)

    def test_the_next_one_has_them_already(self):
        bulk(os.path.join(self.source, "more"), 16)
        self.taken += self.take(2)
        self.assertSpread(self.push("-S", "--channels", "3", *self.SLOWLY), 3)

    def test_a_server_that_lets_few_sessions_in(self):
        self.server.stop()
        self.server.lines.append("MaxSessions 3")
        self.server.start()
        self.assertSpread(self.push("-S", "--channels", "8", *self.SLOWLY), 3)

    def test_a_server_that_lets_one_session_in(self):
        self.server.stop()
        self.server.lines.append("MaxSessions 1")
        self.server.start()
        self.assertSpread(self.push("-S", "--channels", "8", *self.SLOWLY), 1)

    def test_where_no_connection_can_be_shared(self):
        options = [*remote.ssh_options(), "ControlPath=none", "ControlMaster=no"]
        self.assertSpread(self.push("-S", "--channels", "4", *self.SLOWLY, options=options), 1)


class ByItself(FarTestCase):

    mib = 96

    def test_a_far_host_gets_many(self):
        self.between.delay = 0.05
        self.assertSpread(self.push("-S", "-v", "debug"), 8)

    def test_and_so_does_one_that_is_pulled_from(self):
        self.between.delay = 0.05
        self.assertSpread(self.pull("-S", "-v", "debug"), 8)

    def test_a_near_one_gets_one(self):
        self.set_endpoints()
        self.assertSpread(self.push("-S", "-v", "debug"), 1)


class OnASlowLine(FarTestCase):

    mib = 12

    def test_it_gets_one(self):
        """Also where a busy machine makes the way half a second long."""
        self.between.delay = 0.05
        self.assertSpread(self.push("-S", "--limit", "2M", "-v", "debug"), 1)


class Restricted(remote.RestrictedTestCase):

    mib = 48

    def test_each_channel_is_held_to_the_rules(self):
        bulk(os.path.join(self.source, "bulk"), self.mib)
        taken = self.take(1)
        result = self.push("-S", "--channels", "4", *FarTestCase.SLOWLY)
        self.assertIn(": 4 channels", result.stderr)
        self.assertEqual(1, self.server.accepted())
        self.assertBackedUp(taken)
        self.assertNothingLeft(self.server)


class AsAUserWithSudo(FarTestCase):

    def test_push(self):
        account = self.user(sudo=True)
        self.server.authorize(account.name)
        self.set_endpoints(user=account.name)
        self.assertSpread(self.push("-S", "--ssh-sudo", "--channels", "3", *self.SLOWLY), 3)


class Broken(FarTestCase):
    """Single channels are lost, and whole runs; what has arrived is not sent again."""

    def start_one(self, *options, pull=False):
        ends = [self.remote_source, self.target] if pull else [self.source, self.remote_target]
        run = self.start(*self.program_options() + ["-S", "-p", "home", "--channels", "4"]
                         + list(self.SLOWLY) + list(options) + ends)
        run.wait_for("channels", lambda: ": 4 channels" in run.result().stderr)
        return run

    def end_one_here(self, run):
        """One of the ssh processes of the further channels."""
        sessions = [pid for pid, process in remote.processes_with(b"").items()
                    if process.parent == run.pid and any(b"ProxyCommand" in word for word in process.argv)]
        self.assertEqual(3, len(sessions))
        os.kill(self.random.choice(sessions), signal.SIGKILL)

    def assertGoneOn(self, run):
        result = run.finish()
        self.assertEqual(0, result.status, result.stderr)
        self.assertIn("broke off: the connection to", result.stderr)
        self.assertBackedUp(self.taken)
        self.assertLess(self.between.up + self.between.down, 1.5 * self.mib * MIB)
        self.assertNothingLeft(self.server)

    def test_a_channel_of_a_push_is_lost(self):
        run = self.start_one()
        self.end_one_here(run)
        self.assertGoneOn(run)

    def test_a_channel_of_a_pull_is_lost(self):
        run = self.start_one(pull=True)
        self.end_one_here(run)
        self.assertGoneOn(run)

    def test_the_line_is_cut(self):
        run = self.start_one()
        self.between.cut()
        self.assertGoneOn(run)

    def test_killed_at_random(self):
        for number in range(TIMES):
            pull = bool(number % 2)
            run = self.start_one(pull=pull)
            passed = self.between.up + self.between.down
            some = self.random.randrange(1, 12) * MIB
            run.wait_for("some of it", lambda: self.between.up + self.between.down > passed + some)  # noqa: B023
            os.kill(run.pid, signal.SIGKILL)
            self.assertEqual(-signal.SIGKILL, run.finish().status)
            wait_until(lambda: not self.server.processes())
            (self.pull if pull else self.push)("-S")
            self.assertBackedUp(self.taken)
            support.delete(self.backup_path(self.taken[0]))
            for folder in (self.target, self.snapshots):
                for name in support.hidden(folder):
                    os.unlink(os.path.join(folder, name))
