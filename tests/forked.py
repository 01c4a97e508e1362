"""The program started in a few milliseconds: forked off a process that has imported it.

To start Python and to import the program takes longer than most runs take. A process does that once: all that
`python -E -s -S btrfs_backup_ng.pyz` does before it calls main(). For each run it forks a child, which goes on from
there with arguments, environment, files, folder and session of its own, and which has its mark in /proc as well.
What Python makes of the environment before is not done again: runs with other locales, say, are started as usual.
"""

import array
import contextlib
import functools
import marshal
import os
import select
import signal
import socket
import subprocess
import tempfile

MARK = "BTRFS_BACKUP_NG_TEST_RUN"

# What the process runs: the zipapp's __main__.py up to its last statement, which each child runs.
NURSERY = """
import os
if os.fork():
    os._exit(0)  # a child of the tests' would be counted among those of what they test

import sys
import zipimport
import _socket
import marshal
import time

program = sys.path[0] = sys.argv[1]
control, mark = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, int(sys.argv[2])), os.fsencode(sys.argv[3])
__loader__, __file__ = zipimport.zipimporter(program), os.path.join(program, "__main__.py")
before, last, after = __loader__.get_source("__main__").rpartition("raise SystemExit(main())")
exec(compile(before, __file__, "exec"))


def show_mark(value):
    # /proc tells of the memory where the environment was when the process began
    with open("/proc/self/stat", "rb") as stat:
        start = int(stat.read().rpartition(b")")[2].split()[47])
    with open("/proc/self/environ", "rb") as environ:
        at = (b"\\0" + environ.read()).index(b"\\0" + mark + b"=") + len(mark) + 1
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(start + at)
        memory.write(value)


def take_over():
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    control.close()
    with os.fdopen(request, "rb") as text:
        arguments, environment, folder, mask = marshal.load(text)
    sys.argv[:] = [program] + [os.fsdecode(word) for word in arguments]
    show_mark(environment[mark])
    os.environb.clear()
    os.environb.update(environment)
    time.tzset()
    os.umask(mask)
    os.chdir(folder)
    answers.send(b"%d" % os.getpid())
    answers.close()


def watch(child):
    for file in stdout, stderr, request, 1, 2:
        os.close(file)
    end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        answers.send(b"%d" % (end.si_status if end.si_code == os.CLD_EXITED else -end.si_status))
        answers.recv(1)  # only then is the child's number free for others
    except OSError:
        pass
    os.waitpid(child, 0)
    os._exit(0)


signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    got, ancillary, _, _ = control.recvmsg(1, _socket.CMSG_SPACE(16))
    if not got:
        os._exit(0)
    stdout, stderr, request, answers = memoryview(ancillary[0][2]).cast("i")
    answers = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, answers)
    if not os.fork():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if not child:
            break
        watch(child)
    for file in stdout, stderr, request:
        os.close(file)
    answers.close()

take_over()
exec(compile(last + after, __file__, "exec"))
"""


class Child:
    """A run, as a `subprocess.Popen` would be one."""

    def __init__(self, pid, answers):
        self.pid, self.answers = pid, answers
        self.returncode = None

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("the program", timeout)
            said = self.answers.recv(100)
            if not said:
                raise AssertionError("nobody knows how the program ended")
            self.returncode = int(said)
            self.answers.close()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


# What Python and the import of the program make something of, as the variables' names begin.
SET_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "OPENSSL", "HOME", "XDG_CACHE_HOME")


def set_at_start(environment):
    return {name: value for name, value in environment.items() if name.startswith(SET_AT_START)}


class Nursery:
    """The process that forks the children. `argv` is that of the program, `mark` one of no run, as long as any."""

    def __init__(self, argv, mark):
        self.control, its = socket.socketpair()
        self.output, self.environment = tempfile.TemporaryFile(), set_at_start(os.environ)
        argv = argv[:-1] + ["-c", NURSERY, argv[-1], str(its.fileno()), MARK]
        subprocess.check_call(argv, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output,
                              env=dict(os.environ, **{MARK: mark}), pass_fds=[its.fileno()], start_new_session=True)
        its.close()

    def start(self, arguments, stdout, stderr, environment, folder):
        """A Child at work."""
        answers, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with tempfile.TemporaryFile() as request, its:
            marshal.dump((arguments, environment, folder, umask()), request, 2)
            request.seek(0)
            files = array.array("i", [file.fileno() for file in (stdout, stderr, request, its)])
            with contextlib.suppress(BrokenPipeError):
                self.control.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        said = answers.recv(100)
        if not said:
            raise AssertionError("the program did not start: %r" % os.pread(self.output.fileno(), 1 << 16, 0))
        return Child(int(said), answers)


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@functools.lru_cache(maxsize=None)
def nursery(argv, mark):
    """One for all of this process."""
    return Nursery(list(argv), mark)
