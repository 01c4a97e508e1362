"""Shows the main job on two scratch filesystems: back up, change, back up, verify, lose, restore.

    python3 tests/demo.py

Needs root, btrfs-progs, and btrfs_backup_ng.pyz beside this folder. Each command is run the way
it is shown, and what it should have done is checked. The status is 0 when everything worked.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from typing import Callable, Iterator, List, NoReturn, Sequence

from scratch import (
    MIB,
    ZIPAPP,
    ScratchError,
    btrfs_on_loop,
    end_cleanly_on_signals,
    find_system_programs,
    run_quietly,
    scratch_folder,
)

# The snapshot folder that the program makes in the source when none is given.
SNAPSHOT_FOLDER = ".btrfs-backup-ng/snapshots"

# Columns of a terminal.
WIDTH = 80

FILES = {
    "letters/thanks.txt": b"Dear Aunt,\nthe bicycle has arrived.\n",
    "letters/notes.txt": b"Buy a second disk.\n",
    "photos/garden.raw": os.urandom(24 * MIB),
}


class DemoError(Exception):
    """Something is not as the demo says it should be."""


def fail(reason: str) -> NoReturn:
    raise DemoError(reason)


def explain(text: str) -> None:
    print("\n# " + text.replace("\n", "\n# "), flush=True)


def type_command(command: str) -> None:
    """Show a command line and run it in a shell, both of its streams as one; it has to succeed.

    Of a pipe the shell tells only how its last command ended, so what a pipe has done is looked at afterwards.
    """
    words = textwrap.wrap(command, WIDTH - 4, break_long_words=False, break_on_hyphens=False, subsequent_indent="    ")
    print("$ " + " \\\n".join(words), flush=True)
    done = subprocess.run(["sh", "-c", command], stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        fail("that command ended with status {}".format(done.returncode))


@contextlib.contextmanager
def program_on_path(folder: str) -> Iterator[None]:
    """Let `btrfs-backup-ng` name the zipapp, under the interpreter that runs the demo."""
    os.mkdir(folder)
    launcher = os.path.join(folder, "btrfs-backup-ng")
    with open(launcher, "w", encoding="utf-8", errors="surrogateescape") as stream:
        argv = " ".join(shlex.quote(part) for part in (sys.executable, ZIPAPP))
        stream.write('#!/bin/sh\nexec {} "$@"\n'.format(argv))
    os.chmod(launcher, 0o755)
    path = os.environ["PATH"]
    os.environ["PATH"] = folder + os.pathsep + path
    try:
        yield
    finally:
        os.environ["PATH"] = path


@contextlib.contextmanager
def working_folder(folder: str) -> Iterator[None]:
    """So that paths are short enough for a line of a terminal."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def write_file(path: str, contents: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(contents)


def read_file(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read()


def visible_names(folder: str) -> List[str]:
    """Names of the snapshots or backups in a folder, oldest first; [] where it does not exist."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    return []


def shown(subvolume: str, field: str) -> str:
    """What `btrfs subvolume show` says of "Received UUID" or "Parent UUID", "-" for none."""
    for line in run_quietly(["btrfs", "subvolume", "show", subvolume]).splitlines():
        if line.strip().startswith(field + ":"):
            return line.split(":", 1)[1].strip()
    return "-"


class Demo:
    """The two disks, and what is to be found on them."""

    def __init__(self, pc: str, disk: str) -> None:
        self.home = os.path.join(pc, "home")
        self.snapshots = os.path.join(self.home, SNAPSHOT_FOLDER)
        self.backups = os.path.join(disk, "home")

    def check_backups(self, count: int) -> None:
        names = visible_names(self.backups)
        if len(names) != count or visible_names(self.snapshots) != names:
            fail("there should be {} backups, each of its snapshot, but there are {} of {}".format(
                count, names, visible_names(self.snapshots)))
        for name in names:
            backup = os.path.join(self.backups, name)
            readonly = run_quietly(["btrfs", "property", "get", "-ts", backup, "ro"])
            if readonly.strip() != "ro=true" or shown(backup, "Received UUID") == "-":
                fail("{} is not a complete backup".format(backup))

    def newest(self, folder: str) -> str:
        return os.path.join(folder, visible_names(folder)[-1])

    def make_home(self) -> None:
        explain("A subvolume to back up, with some files, on the first of two btrfs disks:")
        type_command("btrfs subvolume create {}".format(self.home))
        for name, contents in FILES.items():
            write_file(os.path.join(self.home, name), contents)
        type_command("cd {} && du -h -a --apparent-size letters photos".format(self.home))

    def full_backup(self) -> None:
        explain("The first backup, onto the second disk. A read-only snapshot is taken,\n"
                "and as there is nothing to build on yet, all of it is sent:")
        type_command("btrfs-backup-ng {} {}".format(self.home, self.backups))
        self.check_backups(1)

    def change(self) -> None:
        explain("Work goes on: one letter grows, one is new. The big photo stays as it is.")
        type_command("echo 'It is red.' >> {}/letters/thanks.txt".format(self.home))
        type_command("echo 'See you soon.' > {}/letters/postcard.txt".format(self.home))

    def dry_run(self) -> None:
        explain("What would the next backup do? --dry-run says it and changes nothing:")
        type_command("btrfs-backup-ng --dry-run {} {}".format(self.home, self.backups))
        self.check_backups(1)

    def incremental_backup(self) -> None:
        explain("The same command again. Now only what has changed since is sent:")
        type_command("btrfs-backup-ng {} {}".format(self.home, self.backups))
        self.check_backups(2)
        if shown(self.newest(self.backups), "Parent UUID") == "-":
            fail("the second backup was not incremental")

    def listing(self) -> None:
        explain("What is there? `parent` marks what the next backup builds on. Each backup is a\n"
                "whole subvolume that can be looked into, not a bundle of differences:")
        type_command("btrfs-backup-ng list {} {}".format(self.home, self.backups))
        output = run_quietly(["btrfs-backup-ng", "list", self.home, self.backups])
        for name in visible_names(self.backups):
            if name not in output:
                fail("{} should be listed".format(name))

    def verify(self) -> None:
        explain("Is it equal to its snapshot? Both are read on their own side, every byte:")
        type_command("btrfs-backup-ng verify --latest {} {}".format(self.home, self.backups))

    def restore_file(self) -> None:
        letter = os.path.join(self.home, "letters/thanks.txt")
        lost = read_file(letter)
        explain("Oh dear:")
        type_command("rm {}".format(letter))
        explain("One file comes back by a plain copy out of the newest backup:")
        backup = self.newest(self.backups)
        type_command("cp -a {}/letters/thanks.txt {}/letters/".format(backup, self.home))
        type_command("cat {}".format(letter))
        if read_file(letter) != lost or b"It is red." not in lost:
            fail("the letter is not what it was")

    def restore_all(self) -> None:
        explain("And now everything is gone:")
        type_command("rm -r {0}/letters {0}/photos".format(self.home))
        explain("The newest backup comes back in the place of the subvolume. Nothing is\n"
                "overwritten, the old one stays beside it. The disk still has a snapshot,\n"
                "so little is sent:")
        type_command("btrfs-backup-ng restore {} --latest --in-place {}".format(self.backups, self.home))
        type_command("diff -r --no-dereference -x .btrfs-backup-ng {} {} && echo equal".format(
            self.newest(self.backups), self.home))
        self.check_restored()
        explain("Backups go on from there, incrementally:")
        type_command("btrfs-backup-ng --dry-run {} {}".format(self.home, self.backups))
        output = run_quietly(["btrfs-backup-ng", "--dry-run", self.home, self.backups])
        if "incrementally from" not in output:
            fail("the next backup should be incremental")

    def check_restored(self) -> None:
        """Look once more without diff: the files that the demo itself has written."""
        for name, contents in FILES.items():
            if not read_file(os.path.join(self.home, name)).startswith(contents):
                fail("{} was not restored as it was".format(name))

    def steps(self) -> Sequence[Callable[[], None]]:
        return (
            self.make_home,
            self.full_backup,
            self.change,
            self.dry_run,
            self.incremental_backup,
            self.listing,
            self.verify,
            self.restore_file,
            self.restore_all,
        )


def run_demo() -> None:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(scratch_folder("d."))
        pc = stack.enter_context(btrfs_on_loop(folder, "pc", 512 * MIB))
        disk = stack.enter_context(btrfs_on_loop(folder, "disk", 512 * MIB))
        stack.enter_context(program_on_path(os.path.join(folder, "bin")))
        stack.enter_context(working_folder(folder))
        for step in Demo(*map(os.path.basename, (pc, disk))).steps():
            step()


def main() -> int:
    argparse.ArgumentParser(description="Show a backup and a restore on scratch disks.").parse_args()
    find_system_programs()
    if os.geteuid() != 0 or not os.path.exists(ZIPAPP) or not shutil.which("mkfs.btrfs"):
        print("demo: needs root, btrfs-progs and a built zipapp; try: sudo make demo", file=sys.stderr)
        return 1
    end_cleanly_on_signals()
    started = time.monotonic()
    try:
        run_demo()
    except (DemoError, ScratchError) as error:
        print("\ndemo: {}".format(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; nothing is left behind", file=sys.stderr)
        return 130
    seconds = time.monotonic() - started
    explain("Everything worked, in {:.0f} seconds. Nothing is left behind.".format(seconds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
