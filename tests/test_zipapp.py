"""The one file: how it is packed, and where it runs from."""

import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import unittest
import zipfile
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple
from unittest import mock

from pythons import old_pythons, pythons

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILD = "build_zipapp.sh"
PROGRAM = "btrfs_backup_ng.py"
ZIPAPP = "btrfs_backup_ng.pyz"

# Stands in for the program where only what is around it is tested.
STAND_IN = """\
import sys


def main(argv=None):
    print("arguments: " + " ".join(sys.argv[1:]))
    return 0 if sys.argv[1:2] == ["print"] else 7


if __name__ == "__main__":
    raise SystemExit(main())
"""


def run(argv: Sequence[str], **options: Any) -> Tuple[int, str, str]:
    """Status, stdout and stderr of a command; `env` adds to the environment."""
    environment = dict(os.environ)
    # What make, or the runner's own interpreter, leaves to its children is no part of the test.
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "SOURCE_DATE_EPOCH", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    environment.update(options.pop("env", {}))
    done = subprocess.run(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
        **options
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def contents(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read()


class ZipappTest(unittest.TestCase):
    """Each test has a folder of its own, with a copy of what it packs."""

    usual_seconds = 2

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="zipapp.")
        self.addCleanup(folder.cleanup)
        # Blanks and more in the path: a script that forgets to quote shows it here.
        self.folder = os.path.join(folder.name, "with blank $HOME")
        os.mkdir(self.folder)
        self.cache = os.path.join(folder.name, "cache")
        environment = mock.patch.dict(os.environ, XDG_CACHE_HOME=self.cache)
        environment.start()
        self.addCleanup(environment.stop)
        self.zipapp = os.path.join(self.folder, ZIPAPP)

    def copy(self, *names: str) -> None:
        for name in names:
            shutil.copy(os.path.join(REPOSITORY, name), self.folder)

    def write_stand_in(self) -> None:
        with open(os.path.join(self.folder, PROGRAM), "w", encoding="utf-8") as stream:
            stream.write(STAND_IN)

    def build(self, *arguments: str, **options: Any) -> Tuple[int, str, str]:
        script = os.path.join(self.folder, BUILD)
        options.setdefault("env", {}).setdefault("PYTHON", sys.executable)
        return run((script,) + arguments, **options)

    def build_bytes(self, **options: Any) -> bytes:
        status, _, errors = self.build(**options)
        self.assertEqual((status, errors), (0, ""))
        return contents(self.zipapp)

    def names(self) -> List[str]:
        return sorted(os.listdir(self.folder))

    def read_only(self, folder: str) -> List[str]:
        """What a command is to begin with, so that nothing can be written to the folder."""
        os.chmod(folder, 0o555)
        self.addCleanup(os.chmod, folder, 0o755)
        if os.geteuid() != 0:
            return []
        # Modes do not hold root back, a read-only mount does. It is in a namespace of its own,
        # which goes away with the command.
        script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && [ ! -w "$0" ] && exec "$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, folder]


class Packing(ZipappTest):
    def setUp(self) -> None:
        super().setUp()
        self.copy(BUILD, PROGRAM)

    def test_same_bytes_from_every_python_and_environment(self) -> None:
        expected = self.build_bytes()
        for python in pythons():
            with self.subTest(python=python):
                self.assertEqual(self.build_bytes(env={"PYTHON": python}), expected)
        environments: Iterable[Dict[str, str]] = (
            {"TZ": "Pacific/Kiritimati"},
            {"TZ": "XYZ+11:30"},
            {"LANG": "C", "LC_ALL": "C"},
            {"LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8"},
            {"PYTHONHASHSEED": "7", "PYTHONUTF8": "1"},
        )
        for environment in environments:
            with self.subTest(environment=environment):
                self.assertEqual(self.build_bytes(env=environment), expected)

    def test_same_bytes_whatever_umask_file_times_and_folder(self) -> None:
        expected = self.build_bytes()
        for umask in (0o077, 0o000):
            previous = os.umask(umask)
            try:
                self.assertEqual(self.build_bytes(cwd="/"), expected)
            finally:
                os.umask(previous)
            self.assertEqual(stat.S_IMODE(os.stat(self.zipapp).st_mode), 0o755)
        program = os.path.join(self.folder, PROGRAM)
        os.utime(program, (1, 1))
        os.chmod(program, 0o600)
        self.assertEqual(self.build_bytes(), expected)

    def test_contents(self) -> None:
        packed = self.build_bytes()
        self.assertTrue(packed.startswith(b"#!/usr/bin/env python3\n"))
        with zipfile.ZipFile(self.zipapp) as archive:
            self.assertIsNone(archive.testzip())
            self.assertEqual(archive.namelist(), ["__main__.py", PROGRAM])
            self.assertEqual(archive.read(PROGRAM), contents(os.path.join(self.folder, PROGRAM)))
            for info in archive.infolist():
                self.assertEqual(info.date_time, (1980, 1, 1, 0, 0, 0))
                stored = info.filename == "__main__.py"
                self.assertEqual(info.compress_type, zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED)
                self.assertEqual(info.external_attr >> 16, stat.S_IFREG | 0o644)

    def test_source_date_epoch(self) -> None:
        for seconds, date in (
            ("1700000000", (2023, 11, 14, 22, 13, 20)),
            ("0", (1980, 1, 1, 0, 0, 0)),
            ("99999999999", (2107, 12, 31, 23, 59, 58)),
        ):
            with self.subTest(seconds=seconds):
                self.build_bytes(env={"SOURCE_DATE_EPOCH": seconds, "TZ": "Asia/Tokyo"})
                with zipfile.ZipFile(self.zipapp) as archive:
                    self.assertEqual([i.date_time for i in archive.infolist()], [date, date])

    def test_output_path(self) -> None:
        expected = self.build_bytes()
        status, _, errors = self.build("other name", cwd=self.folder)
        self.assertEqual((status, errors), (0, ""))
        self.assertEqual(contents(os.path.join(self.folder, "other name")), expected)

    def assert_refused(self, reason: str, outcome: Tuple[int, str, str]) -> None:
        status, output, errors = outcome
        self.assertNotEqual(status, 0)
        self.assertEqual(output, "")
        self.assertRegex(errors, r"\Abuild_zipapp\.sh: [^\n]*{}[^\n]*\n\Z".format(re.escape(reason)))

    def test_refusals_leave_the_old_file_alone(self) -> None:
        expected, names = self.build_bytes(), self.names()
        self.assert_refused("SOURCE_DATE_EPOCH", self.build(env={"SOURCE_DATE_EPOCH": "today"}))
        self.assert_refused("no-such-python", self.build(env={"PYTHON": "no-such-python"}))
        self.assert_refused("No such file", self.build(os.path.join(self.folder, "none", "out")))
        self.assert_refused("is a folder", self.build(self.folder))
        self.assert_refused("too many", self.build("a", "b"))
        for python in old_pythons():
            self.assert_refused("needs Python 3.6", self.build(env={"PYTHON": python}))
        self.assertEqual(contents(self.zipapp), expected)
        self.assertEqual(self.names(), names)
        os.unlink(os.path.join(self.folder, PROGRAM))
        self.assert_refused(PROGRAM, self.build())


class Running(ZipappTest):
    def setUp(self) -> None:
        super().setUp()
        self.copy(BUILD, PROGRAM)
        self.build_bytes()
        os.unlink(os.path.join(self.folder, BUILD))

    def assert_runs(self, *command: str, **options: Any) -> str:
        """The command must know its version and help, refuse a bad option, and write no file.

        Returns the name and version that it has given.
        """
        names = self.names()
        status, version, errors = run(command + ("--version",), **options)
        self.assertEqual((status, errors), (0, ""))
        digest = hashlib.sha256(contents(os.path.join(REPOSITORY, PROGRAM))).hexdigest()
        self.assertRegex(version, r"\Abtrfs-backup-ng \d+\.\d+\.\d+\nsha256 {}\nPython 3\.\d+\.\d+\S*\n"
                                  r"(btrfs-progs v\S+|the program btrfs is not installed)\n\Z".format(digest))
        status, text, errors = run(command + ("--help",), **options)
        self.assertEqual((status, errors), (0, ""))
        self.assertIn("usage: btrfs-backup-ng", text)
        status, _, errors = run(command + ("--no-such-option",), **options)
        self.assertEqual(status, 2)
        self.assertIn("--no-such-option", errors)
        self.assertNotIn("Traceback", errors)
        self.assertEqual(self.names(), names)
        return " ".join(version.split()[:2])

    def test_as_file_and_zipapp_under_every_python(self) -> None:
        """As a file, which each run compiles, under the oldest and the newest (TORTURE: under all)."""
        versions, found = set(), pythons()
        for python in found:
            both = python in (found[0], found[-1]) or os.environ.get("TORTURE")
            for name in (PROGRAM, ZIPAPP) if both else (ZIPAPP,):
                with self.subTest(python=python, name=name):
                    versions.add(self.assert_runs(python, os.path.join(self.folder, name)))
        self.assertEqual(len(versions), 1)

    def python_on_path(self) -> Dict[str, str]:
        """An environment whose python3 is the one that runs the tests."""
        folder = tempfile.TemporaryDirectory(prefix="zipapp.")
        self.addCleanup(folder.cleanup)
        os.symlink(sys.executable, os.path.join(folder.name, "python3"))
        return {"PATH": folder.name + os.pathsep + os.environ["PATH"]}

    def test_executed_directly_and_through_a_symlink(self) -> None:
        environment = self.python_on_path()
        self.assert_runs(self.zipapp, env=environment)
        self.assert_runs("./" + ZIPAPP, cwd=self.folder, env=environment)
        links = os.path.join(os.path.dirname(self.folder), "bin")
        os.mkdir(links)
        link = os.path.join(links, "btrfs-backup-ng")
        os.symlink(os.path.join("..", os.path.basename(self.folder), ZIPAPP), link)
        self.assert_runs(link, env=environment)
        environment["PATH"] = links + os.pathsep + environment["PATH"]
        self.assert_runs("btrfs-backup-ng", env=environment)
        self.assertEqual(os.listdir(links), ["btrfs-backup-ng"])

    def test_from_a_read_only_folder(self) -> None:
        begin = self.read_only(self.folder)
        for name in (PROGRAM, ZIPAPP):
            with self.subTest(name=name):
                self.assert_runs(*begin, sys.executable, os.path.join(self.folder, name))

    def test_in_any_locale(self) -> None:
        for locale in ("C", "POSIX", "C.UTF-8", "no_SUCH.locale"):
            with self.subTest(locale=locale):
                self.assert_runs(sys.executable, self.zipapp, env={"LC_ALL": locale})

    def test_without_a_home_and_without_site_packages(self) -> None:
        self.assert_runs(sys.executable, "-I", "-S", self.zipapp, env={"HOME": "/nonexistent"})


class Result(ZipappTest):
    """With a stand-in for the program, whose main() returns 7."""

    def setUp(self) -> None:
        super().setUp()
        self.copy(BUILD)
        self.write_stand_in()
        self.build_bytes()

    def test_status_of_main_comes_through(self) -> None:
        for name in (PROGRAM, ZIPAPP):
            outcome = run([sys.executable, os.path.join(self.folder, name), "-p", "@home", ""])
            self.assertEqual(outcome, (7, "arguments: -p @home \n", ""))

    def main_module(self) -> str:
        with zipfile.ZipFile(self.zipapp) as archive:
            return archive.read("__main__.py").decode("ascii")

    def test_ctrl_c_while_it_starts_shows_no_traceback(self) -> None:
        stop = "import os, signal\n\nos.kill(os.getpid(), signal.SIGINT)\n"
        with open(os.path.join(self.folder, PROGRAM), "w", encoding="utf-8") as stream:
            stream.write(stop + STAND_IN)
        self.build_bytes()
        self.assertEqual(run([sys.executable, self.zipapp]), (-signal.SIGINT, "", ""))
        self.copy(PROGRAM)
        with open(os.path.join(self.folder, "fcntl.py"), "w", encoding="utf-8") as stream:
            stream.write(stop)
        program = os.path.join(self.folder, PROGRAM)
        self.assertEqual(run([sys.executable, "-S", program, "--version"], env={"PYTHONPATH": self.folder}),
                         (-signal.SIGINT, "", ""))

    def assert_refuses(self, status: Optional[int], output: str, errors: str) -> None:
        self.assertEqual((status, output), (1, ""))
        self.assertRegex(errors, r"\Abtrfs-backup-ng: needs Python 3\.6 or later, this is [^\n]+\n\Z")

    def test_too_old_python_gets_one_line(self) -> None:
        for python in old_pythons():
            with self.subTest(python=python):
                self.assert_refuses(*run([python, self.zipapp, "--version"]))

    def test_version_is_looked_at_first(self) -> None:
        """The same where no old Python is at hand: by a Python that says it is one."""
        pretend = "import sys; sys.version_info = (3, 5, 10, 'final', 0); exec(sys.argv[1])"
        self.assert_refuses(*run([sys.executable, "-c", pretend, self.main_module()]))


class CacheFolder(ZipappTest):
    """The copy of the program that a zipapp keeps with the user, for Python to keep its bytecode.

    Once it has been made it is told from the one in the zipapp by its status: 8 instead of 7.
    """

    # Says which home the user has, whatever the system knows of him.
    AT_HOME = (
        "import pwd, runpy, sys\n"
        "home, sys.argv = sys.argv[1], sys.argv[2:]\n"
        "pwd.getpwuid = lambda uid: pwd.struct_passwd(('user', 'x', uid, 0, '', home, ''))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )

    def setUp(self) -> None:
        super().setUp()
        self.copy(BUILD)
        self.write_stand_in()
        self.build_bytes()
        self.copies = os.path.join(self.cache, "btrfs-backup-ng")
        self.kept_in = os.path.join(self.copies, hashlib.sha256(STAND_IN.encode()).hexdigest())
        self.kept = os.path.join(self.kept_in, PROGRAM)

    def status(self, *begin: str, **options: Any) -> int:
        """What a run returns, which never writes beside the zipapp."""
        names = self.names()
        status, output, errors = run(begin + (sys.executable, self.zipapp), **options)
        self.assertEqual((output, errors), ("arguments: \n", ""))
        self.assertEqual(self.names(), names)
        return status

    def status_at_home(self, home: str, *begin: str) -> int:
        status, output, errors = run(begin + (sys.executable, "-c", self.AT_HOME, home, self.zipapp),
                                     env={"XDG_CACHE_HOME": ""})
        self.assertEqual((output, errors), ("arguments: \n", ""))
        return status

    def keep_another(self) -> None:
        """Have a copy made; put another of the same size in its place."""
        self.assertEqual(self.status(), 7)
        with open(self.kept, "w", encoding="utf-8") as stream:
            stream.write(STAND_IN.replace("else 7", "else 8"))
        os.utime(self.kept, (1, 1))  # the bytecode of the first one is out of date

    def test_made_on_the_first_run_and_used_from_then_on(self) -> None:
        self.assertEqual(self.status(), 7)
        self.assertEqual(contents(self.kept).decode(), STAND_IN)
        self.assertEqual(stat.S_IMODE(os.stat(self.kept_in).st_mode), 0o700)
        self.assertEqual(sorted(os.listdir(self.kept_in)), ["__pycache__", PROGRAM])
        self.keep_another()
        self.assertEqual(self.status(), 8)

    def test_made_and_used_under_every_umask(self) -> None:
        for umask in (0o077, 0o002, 0o000):
            previous = os.umask(umask)
            self.addCleanup(os.umask, previous)
            with self.subTest(umask=oct(umask)):
                self.keep_another()
                self.assertEqual(self.status(), 8)
            shutil.rmtree(self.cache)

    def test_each_program_has_its_own(self) -> None:
        self.keep_another()
        with open(os.path.join(self.folder, PROGRAM), "a", encoding="utf-8") as stream:
            stream.write("# changed\n")
        self.build_bytes()
        self.assertEqual(self.status(), 7)
        self.assertEqual(len(os.listdir(self.copies)), 2)

    def test_not_used_where_others_may_write(self) -> None:
        self.keep_another()
        for path in (self.cache, self.copies, self.kept_in, self.kept):
            mode = stat.S_IMODE(os.stat(path).st_mode)
            for bit in (stat.S_IWGRP, stat.S_IWOTH):
                with self.subTest(path=path, bit=oct(bit)):
                    os.chmod(path, mode | bit)
                    self.assertEqual(self.status(), 7)
            os.chmod(path, mode)
        self.assertEqual(self.status(), 8)

    @unittest.skipUnless(os.geteuid() == 0, "only root can give files away")
    def test_not_used_where_it_belongs_to_another(self) -> None:
        self.keep_another()
        for path in (self.cache, self.copies, self.kept_in, self.kept):
            with self.subTest(path=path):
                os.chown(path, 65534, -1)
                self.assertEqual(self.status(), 7)
            os.chown(path, 0, -1)
        self.assertEqual(self.status(), 8)

    @unittest.skipUnless(os.geteuid() == 0, "only root can give files away")
    def test_nothing_is_written_where_another_may_write(self) -> None:
        os.mkdir(self.cache)
        os.chown(self.cache, 65534, -1)
        self.assertEqual(self.status(), 7)
        self.assertEqual(os.listdir(self.cache), [])

    def test_a_link_to_it_is_not_used(self) -> None:
        for path in (self.kept_in, self.kept):
            self.keep_another()
            os.rename(path, path + ".aside")
            os.symlink(path + ".aside", path)
            with self.subTest(path=path):
                self.assertEqual(self.status(), 7)
            shutil.rmtree(self.cache)

    def test_a_damaged_one_is_made_anew(self) -> None:
        for size in (0, 1, len(STAND_IN) - 1, len(STAND_IN) + 1):
            with self.subTest(size=size):
                self.keep_another()
                os.truncate(self.kept, size)
                self.assertEqual(self.status(), 7)
                self.assertEqual(contents(self.kept).decode(), STAND_IN)
                self.assertEqual(sorted(os.listdir(self.kept_in)), ["__pycache__", PROGRAM])
                shutil.rmtree(self.cache)

    def bytecode(self) -> str:
        folder = os.path.join(self.kept_in, "__pycache__")
        (name,) = os.listdir(folder)
        return os.path.join(folder, name)

    def test_torn_bytecode_does_no_harm(self) -> None:
        """As a crash of the system leaves it: cut, or of zeros."""
        self.assertEqual(self.status(), 7)
        whole = contents(self.bytecode())
        zeros = bytes(len(whole) - 16)
        for torn in (b"", whole[:8], whole[:16], whole[:100], whole[:-1], whole[:16] + zeros, bytes(300)):
            with self.subTest(torn=torn[:20], size=len(torn)):
                with open(self.bytecode(), "wb") as stream:
                    stream.write(torn)
                self.assertEqual(self.status(), 7)
                self.assertEqual(self.status(), 7)
                self.assertEqual(len(contents(self.bytecode())), len(whole))

    def test_bytecode_is_kept_whatever_the_environment_says(self) -> None:
        elsewhere = os.path.join(self.cache, "elsewhere")
        self.assertEqual(self.status(env={"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": elsewhere}), 7)
        self.assertTrue(os.path.exists(self.bytecode()))
        self.assertFalse(os.path.exists(elsewhere))

    def test_a_cache_that_cannot_be_written(self) -> None:
        os.mkdir(self.cache)
        self.assertEqual(self.status(*self.read_only(self.cache)), 7)
        self.assertEqual(os.listdir(self.cache), [])
        self.assertEqual(self.status(env={"XDG_CACHE_HOME": self.zipapp}), 7)

    def test_in_the_home_where_no_cache_is_named(self) -> None:
        home = os.path.join(os.path.dirname(self.cache), "home")
        os.mkdir(home)
        self.assertEqual(self.status_at_home(home, *self.read_only(home)), 7)
        self.assertEqual(os.listdir(home), [])
        os.chmod(home, 0o755)
        self.assertEqual(self.status_at_home(home), 7)
        kept = os.path.join(home, ".cache", os.path.relpath(self.kept, self.cache))
        self.assertEqual(contents(kept).decode(), STAND_IN)
        self.assertFalse(os.path.exists(self.cache))


class OldCopies(ZipappTest):
    """The program's own copies of earlier versions go once nobody has used them for long."""

    DAY = 86400

    def setUp(self) -> None:
        super().setUp()
        self.copy(BUILD, PROGRAM)
        self.build_bytes()
        self.copies = os.path.join(self.cache, "btrfs-backup-ng")
        self.run_it()
        (name,) = os.listdir(self.copies)
        self.own = os.path.join(self.copies, name)

    def run_it(self) -> None:
        status, _, errors = run([sys.executable, self.zipapp, "--help"])
        self.assertEqual((status, errors), (0, ""))

    def run_after(self, days: float) -> None:
        """A run when the last one was so long ago."""
        self.age(self.own, days)
        self.run_it()

    def age(self, path: str, days: float) -> None:
        moment = time.time() - days * self.DAY
        os.utime(path, (moment, moment))

    def old_copy(self, days: float, source: bytes = b"print('old')\n", name: str = "") -> str:
        folder = os.path.join(self.copies, name or hashlib.sha256(source).hexdigest())
        os.makedirs(os.path.join(folder, "__pycache__"), 0o700)
        for path in (PROGRAM, PROGRAM + ".123", "__pycache__/btrfs_backup_ng.cpython-36.pyc"):
            with open(os.path.join(folder, path), "wb") as stream:
                stream.write(source)
        self.age(folder, days)
        return folder

    def test_unused_for_long(self) -> None:
        old, used = self.old_copy(91), self.old_copy(80, b"another")
        self.run_after(2)
        self.assertFalse(os.path.exists(old))
        self.assertTrue(os.path.exists(used))
        self.assertTrue(os.path.exists(self.own))

    def test_looked_for_once_a_day(self) -> None:
        old = self.old_copy(91)
        self.run_after(0.9)
        self.assertTrue(os.path.exists(old))
        self.run_after(1.1)
        self.assertFalse(os.path.exists(old))
        self.assertLess(time.time() - os.stat(self.own).st_mtime, 60)

    def test_what_is_not_provably_ours_stays(self) -> None:
        other_source = self.old_copy(91, b"1", hashlib.sha256(b"2").hexdigest())
        other_name = self.old_copy(91, b"3", "notes")
        more_in_it = self.old_copy(91, b"4")
        more_in_bytecode = self.old_copy(91, b"5")
        open_to_others = self.old_copy(91, b"6")
        without_source = self.old_copy(91, b"7")
        with open(os.path.join(more_in_it, "notes"), "w"), open(
                os.path.join(more_in_bytecode, "__pycache__", "other.cpython-36.pyc"), "w"):
            pass
        os.unlink(os.path.join(without_source, PROGRAM))
        linked = os.path.join(self.copies, hashlib.sha256(b"8").hexdigest())
        os.symlink(self.old_copy(91, b"8", "elsewhere"), linked)
        os.utime(linked, (1, 1), follow_symlinks=False)
        for folder in (more_in_it, more_in_bytecode, without_source):
            self.age(folder, 91)
        os.chmod(open_to_others, 0o770)
        self.run_after(2)
        for folder in (other_source, other_name, more_in_it, more_in_bytecode, open_to_others, without_source, linked):
            self.assertTrue(os.path.exists(folder), folder)
        self.assertTrue(os.path.exists(os.path.join(linked, PROGRAM)))


class Make(ZipappTest):
    """The targets of the Makefile that build and install."""

    def setUp(self) -> None:
        super().setUp()
        self.copy("Makefile", BUILD)
        self.write_stand_in()
        # Beside the folder, as make takes a $ in what it is given for a variable of its own.
        self.destination = os.path.join(os.path.dirname(self.folder), "package root")

    def make(self, *arguments: str) -> str:
        command = ["make", "-s", "PYTHON=" + sys.executable]
        status, output, errors = run(command + list(arguments), cwd=self.folder)
        self.assertEqual((status, errors), (0, ""))
        return output

    def installed(self) -> List[str]:
        return sorted(
            os.path.relpath(os.path.join(top, name), self.destination)
            for top, _, names in os.walk(self.destination)
            for name in names
        )

    def test_install_and_uninstall(self) -> None:
        where = ["DESTDIR=" + self.destination, "PREFIX=/opt/tools"]
        self.make("install", *where)
        printed = {
            "opt/tools/share/man/man8/btrfs-backup-ng.8": "man",
            "opt/tools/share/bash-completion/completions/btrfs-backup-ng": "completion bash",
            "opt/tools/share/zsh/site-functions/_btrfs-backup-ng": "completion zsh",
            "opt/tools/share/fish/vendor_completions.d/btrfs-backup-ng.fish": "completion fish",
        }
        self.assertEqual(self.installed(), sorted(["opt/tools/bin/btrfs-backup-ng"] + list(printed)))
        for name, arguments in printed.items():
            path = os.path.join(self.destination, name)
            self.assertEqual(contents(path).decode(), "arguments: print {}\n".format(arguments))
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o644)
        program = os.path.join(self.destination, "opt/tools/bin/btrfs-backup-ng")
        self.assertEqual(stat.S_IMODE(os.stat(program).st_mode), 0o755)
        self.assertEqual(run([sys.executable, program])[0], 7)
        self.make("uninstall", *where)
        self.assertEqual(self.installed(), [])

    def test_build_again_only_after_a_change(self) -> None:
        self.make("build")
        before = os.stat(self.zipapp)
        self.make("build")
        self.assertEqual(os.stat(self.zipapp), before)
        with open(os.path.join(self.folder, PROGRAM), "a", encoding="utf-8") as stream:
            stream.write("# changed\n")
        self.make("build")
        self.assertNotEqual(os.stat(self.zipapp).st_ino, before.st_ino)

    def test_help_names_every_target(self) -> None:
        text = self.make()
        targets = re.findall(r"^\.PHONY: (.*)$", self.makefile(), re.MULTILINE)[0].split()
        for target in targets:
            self.assertRegex(text, r"(?m)^  {} +\S".format(target))

    def makefile(self) -> str:
        return contents(os.path.join(self.folder, "Makefile")).decode()

    def test_clean(self) -> None:
        names = self.names()
        self.make("build")
        self.make("clean")
        self.assertEqual(self.names(), names)


if __name__ == "__main__":
    unittest.main()
