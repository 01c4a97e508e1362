"""Scratch folders and real btrfs filesystems on loop devices, and the subvolumes and state files on them.

What is known about a subvolume comes from `btrfs subvolume show`, never from the program under test.
"""

import atexit
import contextlib
import copy
import fcntl
import glob
import itertools
import json
import os
import shutil
import stat
import subprocess
import tempfile
import time
import unittest
from typing import Dict, NamedTuple, Optional

SYSTEM_FOLDERS = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]


def find_program(name):
    """The path of a program, also in folders that an ordinary user's PATH often lacks; None where it is not there."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath)] + SYSTEM_FOLDERS))


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
        share_mounts(_scratch)
        atexit.register(discard, _scratch)
    return _scratch


def share_mounts(folder):
    """What is unmounted below the folder is so in mount namespaces as well that are this one's slaves.

    Else a disk would stay in use there, unseen, and its loop device with it.
    """
    for words in (["--bind", folder, folder], ["--make-private", folder], ["--make-shared", folder]):
        subprocess.call(["mount"] + words, stderr=subprocess.DEVNULL)


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
    return [point for point in mount_points() if point.startswith(folder + "/")]


def mount_points():
    with open("/proc/self/mounts", errors="surrogateescape") as mounts:
        return [line.split(" ")[1] for line in mounts][::-1]


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
    """Removes a scratch folder, with all that is mounted below it and attached to images in it.

    Loop devices go before its own mount does: behind that nothing tells any more whose they are. A tree in it may be
    deeper than what Python walks.
    """
    for mount_point in mounts_below(folder):
        unmount(mount_point)
    for loop in list(loops_below(folder)):
        detach(loop, folder)
    for mount_point in [point for point in mount_points() if point == folder]:
        unmount(mount_point)
    subprocess.call(["rm", "-rf", "--one-file-system", folder], stderr=subprocess.DEVNULL)


def remove_scratch():
    """Removes this process's scratch folder, and those of processes that are dead."""
    if _scratch is not None:
        discard(_scratch)
    sweep()


def image_name(number):
    """Tells which run of the tests an image is of: its loop device shows that whatever becomes of its folder."""
    return "{}{}.img".format(number, "-of-" + os.environ["RUN_OF_TESTS"] if "RUN_OF_TESTS" in os.environ else "")


def unmount(mount_point):
    """Unmount, patiently; lazily when something holds on to it for more than a second."""
    for _ in range(20):
        if not subprocess.call(["umount", mount_point], stderr=subprocess.DEVNULL):
            return
        time.sleep(0.05)
    subprocess.call(["umount", "-l", mount_point], stderr=subprocess.DEVNULL)


def set_size(image, size):
    """Makes a sparse file of so many bytes, or of a size such as 512M, or makes one larger."""
    with open(image, "ab") as file:
        file.truncate(size if isinstance(size, int) else int(size[:-1]) << {"M": 20, "G": 30}[size[-1]])


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
        self.image = os.path.join(image_in or scratch_folder(), image_name(number))
        self.path = at or os.path.join(scratch_folder(), "disk%d" % number)
        self.options = options
        self.loop = None
        set_size(self.image, size)
        make_btrfs(self.image, *mkfs)
        os.makedirs(self.path, exist_ok=True)
        self.mount()

    def mount(self):
        self.loop = command("losetup", "-f", "--show", self.image).strip()
        try:
            command("mount", "-t", "btrfs", "-o", self.options, self.loop, self.path)
        except BaseException:
            detach(self.loop, os.path.dirname(self.image))
            raise

    def unmount(self):
        """The disk is away: its mount point is an empty folder now."""
        if self.loop is None:
            return
        unmount(self.path)
        detach(self.loop, os.path.dirname(self.image))
        self.loop = None

    def copied(self):
        """A copy of it, as of another machine, which takes turns with it at its mount point; neither is mounted now."""
        self.unmount()
        other = copy.copy(self)
        other.image = os.path.join(os.path.dirname(self.image), image_name(next(self.numbers)))
        command("cp", "--sparse=always", self.image, other.image)
        return other

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
        set_size(self.image, size)
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


def ext4(test, size="256M"):
    """A mounted ext4 filesystem's folder."""
    number = next(Disk.numbers)
    image, folder = (os.path.join(scratch_folder(), name) for name in (image_name(number), "ext4-%d" % number))
    os.mkdir(folder)
    set_size(image, size)
    command("mkfs.ext4", "-q", "-F", image)
    loop = command("losetup", "-f", "--show", image).strip()
    command("mount", loop, folder)
    test.addCleanup(os.unlink, image)
    test.addCleanup(command, "losetup", "-d", loop)
    test.addCleanup(unmount, folder)
    return folder


def tmpfs(test):
    folder = os.path.join(scratch_folder(), "tmpfs-{}".format(next(Disk.numbers)))
    os.mkdir(folder)
    command("mount", "-t", "tmpfs", "-o", "size=256M", "tmpfs", folder)
    test.addCleanup(unmount, folder)
    return folder


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
    """What lies in a folder of backups beside them: partials, records, locks. Not the notes about them, which stay."""
    notes = (".source", ".sizes")
    return sorted(name for name in os.listdir(folder) if name.startswith(".") and not name.endswith(notes))


def partials(folder):
    """By their paths in a folder: those that are being received may be in a closed one in it."""
    found = glob.glob(os.path.join(glob.escape(folder), ".*.partial"))
    found += glob.glob(os.path.join(glob.escape(folder), ".*.partial.begun", ".*.partial"))
    return sorted(os.path.relpath(path, folder) for path in found)


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
