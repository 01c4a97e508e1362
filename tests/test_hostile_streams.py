"""Streams that are well-formed and hostile: whatever they hold, nothing changes but their own subvolume.

HOSTILE=N in the environment: so many streams each way; TORTURE: 20000 for the gate with `btrfs receive` that goes on
after errors, which does many at once, and 500 for the others.
"""

import hashlib
import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import unittest
import uuid
from unittest import mock

import support

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import btrfs_backup_ng as program

TORTURE = bool(os.environ.get("TORTURE"))
STREAMS = int(os.environ.get("HOSTILE") or (500 if TORTURE else 8))
AT_ONCE, BATCHES = 100, int(os.environ.get("HOSTILE") or (20000 if TORTURE else 400)) // 100
NAME = "new20260201-093000"
EVIL = b"OVERWRITTEN"
THE_END = program.make_command(program.END, ())


def number(value=0):
    return struct.pack("<Q", value)


def with_data(version, attributes):
    """The payload of a command, whose DATA has no length from protocol 2 on."""
    parts = []
    for kind, data in attributes:
        head = struct.pack("<H", kind) if version >= 2 and kind == program.A_DATA else struct.pack(
            "<HH", kind, len(data))
        parts.append(head + data)
    return b"".join(parts)


def encode(version, command, attributes):
    payload = with_data(version, attributes)
    checksum = program.crc32c(program.COMMAND_HEADER.pack(len(payload), command, 0) + payload)
    return program.COMMAND_HEADER.pack(len(payload), command, checksum) + payload


class Maker:
    """Makes hostile streams. victims: paths of what must not change; device: number of a block device; uuids: of
    subvolumes to clone from.
    """

    def __init__(self, chance, victims, device, uuids):
        self.chance, self.victims, self.device, self.uuids = chance, [os.fsencode(v) for v in victims], device, uuids
        self.targets = [b"..", b"../..", b"../other.btrfs", b"../../outside", b"../.other.partial"]
        self.targets += self.victims + [os.path.dirname(v) for v in self.victims]

    def prelude(self):
        """What the others then go through: links out of the subvolume, and a disk."""
        ino = (program.A_INO, number(257))
        made = [(program.MKFILE, [(program.A_PATH, b"x"), ino]), (program.MKDIR, [(program.A_PATH, b"d"), ino]),
                (program.MKNOD, [(program.A_PATH, b"disk"), ino, (program.A_RDEV, number(self.device)),
                                 (program.A_MODE, number(stat.S_IFBLK | 0o600))])]
        made += [(program.SYMLINK, [(program.A_PATH, name), ino, (program.A_PATH_LINK, target)])
                 for name, target in zip((b"s0", b"s1", b"d/s2", b"s3"), self.chance.sample(self.targets, 4))]
        return made

    def path(self):
        out = self.chance.choice([b"", b"/other.btrfs", b"/backups/other.btrfs", b"/secret", b"/file", b"/y",
                                  b"/.other.partial/file", b"/victim"])
        chance = self.chance.random()
        if chance < 0.55:
            return self.chance.choice([b"s0", b"s1", b"d/s2", b"s3"]) + out
        if chance < 0.7:
            return self.chance.choice([b"disk", b"x", b"d/y", b"new", b"d", b""])
        if chance < 0.85:
            return self.chance.choice([b"../", b"../../", b"d/../../", b"./../", b"x\0/../", b"/"]) + out[1:]
        return self.chance.choice(self.victims + [b".", b"..", b"d//y", b"d/", b"n" * 300, b"a/" * 2100, b"\0"])

    def honest_form(self, version):
        """A command with the attributes that it takes, whatever its paths."""
        p, path, chance = program, (program.A_PATH, self.path()), self.chance
        fifo = (p.A_PATH, b"fifo")  # of this name alone, lest a clone from it waits for a writer
        place, ino = (p.A_FILE_OFFSET, number(chance.choice([0, 0, 4096]))), (p.A_INO, number(300))
        encoded = [(kind, number(4096)) for kind in (27, 28)] + [(29, number(0)), (30, struct.pack(
            "<I", chance.randrange(4))), (p.A_DATA, EVIL)]
        clone = [(p.A_CLONE_LEN, number(4096)), (p.A_CLONE_UUID, chance.choice(self.uuids)), (21, number(7)),
                 (p.A_CLONE_PATH, self.path()), (23, number(0))]
        times = [(kind, bytes(12)) for kind in (p.A_ATIME, p.A_MTIME, p.A_CTIME)]
        return chance.choice([
            (p.MKFILE, [path, ino]), (p.MKDIR, [path, ino]), (p.MKFIFO, [fifo, ino]), (p.MKSOCK, [path, ino]),
            (p.MKNOD, [path, ino, (p.A_RDEV, number(self.device)), (p.A_MODE, number(stat.S_IFBLK | 0o666))]),
            (p.SYMLINK, [path, ino, (p.A_PATH_LINK, chance.choice(self.targets))]),
            (p.RENAME, [path, (p.A_PATH_TO, self.path())]), (p.LINK, [path, (p.A_PATH_LINK, self.path())]),
            (p.UNLINK, [path]), (p.RMDIR, [path]), (p.WRITE, [path, place, (p.A_DATA, EVIL)]),
            (p.WRITE, [path, place, (p.A_DATA, EVIL)]), (p.TRUNCATE, [path, (p.A_SIZE, number(3))]),
            (p.ENCODED_WRITE if version >= 2 else p.WRITE, [path, place] + (encoded if version >= 2 else [
                (p.A_DATA, EVIL)])),
            (p.CLONE, [place] + clone[:1] + [path] + clone[1:]), (p.CHMOD, [path, (p.A_MODE, number(0o666))]),
            (p.CHOWN, [path, (p.A_UID, number(1000)), (p.A_GID, number(1000))]), (p.UTIMES, [path] + times),
            (p.SET_XATTR, [path, (p.A_XATTR_NAME, b"user.evil"), (p.A_XATTR_DATA, EVIL)]),
            (p.REMOVE_XATTR, [path, (p.A_XATTR_NAME, b"user.evil")]),
            (p.FALLOCATE, [path, (25, struct.pack("<I", 3)), place, (p.A_SIZE, number(4096))]),
            (p.UPDATE_EXTENT, [path, place, (p.A_SIZE, number(4096))]), (26, [path]), (chance.randrange(70), [path])])

    def command(self, version):
        command, attributes = self.honest_form(version)
        if self.chance.random() < 0.25:
            attributes.insert(self.chance.randrange(len(attributes) + 1), (self.chance.choice([15, 16, 17, 22, 99]),
                                                                           self.path()))
        if self.chance.random() < 0.25:
            self.chance.shuffle(attributes)
        return encode(version, command, attributes)

    def commands(self, version):
        return ([encode(version, *made) for made in self.prelude()]
                + [self.command(version) for _ in range(self.chance.randrange(1, 30))])


class Chunks(program.Sender):
    """A sender of whole commands."""

    start = 0

    def __init__(self, chunks):
        self.chunks = list(chunks)

    def read(self, buffer):
        if not self.chunks:
            return 0
        chunk = self.chunks.pop(0)
        buffer[:len(chunk)] = chunk
        return len(chunk)

    def finish(self, timeout):
        pass

    def end(self):
        pass


def fingerprint(top, left_out=()):
    """All that is to be seen of a tree, but for what is of the stream's own name."""
    found = {}
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if NAME not in name]
        for name in files + folders:
            path = os.path.join(folder, name)
            about = os.lstat(path)
            if NAME in name:
                continue
            seen = [about.st_mode, about.st_uid, about.st_gid, sorted(os.listxattr(path, follow_symlinks=False))]
            if stat.S_ISREG(about.st_mode):
                with open(path, "rb") as file:
                    seen += [about.st_nlink, about.st_mtime_ns, hashlib.sha256(file.read()).hexdigest()]
            elif path not in left_out:
                seen.append(about.st_mtime_ns)
            found[path] = seen
    return found


class HostileStreams(support.TestCase):

    def setUp(self):
        self.target_disk = self.disk()
        top = self.target_disk.path
        self.folder = os.path.join(top, "backups")
        os.mkdir(self.folder)
        self.write("other.btrfs", self.folder)
        self.write("file", support.create(os.path.join(self.folder, ".other.partial")))
        self.write("secret", support.create(os.path.join(top, "outside")))
        self.kept = os.path.join(self.folder, "kept20260101-000000")
        support.snapshot(os.path.join(top, "outside"), self.kept)
        self.elsewhere = tempfile.mkdtemp(dir=support.scratch_folder())
        self.addCleanup(shutil.rmtree, self.elsewhere)
        self.write("victim", self.elsewhere)
        self.block = self.attach_block_device()
        victims = [os.path.join(self.folder, "other.btrfs"), os.path.join(top, "outside", "secret"),
                   os.path.join(self.kept, "secret"), os.path.join(self.elsewhere, "victim")]
        self.own = str(uuid.uuid4())
        self.expected = program.ExpectedStream(NAME, self.own, None, 0, 0, 0o755)
        uuids = [program.parse_uuid(u) for u in (self.own, support.subvolume(self.kept).uuid,
                                                 support.subvolume(os.path.join(top, "outside")).uuid)]
        self.maker = Maker(support.chance(self), victims, os.stat(self.block).st_rdev, uuids)
        self.before = self.look()

    def write(self, name, folder):
        path = os.path.join(folder, name)
        with open(path, "wb") as file:
            file.write(name.encode() * 3000)
        os.chmod(path, 0o640)

    def attach_block_device(self):
        image = os.path.join(self.elsewhere, "block.img")
        with open(image, "wb") as file:
            file.write(b"a disk " * (1 << 16))
        block = support.command("losetup", "-f", "--show", image).strip()
        self.addCleanup(support.command, "losetup", "-d", block)
        return block

    def look(self):
        os.sync()
        with open(self.block, "rb") as block:
            seen = {"block": hashlib.sha256(block.read()).hexdigest()}
        for top in (self.target_disk.path, self.elsewhere):
            seen.update(fingerprint(top, (self.folder,)))
        return seen

    def opening(self, version):
        first = [(program.A_PATH, NAME.encode()), (program.A_UUID, program.parse_uuid(self.own)),
                 (program.A_CTRANSID, number(7))]
        return program.STREAM_HEADER.pack(program.STREAM_MAGIC, version) + program.make_command(program.SUBVOL, first)

    def clear(self):
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            if NAME in name and support.is_subvolume(path):
                support.delete(path)
            elif NAME in name:
                os.unlink(path)

    def deliver(self, host, commands, version):
        """What becomes of a stream: an error or None."""
        receiver = host.open_receive(self.folder, self.expected, False, "anew")
        chunks = [self.opening(version)] + commands + [THE_END]
        try:
            return program.Relay(Chunks(chunks), {"": receiver}, 30).run().errors.get("")
        finally:
            receiver.end()

    def check_way(self, host):
        refusals = 0
        for _ in range(STREAMS):
            version = self.maker.chance.choice([1, 2])
            commands = self.maker.commands(version)
            try:
                refusals += self.deliver(host, commands, version) is not None
            except program.BackupError:
                refusals += 1
            self.assertEqual(self.before, self.look(), commands)
            self.clear()
        self.assertGreater(refusals, STREAMS // 2)

    def test_through_a_restricted_key(self):
        argv = support.PROGRAM_ARGV + ["agent", "--under", self.target_disk.path, "--allow", "receive"]
        host = program.AgentHost("server", lambda first: program.Connection("server", argv), program.Events())
        self.addCleanup(host.end)
        self.check_way(host)

    def test_through_a_pull(self):
        self.check_way(program.LocalHost(program.Events()))

    def test_where_the_kernel_cannot_help(self):
        with mock.patch.object(program, "confine", lambda folder: None):
            self.check_way(program.LocalHost(program.Events()))

    def test_a_key_that_may_receive_needs_the_kernel(self):
        with mock.patch.object(program, "confine", lambda folder: None):
            with self.assertRaisesRegex(program.BackupError, "following links"):
                program.LocalHost(program.Events(), must_confine=True).open_receive(self.folder, self.expected, False)

    def test_what_passes_the_gate_does_no_harm_even_after_errors(self):
        """Each command is judged by itself, and `btrfs receive` goes on after those that fail."""
        passed = 0
        for _ in range(BATCHES):
            version = self.maker.chance.choice([1, 2])
            commands = [command for _ in range(AT_ONCE) for command in self.maker.commands(version)]
            passed += self.receive_all(version, [command for command in commands if self.passes(version, command)])
            self.assertEqual(self.before, self.look())
            self.clear()
        self.assertGreater(passed, 200 * BATCHES)

    def passes(self, version, command):
        gate = program.StreamGate(self.expected)
        gate.open(version)
        try:
            gate.judge(command, 0, len(command), program.COMMAND_START.unpack_from(command)[1])
        except program.BackupError:
            return False
        return True

    def receive_all(self, version, commands):
        confinement = program.confine(self.folder)
        try:
            argv = ["btrfs", "receive", "-E", "0", "--chroot", confinement.path]
            done = subprocess.run(argv, input=self.opening(version) + b"".join(commands) + THE_END,
                                  preexec_fn=confinement.enter, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  timeout=120)
            self.assertNotIn(b"crc32", done.stderr)
            return len(commands)
        finally:
            confinement.end()


class TheView(support.TestCase):

    def test_something_mounted_while_it_is_made_is_no_part_of_a_transfer(self):
        """Whoever may mount outside does so between two steps of the new process, which waits for that."""
        disk = self.disk().path
        support.command("mount", "--make-shared", disk)
        folder, inner = support.create(os.path.join(disk, "backups")), os.path.join(disk, "backups", "inner")
        os.mkdir(inner)
        confinement = program.Confinement(folder)
        self.addCleanup(confinement.end)
        (asked, ask), (answered, answer) = os.pipe(), os.pipe()
        for fd in (asked, ask, answered, answer):
            self.addCleanup(os.close, fd)
        mount = confinement.mount

        def mount_and_wait(source, target, kind, flags, data):
            status = mount(source, target, kind, flags, data)
            if flags == confinement.BIND:
                os.write(ask, b".")
                os.read(answered, 1)
            return status

        def mount_there():
            os.read(asked, 1)
            support.command("mount", "-t", "tmpfs", "none", inner)
            os.write(answer, b".")

        mounting = threading.Thread(target=mount_there)
        mounting.start()
        self.addCleanup(support.unmount, inner)
        with mock.patch.object(confinement, "mount", mount_and_wait), self.assertRaisesRegex(
                program.BackupError, "cannot prepare"):
            program.start_program(["true"], prepare=confinement.enter).wait()
        mounting.join()


if __name__ == "__main__":
    unittest.main()
