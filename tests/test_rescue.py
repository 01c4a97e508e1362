"""The program where little is left to run it: rescue systems, broken clocks, stripped Pythons, hardly any memory."""

import ast
import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import unittest

import support

REPOSITORY = os.path.dirname(support.HERE)
ZIPAPP = os.path.join(REPOSITORY, "btrfs_backup_ng.pyz")


class RescueTestCase(support.BackupTestCase):

    def setUp(self):
        super().setUp()
        support.Churn(self.source).fill(30)

    def run_twice(self, *options, source=None, target=None, between=lambda: None, **how):
        """A full backup and an increment; afterwards all is as it should be."""
        arguments = list(options) + ["-p", "home", source or self.source, target or self.target]
        results = [self.run_program(*arguments, **how)]
        self.write("changed", "between the two")
        between()
        support.next_second()
        results.append(self.run_program(*arguments, **how))
        self.assertIn("incrementally", results[1].stderr)
        self.assertEqual(2, len(support.names(self.target)))
        self.assertBackedUp(support.names(self.snapshots))
        return results


class Surroundings(RescueTestCase):

    READ_ONLY = 'mount -o remount,bind,ro / && [ ! -w / ] && [ ! -w "$HOME" ] && exec "$@"'

    def test_read_only_root_and_home(self):
        home = os.path.expanduser("~")
        for program in ([support.PYTHON, "-E", "-s", support.PROGRAM], [support.PYTHON, self.zipapp()]):
            with self.subTest(program=program):
                source, target = self.source, self.target
                try:
                    self.run_twice(wrapper=support.in_own_mounts(self.READ_ONLY), program=program,
                                   env={"HOME": home, "TMPDIR": "/tmp"})
                finally:
                    self.clear(source, target)

    def zipapp(self):
        if not os.path.exists(ZIPAPP):
            build = os.path.join(REPOSITORY, "build_zipapp.sh")
            subprocess.check_call([build], env=dict(os.environ, PYTHON=sys.executable))
        return ZIPAPP

    def clear(self, *folders):
        for folder in (self.target, self.snapshots):
            for name in support.names(folder):
                support.delete(os.path.join(folder, name))
        for name in os.listdir(self.snapshots):
            os.unlink(os.path.join(self.snapshots, name))

    def test_no_shared_memory_and_no_temporary_folder(self):
        """The scratch disks may lie there, so they get another place first."""
        place = os.path.join(support.scratch_folder(), "place")
        os.mkdir(place)
        self.addCleanup(os.rmdir, place)
        script = ('mkdir -p /run/elsewhere && mount -t tmpfs none /run && mkdir /run/elsewhere && '
                  'mount --rbind "$1" /run/elsewhere && shift && '
                  'mkdir /run/program && mount --bind "$1" /run/program && shift && '
                  'umount -l /dev/shm; mount -t tmpfs -o ro none /tmp && mount -t tmpfs -o ro none /var/tmp && '
                  'cd / && exec "$@"')
        scratch = support.scratch_folder()
        wrapper = support.in_own_mounts(script) + [scratch, REPOSITORY]
        self.run_twice(source=self.source.replace(scratch, "/run/elsewhere"), wrapper=wrapper,
                       target=self.target.replace(scratch, "/run/elsewhere"),
                       program=[support.PYTHON, "-E", "-s", "/run/program/btrfs_backup_ng.py"])

    def test_no_home_no_locale_no_environment_at_all(self):
        self.run_twice(wrapper=["env", "-i", "PATH=/usr/bin:/bin"])

    def test_in_the_c_locale_with_names_that_are_not_in_it(self):
        disk = self.disk()
        folder = os.path.join(os.fsencode(disk.path), b"caf\xc3\xa9 \xff")
        os.mkdir(folder)
        plain = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        self.target = os.fsdecode(folder)
        for result in self.run_twice(env=plain, program=[support.PYTHON, support.PROGRAM]):
            self.assertTrue(result.stderr.isascii() if hasattr(str, "isascii") else True, result.stderr)
        with open(os.path.join(self.snapshots, ".destinations.json")) as pins:  # says the same in every locale
            self.assertIn(folder.decode("utf-8", "surrogateescape"), json.load(pins)["destinations"])

    def test_nothing_is_open(self):
        """Neither input nor output nor errors: what it opens itself must not be taken for these."""
        log = os.path.join(support.scratch_folder(), "log")
        closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
        self.run_program("-p", "home", "--log-json", log, self.source, self.target, wrapper=closed)
        self.addCleanup(os.unlink, log)
        with open(log) as events:
            self.assertIn("sent home", events.read())
        self.assertBackedUp(support.names(self.snapshots))
        for name in os.listdir(self.snapshots):
            path = os.path.join(self.snapshots, name)
            if os.path.isfile(path):
                with open(path) as state:
                    self.assertNotRegex(state.read(), "took|sent|sending")
        result = self.run_program("--version", wrapper=["sh", "-c", 'exec "$@" <&- >&-', "sh"], status=1)
        self.assertErrorSays(result, "is stdout open")  # which nobody can have read

    def test_output_that_cannot_be_written(self):
        for arguments in (["--version"], ["--help"], ["print", "man"], ["--dry-run", self.source, self.target]):
            with self.subTest(arguments=arguments):
                result = self.run_program(*arguments, wrapper=["sh", "-c", 'exec "$@" >/dev/full', "sh"], status=1)
                self.assertErrorSays(result, "no space left")

    def test_busybox_only(self):
        """A PATH that holds busybox's commands and btrfs, and nothing else."""
        busybox = shutil.which("busybox")
        if not busybox:
            self.skipTest("needs the program busybox")
        folder = os.path.join(support.scratch_folder(), "busybox")
        os.mkdir(folder)
        self.addCleanup(shutil.rmtree, folder)
        for name in support.command(busybox, "--list").split():
            os.symlink(busybox, os.path.join(folder, name))
        os.symlink(shutil.which("btrfs") or "btrfs", os.path.join(folder, "btrfs"))
        received = os.path.join(support.scratch_folder(), "stream")
        self.run_twice(env={"PATH": folder, "SHELL": "/bin/ash"})
        self.run_program("-S", "-p", "home", self.source, "shell://gzip -c | gunzip >" + received, env={"PATH": folder})
        self.assertGreater(os.path.getsize(received), 1000)

    def test_root_without_sudo(self):
        self.run_twice(wrapper=support.without_programs("sudo"))

    def test_an_ordinary_user_without_sudo_is_told(self):
        wrapper = support.without_programs("sudo") + support.as_nobody()
        result = self.run_program("-p", "home", self.source, self.target, wrapper=wrapper, status=1)
        self.assertErrorSays(result, "needs root", "sudo is not installed")


class StrippedPython(RescueTestCase):
    """Interpreters without what distributions leave out."""

    usual_seconds = 5

    # The main job needs these; what they import in turn is no part of the matter.
    NEEDED = {"collections", "collections.abc", "contextlib", "errno", "fcntl", "functools", "gc", "hashlib",
              "itertools", "json", "os", "re", "select", "signal", "socket", "stat", "struct", "subprocess", "sys",
              "threading", "time", "typing"}

    # Compiled modules that a build may lack for want of a library.
    COMPILED = ["_asyncio", "_bz2", "_contextvars", "_ctypes", "_curses", "_decimal", "_hashlib", "_json", "_lzma",
                "_multiprocessing", "_pickle", "_posixshmem", "_queue", "_sqlite3", "_ssl", "_uuid", "mmap", "pwd",
                "readline", "resource", "termios", "unicodedata", "zlib"]

    BLOCK = ("import runpy, sys\n"
             "for name in sys.argv[1].split(','): sys.modules[name] = None\n"
             "sys.argv = sys.argv[2:]\n"
             "runpy.run_path(sys.argv[0], run_name='__main__')\n")

    def without(self, *modules):
        """The program without these; its zipapp, which is not compiled each time, where it can be unpacked."""
        program = support.PROGRAM if "zlib" in modules else support.FAST_PROGRAM
        return [support.PYTHON, "-E", "-s", "-c", self.BLOCK, ",".join(modules), program]

    def imported(self):
        """The modules that the program names in its imports, wherever these stand."""
        with open(support.PROGRAM, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module

    def optional(self):
        """What the program imports but does not need; of the needed ones some bring others along."""
        ask = "import {}; print(*sys.modules)".format(", ".join(sorted(self.NEEDED)))
        brought = set(support.command(support.PYTHON, "-E", "-s", "-c", ask).split())
        return sorted(set(self.imported()) - self.NEEDED - brought)

    def test_without_site_packages_and_environment(self):
        self.run_twice(program=[support.PYTHON, "-S", "-E", "-s", support.PROGRAM])

    def test_isolated_and_optimised(self):
        self.run_twice(program=[support.PYTHON, "-I", "-OO", "-B", support.PROGRAM])

    def test_every_module_that_is_not_needed(self):
        self.assertGreater(len(self.optional()), 3)
        self.run_twice(program=self.without(*self.optional()))

    def test_compiled_modules(self):
        self.run_twice(program=self.without(*self.COMPILED))

    def test_each_by_itself(self):
        """Not just all at once: what is caught as missing in one place may be expected in another."""
        self.run_program("-p", "home", self.source, self.target)
        for name in self.optional() + self.COMPILED:
            with self.subTest(module=name):
                result = self.run_program("-S", "-p", "home", self.source, self.target, program=self.without(name))
                self.assertNotIn("error", result.stderr)

    def test_a_needed_one_is_named(self):
        result = self.run_program("-p", "home", self.source, self.target, program=self.without("json"), status=1)
        self.assertErrorSays(result, "json", "python")


class WrongClock(RescueTestCase):
    """A clock that is years off, and set right again. The kernel's own times stay right."""

    SHIFT = ("import runpy, sys, time\n"
             "now, shift = time.time, float(sys.argv[1])\n"
             "time.time = lambda: now() + shift\n"
             "sys.argv = sys.argv[2:]\n"
             "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    YEAR = 31557600

    def at(self, years, *options, **how):
        program = [support.PYTHON, "-E", "-s", "-c", self.SHIFT, str(years * self.YEAR), support.FAST_PROGRAM]
        self.write("file", "of {} years".format(years))
        return self.run_program("-p", "home", *(list(options) + [self.source, self.target]), program=program, **how)

    def test_back_at_the_beginning_of_time(self):
        """As after a battery has died: 1970, or a little later."""
        self.at(0)
        self.at(-(time.time() - 100) / self.YEAR)
        support.next_second()
        result = self.at(0)
        self.assertIn("incrementally", result.stderr)
        names = support.names(self.target)
        self.assertEqual(3, len(names))
        self.assertTrue(names[0].startswith("home1970"), names)
        self.assertBackedUp(names)

    def test_years_ahead_and_back(self):
        first = self.at(0)
        self.at(12)
        (future,) = [name for name in support.names(self.target) if name.startswith("home203")]
        result = self.at(0, "-N", "1", "-n", "1")
        self.assertIn("future", result.stderr)
        self.assertIn(future, support.names(self.target))
        self.assertIn(future, support.names(self.snapshots))
        self.assertIn("incrementally", result.stderr)
        newest = [name for name in support.names(self.target) if name != future]
        self.assertEqual(1, len(newest))
        self.assertNotIn(newest[0], first.stderr)
        self.assertBackedUp(support.names(self.target))

    def test_wrong_while_old_ones_go(self):
        """What counts as newest by its name may be the oldest: nothing is lost that both sides need."""
        for years in (0, -20, -10):
            self.at(years, "-N", "2", "-n", "2")
        support.next_second()
        result = self.at(0, "-N", "2", "-n", "2")
        self.assertIn("incrementally", result.stderr)
        self.assertBackedUp([name for name in support.names(self.target)
                             if name in support.names(self.snapshots)], None)

    def assertBackedUp(self, expected, target=""):
        if target == "":
            super().assertBackedUp(expected)
            return
        for name in expected:
            self.assertComplete(self.backup_path(name), self.snapshot_path(name))


SNAP_CREATE_V2, SUBVOL_SETFLAGS, READ_ONLY = 0x50009417, 0x4008941a, 2


def take_quickly(subvolume, folder, name, readonly=True):
    """A snapshot by ioctl: a thousand in the time of ten `btrfs subvolume snapshot`."""
    source, target = os.open(subvolume, os.O_RDONLY), os.open(folder, os.O_RDONLY)
    try:
        argument = struct.pack("=qQQ32x4040s", source, 0, READ_ONLY if readonly else 0, name.encode())
        fcntl.ioctl(target, SNAP_CREATE_V2, bytearray(argument))
    finally:
        os.close(source)
        os.close(target)


def set_readonly(path):
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(folder, SUBVOL_SETFLAGS, struct.pack("=Q", READ_ONLY))
    finally:
        os.close(folder)


class LittleMemory(support.BackupTestCase):
    """2,000 snapshots on both sides, and 256 MiB of address space for each process."""

    usual_seconds = 30

    COUNT = 2000

    def setUp(self):
        super().setUp()
        os.makedirs(self.snapshots)
        self.write("file", "content")
        first = support.snapshot(self.source, os.path.join(self.source_disk.path, "first"))
        support.send_receive(first, self.target_disk.path)
        received = os.path.join(self.target_disk.path, "first")
        for number in range(self.COUNT):
            name = time.strftime("home%Y%m%d-%H%M%S", time.localtime(1500000000 + number * 3600))
            take_quickly(self.source, self.snapshots, name)
            take_quickly(received, self.target, name, readonly=False)
            support.set_received_uuid(self.backup_path(name), support.uuid_of(self.snapshot_path(name)))
            set_readonly(self.backup_path(name))

    @staticmethod
    def limited(mib):
        return ["prlimit", "--as={}".format(mib << 20), "--"]

    def test_a_backup_with_retention(self):
        result = self.backup("-N", "1900", "-n", "1900", wrapper=self.limited(256), timeout=300)
        self.assertIn("incrementally", result.stderr)
        self.assertEqual(1900, len(support.names(self.snapshots)))
        self.assertEqual(1900, len(support.names(self.target)))
        self.assertComplete(self.backup_path(support.names(self.target)[-1]),
                            self.snapshot_path(support.names(self.snapshots)[-1]))
        starved = self.start("-p", "home", self.source, self.target, wrapper=self.limited(16)).finish()
        self.assertNotEqual(0, starved.status)  # else nothing was limited


if __name__ == "__main__":
    unittest.main()
