"""What stands in the place of programs, and what keeps a program from something.

What a test puts before the program under test is an environment, for `env`, or words, for `wrapper`.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import subprocess
import sys
from unittest import mock

from disks import SYSTEM_FOLDERS, find_program, require, scratch_folder, why_no_mounts
from running import HANGS, PYTHON

NOBODY = 65534

# Programs, as shell scripts.

numbers = itertools.count(1)


def write_script(path, text):
    """A script that can be run, the shell's unless it begins with #!. One that is there is replaced as a whole."""
    with open(path + ".new", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text if text.startswith("#!") else "#!/bin/sh\n" + text)
    os.chmod(path + ".new", 0o755)
    os.rename(path + ".new", path)
    return path


def folder_with(name, text):
    """A new folder with a program of that name, a shell script; `REAL` in it is the program that it stands for."""
    folder = os.path.join(scratch_folder(), "fake%d" % next(numbers))
    os.mkdir(folder)
    write_script(os.path.join(folder, name), text.replace("REAL", find_program(name) or "REAL"))
    return folder


def first_on_path(folder):
    return {"PATH": folder + ":" + os.environ["PATH"]}


def fake(name, text):
    """An environment in which this script is the program of that name."""
    return first_on_path(folder_with(name, text))


def btrfs_where(script, *parts):
    """An environment in which `btrfs` first runs a script where its words hold these parts, one after the other.

    There is a blank before and after each word. Then it does what it should, if the script has not ended it.
    """
    pattern = "*".join(map(shlex.quote, parts))
    return fake("btrfs", 'case " $* " in *%s*) %s;; esac\nexec REAL "$@"\n' % (pattern, script))


def fails(words):
    """The script of a program that says why it fails."""
    return "echo %s >&2; exit 1" % shlex.quote(words)


CALLS_THAT_CHANGE = '"subvolume snapshot" | "subvolume delete" | "filesystem sync"'


def killed_at(number, sign=9, counted="*"):
    """An environment in which who calls `btrfs` gets a signal at that call, which is not done; the first one is 1.

    counted: which calls count, as a pattern of the shell's for their first two words
    """
    return fake("btrfs", """case "$1 $2" in {counted})
    echo >> "${{0%/*}}/calls"
    if [ $(wc -l < "${{0%/*}}/calls") = {number} ]; then kill -{sign} $PPID; [ {sign} = 9 ] || sleep 0.3; exit 1; fi
esac
exec REAL "$@"
""".format(counted=counted, number=number, sign=int(sign)))


# A `btrfs receive` that does the first command of its stream, and has something done before it gets the rest; and
# perhaps once more when it has done all but the last, which makes the backup read-only.
PAUSED = """#!{python} -SE
import array, fcntl, glob, os, struct, subprocess, sys, termios, time
if sys.argv[1] != "receive":
    os.execv('REAL', ['REAL'] + sys.argv[1:])

def take(size):
    data = b""
    while len(data) < size:
        data += os.read(0, size - len(data))
    return data

def partials():
    return set(glob.glob({folder!r} + "/.*.partial") + glob.glob({folder!r} + "/.*.partial.begun/.*.partial"))

before = partials()
receive = subprocess.Popen(['REAL'] + sys.argv[1:], stdin=subprocess.PIPE)
head = take(27)
receive.stdin.write(head + take(struct.unpack_from("<I", head, 17)[0]))
receive.stdin.flush()
end = time.monotonic() + 10
while time.monotonic() < end and not partials() - before:
    time.sleep(0.01)
time.sleep(0.2)
subprocess.call(["sh", "-c", {script!r}], cwd={folder!r})
last = b""
for chunk in iter(lambda: os.read(0, 65536), b""):
    last += chunk
    receive.stdin.write(last[:-10])
    receive.stdin.flush()
    last = last[-10:]

def waits():
    unread = array.array("i", [0])
    fcntl.ioctl(receive.stdin, termios.FIONREAD, unread)
    with open("/proc/%d/stat" % receive.pid) as stat:
        return not unread[0] and stat.read().rpartition(")")[2].split()[0] == "S"

while {at_end} and not waits():
    time.sleep(0.01)
if {at_end}:
    subprocess.call(["sh", "-c", {script!r}], cwd={folder!r})
try:
    receive.stdin.write(last)
    receive.stdin.close()
except BrokenPipeError:
    pass
sys.exit(receive.wait())
"""


def paused_receive(folder, script, at_end=False):
    """The text of such a btrfs: `script` is run in a folder once that has one more partial."""
    return PAUSED.format(python=sys.executable, folder=folder, script=script, at_end=at_end)


# A user who opens his file in whatever there is of the backups, all the time and whenever he is asked to, until it is
# over; then he writes to what he has open, and says how often he was asked.
OPENER = """
import glob, mmap, os, sys
top, control = sys.argv[1:]
held, asked = {}, 0
while not os.path.exists(control + "/over"):
    is_asked = os.path.exists(control + "/ask")
    for place in ("*", ".*", ".*/*", ".*/.*"):
        for path in glob.glob("%s/%s/theirs/data" % (top, place)):
            try:
                fd = os.open(path, os.O_RDWR)
                held.setdefault(os.fstat(fd).st_dev, (fd, mmap.mmap(fd, 0)))
            except OSError:
                pass
    if is_asked:
        os.unlink(control + "/ask")
        asked += 1
for fd, memory in held.values():
    try:
        os.pwrite(fd, b"changed", 0)
        memory[8:15] = b"changed"
        memory.flush()
    except OSError:
        pass
print(asked)
"""
ASK = "touch '{0}/ask'; while [ -e '{0}/ask' ]; do sleep 0.01; done"


@contextlib.contextmanager
def opened_meanwhile(folder, control, times):
    """Has him at work in a folder; yields the script that asks him, for {} the path of the folder `control`.

    AssertionError where he was not asked so many times.
    """
    os.mkdir(control)
    os.chown(control, NOBODY, NOBODY)
    opener = subprocess.Popen(
        ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", sys.executable, "-SE", "-c",
         OPENER, folder, control], stdout=subprocess.PIPE)
    try:
        yield ASK
    finally:
        with open(os.path.join(control, "over"), "w"):
            asked, _ = opener.communicate(timeout=HANGS)
        shutil.rmtree(control)
    if int(asked) != times:
        raise AssertionError("asked {} times, not {}".format(int(asked), times))


def gate(verb):
    """An environment in which each `btrfs VERB` stops itself before it begins; SIGCONT lets it in.

    However short it is, and however slowly we look, we meet it.
    """
    return fake("btrfs", 'case " $1 $2 " in *" %s "*) kill -STOP $$;; esac\nexec REAL "$@"\n' % verb)


# What keeps a program from something.


def as_nobody():
    """The words before a command that let an ordinary user run it.

    The capability lets that user read the interpreter and the program, wherever they lie.
    """
    os.chmod(scratch_folder(), 0o755)
    return ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups",
            "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]


WITHOUT_DELETIONS = """
import ctypes, os, platform, struct, sys
number = {"x86_64": 16, "aarch64": 29}[platform.machine()]  # of ioctl(2)
allow, refuse = 0x7fff0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
# load a word, jump if equal, return; the offsets are those of struct seccomp_data
steps = [(0x20, 0, 0, 0), (0x15, 0, 4, number), (0x20, 0, 0, 24), (0x15, 1, 0, 0x5000940f), (0x15, 0, 1, 0x5000943f),
         (0x06, 0, 0, refuse), (0x06, 0, 0, allow)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
program = struct.pack("HP", len(steps), ctypes.addressof(code))
if ctypes.CDLL(None, use_errno=True).prctl(22, 2, program):
    sys.exit("seccomp: " + os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[1], sys.argv[1:])
"""


def without_deletions():
    """The words before a command for which the kernel deletes no subvolume (SNAP_DESTROY and SNAP_DESTROY_V2)."""
    return [PYTHON, "-c", WITHOUT_DELETIONS]


def without_programs(*names):
    """The words before a command for which these programs are not there: nothing can run what hides them."""
    script = 'while [ "$1" != -- ]; do mount --bind /dev/null "$1" || exit 99; shift; done; shift; exec "$@"'
    return in_own_mounts(script) + installed(*names) + ["--"]


def installed(*names):
    """All places where these programs are, without links."""
    folders = os.environ["PATH"].split(":") + SYSTEM_FOLDERS
    paths = {os.path.realpath(os.path.join(folder, name)) for folder in folders for name in names}
    return sorted(path for path in paths if os.path.isfile(path))


def in_own_mounts(script):
    """The words before a command to run by a script in a mount namespace of its own, as its "$@"."""
    require(why_no_mounts())
    return ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, "sh"]


def without_rights():
    """The words before a command that let an ordinary user run it, who may read what others may, and the interpreter.

    That may lie below a folder that he cannot enter, such as root's home: in whose place he sees but the way to it.
    """
    os.chmod(scratch_folder(), 0o755)
    prefix = os.path.dirname(os.path.dirname(os.path.realpath(PYTHON)))
    way = [prefix[:at] for at in range(2, len(prefix) + 1) if prefix[at:at + 1] in ("/", "")]
    closed = next((folder for folder in way if not os.stat(folder).st_mode & 0o001), None)
    user = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    if closed is None:
        return user
    held = os.path.join(scratch_folder(), "interpreter")
    os.makedirs(held, exist_ok=True)
    script = ("set -e; mount --bind {0} {2}; mount -t tmpfs -o mode=755 tmpfs {1}; mkdir -p {0}; mount --bind {2} {0}; "
              "exec \"$@\"")
    return in_own_mounts(script.format(*map(shlex.quote, (prefix, closed, held)))) + user


# A process that has nothing to do with the run, alone with it in a PID namespace: where all that may be killed is.
BESIDE_A_BYSTANDER = """
sleep 1000 &
bystander=$!
{limits}
"$@"
status=$?
kill -0 $bystander || echo the bystander was killed >&2
kill $bystander
exit $status
"""


def beside_a_bystander(limits):
    """A wrapper that runs a program so; `limits` are words of the shell, such as `ulimit -n 40`."""
    return ["unshare", "-m", "--propagation", "slave", "-p", "-f", "--mount-proc", "sh", "-c",
            BESIDE_A_BYSTANDER.format(limits=limits), "sh"]


def swapped_and_killed(backup, source):
    """The status of a restore in place that ends without a word when the restored state has got its place: 9."""
    import btrfs_backup_ng as program  # demo and bench take fakes without it
    pid = os.fork()
    if not pid:
        try:
            with mock.patch.object(program, "finish_swap", lambda place: os._exit(9)):
                program.main(["restore", "-q", "-p", "home", backup, "--in-place", source])
        finally:
            os._exit(8)
    return os.waitpid(pid, 0)[1] >> 8
