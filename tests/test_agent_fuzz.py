"""The agent is fed with nonsense: it ends cleanly each time, and touches nothing.

AGENT_FUZZ=10000 says how many frames; the default is a short form.
"""

import contextlib
import fcntl
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unittest

import support

sys.path.insert(0, os.path.dirname(support.HERE))
import btrfs_backup_ng as program

FRAMES = int(os.environ.get("AGENT_FUZZ") or (10000 if os.environ.get("TORTURE") else 600))
FRAMES_EACH = 12  # for one agent, which ends at the first that breaks the protocol
KINDS = [b"C", b"C", b"C", b"C", b"R", b"X", b"L", b"D", b"F", b"A", b"\0", b"z", b"\n"]
UUID = "01234567-89ab-cdef-0123-456789abcdef"


def packed(value):
    return json.dumps(program.pack_value(value)).encode("ascii")


def frame(kind, payload, length=None):
    return kind + struct.pack(">I", len(payload) if length is None else length) + payload


def unread(pipe):
    """How many bytes nobody has read yet."""
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


class Nonsense:
    """Frames at random, from pure noise to calls that are right but for one thing.

    Right calls are among them as far as they only look, or must find that there is nothing of ours to change.
    """

    def __init__(self, seed, folder):
        self.random = random.Random(seed)
        self.folder = folder
        stranger = program.Subvolume("home20240101-000000", UUID, readonly=True, received_uuid=UUID)
        expected = program.ExpectedStream("home20240101-000000", UUID, None, 0, 0, 0o755)
        self.calls = [
            ("list", (folder,)), ("look", (folder,)), ("read_locks", (folder,)), ("read_pins", (folder,)),
            ("capabilities", ()), ("nested_subvolumes", (folder, folder)),
            ("delete", (folder, [stranger], True)), ("delete", (folder + "/..", [stranger], True)),
            ("snapshot", (folder + "/nothing", folder, "home20240102-000000")),
            ("open_send", (folder, "home20249999-000000", None, program.SendOptions())),
            ("open_receive", (folder, expected, False)), ("open_receive", (folder + "/none", expected, False)),
            ("data_since", (folder, 1)), ("expected_stream", (folder, stranger, None)),
        ]
        # Each of the first few ends the agent, so that it never sees what comes after.
        self.actions = [self.noise, self.huge, self.short, self.no_json, self.stream] + 4 * [
            self.deep, self.wrong_class, self.wrong_types, self.wrong_count, self.unknown_call, self.inner_names,
            self.right, self.flipped]

    def frame(self):
        return self.random.choice(self.actions)()

    def data(self, most):
        size = self.random.randrange(most)
        return self.random.getrandbits(8 * size + 1).to_bytes(size + 1, "big")[1:]

    def kind(self):
        return self.random.choice(KINDS)

    def call(self):
        return self.random.choice(self.calls)

    # What there is of nonsense.

    def noise(self):
        return self.data(2000)

    def huge(self):
        return frame(self.kind(), self.data(50), self.random.choice([2 ** 32 - 1, 2 ** 31, (64 << 20) + 1]))

    def short(self):
        """The payload of a frame that announces more: what follows is taken for its rest."""
        return frame(self.kind(), self.data(50), self.random.randrange(60, 5000))

    def no_json(self):
        texts = [b"", b"{", b"nul", b"\xff\xfe", b'"\\ud800"', b"[" * 100000, b'{"is": "tuple", "of": ' * 5000,
                 b"1e999999", b"9" * 5000, b"NaN", b'{"is": 1, "of": 2}', b'{"of": []}', b'{"is": "dict", "of": [1]}',
                 b'{"is": "dict", "of": [[[], 1]]}', b'{"is": "set", "of": [[]]}', b'{"is": "error", "of": []}']
        return frame(self.random.choice([b"C", b"C", b"L", b"R"]), self.random.choice(texts))

    def deep(self):
        value = []
        for _ in range(self.random.choice([10, 19, 21, 500])):
            value = [value]
        return frame(b"C", json.dumps({"is": "tuple", "of": ["list", {"is": "tuple", "of": [value]}, ""]}).encode())

    def wrong_class(self):
        names = ["Subvolume", "Place", "eval", "os", "__import__", "Popen", "BackupError", "Interrupted", "", "dict"]
        inner = {"is": self.random.choice(names), "of": self.random.choice([[], [1], ["x", "y"], [None] * 30])}
        value = {"is": "tuple", "of": ["list", {"is": "tuple", "of": [inner]}, ""]}
        return frame(b"C", json.dumps(value).encode())

    def odd_value(self):
        return self.random.choice([None, True, -1, 2 ** 70, 1.5, float("nan"), "", "\0", "a\0b", "/", "..", "-rf",
                                   "x" * 70000, "\udcff", [], [None], (), (1, 2), {}, {"a": 1}, frozenset(),
                                   "new\nline"])

    def wrong_types(self):
        name, arguments = self.call()
        arguments = list(arguments) or [0]
        arguments[self.random.randrange(len(arguments))] = self.odd_value()
        return frame(b"C", packed((name, tuple(arguments), self.random.choice(["", "", "zstd", "rot13"]))))

    def wrong_count(self):
        name, arguments = self.call()
        arguments = arguments[:-1] if self.random.random() < 0.5 else arguments + (self.odd_value(),)
        return frame(b"C", packed((name, arguments, "")))

    def unknown_call(self):
        return frame(b"C", packed((self.odd_value(), self.odd_value(), self.odd_value())))

    def inner_names(self):
        """Names that the host has, but that are no calls."""
        names = ["__init__", "__class__", "command", "events", "make_writable", "run", "end", "serve", "answer",
                 "__reduce__", "eval", "os.system", "measure_send", "hold", "release"]
        return frame(b"C", packed((self.random.choice(names), (self.folder, "x", "y")[:self.random.randrange(4)], "")))

    def right(self):
        name, arguments = self.call()
        return frame(b"C", packed((name, arguments, "")))

    def flipped(self):
        data = bytearray(self.right())
        data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return bytes(data)

    def stream(self):
        """Something that follows a call to receive, rarely a btrfs stream."""
        data = b"btrfs-stream\0\1\0\0\0" * self.random.randrange(2) + self.data(3000)
        end = self.random.choice([frame(b"F", b""), frame(b"A", b""), frame(b"X", packed("no")), b""])
        return frame(b"D", data) + end


class Fuzz(support.TestCase):

    def setUp(self):
        self.disk_ = self.disk("128M")
        self.top = support.create(os.path.join(self.disk_.path, "home"))
        self.folder = os.path.join(self.disk_.path, "backups")
        os.mkdir(self.folder)
        support.snapshot(self.top, os.path.join(self.folder, "home20240101-000000"))
        support.command("btrfs", "filesystem", "sync", self.disk_.path)

    def feed(self, data):
        """How the agent ends that is fed with the data, and what it said.

        It may end before it has read all. Else its input ends only when it has nothing left to do, as it would drop
        what it has not done yet.
        """
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
            agent = subprocess.Popen(support.PROGRAM_ARGV + ["agent"],
                                     stdin=subprocess.PIPE, stdout=out, stderr=error, cwd=support.scratch_folder())
            try:
                with contextlib.suppress(BrokenPipeError):
                    agent.stdin.write(data)
                    agent.stdin.flush()
                    self.wait_until_idle(agent)
                with contextlib.suppress(BrokenPipeError):
                    agent.stdin.close()
                agent.wait(20)
            except subprocess.TimeoutExpired:
                self.fail("the agent hangs")
            finally:
                agent.kill()
                agent.wait()
            out.seek(0)
            error.seek(0)
            return agent.returncode, out.read(), os.fsdecode(error.read())

    @staticmethod
    def wait_until_idle(agent):
        """Wait until it has ended, or has read all and uses no more processor time."""
        used, since = None, time.monotonic()
        while agent.poll() is None and time.monotonic() - since < 0.05:
            with open("/proc/%d/stat" % agent.pid, "rb") as stat:
                now = stat.read().rpartition(b")")[2].split()[11:15], unread(agent.stdin)
            if now != used or now[1] > 0:
                used, since = now, time.monotonic()
            time.sleep(0.005)

    def check(self, data):
        status, out, error = self.feed(data)
        self.assertIn(status, (0, 1, 143), error)
        self.assertNotIn("Traceback", error)
        self.assertLess(len(error), 5000)
        return out

    def test_nonsense(self):
        before = support.listing(self.disk_.path)
        done, seed = 0, support.FIRST_CASE
        while done < FRAMES:
            nonsense = Nonsense(seed, self.folder)
            data = b"".join(nonsense.frame() for _ in range(FRAMES_EACH))
            if nonsense.random.random() < 0.3:
                data = data[:nonsense.random.randrange(len(data))]
            marker = program.MARKER if nonsense.random.random() < 0.95 else b""
            with self.subTest(seed=seed):
                self.check(marker + data)
                self.assertUnchanged(before, self.disk_.path)
            done += FRAMES_EACH
            seed += 1

    def test_a_right_call_is_answered(self):
        """Else the test above would pass with an agent that does nothing."""
        out = self.check(program.MARKER + frame(b"C", packed(("list", (self.folder,), ""))))
        self.assertIn(b"home20240101-000000", out)

    def test_nothing_at_all(self):
        self.check(b"")

    def test_a_greeting_of_another_protocol(self):
        self.check(b"SSH-2.0-OpenSSH_9.2\r\n" + bytes(100000))

    def test_much_noise(self):
        self.check(b"noise" * 200000)


if __name__ == "__main__":
    unittest.main()
