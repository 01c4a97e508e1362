"""Hosts that say anything: nothing runs here, nothing is written but the job's own, each ends in words.

HOSTILE=5000 says how many; TORTURE does as well, the default is a short form. FIRST_CASE begins elsewhere.
"""

import contextlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
import types
import unittest
from typing import Any

import hostile_agent
import support

sys.path.insert(0, os.path.dirname(support.HERE))
import btrfs_backup_ng as program

CASES = int(os.environ.get("HOSTILE") or (5000 if os.environ.get("TORTURE") else 25))
PATIENCE = 60.0  # seconds for one case, on a machine that is busy
MOST_MEMORY = 700 << 10  # KiB
UUID = "01234567-89ab-cdef-0123-456789abcdef"
OURS = re.compile(r"\.?home[0-9]{8}-[0-9]{6}.*|\.(home\.)?(lock|source)|\.sizes|"
                  r"\.outstanding_transfers|\.(own-)?destinations\.json")
ODD = (None, True, -1, 0, 7, 2 ** 63, 2 ** 64 + 1, 10 ** 30, 1e300, "", "/", "..", "../../etc/passwd", "-rf", "a/b",
       "\0", "new\nline", "\x1b[2J", "x" * 5000, "\udcff", UUID, "home20200101-000000", [], [[]], {}, {"a": 1},
       {"is": "tuple", "of": []}, {"is": "dict", "of": [["home20200101-000000", 1.0]]}, {"is": "set", "of": ["x"]},
       {"is": "Subvolume", "of": ["../evil", UUID]}, {"is": "error", "of": ["Busy", "m", "h", "d", True]},
       {"is": "error", "of": ["Interrupted", "m\x1b", "h", "d", False]})


class Liar:
    """Changes what an agent says, by chance."""

    def __init__(self, seed, channel):
        self.random, self.channel = random.Random(seed), channel
        self.right, channel.send = channel.send, self.send
        self.share = self.random.choice((0.05, 0.2, 0.6))
        self.kinds = {"greeting": 0.1}

    def send(self, kind, payload=b""):
        if self.random.random() >= self.share * (0.1 if kind in (program.DATA, program.EVENT) else 1):
            self.right(kind, payload)
            return
        lies = [self.other_value, self.other_value, self.changed, self.changed, self.other_kind, self.torn, self.silent,
                self.forged, self.twice, self.deep, self.large, self.endless, self.bytes]
        self.random.choice(lies)(kind, bytes(payload))

    def other_value(self, kind, payload):
        self.right(kind, json.dumps(self.random.choice(ODD)).encode())

    def changed(self, kind, payload):
        """One node of the value is another."""
        try:
            value = json.loads(payload.decode("ascii"))
        except ValueError:
            self.bytes(kind, payload)
            return
        for _ in range(self.random.choice((1, 1, 3))):
            value = self.change(value)
        self.right(kind, json.dumps(value).encode())

    def change(self, value):
        inner = value["of"] if isinstance(value, dict) and isinstance(value.get("of"), list) else value
        if isinstance(inner, list) and inner and self.random.random() < 0.85:
            at = self.random.randrange(len(inner))
            inner[at] = self.change(inner[at])
            return value
        return self.random.choice(ODD)

    def other_kind(self, kind, payload):
        self.right(self.random.choice([b"C", b"R", b"X", b"L", b"D", b"F", b"A", b"P", b"W", b"z"]), payload)

    def torn(self, kind, payload):
        length = (len(payload) + self.random.choice((-3, 5, 1 << 20, 1 << 31))) % (1 << 32)
        self.channel.put(program.FRAME.pack(kind, length))
        self.channel.put(payload)
        if self.random.random() < 0.5:
            self.leave(kind, payload)

    def leave(self, kind, payload):
        with contextlib.suppress(program.BackupError):
            self.channel.flush(1.0)
        os._exit(0)

    def silent(self, kind, payload):
        time.sleep(PATIENCE)

    def forged(self, kind, payload):
        for told in hostile_agent.forged("/tmp/never"):
            self.right(program.EVENT, json.dumps(program.pack_value(told)).encode())
        self.right(kind, payload)

    def twice(self, kind, payload):
        self.right(kind, payload)
        self.right(kind, payload)

    def deep(self, kind, payload):
        self.right(kind, b"[" * 5000 + b"]" * 5000)

    def large(self, kind, payload):
        lists, digits = self.random.choice((1000, 300000, 3000000)), self.random.choice((1, 1000))
        self.right(kind, b"[" + b"[]," * lists + b"1" * digits + b"]")

    def endless(self, kind, payload):
        event, data = program.FRAME.pack(program.EVENT, 4) + b"null", program.FRAME.pack(program.DATA, 8) + bytes(8)
        nothing = program.FRAME.pack(program.DATA, 0)
        piece = self.random.choice((event, data, nothing, b"[]", b"\n")) * 5000
        with contextlib.suppress(program.BackupError):
            while True:
                self.channel.put(piece)
                self.channel.flush(PATIENCE)

    def bytes(self, kind, payload):
        self.right(kind, self.random.getrandbits(800).to_bytes(100, "big"))


class Forked:
    """Stands for the process that leads to an agent: a child of this one, which lies."""

    def __init__(self, seed, ends, others):
        self.status, self.tail, self.program = None, [], "agent"
        self.drain = types.SimpleNamespace(over=types.SimpleNamespace(wait=lambda seconds: None))
        self.process = types.SimpleNamespace(poll=lambda: self.status)
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                for fd in others:
                    os.close(fd)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.SIG_DFL)
                channel = program.Channel(ends[0], ends[1], "the other side")
                Liar(seed, channel)
                program.Agent(channel).serve()
            os._exit(0)

    def has_ended(self):
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def wait(self, timeout):
        deadline = time.monotonic() + timeout / 20
        while not self.has_ended() and time.monotonic() < deadline:
            time.sleep(0.01)

    def end(self):
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.status = 9


class ForkedConnection(program.Connection):

    def __init__(self, seed):
        self.machine, self.is_broken = "nas", False
        self.mutex, self.has_ended, self.token, self.beside = threading.Lock(), False, None, {}
        (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
        self.stage: Any = Forked(seed, (their_in, their_out), (our_in, our_out))
        os.close(their_in)
        os.close(their_out)
        self.channel = program.Channel(our_in, our_out, "nas")
        try:
            self.greeting = self.begin()
        except BaseException:
            self.end()
            raise


def live(seed, argv, folder):
    """The program, in this process, with hosts that lie."""
    numbers = itertools.count(1000 * seed)
    program.SshConnector.__call__ = lambda self, is_first: ForkedConnection(next(numbers))  # type: ignore
    program.SshConnector.beside = lambda self: ForkedConnection(next(numbers))  # type: ignore
    program.MOST_DRAINED = 4 << 20
    program.ENDING_TIMEOUT, program.FIRST_PAUSE, program.GREETING_TIMEOUT = 0.5, 0.01, 2.0
    reach = program.AgentHost.__init__

    def impatient(self, machine, connect, events, compress, patience, *more):
        reach(self, machine, connect, events, compress, min(patience, 1.0), *more)

    program.AgentHost.__init__ = impatient  # type: ignore
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    os.chdir(folder)
    for name, fd in (("out", 1), ("err", 2)):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, errors="backslashreplace")
    return program.main(argv)


class HostsThatLie(support.BackupTestCase):

    usual_seconds = 12

    def setUp(self):
        super().setUp()
        self.folder = os.path.join(support.scratch_folder(), "case")
        os.mkdir(self.folder)
        self.addCleanup(shutil.rmtree, self.folder)
        self.write("file", "content" * 1000)
        self.take(1, 2)
        self.remote = os.path.join(self.target_disk.path, "remote")
        os.mkdir(self.remote)
        self.transfer("-n", "0", to=[self.remote])
        self.restored = os.path.join(self.target_disk.path, "restored")
        os.mkdir(self.restored)

    def commands(self, chance):
        """Every way to meet a host."""
        there, source = "ssh://nas" + self.remote, "ssh://nas" + self.source
        common = ["-p", "home", "--stall-timeout", "1"]
        job = common + ["-S", "--retries", "1"]
        return chance.choice((
            job + [self.source, there], job + [self.source, there], job + [source, self.target],
            job + [source, self.target],
            job + ["--dry-run", source, there], job + ["-n", "1", self.source, there], job + [source, there],
            job + [self.source, "raw+ssh://nas" + self.remote + "/raw"],
            ["list", "-p", "home", self.source, there], ["list", "-p", "home", there],
            ["list", "-p", "home", source, there],
            ["doctor", "-p", "home", self.source, there], ["prune", "-n", "1", there],
            ["verify", "-p", "home", self.source, there],
            ["history", self.source + "/file", there], ["history", source + "/file", self.target],
            ["history", "--deleted", self.source, there], ["history", "--deleted", there + "/" + self.name(2)],
            ["history", "--json", there + "/file"],
            ["diff", self.snapshot_path(self.name(1)), there + "/" + self.name(2)],
            ["diff", there + "/" + self.name(1), there + "/" + self.name(2)],
            ["restore", "--stall-timeout", "1", there + "/" + self.name(2), self.restored]))

    def run_case(self, seed, argv):
        """(exit status, peak KiB) of the program in a child of ours."""
        pid = os.fork()
        if pid == 0:
            status = 99
            with contextlib.suppress(BaseException):
                os.setpgid(0, 0)
                status = live(seed, argv, self.folder)
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        deadline = time.monotonic() + PATIENCE
        done, status, usage = os.wait4(pid, os.WNOHANG)
        while not done and time.monotonic() < deadline:
            time.sleep(0.005)
            done, status, usage = os.wait4(pid, os.WNOHANG)
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
        if not done:
            os.wait4(pid, 0)
            self.fail("it hangs: {} {}".format(argv, self.said()))
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status), usage.ru_maxrss

    def said(self):
        """On stderr, then as results."""
        texts = []
        for name in ("err", "out"):
            with open(os.path.join(self.folder, name), errors="replace") as file:
                texts.append(file.read())
        return "".join(texts)

    def names_outside(self):
        """All that stands beside what the job may write."""
        places = (support.scratch_folder(), self.source_disk.path, self.target_disk.path, self.source, "/tmp",
                  self.folder)
        return [sorted(name for name in os.listdir(place) if not name.startswith("bbng-")) if place != "/tmp" else
                os.path.exists("/tmp/never") for place in places]

    def clean(self):
        for folder in (self.target, self.restored):
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                self.assertTrue(OURS.fullmatch(name), name)
                if support.is_subvolume(path):
                    support.delete(path)
                else:
                    os.unlink(path)

    def test_all_the_ways_to_meet_one(self):
        outside, largest, slowest, errors = None, 0, 0.0, 0
        for seed in range(support.FIRST_CASE, support.FIRST_CASE + CASES):
            chance = random.Random(seed)
            argv = self.commands(chance)
            with self.subTest(seed=seed, argv=" ".join(argv)):
                begun = time.monotonic()
                status, memory = self.run_case(seed, argv)
                slowest, largest = max(slowest, time.monotonic() - begun), max(largest, memory)
                words = self.said()
                errors += status != 0
                self.assertIn(status, (0, 1, 75), words[-3000:])
                for word in ("Traceback", "this is a bug", "Exception ignored", "\x1b"):
                    self.assertNotIn(word, words)
                if status and argv[0] not in ("doctor", "verify", "list"):
                    self.assertIn("error: ", words)
                self.assertLess(memory, MOST_MEMORY)
                outside = outside or self.names_outside()
                self.assertEqual(outside, self.names_outside())
                self.clean()
        text = "{} hosts that lie, seeds from {}: {} runs failed, the largest took {:.0f} MiB, the slowest {:.1f} s"
        print(text.format(
            CASES, support.FIRST_CASE, errors, largest / 1024, slowest), file=sys.stderr)


if __name__ == "__main__":
    unittest.main()
