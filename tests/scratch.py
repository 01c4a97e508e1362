"""Scratch folders and disks of the demo and the benchmark, where nobody sweeps up behind them.

All is a context manager, and nothing outlives it: not on errors, not on Ctrl-C, not on SIGTERM.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from typing import Any, Iterator, Optional, Sequence

from disks import Disk

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ZIPAPP = os.path.join(REPOSITORY, "btrfs_backup_ng.pyz")

# An ordinary user's PATH often lacks the folders that mkfs and losetup are in.
SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")

MIB = 1024 * 1024


class ScratchError(Exception):
    """A command that only prepares or cleans up has failed."""


def run_quietly(argv: Sequence[str]) -> str:
    """Run argv, return what it wrote to stdout; raise ScratchError with its stderr if it fails."""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False
    )
    if done.returncode != 0:
        raise ScratchError(
            "{}: status {}\n{}".format(
                " ".join(argv), done.returncode, done.stderr.decode(errors="replace")
            )
        )
    return done.stdout.decode(errors="surrogateescape")


def _end_by_exception(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)


def end_cleanly_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the context managers, as SIGINT does anyway; not what nohup ignores."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end_by_exception)


def find_system_programs() -> None:
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath),) + SYSTEM_FOLDERS)


@contextlib.contextmanager
def scratch_folder(prefix: str, parent: Optional[str] = None) -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
    try:
        yield folder
    finally:
        # A mount that would not go away must not have its files deleted through it.
        if not any(os.path.ismount(entry.path) for entry in os.scandir(folder)):
            shutil.rmtree(folder)


@contextlib.contextmanager
def btrfs_on_loop(
    folder: str, name: str, size: int, options: str = "noatime"
) -> Iterator[str]:
    """A new btrfs of `size` bytes, its image in the folder, mounted at folder/name."""
    disk = Disk(size, options=options, at=os.path.join(folder, name), image_in=folder)
    try:
        yield disk.path
    finally:
        disk.close()
