"""Fixtures of the tests: scratch btrfs filesystems, the program as a child, trees to compare.

Nothing of btrfs is mocked: a Disk is a real filesystem on a loop device. What is known about a
subvolume comes from `btrfs subvolume show`, never from the program under test.

Environment:
  BTRFS_BACKUP_NG         the program to test, default ../btrfs_backup_ng.py, and most of the time its zipapp
  BTRFS_BACKUP_NG_PYTHON  the interpreter that runs it, default the one that runs the tests
  BTRFS_BACKUP_NG_FLAGS   the flags of that interpreter, default "-E -s"
  CI                      when set, a test that cannot run fails instead of being skipped
"""

import atexit
import contextlib
import ctypes
import fcntl
import glob
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import zipfile
from typing import Dict, List, NamedTuple, Optional


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
FLAGS = os.environ.get("BTRFS_BACKUP_NG_FLAGS", "-E -s").split()
TOOL_FOLDER = b".btrfs-backup-ng"
NOBODY = 65534
MIB = 1 << 20
HANGS = 120  # seconds after which what we wait for does not come; no measure of speed, for others may be at work


def command(*argv):
    """What the command wrote to stdout, as text. Raises when it fails."""
    done = subprocess.run([os.fsencode(word) for word in argv], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        raise RuntimeError("%r exited %d: %s" % (argv, done.returncode, os.fsdecode(done.stderr)))
    return os.fsdecode(done.stdout)


def why_not():
    """The reason why tests on real filesystems cannot run here, or None."""
    if os.geteuid() != 0:
        return "needs root, for loop devices and btrfs send/receive"
    for program in ("btrfs", "mkfs.btrfs", "losetup", "fallocate", "setpriv", "chattr"):
        if not shutil.which(program):
            return "needs the program " + program
    if not os.path.exists("/dev/loop-control"):
        return "needs loop devices"
    with open("/proc/filesystems") as filesystems:
        if "\tbtrfs\n" in filesystems.read():
            return None
    if subprocess.call(["modprobe", "btrfs"], stderr=subprocess.DEVNULL):
        return "needs a kernel with btrfs"
    return None


def require(reason):
    """Skip the test for the reason, if there is one; in CI that is a failure."""
    if reason and os.environ.get("CI"):
        raise AssertionError("must not be skipped in CI: " + reason)
    if reason:
        raise unittest.SkipTest(reason)


def why_no_mounts():
    """The reason why nothing here can have mounts of its own, as `unshare --mount` gives them, or None."""
    with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
        if any(line.split(" ")[4] == "/" for line in mounts):
            return None
    return "needs a root that is a mount point; for a chroot: mount --bind FOLDER FOLDER; chroot FOLDER"


# Scratch folders. One per test process, which holds a flock on it, so that the next run can remove what a
# killed one left mounted; a process id alone would not tell, for it may be one of another PID namespace.

SCRATCH_PREFIX = "btrfs-backup-ng-test-"
_scratch = None
_scratch_lock = None


def scratch_bases():
    return ["/dev/shm", tempfile.gettempdir()]


def has_room(base):
    if not os.access(base, os.W_OK):
        return False
    space = os.statvfs(base)
    return space.f_bavail * space.f_frsize > 4 << 30


def scratch_folder():
    """This process's folder for images and mount points; gone when the process ends."""
    global _scratch, _scratch_lock
    if _scratch is None:
        sweep()
        base = next((b for b in scratch_bases() if has_room(b)), tempfile.gettempdir())
        new = tempfile.mkdtemp(prefix="new-" + SCRATCH_PREFIX, dir=base)
        _scratch_lock = os.open(new, os.O_RDONLY)
        fcntl.flock(_scratch_lock, fcntl.LOCK_EX)
        paths = (os.path.join(base, SCRATCH_PREFIX + str(number)) for number in itertools.count(os.getpid()))
        _scratch = next(path for path in paths if not os.path.exists(path))
        os.rename(new, _scratch)
        atexit.register(discard, _scratch)
    return _scratch


def scratch_number():
    return int(scratch_folder().rpartition("-")[2])


def is_in_use(number):
    """Whether a test process that lives has the scratch folder of that number, or is this process."""
    locked = any(is_locked(os.path.join(base, SCRATCH_PREFIX + str(number))) for base in scratch_bases())
    return locked or os.path.exists("/proc/%d" % number)


def is_locked(folder):
    """Whether a process holds a flock on a folder."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def sweep():
    """Remove the scratch folders of test processes that are dead."""
    for base in scratch_bases():
        for folder in glob.glob(os.path.join(base, SCRATCH_PREFIX + "*")):
            number = folder[folder.rindex("-") + 1:]
            if number.isdigit() and not is_in_use(int(number)):
                discard(folder)


def mounts_below(folder):
    """Mount points in the folder, the last mounted first."""
    with open("/proc/self/mounts", errors="surrogateescape") as mounts:
        points = [line.split(" ")[1] for line in mounts]
    return [p for p in reversed(points) if p.startswith(folder + "/")]


def loops_below(folder):
    """Loop devices whose image lies in the folder."""
    for backing in glob.glob("/sys/block/loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it has gone meanwhile
            with open(backing, errors="surrogateescape") as image:
                if image.read().startswith(folder + "/"):
                    yield "/dev/" + backing.split("/")[3]


LOOP_CLR_FD = 0x4C01  # linux/loop.h


def detach(loop, folder):
    """Detaches a loop device whose image lies in the folder. Its number may be another run's by now.

    While the device is open here nobody can attach something else to it.
    """
    with contextlib.suppress(OSError):
        fd = os.open(loop, os.O_RDONLY)
        try:
            if loop in loops_below(folder):
                fcntl.ioctl(fd, LOOP_CLR_FD)
        finally:
            os.close(fd)


def discard(folder):
    for mount_point in mounts_below(folder):
        unmount(mount_point)
    for loop in list(loops_below(folder)):
        detach(loop, folder)
    shutil.rmtree(folder, ignore_errors=True)


def unmount(mount_point):
    """Unmount, patiently; lazily when something holds on to it for more than a second."""
    for _ in range(20):
        if not subprocess.call(["umount", mount_point], stderr=subprocess.DEVNULL):
            return
        time.sleep(0.05)
    subprocess.call(["umount", "-l", mount_point], stderr=subprocess.DEVNULL)


def make_btrfs(image, *options):
    """mkfs.btrfs, which looks at each loop device there is, and fails where another run's goes away meanwhile."""
    for _ in range(50):
        try:
            return command("mkfs.btrfs", "-q", *(options + (image,)))
        except RuntimeError as error:
            if "cannot check mount status" not in str(error):
                raise
    raise RuntimeError("other loop devices come and go all the time")


class Disk:
    """A btrfs filesystem on a sparse file: `path` is where it is mounted."""

    numbers = itertools.count(1)

    def __init__(self, size="512M", mkfs=(), options="defaults", at=None, image_in=None):
        number = next(self.numbers)
        self.image = os.path.join(image_in or scratch_folder(), "%d.img" % number)
        self.path = at or os.path.join(scratch_folder(), "disk%d" % number)
        self.options = options
        self.loop = None
        command("truncate", "-s", size, self.image)
        make_btrfs(self.image, *mkfs)
        os.makedirs(self.path, exist_ok=True)
        self.mount()

    def mount(self):
        self.loop = command("losetup", "-f", "--show", self.image).strip()
        command("mount", "-t", "btrfs", "-o", self.options, self.loop, self.path)

    def unmount(self):
        """The disk is away: its mount point is an empty folder now."""
        if self.loop is None:
            return
        unmount(self.path)
        detach(self.loop, os.path.dirname(self.image))
        self.loop = None

    def cut_power(self):
        """Mounts it as it would be after a power failure at this moment: what was not written yet is lost.

        Its image must lie on a filesystem that clones files, which gives the image of one instant.
        """
        left = self.image + ".left"
        command("cp", "--reflink=always", self.image, left)
        self.unmount()
        os.rename(left, self.image)
        self.mount()

    def remount(self, option):
        command("mount", "-o", "remount," + option, self.path)

    def grow(self, size):
        command("truncate", "-s", size, self.image)
        command("losetup", "-c", self.loop)
        command("btrfs", "filesystem", "resize", "max", self.path)

    def used(self):
        """Bytes in use, once everything is written."""
        command("btrfs", "filesystem", "sync", self.path)
        space = os.statvfs(self.path)
        return (space.f_blocks - space.f_bfree) * space.f_frsize

    def close(self):
        self.unmount()
        os.unlink(self.image)


# Chance and time.

SEED = os.environ.get("SEED") or str(random.SystemRandom().getrandbits(32))


def chance(test):
    """A source of random choices for a test: they follow from SEED, in the environment or taken here, and its name."""
    if "SEED" not in os.environ:
        print("SEED=%s %s" % (SEED, test.id()), file=sys.stderr)
    return random.Random("%s %s" % (SEED, test.id()))


def next_second():
    """Wait for the next second of the clock: the name of a snapshot has the second in which it was taken."""
    time.sleep(1.01 - time.time() % 1)


# Subvolumes, as btrfs-progs see them.


class Subvolume(NamedTuple):
    id: int
    uuid: str
    parent_uuid: Optional[str]
    received_uuid: Optional[str]
    readonly: bool


def subvolume(path):
    """What `btrfs subvolume show` says of a subvolume."""
    fields: Dict[str, str] = {}
    for line in command("btrfs", "subvolume", "show", path).splitlines():
        key, colon, value = line.strip().partition(":")
        if colon:
            fields.setdefault(key, value.strip())
    return Subvolume(
        id=int(fields["Subvolume ID"]),
        uuid=fields["UUID"],
        parent_uuid=None if fields["Parent UUID"] == "-" else fields["Parent UUID"],
        received_uuid=None if fields["Received UUID"] == "-" else fields["Received UUID"],
        readonly="readonly" in fields["Flags"].split())


def is_subvolume(path):
    """The root of every subvolume has inode 256."""
    found = os.lstat(path)
    return stat.S_ISDIR(found.st_mode) and found.st_ino == 256


def create(path):
    command("btrfs", "subvolume", "create", path)
    return path


def snapshot(source, path, readonly=True):
    command("btrfs", "subvolume", "snapshot", *(["-r"] if readonly else []) + [source, path])
    return path


def delete(path):
    command("btrfs", "subvolume", "delete", path)


def make_writable(path):
    """What nobody should do to a backup. btrfs-progs before 5.14.2 ask for no force."""
    words = ("-ts", path, "ro", "false")
    try:
        command("btrfs", "property", "set", "-f", *words)
    except RuntimeError:
        command("btrfs", "property", "set", *words)


def send_receive(path, folder, parent=None):
    """`btrfs send | btrfs receive`, as one does it by hand."""
    argv = ["btrfs", "send", "-q"] + (["-p", parent] if parent else []) + [path]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as sender:
        subprocess.check_call(["btrfs", "receive", "-q", folder], stdin=sender.stdout)
    if sender.returncode:
        raise RuntimeError("btrfs send exited %d" % sender.returncode)


def set_received_uuid(path, uuid_bytes):
    """Stamp a received UUID on a writable subvolume, as `btrfs receive` does at its end."""
    set_received_subvol = 0xc0c89425
    argument = bytearray(uuid_bytes.ljust(200, b"\0"))
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(folder, set_received_subvol, argument)
    finally:
        os.close(folder)


def uuid_of(path):
    """The 16 bytes of a subvolume's UUID."""
    get_subvol_info = 0x81f8943c
    argument = bytearray(504)
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(folder, get_subvol_info, argument)
    finally:
        os.close(folder)
    uuid_offset = 8 + 256 + 8 + 8 + 8 + 8  # id, name, parent id, top folder's id, generation, flags
    return bytes(argument[uuid_offset:uuid_offset + 16])


def names(folder):
    """The visible names in a folder, sorted; [] when there is no such folder."""
    if not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def hidden(folder):
    """What lies in a folder of backups beside them: partials, records, locks. Not the note that says whose they are."""
    return sorted(name for name in os.listdir(folder) if name.startswith(".") and not name.endswith(".source"))


def partials(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".partial"))


def read_locks(snapshot_folder):
    """The locks and parent notes there are, without entries that hold none.

    That of which disk a lock is ("NAME on UUID") stands beside the lock, and is left out with it there.
    """
    path = os.path.join(snapshot_folder, ".outstanding_transfers")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8", errors="surrogateescape") as lock_file:
        entries = json.load(lock_file)
    locks = {name: entry for name, entry in entries.items() if any(entry.values())}
    return {name: entry for name, entry in locks.items() if name.partition(" on ")[0] not in set(locks) - {name}}


def write_locks(snapshot_folder, content):
    """Leave a lock file behind: a value that becomes JSON, or the very bytes."""
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    os.makedirs(snapshot_folder, exist_ok=True)
    with open(os.path.join(snapshot_folder, ".outstanding_transfers"), "wb") as lock_file:
        lock_file.write(content)


# The program as a child.


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

    def __init__(self, *arguments, env=None, wrapper=(), program=tuple([PYTHON] + FLAGS + [FAST_PROGRAM])):
        mark = "BTRFS_BACKUP_NG_TEST_RUN=%d-%d" % (os.getpid(), next(self.numbers))
        self.mark = mark.encode()
        name, _, value = mark.partition("=")
        self.stdout = tempfile.TemporaryFile()
        self.stderr = tempfile.TemporaryFile()
        argv = list(wrapper) + list(program) + list(arguments)
        self.process = subprocess.Popen(
            [os.fsencode(word) for word in argv], stdin=subprocess.DEVNULL, stdout=self.stdout,
            stderr=self.stderr, env=dict(os.environ, **dict(env or {}, **{name: value})),
            cwd=scratch_folder(), start_new_session=True)
        self.pid = self.process.pid

    def processes(self):
        """{pid: argv} of what the program started and what still runs, itself included."""
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
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

    def wait_to_say(self, words):
        return self.wait_for(words + " said", lambda: words in self.read_stderr())

    def wait_for(self, what, condition, timeout=HANGS):
        """What the condition says once it is true; fails when the program ends before."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            said = condition()
            if said:
                return said
            if self.process.poll() is not None:
                raise AssertionError("the program ended before there was %s: %s"
                                     % (what, self.finish().stderr))
            time.sleep(0.001)
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


def gate(verb):
    """An environment in which each `btrfs VERB` stops itself before it begins; SIGCONT lets it in.

    However short it is, and however slowly we look, we meet it.
    """
    folder = os.path.join(scratch_folder(), "gate-" + verb)
    script = os.path.join(folder, "btrfs")
    if not os.path.exists(script):
        os.makedirs(folder)
        with open(script + ".new", "w") as file:
            file.write('#!/bin/sh\ncase " $1 $2 " in *" %s "*) kill -STOP $$;; esac\nexec %s "$@"\n'
                       % (verb, shutil.which("btrfs")))
        os.chmod(script + ".new", 0o755)
        os.rename(script + ".new", script)
    return {"PATH": folder + ":" + os.environ["PATH"]}


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
    folders = os.environ["PATH"].split(":") + ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"]
    paths = {os.path.realpath(os.path.join(folder, name)) for folder in folders for name in names}
    return sorted(path for path in paths if os.path.isfile(path))


def in_own_mounts(script):
    """The words before a command to run by a script in a mount namespace of its own, as its "$@"."""
    require(why_no_mounts())
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


# Trees.


def tree(top):
    """{relative path: {attribute: value}} of everything that a backup has to bring back.

    Left out: the times of the top folder, which receive does not restore; the program's own
    folder; and nested subvolumes, which are no part of a snapshot (they have inode 256, their
    empty stand-ins in a snapshot inode 2).
    """
    top = os.fsencode(top)
    found = {b".": describe(top)}
    del found[b"."]["mtime_ns"]
    links: Dict[int, List[bytes]] = {}
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if belongs(top, folder, name)]
        for name in folders + files:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, top)
            found[relative] = describe(path)
            links.setdefault(os.lstat(path).st_ino, []).append(relative)
    for group in links.values():
        if len(group) > 1:
            for relative in group:
                found[relative]["links"] = sorted(group)
    return found


def belongs(top, folder, name):
    if folder == top and name == TOOL_FOLDER:
        return False
    return os.lstat(os.path.join(folder, name)).st_ino not in (2, 256)


def describe(path):
    found = os.lstat(path)
    seen = {
        "type": stat.S_IFMT(found.st_mode),
        "mode": oct(stat.S_IMODE(found.st_mode)),
        "owner": (found.st_uid, found.st_gid),
        "mtime_ns": found.st_mtime_ns,
        "xattrs": {name: os.getxattr(path, name, follow_symlinks=False)
                   for name in os.listxattr(path, follow_symlinks=False)},
    }
    if stat.S_ISREG(found.st_mode):
        seen["size"] = found.st_size
        with open(path, "rb") as content:
            seen["content"] = hashlib.sha256(content.read()).hexdigest()
    elif stat.S_ISLNK(found.st_mode):
        seen["target"] = os.readlink(path)
    elif stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        seen["device"] = (os.major(found.st_rdev), os.minor(found.st_rdev))
    return seen


def differences(one, other):
    """Lines that say where two trees differ."""
    for path in sorted(set(one) | set(other)):
        if path not in other:
            yield "%r: only in the first" % path
        elif path not in one:
            yield "%r: only in the second" % path
        else:
            for key in sorted(set(one[path]) | set(other[path])):
                if one[path].get(key) != other[path].get(key):
                    yield "%r: %s: %r, %r" % (path, key, one[path].get(key), other[path].get(key))


def listing(*folders):
    """All that a run could change beneath the folders, but the flock's file and access times.

    Made to be compared with a listing taken later: inodes, times and sizes of everything,
    snapshots included. The stand-ins of nested subvolumes (inode 2) are left out, as their times
    are those of looking.
    """
    seen = {os.fsencode(top): changeable(top) for top in folders}
    for top in folders:
        for folder, folder_names, file_names in os.walk(os.fsencode(top)):
            for name in folder_names + file_names:
                path = os.path.join(folder, name)
                if name != b".lock" and os.lstat(path).st_ino != 2:
                    seen[path] = changeable(path)
    return seen


def changeable(path):
    found = os.lstat(path)
    seen = [found.st_ino, found.st_mode, found.st_mtime_ns, found.st_ctime_ns, found.st_size]
    if is_subvolume(path):
        seen.append(subvolume(path))
    return seen


# Change.

KEEP_SIZE, PUNCH_HOLE = 1, 2  # of fallocate(2)
FICLONE = 0x40049409
FICLONERANGE = 0x4020940d

HOSTILE_NAMES = [b"plain", b"two words", b" leading blank", b"it's", b'"quoted"', b"$HOME", b"`id`",
                 b"new\nline", b"-rf", b"--", b"caf\xe9", b"\xff\xfe", b"t\xc3\xbcr", b"tab\t",
                 b"back\\slash", b"*", b".hidden", b"~", b"a:b", b"@file", b"\x01", b"%s"]


class Churn:
    """Fills a folder with files of every kind and changes them at random.

    The same seed brings the same changes. What `btrfs send` itself gets wrong is avoided: a
    chown of a file that is setuid before and after loses the bit on the way.
    """

    def __init__(self, top, seed=1):
        self.top = os.fsencode(top)
        self.random = random.Random(seed)
        self.count = 0
        self.setuid = set()

    def fill(self, count=60):
        for _ in range(5):
            self.make_folder()
        for _ in range(count // 2):
            self.create()
        self.change(count)

    def change(self, count=40):
        for _ in range(count):
            self.random.choice(self.ACTIONS)(self)

    # What to act on.

    def new_path(self, folder=None):
        self.count += 1
        name = self.random.choice(HOSTILE_NAMES) + b"%d" % self.count
        if self.random.random() < 0.1:
            name = name.ljust(255, b"n")
        return os.path.join(folder or self.some_folder(), name)

    def walk(self):
        for folder, folders, files in os.walk(self.top):
            if folder == self.top:
                folders[:] = [name for name in folders if name != TOOL_FOLDER]
            folders.sort()
            yield folder, folders, sorted(files)

    def folders(self):
        """All folders but the top, for that one stays."""
        return [folder for folder, _, _ in self.walk()][1:]

    def some_folder(self):
        return self.random.choice([self.top] + self.folders())

    def entries(self):
        return [os.path.join(folder, name) for folder, _, files in self.walk() for name in files]

    def some_entry(self):
        """Anything but a folder."""
        return self.random.choice(self.entries() or [self.create()])

    def some_file(self, size=0):
        """A regular file of at least that size."""
        fitting = [path for path in self.entries()
                   if stat.S_ISREG(os.lstat(path).st_mode) and os.path.getsize(path) >= size]
        return self.random.choice(fitting or [self.create(size)])

    def data(self, size):
        return self.random.getrandbits(8 * size + 1).to_bytes(size + 1, "big")[1:]

    def range_in(self, path):
        size = os.path.getsize(path)
        start = self.random.randrange(size + 1)
        return start, self.random.randint(1, 40000)

    # What can happen.

    def create(self, size=0):
        path = self.new_path()
        with open(path, "wb") as file:
            file.write(self.data(size + self.random.choice([0, 10, 3000, 5000, 70000, 200000])))
        return path

    def append(self):
        with open(self.some_file(), "r+b") as file:  # O_CREAT is refused for another's file in a sticky folder
            file.seek(0, os.SEEK_END)
            file.write(self.data(self.random.randint(1, 20000)))

    def overwrite(self):
        path = self.some_file()
        start, length = self.range_in(path)
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(self.data(length))

    def truncate(self):
        path = self.some_file()
        os.truncate(path, self.random.randint(0, 2 * os.path.getsize(path)))

    def fallocate(self, mode):
        """mode: as in fallocate(2). The program of that name opens with O_CREAT."""
        path = self.some_file(1)
        start, length = self.range_in(path)
        libc = ctypes.CDLL(None, use_errno=True)
        with open(path, "r+b") as file:
            if libc.fallocate(file.fileno(), mode, ctypes.c_int64(start), ctypes.c_int64(length)) != 0:
                raise OSError(ctypes.get_errno(), "fallocate", path)

    def punch(self):
        self.fallocate(KEEP_SIZE | PUNCH_HOLE)

    def preallocate(self):
        self.fallocate(self.random.choice([0, KEEP_SIZE]))

    def reflink(self):
        source, target = self.some_file(), self.new_path()
        with open(source, "rb") as old, open(target, "wb") as new:
            fcntl.ioctl(new, FICLONE, old.fileno())

    def reflink_range(self):
        source, target = self.some_file(8192), self.some_file(8192)
        with open(source, "rb") as old, open(target, "r+b") as new:
            start = 4096 * self.random.randrange(2)
            fcntl.ioctl(new, FICLONERANGE, struct.pack("=qQQQ", old.fileno(), 4096 - start, 4096, start))

    def rename(self):
        entry = self.some_entry()
        os.rename(entry, self.new_path(os.path.dirname(entry)))

    def move(self):
        os.rename(self.some_entry(), self.new_path())

    def replace(self):
        os.rename(self.create(), self.some_file())

    def swap(self):
        one, other, aside = self.some_entry(), self.some_entry(), self.new_path()
        if one != other:
            os.rename(one, aside)
            os.rename(other, one)
            os.rename(aside, other)

    def remove(self):
        os.unlink(self.some_entry())

    def hard_link(self):
        os.link(self.some_entry(), self.new_path(), follow_symlinks=False)

    def symlink(self):
        target = self.random.choice([b"/no/where", b"../up", b"a b", b"\xff", self.new_path()])
        os.symlink(target, self.new_path())

    def special(self):
        kind = self.random.choice([stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK])
        os.mknod(self.new_path(), kind | 0o640, os.makedev(1, 3))

    def make_folder(self):
        os.mkdir(self.new_path())

    def rename_folder(self):
        if self.folders():
            folder, into = self.random.choice(self.folders()), self.some_folder()
            if not (into + b"/").startswith(folder + b"/"):
                os.rename(folder, self.new_path(into))

    def remove_folder(self):
        if len(self.folders()) > 4:
            shutil.rmtree(self.random.choice(self.folders()))

    def set_xattr(self):
        name = self.random.choice([b"user.note", b"user.caf\xc3\xa9", b"trusted.note"])
        path = self.random.choice([self.some_file(), self.some_folder()])
        os.setxattr(path, name, self.data(self.random.randint(0, 200)))

    def remove_xattr(self):
        path = self.some_file()
        for name in os.listxattr(path):
            os.removexattr(path, name)

    def acl(self):
        path = self.some_file()
        entries = [(0x01, 6, 2 ** 32 - 1), (0x02, self.random.randrange(8), 1000), (0x04, 4, 2 ** 32 - 1),
                   (0x10, 7, 2 ** 32 - 1), (0x20, 4, 2 ** 32 - 1)]
        packed = b"".join(struct.pack("<HHI", *entry) for entry in entries)
        os.setxattr(path, b"system.posix_acl_access", struct.pack("<I", 2) + packed)

    def capability(self):
        net_bind_service = 1 << 10
        packed = struct.pack("<5I", 0x02000001, net_bind_service, 0, 0, 0)
        os.setxattr(self.some_file(), b"security.capability", packed)

    def chmod(self):
        os.chmod(self.some_file(), self.random.choice([0o600, 0o644, 0o755, 0o000]))

    def chmod_folder(self):
        os.chmod(self.some_folder(), self.random.choice([0o700, 0o755, 0o2770, 0o1777]))

    def make_setuid(self):
        path = self.some_file()
        os.chmod(path, self.random.choice([0o4755, 0o6711]))
        self.setuid.add(os.lstat(path).st_ino)

    def chown(self):
        path = self.random.choice([self.some_entry(), self.some_folder()])
        if os.lstat(path).st_ino not in self.setuid:
            os.chown(path, self.random.randrange(3000), self.random.randrange(3000), follow_symlinks=False)

    def touch(self):
        mtime_ns = self.random.randrange(2 * 10 ** 18)
        os.utime(self.some_entry(), ns=(mtime_ns, mtime_ns), follow_symlinks=False)

    ACTIONS = [create, create, append, overwrite, truncate, punch, preallocate, reflink, reflink_range,
               rename, move, replace, swap, remove, hard_link, symlink, special, make_folder,
               rename_folder, remove_folder, set_xattr, remove_xattr, acl, capability, chmod,
               chmod_folder, make_setuid, chown, touch]


def bulk(path, mib, seed=1):
    """A file of so many MiB, made quickly; as large in the stream as it looks.

    Made anew: churn may have put a folder or a fifo in its place.
    """
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
    block = random.Random(seed).getrandbits(8 * MIB).to_bytes(MIB, "big")
    with open(path, "wb") as file:
        for _ in range(mib):
            file.write(block)


# Test cases.


class TestCase(unittest.TestCase):
    """A test on real filesystems."""

    @classmethod
    def setUpClass(cls):
        require(why_not())

    def disk(self, *args, **options):
        disk = Disk(*args, **options)
        self.addCleanup(disk.close)
        return disk

    def start(self, *arguments, **options):
        """The program, at work in the background; killed at the end of the test."""
        running = Running(*arguments, **options)
        self.addCleanup(running.close)
        return running

    def run_program(self, *arguments, status=0, timeout=HANGS, **options):
        """The program's Result. `status` is what it has to exit with, None for anything."""
        result = self.start(*arguments, **options).finish(timeout)
        self.assertNotIn("Traceback", result.stderr)
        self.assertNotRegex(result.stderr, "unexpected [A-Z][A-Za-z]+: ")
        self.assertNotRegex(result.stderr, "Exception ignored|[A-Z][a-z]+Warning")
        if status is not None:
            self.assertEqual(status, result.status, result.stderr)
        if result.status not in (0, 130, 143):
            self.assertIn("error", result.stderr.lower(), "failed without saying why")
        return result

    def assertTreesEqual(self, one, other):
        """Trees are given as paths, or as what tree() returned."""
        one, other = (tree(t) if isinstance(t, (str, bytes)) else t for t in (one, other))
        found = list(differences(one, other))
        if found:
            self.fail("%d differences:\n  %s" % (len(found), "\n  ".join(found[:8])))

    def assertComplete(self, backup, original):
        """The backup is read-only, is of that very snapshot, and holds what it holds."""
        made, of = subvolume(backup), subvolume(original)
        self.assertTrue(made.readonly, backup + " is writable")
        self.assertEqual(of.received_uuid or of.uuid, made.received_uuid, backup)
        self.assertTreesEqual(original, backup)

    def assertUnchanged(self, before, *folders):
        after = listing(*folders)
        changed = [path for path in sorted(set(before) | set(after)) if before.get(path) != after.get(path)]
        self.assertEqual([], changed)

    def assertErrorSays(self, result, *words):
        """One error line, and the words in it or in the indented hint under it."""
        self.assertEqual(1, len(result.errors), result.stderr)
        lines = result.stderr.splitlines()
        at = lines.index(result.errors[0])
        hint = itertools.takewhile(lambda line: line[:1].isspace(), lines[at + 1:])
        message = "\n".join([lines[at]] + list(hint)).lower()
        for word in words:
            self.assertIn(word.lower(), message)


class BackupTestCase(TestCase):
    """A source subvolume and a folder for its backups, on a disk each; prefix `home`."""

    source_size = "512M"
    target_size = "512M"

    def setUp(self):
        self.source_disk = self.disk(self.source_size)
        self.target_disk = self.disk(self.target_size)
        self.source = create(os.path.join(self.source_disk.path, "home"))
        self.snapshots = os.path.join(self.source, ".btrfs-backup-ng", "snapshots")
        self.target = os.path.join(self.target_disk.path, "backups")
        os.mkdir(self.target)

    def backup(self, *options, to=None, **more):
        """Runs the program on the source; to the one target unless told which ones."""
        targets = [self.target] if to is None else to
        arguments = ["-p", "home"] + list(options) + [self.source] + list(targets)
        return self.run_program(*arguments, **more)

    def transfer(self, *options, **more):
        """The same without a snapshot: quick, as no two runs have to differ by a second."""
        return self.backup("-S", *options, **more)

    def start_backup(self, *options, **more):
        return self.start("-p", "home", *(list(options) + [self.source, self.target]), **more)

    def write(self, name, content):
        path = os.path.join(self.source, name)
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            os.unlink(path)  # churn has put a link or a fifo in its place
        with open(path, "w") as file:
            file.write(content)

    def take(self, *days):
        """Snapshots taken by hand, named after days of January 2024, each with its own file."""
        os.makedirs(self.snapshots, exist_ok=True)
        taken = []
        for day in days:
            taken.append(self.name(day))
            self.write("day%d" % day, "day %d\n" % day)
            snapshot(self.source, self.snapshot_path(taken[-1]))
        return taken

    @staticmethod
    def name(day):
        return "home202401%02d-000000" % day

    def snapshot_path(self, name):
        return os.path.join(self.snapshots, name)

    def backup_path(self, name):
        return os.path.join(self.target, name)

    def assertBackedUp(self, expected, target=None):
        """The target holds these backups, each complete, and nothing that is partial."""
        target = target or self.target
        self.assertEqual(sorted(expected), names(target))
        self.assertEqual([], partials(target))
        for name in expected:
            self.assertComplete(os.path.join(target, name), self.snapshot_path(name))
