"""Trees of files: all of one as a value to compare, and random changes of every kind."""

import ctypes
import fcntl
import hashlib
import os
import random
import shutil
import stat
import struct
from typing import Dict, List

from disks import is_subvolume, subvolume

TOOL_FOLDER = b".btrfs-backup-ng"
MIB = 1 << 20


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
        seen["content"] = digest(path)
    elif stat.S_ISLNK(found.st_mode):
        seen["target"] = os.readlink(path)
    elif stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        seen["device"] = (os.major(found.st_rdev), os.minor(found.st_rdev))
    return seen


def digest(path):
    """The SHA-256 of a file, read in parts: memory for a large one as a whole takes longer than the digest."""
    hashed, part = hashlib.sha256(), memoryview(bytearray(1 << 17))
    with open(path, "rb", buffering=0) as content:
        for size in iter(lambda: content.readinto(part), 0):
            hashed.update(part[:size])
    return hashed.hexdigest()


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
