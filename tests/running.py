"""The program as a child: how it is started, what it has started, where it is stopped, how it ends.

Environment:
  BTRFS_BACKUP_NG         the program to test, default ../btrfs_backup_ng.py, and most of the time its zipapp
  BTRFS_BACKUP_NG_PYTHON  the interpreter that runs it, default the one that runs the tests
  BTRFS_BACKUP_NG_FLAGS   the flags of that interpreter, default "-E -s -S"
"""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from typing import NamedTuple

from disks import scratch_folder
from forked import MARK, nursery, set_at_start


def zipapp_of(program):
    """The zipapp beside a program, which starts faster, where it holds the same source; else the program itself."""
    zipapp = program + "z"
    try:
        with zipfile.ZipFile(zipapp) as archive, open(program, "rb") as source:
            return zipapp if archive.read(os.path.basename(program)) == source.read() else program
    except (OSError, KeyError, zipfile.BadZipFile):
        return program


HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.abspath(os.environ.get("BTRFS_BACKUP_NG")
                          or os.path.join(os.path.dirname(HERE), "btrfs_backup_ng.py"))
FAST_PROGRAM = zipapp_of(PROGRAM)
PYTHON = os.environ.get("BTRFS_BACKUP_NG_PYTHON") or sys.executable
FLAGS = os.environ.get("BTRFS_BACKUP_NG_FLAGS", "-E -s -S").split()
PROGRAM_ARGV = [PYTHON] + FLAGS + [FAST_PROGRAM]
FORMAT_MARK = "%010d-%06d"  # all of one length
HANGS = 120  # seconds after which what we wait for does not come; no measure of speed, for others may be at work


def with_bytecode():
    """An environment in which Python keeps the bytecode of what it imports; before 3.8 it keeps none."""
    return dict(os.environ, PYTHONPYCACHEPREFIX=os.path.join(scratch_folder(), "bytecode"),
                PYTHONDONTWRITEBYTECODE="" if sys.version_info >= (3, 8) else "1")


def is_zipapp(program):
    return program == PROGRAM + "z"


def wait_until(condition, timeout=HANGS):
    """What the condition says once it is true, else its last word after so many seconds."""
    deadline = time.monotonic() + timeout
    while True:
        said = condition()
        if said or time.monotonic() > deadline:
            return said
        time.sleep(0.01)


class Result(NamedTuple):
    status: int
    stdout: str
    stderr: str

    @property
    def errors(self):
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


class Running:
    """The program at work, in a session of its own; the scratch folder is where it starts.

    A mark in the environment finds every process that it started, whatever process group or
    session that one has moved to.
    """

    numbers = itertools.count(1)

    def __init__(self, *arguments, env=None, wrapper=(), program=tuple(PROGRAM_ARGV)):
        mark = FORMAT_MARK % (os.getpid(), next(self.numbers))
        self.mark = (MARK + "=" + mark).encode()
        self.stdout = tempfile.TemporaryFile()
        self.stderr = tempfile.TemporaryFile()
        self.before = set(os.listdir("/proc"))  # to look at these each time would take most of a test's time
        self.process = self.begin(list(wrapper) + list(program), [os.fsencode(word) for word in arguments],
                                  dict(os.environ, **dict(env or {}, **{MARK: mark})))
        self.pid = self.process.pid

    def begin(self, program, arguments, environment):
        """The process; forked, where that is as good as to start it."""
        if program == PROGRAM_ARGV and is_zipapp(FAST_PROGRAM):
            parent = nursery(tuple(program), FORMAT_MARK % (0, 0))
            if parent.environment == set_at_start(environment):
                encoded = {os.fsencode(name): os.fsencode(value) for name, value in environment.items()}
                return parent.start(arguments, self.stdout, self.stderr, encoded, scratch_folder())
        return subprocess.Popen(
            [os.fsencode(word) for word in program] + arguments, stdin=subprocess.DEVNULL, stdout=self.stdout,
            stderr=self.stderr, env=environment, cwd=scratch_folder(), start_new_session=True)

    def processes(self):
        """{pid: argv} of what the program started and what still runs, itself included."""
        found = {}
        for pid in filter(str.isdigit, set(os.listdir("/proc")) - self.before):
            try:
                with open("/proc/%s/environ" % pid, "rb") as environ:
                    if self.mark not in environ.read().split(b"\0"):
                        continue
                with open("/proc/%s/cmdline" % pid, "rb") as cmdline:
                    found[int(pid)] = cmdline.read().split(b"\0")[:-1]
            except OSError:
                pass
        return found

    def children(self):
        """The pids of what the program itself has started, its tasks for example."""
        return [pid for pid in self.processes() if read_stat(pid)[1:2] == [str(self.pid)]]

    def transfers(self, verb):
        """{pid: argv} of the children that send or that run `btrfs receive`, without what a gate has before it."""
        words = {pid: argv[argv[:1] == [b"/bin/sh"]:] for pid, argv in self.processes().items()}
        return {pid: argv for pid, argv in words.items() if argv and is_transfer(argv, verb.encode())}

    def find(self, verb):
        """The pid of one of these, or None."""
        return next(iter(self.transfers(verb)), None)

    def read_stderr(self):
        """What it has said until now."""
        return os.fsdecode(os.pread(self.stderr.fileno(), 1 << 20, 0))

    def read_stdout(self):
        """The results that it has printed until now."""
        return os.fsdecode(os.pread(self.stdout.fileno(), 1 << 20, 0))

    def wait_to_say(self, words):
        return self.wait_for(words + " said", lambda: words in self.read_stderr())

    def wait_for(self, what, condition, timeout=HANGS):
        """What the condition says once it is true; fails when the program ends before."""
        begun = time.monotonic()
        deadline = begun + timeout
        while begun < deadline:
            said = condition()
            if said:
                return said
            if self.process.poll() is not None:
                raise AssertionError("the program ended before there was %s: %s"
                                     % (what, self.finish().stderr))
            looked = time.monotonic() - begun
            time.sleep(min(0.01, max(0.001, 4 * looked)))  # looking takes few of the turns of what is looked at
            begun = time.monotonic()
        raise AssertionError("no %s after %d s: %s" % (what, timeout, self.kill().stderr))

    def left(self):
        """What still runs when the kernel has had its time to end what was killed."""
        deadline = time.monotonic() + HANGS
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.processes()

    def hold(self, verb):
        """Stop the `btrfs send` or `btrfs receive` as soon as there is one; its pid.

        One that is short may be over by then: `met_at_gate` misses none.
        """
        return self.wait_for("btrfs " + verb, lambda: next(filter(stop, self.transfers(verb)), None))

    def met_at_gate(self, verb, count=1):
        """The pids of so many that have stopped at their gates, all at one moment.

        A server's have the mark of this run and no gate. They are let be: who stopped one of them instead
        would let go all but one of those at a gate, and that one would wait for ever.
        """
        def all_met():
            met = set(filter(is_met, self.transfers(verb)))
            return met if len(met) >= count else None
        return self.wait_for("%d btrfs %s at a gate" % (count, verb), all_met)

    def finish(self, timeout=HANGS):
        """Wait for the end. A run that hangs is killed, and fails the test."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError("still running after %d s: %s" % (timeout, self.kill().stderr)) from None
        return self.result()

    def kill(self):
        """kill -9 of the whole process group, and of what has left it."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        while True:
            left = self.processes()
            if not left:
                break
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.002)
        self.process.wait()
        return self.result()

    def result(self):
        self.stdout.seek(0)
        self.stderr.seek(0)
        return Result(self.process.returncode, os.fsdecode(self.stdout.read()),
                      os.fsdecode(self.stderr.read()))

    def close(self):
        self.kill()
        self.stdout.close()
        self.stderr.close()


def is_transfer(argv, verb):
    """Whether a program sends or receives; `send --no-data` is no transfer: it measures one."""
    is_program = os.path.basename(argv[0]) == b"btrfs" and verb in argv[1:3] and b"--no-data" not in argv
    return is_program or b"btrfs-" + verb in argv


def read_stat(pid):
    """The fields of /proc/PID/stat after the program's name: state, parent, ...; [""] of one that is gone."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as fields:
            return os.fsdecode(fields.read().rpartition(b")")[2]).split()
    except OSError:
        return [""]


def is_stopped(pid):
    return read_stat(pid)[0] == "T"


def is_met(pid):
    """Whether a process is the script of a gate and has stopped itself."""
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as words:
            return words.read().startswith(b"/bin/sh\0") and is_stopped(pid)
    except OSError:
        return False


def stop(pid):
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        return False
    return True


def go_on(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass
