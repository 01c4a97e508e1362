"""Measures the program against what does the same by hand, in turns, on scratch filesystems.

    python3 tests/bench.py [--rounds N] [--json FILE] [CASE ...]

Each round runs ours, then theirs, and gives one ratio of wall-clock times, start-up included; the
median of the ratios counts. Before the rounds comes one of each unmeasured, so that the source is
in the page cache. Between runs, outside the measured time, what has arrived is deleted and the
filesystems are synced. The status is 1 when a target is missed.

The filesystems are loop devices, with their images in memory if /dev/shm has the room. Needs
root, btrfs-progs, and btrfs_backup_ng.pyz beside this folder.

Where btrbk, or the release of btrfs-backup-ng that PyPI has, can do the same, they are measured too.
The latter is installed with pip into a venv of its own, .venv-release, or taken from the venv that
BTRFS_BACKUP_NG_RELEASE names; without network its cases have no ratio.

The cases over ssh go to an sshd of our own on the loopback, those with a delay through a proxy that
holds everything back for so long each way.

A new case is a function that prepares a Stage and returns a Pair of commands, or that measures
something else and returns a Row; an entry in CASES gives it a name and a target.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import remote
from scratch import (
    MIB,
    REPOSITORY,
    ZIPAPP,
    ScratchError,
    btrfs_on_loop,
    end_cleanly_on_signals,
    find_system_programs,
    run_quietly,
    scratch_folder,
)

GIB = 1024 * MIB
MEMORY = "/dev/shm"
MEMORY_NEEDED = 10 * GIB
IMAGE_SIZE = 4 * GIB

PREFIX = "bench-"
BEFORE = PREFIX + "20200101-000000"
AFTER = PREFIX + "20200102-000000"

MANY = 300
VERY_MANY = 2000

# The system's own interpreter where it has one, as btrbk is run by the system's own Perl.
SYSTEM_PYTHON = "/usr/bin/python3"
INTERPRETER = SYSTEM_PYTHON if os.access(SYSTEM_PYTHON, os.X_OK) else sys.executable

BTRBK_CONFIG = """\
timestamp_format      long
snapshot_create       no
snapshot_preserve_min all
target_preserve_min   all
volume {source}
  snapshot_dir {snapshots}
  subvolume {subvolume}
    target {destination}
"""

# Of the cases with a slow network: what everything takes each way, and how much there is to do.
DELAY = 0.05
THERE = 100
PENDING = 50


class BenchError(Exception):
    """A measured command failed, or did not do its work."""


# ---- what is measured ----------------------------------------------------------------------


class Pair(NamedTuple):
    """Two commands that do the same."""

    ours: Sequence[str]
    theirs: Sequence[str]  # empty where the other program is not at hand
    check: Callable[[], None]  # raises BenchError if a run has not done its work
    reset: Callable[[], None]  # puts everything back as it was before the run


class Row(NamedTuple):
    """What came out of a case: a figure of ours and one of theirs from each round."""

    unit: str
    ours: List[float]
    theirs: List[float]  # empty where there is nothing to compare with

    def ratios(self) -> List[float]:
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs)]


class Case(NamedTuple):
    about: str
    target: float
    is_ratio: bool  # whether the target holds for the median ratio, or for ours by itself
    measure: Callable[["Stage", int], Row]
    most_rounds: int = 1000


# ---- the stage -----------------------------------------------------------------------------


class Tree(NamedTuple):
    """Files to back up, and a change of them."""

    name: str
    fill: Callable[[str, float, random.Random], None]
    change: Callable[[str, float, random.Random], None]


def names_in(folder: str) -> List[str]:
    """What is in a folder but the notes of a program, sorted."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def remove_notes(folder: str) -> None:
    """Remove the files in which a program notes what it did."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.startswith(".") and os.path.isfile(path):
            os.unlink(path)


class Stage:
    """The two filesystems and what has been prepared on them."""

    def __init__(self, source: str, destination: str, scratch: str, scale: float) -> None:
        self.source = source
        self.destination = destination
        self.log = os.path.join(scratch, "log")
        self.scratch = scratch
        self.scale = scale
        self.backups = self.folder(destination, "backups")
        self.prepared: Set[str] = set()
        self.closing = contextlib.ExitStack()  # what is to be ended before the filesystems go

    @staticmethod
    def folder(*parts: str) -> str:
        path = os.path.join(*parts)
        os.makedirs(path, exist_ok=True)
        return path

    def data(self, tree: Tree) -> str:
        return os.path.join(self.source, tree.name)

    def snapshots(self, tree: Tree, kind: str) -> str:
        """The snapshot folder of a tree: "full" holds one snapshot, "incremental" two."""
        return self.folder(self.source, "snapshots", tree.name + "-" + kind)

    def prepare(self, tree: Tree) -> None:
        """Write a tree and take its snapshots, once."""
        if tree.name in self.prepared:
            return
        data = self.data(tree)
        chance = random.Random(tree.name)
        run_quietly(["btrfs", "subvolume", "create", data])
        tree.fill(data, self.scale, chance)
        take_snapshot(data, os.path.join(self.snapshots(tree, "full"), BEFORE))
        take_snapshot(data, os.path.join(self.snapshots(tree, "incremental"), BEFORE))
        tree.change(data, self.scale, chance)
        take_snapshot(data, os.path.join(self.snapshots(tree, "incremental"), AFTER))
        run_quietly(["btrfs", "filesystem", "sync", self.source])
        self.prepared.add(tree.name)

    def clear(self, keep: Sequence[str] = (), snapshots: Optional[str] = None) -> None:
        """Delete the backups but those named, and what the program noted among the snapshots."""
        for name in sorted(set(names_in(self.backups)) - set(keep)):
            run_quietly(["btrfs", "subvolume", "delete", os.path.join(self.backups, name)])
        for folder in [self.backups] + ([snapshots] if snapshots else []):
            remove_notes(folder)
        self.settle()

    def settle(self) -> None:
        """Wait until what was deleted is gone, which else goes on during the next run."""
        run_quietly(["btrfs", "filesystem", "sync", self.source])
        # The sync wakes the kernel's cleaner, which is else left for half a minute. `btrfs subvolume
        # sync` waits for the same, but by the second.
        run_quietly(["btrfs", "filesystem", "sync", self.destination])
        while run_quietly(["btrfs", "subvolume", "list", "-d", self.destination]):
            time.sleep(0.05)
        run_quietly(["btrfs", "filesystem", "sync", self.destination])

    def run(self, argv: Sequence[str]) -> float:
        """Run a command, return its wall-clock seconds; raise BenchError if it fails."""
        started = time.monotonic()
        with self.started(argv) as process:
            status = process.wait()
            seconds = time.monotonic() - started
        self.check_status(argv, status)
        return seconds

    @contextlib.contextmanager
    def started(self, argv: Sequence[str]) -> Iterator["subprocess.Popen[bytes]"]:
        """A running command, its output in the log; ended on errors."""
        with open(self.log, "wb") as log:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()

    def check_status(self, argv: Sequence[str], status: int) -> None:
        if status != 0:
            with open(self.log, "rb") as log:
                tail = log.read()[-2000:].decode(errors="replace")
            raise BenchError("{}: status {}\n{}".format(" ".join(argv), status, tail))


def take_snapshot(subvolume: str, snapshot: str) -> None:
    run_quietly(["btrfs", "subvolume", "snapshot", "-r", subvolume, snapshot])


def ours_argv(snapshots: str, source: str, destination: str) -> List[str]:
    return [INTERPRETER, ZIPAPP, "-S", "-p", PREFIX, "-f", snapshots, source, destination]


def pipe_argv(snapshot: str, parent: Optional[str], destination: str) -> List[str]:
    """A shell that does with btrfs alone what the program does."""
    send = ["btrfs", "send", "-q"] + (["-p", parent] if parent else []) + [snapshot]
    receive = ["btrfs", "receive", "-q", destination]
    sync = ["btrfs", "filesystem", "sync", destination]
    send, receive, sync = ([shlex.quote(word) for word in argv] for argv in (send, receive, sync))
    script = "{} | {} && {}".format(" ".join(send), " ".join(receive), " ".join(sync))
    return ["sh", "-c", script]


# ---- trees ---------------------------------------------------------------------------------


def write_random(path: str, size: int, offset: int = 0) -> None:
    """Write incompressible bytes into a file, which is made if missing."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    with os.fdopen(handle, "wb") as stream:
        stream.seek(offset)
        while size > 0:
            size -= stream.write(os.urandom(min(size, 16 * MIB)))


def fill_large(folder: str, scale: float, _chance: random.Random) -> None:
    for number in range(4):
        write_random(os.path.join(folder, "large{}".format(number)), int(256 * MIB * scale))


def change_large(folder: str, scale: float, _chance: random.Random) -> None:
    """A quarter of each file anew, 256 MiB in all, and one file more."""
    size = int(64 * MIB * scale)
    for number in range(4):
        write_random(os.path.join(folder, "large{}".format(number)), size, offset=size * number)
    write_random(os.path.join(folder, "new"), size)


def write_small(path: str, chance: random.Random) -> None:
    write_random(path, chance.randint(100, 16000))


def fill_small(folder: str, scale: float, chance: random.Random) -> None:
    for folder_number in range(int(200 * scale)):
        subfolder = os.path.join(folder, "folder{:03}".format(folder_number))
        os.mkdir(subfolder)
        for number in range(100):
            write_small(os.path.join(subfolder, "file{:03}".format(number)), chance)


def change_small(folder: str, scale: float, chance: random.Random) -> None:
    """Of 20,000 files 3,000 changed, 1,000 renamed, 1,000 deleted; and 2,000 new."""
    some = int(1000 * scale)
    files = sorted(os.path.join(top, name) for top, _, names in os.walk(folder) for name in names)
    chance.shuffle(files)
    for path in files[: 3 * some]:
        write_small(path, chance)
    for path in files[3 * some : 4 * some]:
        os.rename(path, path + ".renamed")
    for path in files[4 * some : 5 * some]:
        os.unlink(path)
    for path in files[5 * some : 7 * some]:
        write_small(path + ".new", chance)


LARGE = Tree("large", fill_large, change_large)
HALF = Tree("half", lambda folder, scale, chance: fill_large(folder, scale / 2, chance), lambda *_: None)
SMALL = Tree("small", fill_small, change_small)
TINY = Tree("tiny", lambda _folder, _scale, _chance: None, lambda _folder, _scale, _chance: None)


# ---- cases ---------------------------------------------------------------------------------


def check_arrived(stage: Stage, names: Sequence[str]) -> None:
    """Raise BenchError unless exactly the named backups are there, each of them complete."""
    if names_in(stage.backups) != sorted(names):
        raise BenchError("expected {}, found {}".format(names, names_in(stage.backups)))
    for name in names:
        about = run_quietly(["btrfs", "subvolume", "show", os.path.join(stage.backups, name)])
        received = about.split("Received UUID:", 1)[1].split()[0]
        if "readonly" not in about or received == "-":
            raise BenchError("{} is not complete".format(name))


def full(tree: Tree, stage: Stage) -> Pair:
    stage.prepare(tree)
    stage.clear()
    snapshots = stage.snapshots(tree, "full")
    return Pair(
        ours_argv(snapshots, stage.data(tree), stage.backups),
        pipe_argv(os.path.join(snapshots, BEFORE), None, stage.backups),
        lambda: check_arrived(stage, [BEFORE]),
        lambda: stage.clear(snapshots=snapshots),
    )


def incremental(tree: Tree, stage: Stage) -> Pair:
    stage.prepare(tree)
    stage.clear()
    snapshots = stage.snapshots(tree, "incremental")
    before, after = os.path.join(snapshots, BEFORE), os.path.join(snapshots, AFTER)
    stage.run(pipe_argv(before, None, stage.backups))
    return Pair(
        ours_argv(snapshots, stage.data(tree), stage.backups),
        pipe_argv(after, before, stage.backups),
        lambda: check_arrived(stage, [BEFORE, AFTER]),
        lambda: stage.clear(keep=[BEFORE], snapshots=snapshots),
    )


def verify(tree: Tree, stage: Stage) -> Pair:
    """A snapshot and its backup compared, against the digests of the same files by sha256sum."""
    stage.prepare(tree)
    stage.clear()
    snapshots = stage.snapshots(tree, "full")
    stage.run(pipe_argv(os.path.join(snapshots, BEFORE), None, stage.backups))
    ours = [INTERPRETER, ZIPAPP, "verify", "-f", snapshots, stage.data(tree), stage.backups]
    folders = " ".join(shlex.quote(os.path.join(folder, BEFORE)) for folder in (snapshots, stage.backups))
    theirs = "find {} -type f -print0 | xargs -0 sha256sum".format(folders)
    return Pair(ours, ["sh", "-c", theirs], lambda: check_arrived(stage, [BEFORE]), lambda: None)


def make_many(stage: Stage, subvolume: str, snapshots: str, backups: str, names: List[str]) -> None:
    """Take a snapshot for each name, and send all of them into one `btrfs receive`."""
    run_quietly(["btrfs", "subvolume", "create", subvolume])
    script, parent = [], ""
    for name in names:
        snapshot = os.path.join(snapshots, name)
        take_snapshot(subvolume, snapshot)
        script.append("btrfs send -q {} {}".format(parent, shlex.quote(snapshot)))
        parent = "-p " + shlex.quote(snapshot)
    receive = "btrfs receive -q " + shlex.quote(backups)
    path = os.path.join(stage.scratch, "send-many")  # too long for an argument
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("{{\n{}\n}} | {}\n".format("\n".join(script), receive))
    stage.run(["sh", path])


def check_nothing_to_do(count: int, btrbk_argv: Sequence[str], backups: str) -> None:
    if len(names_in(backups)) != count:
        raise BenchError("expected {} backups in {}".format(count, backups))
    if not btrbk_argv:
        return
    said = run_quietly(btrbk_argv)
    if "<no_action>" not in said:
        raise BenchError("btrbk finds something to do:\n" + said)


def nothing_to_do(count: int, stage: Stage) -> Pair:
    """A pair of folders for each program, as each wants names of its own."""
    folders = {
        name: (
            os.path.join(stage.source, name),
            stage.folder(stage.source, "snapshots", name),
            stage.folder(stage.destination, name),
        )
        for name in ("many", "many-btrbk")
    }
    days = ["202{}{:02}{:02}".format(i // 252, i // 21 % 12 + 1, i % 21 + 1) for i in range(count)]
    make_many(stage, *folders["many"], names=[PREFIX + day + "-000000" for day in days])
    subvolume, snapshots, backups = folders["many-btrbk"]
    make_many(stage, *folders["many-btrbk"], names=["many-btrbk." + day + "T0000" for day in days])
    btrbk_argv = btrbk_dry_run_argv(stage, subvolume, snapshots, backups)
    check_nothing_to_do(count, btrbk_argv, backups)
    subvolume, snapshots, backups = folders["many"]
    return Pair(
        ours_argv(snapshots, subvolume, backups),
        btrbk_argv,
        lambda: check_nothing_to_do(count, [], backups),
        lambda: None,
    )


def btrbk_dry_run_argv(stage: Stage, subvolume: str, snapshots: str, backups: str) -> List[str]:
    argv = btrbk_argv(stage, subvolume, snapshots, backups)
    return argv and argv + ["dryrun"]


def btrbk_argv(stage: Stage, subvolume: str, snapshots: str, backups: str) -> List[str]:
    """btrbk's command but for what to do, or [] where it is not installed."""
    if not shutil.which("btrbk"):
        return []
    config = os.path.join(stage.scratch, "btrbk.conf")
    with open(config, "w", encoding="utf-8") as stream:
        stream.write(
            BTRBK_CONFIG.format(
                source=stage.source,
                snapshots=os.path.relpath(snapshots, stage.source),
                subvolume=os.path.relpath(subvolume, stage.source),
                destination=backups,
            )
        )
    return ["btrbk", "-c", config]


def fan_out(tree: Tree, count: int, stage: Stage) -> Pair:
    """So many destinations, on a filesystem each, against one pipe after the other."""
    stage.prepare(tree)
    stage.clear()
    others = [stage.closing.enter_context(btrfs_on_loop(
        stage.scratch, "other%d" % number, IMAGE_SIZE, "noatime,nodiscard")) for number in range(1, count)]
    snapshots = stage.snapshots(tree, "full")
    snapshot = os.path.join(snapshots, BEFORE)
    scripts = [pipe_argv(snapshot, None, folder)[-1] for folder in [stage.backups] + others]

    def check() -> None:
        check_arrived(stage, [BEFORE])
        for other in others:
            if not os.path.isdir(os.path.join(other, BEFORE)):
                raise BenchError("nothing has arrived at " + other)

    def reset() -> None:
        for other in others:
            run_quietly(["btrfs", "subvolume", "delete", "-c", os.path.join(other, BEFORE)])
            run_quietly(["btrfs", "filesystem", "sync", other])
        stage.clear(snapshots=snapshots)

    return Pair(ours_argv(snapshots, stage.data(tree), stage.backups) + others,
                ["sh", "-c", " && ".join(scripts)], check, reset)


def start_up(theirs: Sequence[str], stage: Stage) -> Pair:
    """The shortest run that does anything: looks at its source and finds nothing to do."""
    stage.prepare(TINY)
    argv = ours_argv(stage.snapshots(TINY, "full"), stage.data(TINY), stage.backups)[:-1] + ["-T"]
    return Pair(argv, theirs if shutil.which(theirs[0]) else [], lambda: None, lambda: None)


# Against the release of btrfs-backup-ng that PyPI has.

RELEASE_CONFIG = """\
[global]
snapshot_dir = "{folder}"
timestamp_format = "%Y%m%d-%H%M%S"
incremental = true
[[volumes]]
path = "{subvolume}"
snapshot_prefix = "{prefix}"
[[volumes.targets]]
path = "{destination}"
"""


@functools.lru_cache(maxsize=None)
def release_program() -> str:
    """The released program, or '' where it cannot be installed."""
    venv = os.environ.get("BTRFS_BACKUP_NG_RELEASE") or os.path.join(REPOSITORY, ".venv-release")
    program = os.path.join(venv, "bin", "btrfs-backup-ng")
    if not os.path.exists(program):
        try:
            run_quietly([sys.executable, "-m", "venv", venv])
            run_quietly([os.path.join(venv, "bin", "pip"), "install", "--quiet", "btrfs-backup-ng"])
        except ScratchError as error:
            print("bench: no release of btrfs-backup-ng: {}".format(str(error).splitlines()[0]), file=sys.stderr)
            return ""
    return program


def release_argv(stage: Stage, subvolume: str, snapshots: str, destination: str) -> List[str]:
    """Its command for the same transfer; it wants its snapshots in a folder that is called like the source."""
    program = release_program()
    if not program:
        return []
    folder = stage.folder(stage.scratch, "release")
    link = os.path.join(folder, os.path.basename(subvolume))
    if not os.path.islink(link):
        os.symlink(snapshots, link)
    config = os.path.join(stage.scratch, "release.toml")
    with open(config, "w", encoding="utf-8") as stream:
        stream.write(RELEASE_CONFIG.format(folder=folder, subvolume=subvolume, prefix=PREFIX, destination=destination))
    return [program, "-c", config, "transfer", "--no-progress"]


def clear_folder(folder: str) -> None:
    """Delete the subvolumes in a folder and all notes that a program has left there."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isdir(path) and os.stat(path).st_ino == 256:
            run_quietly(["btrfs", "subvolume", "delete", path])
        elif os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def full_against_release(tree: Tree, stage: Stage) -> Pair:
    stage.prepare(tree)
    stage.clear()
    snapshots, theirs = stage.snapshots(tree, "full"), stage.folder(stage.destination, "release")

    def check() -> None:
        if not any(os.path.isdir(os.path.join(folder, BEFORE)) for folder in (stage.backups, theirs)):
            raise BenchError("nothing has arrived")

    def reset() -> None:
        clear_folder(theirs)
        stage.clear(snapshots=snapshots)
        for name in set(os.listdir(snapshots)) - {BEFORE}:
            shutil.rmtree(os.path.join(snapshots, name))

    return Pair(ours_argv(snapshots, stage.data(tree), stage.backups),
                release_argv(stage, stage.data(tree), snapshots, theirs), check, reset)


def nothing_against_release(stage: Stage) -> Pair:
    """Both look at the same folders, where nothing is missing."""
    subvolume, snapshots = os.path.join(stage.source, "many"), stage.folder(stage.source, "snapshots", "many")
    backups = stage.folder(stage.destination, "many")
    days = ["202{}{:02}{:02}".format(i // 252, i // 21 % 12 + 1, i % 21 + 1) for i in range(MANY)]
    make_many(stage, subvolume, snapshots, backups, [PREFIX + day + "-000000" for day in days])

    def check() -> None:
        if len(names_in(backups)) != MANY:
            raise BenchError("expected {} backups, found {}".format(MANY, len(names_in(backups))))

    return Pair(ours_argv(snapshots, subvolume, backups), release_argv(stage, subvolume, snapshots, backups),
                check, lambda: None)


# Over ssh. The other machine is this one, behind an sshd of our own, with the default cipher.


def start_sshd(stage: Stage) -> remote.Sshd:
    reason = remote.why_not()
    if reason:
        raise BenchError(reason)
    return stage.closing.enter_context(contextlib.closing(remote.Sshd()))


def ours_ssh_argv(snapshots: str, source: str, endpoint: str) -> List[str]:
    argv = ours_argv(snapshots, source, endpoint)
    return argv[:-2] + remote.as_program_options(remote.ssh_options()) + argv[-2:]


def full_over_ssh(tree: Tree, stage: Stage) -> Pair:
    stage.prepare(tree)
    stage.clear()
    sshd = start_sshd(stage)
    snapshots = stage.snapshots(tree, "full")
    receive = "btrfs receive -q {0} && btrfs filesystem sync {0}".format(shlex.quote(stage.backups))
    send = "btrfs send -q {}".format(shlex.quote(os.path.join(snapshots, BEFORE)))
    script = "{} | {}".format(send, " ".join(shlex.quote(word) for word in sshd.argv(receive)))
    return Pair(
        ours_ssh_argv(snapshots, stage.data(tree), sshd.endpoint(stage.backups)),
        ["sh", "-c", script],
        lambda: check_arrived(stage, [BEFORE]),
        lambda: stage.clear(snapshots=snapshots),
    )


def far(is_push: bool, delay: float, rate: float, stage: Stage) -> Pair:
    """512 MiB over a long line."""
    stage.prepare(HALF)
    stage.clear()
    sshd = start_sshd(stage)
    port = stage.closing.enter_context(contextlib.closing(remote.Proxy(sshd.port, delay, rate))).port
    snapshots, data = stage.snapshots(HALF, "full"), stage.data(HALF)
    send = "btrfs send -q {}".format(shlex.quote(os.path.join(snapshots, BEFORE)))
    receive = "btrfs receive -q {}".format(shlex.quote(stage.backups))
    sync = "btrfs filesystem sync {}".format(shlex.quote(stage.backups))
    if is_push:
        there = " ".join(map(shlex.quote, sshd.argv("{} && {}".format(receive, sync), port=port)))
        script = "{} | {}".format(send, there)
        ours = ours_ssh_argv(snapshots, data, sshd.endpoint(stage.backups, port=port))
    else:
        script = "{} | {} && {}".format(" ".join(map(shlex.quote, sshd.argv(send, port=port))), receive, sync)
        ours = ours_ssh_argv(snapshots, sshd.endpoint(data, port=port), stage.backups)
    return Pair(ours, ["sh", "-c", script], lambda: check_arrived(stage, [BEFORE]),
                lambda: stage.clear(snapshots=snapshots))


def make_wrapped_ssh(stage: Stage) -> str:
    """A folder with an `ssh` that reaches our sshd, for btrbk, which passes no options on."""
    folder = stage.folder(stage.scratch, "bin")
    words = [str(remote.find_program("ssh")), "-F", "none"]
    for option in remote.ssh_options():
        words += ["-o", option]
    remote.write_file(
        os.path.join(folder, "ssh"),
        '#!/bin/sh\nexec {} "$@"\n'.format(" ".join(shlex.quote(word) for word in words)), 0o755)
    return folder


class Pending(NamedTuple):
    """A folder of snapshots at the source of which the last few are missing at the destination."""

    subvolume: str
    snapshots: str
    backups: str
    there: List[str]
    missing: List[str]

    def make(self, stage: Stage) -> None:
        """Each snapshot with a small change."""
        run_quietly(["btrfs", "subvolume", "create", self.subvolume])
        for name in self.there + self.missing:
            write_random(os.path.join(self.subvolume, "file"), 4096)
            take_snapshot(self.subvolume, os.path.join(self.snapshots, name))
        paths = [os.path.join(self.snapshots, name) for name in self.there]
        sends = ["btrfs send -q " + paths[0]]
        sends += ["btrfs send -q -p {} {}".format(*pair) for pair in zip(paths, paths[1:])]
        stage.run(["sh", "-c", "{{ {}; }} | btrfs receive -q {}".format("; ".join(sends), self.backups)])

    def check(self) -> None:
        arrived = names_in(self.backups)
        if arrived and arrived != sorted(self.there) and arrived != sorted(self.there + self.missing):
            raise BenchError("found {} in {}".format(arrived, self.backups))

    def is_done(self) -> bool:
        return len(names_in(self.backups)) == len(self.there + self.missing)

    def reset(self, stage: Stage) -> None:
        for name in set(names_in(self.backups)) - set(self.there):
            run_quietly(["btrfs", "subvolume", "delete", os.path.join(self.backups, name)])
        remove_notes(self.backups)
        remove_notes(self.snapshots)
        stage.settle()


def pending_over_delay(count: int, stage: Stage) -> Pair:
    """A pair of folders for each program, as each wants names of its own."""
    sshd = start_sshd(stage)
    proxy = stage.closing.enter_context(contextlib.closing(remote.Proxy(sshd.port, DELAY)))
    days = ["202{}{:02}{:02}".format(i // 252, i // 21 % 12 + 1, i % 21 + 1) for i in range(THERE + count)]
    folders = []
    for name, form in (("pending", PREFIX + "{}-000000"), ("pending-btrbk", "pending-btrbk.{}T0000")):
        names = [form.format(day) for day in days]
        folders.append(Pending(
            os.path.join(stage.source, name), stage.folder(stage.source, "snapshots", name),
            stage.folder(stage.destination, name), names[:THERE], names[THERE:]))
        folders[-1].make(stage)
    ours, theirs = folders

    def check() -> None:
        for folder in folders:
            folder.check()
        if not any(folder.is_done() for folder in folders):
            raise BenchError("nothing has arrived")

    def reset() -> None:
        for folder in folders:
            folder.reset(stage)

    endpoint = sshd.endpoint(ours.backups, port=proxy.port)
    return Pair(
        ours_ssh_argv(ours.snapshots, ours.subvolume, endpoint),
        btrbk_ssh_argv(stage, theirs, sshd.endpoint(theirs.backups, port=proxy.port).replace("root@", "")),
        check,
        reset,
    )


def looking_over_delay(verb: str, name: str, stage: Stage, rounds: int) -> Row:
    """Seconds that a look at many backups takes beyond a login that does nothing, over the same line."""
    sshd = start_sshd(stage)
    proxy = stage.closing.enter_context(contextlib.closing(remote.Proxy(sshd.port, DELAY)))
    names = [PREFIX + "202{}{:02}{:02}-000000".format(i // 252, i // 21 % 12 + 1, i % 21 + 1) for i in range(MANY)]
    folder = Pending(os.path.join(stage.source, "looked-at"), stage.folder(stage.source, "snapshots", "looked-at"),
                     stage.folder(stage.destination, "looked-at"), names, [])
    folder.make(stage)
    place = sshd.endpoint(os.path.join(folder.backups, name).rstrip("/"), port=proxy.port)
    pair = Pair([INTERPRETER, ZIPAPP, verb] + remote.as_program_options(remote.ssh_options()) + [place],
                sshd.argv("true", port=proxy.port), folder.check, lambda: None)
    row = measure_in_turns(lambda _stage: pair, stage, rounds)
    return Row("s", [ours - theirs for ours, theirs in zip(row.ours, row.theirs)], [])


def btrbk_ssh_argv(stage: Stage, folder: Pending, endpoint: str) -> List[str]:
    argv = btrbk_argv(stage, folder.subvolume, folder.snapshots, endpoint)
    return argv and ["env", "PATH={}:{}".format(make_wrapped_ssh(stage), os.environ["PATH"])] + argv + ["run"]


def measure_in_turns(prepare: Callable[[Stage], Pair], stage: Stage, rounds: int) -> Row:
    """Seconds of ours and of theirs from each round."""
    pair = prepare(stage)
    row = Row("s", [], [])
    for number in range(-1, rounds):
        for argv, seconds in ((pair.ours, row.ours), (pair.theirs, row.theirs)):
            if not argv:
                continue
            took = stage.run(argv)
            pair.check()
            pair.reset()
            # The round before the first only warms the caches.
            if number >= 0:
                seconds.append(took)
    return row


def parents_and_pids() -> Iterator[Tuple[int, int]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                with open("/proc/{}/stat".format(name), "rb") as stream:
                    # The command's name, in brackets, may hold anything.
                    yield int(stream.read().rpartition(b")")[2].split()[1]), int(name)


def with_descendants(root: int) -> Set[int]:
    found, pairs = {root}, list(parents_and_pids())
    while True:
        more = {pid for parent, pid in pairs if parent in found} - found
        if not more:
            return found
        found |= more


def is_python(pid: int) -> bool:
    executable = os.path.realpath("/proc/{}/exe".format(pid))
    return executable == os.path.realpath(INTERPRETER)


def peak_mib(pid: int) -> float:
    """The most memory that a process has had resident, in MiB."""
    with open("/proc/{}/status".format(pid), encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


def watch_memory(process: "subprocess.Popen[bytes]") -> float:
    """The sum of the peaks of all Python processes below one, itself included, in MiB."""
    peaks: Dict[int, float] = {}
    while process.poll() is None:
        for pid in with_descendants(process.pid):
            with contextlib.suppress(OSError):
                if is_python(pid):
                    peaks[pid] = max(peaks.get(pid, 0.0), peak_mib(pid))
                else:
                    # Seen just before it became another program.
                    peaks.pop(pid, None)
        time.sleep(0.01)
    return sum(peaks.values())


def measure_memory(prepare: Callable[[Stage], Pair], stage: Stage, rounds: int) -> Row:
    """MiB of ours from each round, outside of the rounds that measure time."""
    pair = prepare(stage)
    row = Row("MiB", [], [])
    for _ in range(rounds):
        with stage.started(pair.ours) as process:
            row.ours.append(watch_memory(process))
            stage.check_status(pair.ours, process.wait())
        pair.check()
        pair.reset()
    return row


def in_turns(prepare: Callable[[Stage], Pair]) -> Callable[[Stage, int], Row]:
    return functools.partial(measure_in_turns, prepare)


FULL_LARGE = functools.partial(full, LARGE)
FULL_SMALL = functools.partial(full, SMALL)
INCREMENTAL_LARGE = functools.partial(incremental, LARGE)
INCREMENTAL_SMALL = functools.partial(incremental, SMALL)

CASES = {
    "full-large": Case("1 GiB in 4 files", 1.0, True, in_turns(FULL_LARGE)),
    "full-small": Case("20,000 small files", 1.0, True, in_turns(FULL_SMALL)),
    "incremental-large": Case("256 MiB rewritten, 64 new", 1.0, True, in_turns(INCREMENTAL_LARGE)),
    "incremental-small": Case("7,000 files changed", 1.0, True, in_turns(INCREMENTAL_SMALL)),
    "memory": Case(
        "peak during full-large", 40.0, False, functools.partial(measure_memory, FULL_LARGE)
    ),
    "verify-large": Case(
        "both sides of full-large, sha256sum", 1.1, True, in_turns(functools.partial(verify, LARGE))
    ),
    "verify-small": Case(
        "both sides of full-small, sha256sum", 1.1, True, in_turns(functools.partial(verify, SMALL))
    ),
    "fan-out-2": Case("1 GiB to 2 disks, 2 pipes", 0.75, True, in_turns(functools.partial(fan_out, LARGE, 2))),
    "fan-out-3": Case("1 GiB to 3 disks, 3 pipes", 0.6, True, in_turns(functools.partial(fan_out, LARGE, 3))),
    "nothing": Case(
        "300 on both sides, btrbk dryrun", 0.5, True, in_turns(functools.partial(nothing_to_do, MANY))
    ),
    "nothing-2000": Case(
        "2,000 on both sides, btrbk dryrun", 0.5, True, in_turns(functools.partial(nothing_to_do, VERY_MANY)), 3
    ),
    "memory-2000": Case(
        "peak with 2,000 on both sides", 60.0, False,
        functools.partial(measure_memory, functools.partial(nothing_to_do, VERY_MANY)), 1
    ),
    "start-up": Case(
        "shortest run, btrbk --version", 1.0, True, in_turns(functools.partial(start_up, ["btrbk", "--version"]))
    ),
    "start-python": Case(
        "shortest run, python3 -c pass", 6.0, True,
        in_turns(functools.partial(start_up, [INTERPRETER, "-c", "pass"]))
    ),
    "release-full": Case(
        "1 GiB in 4 files, release of PyPI", 1.0, True, in_turns(functools.partial(full_against_release, LARGE))
    ),
    "release-nothing": Case(
        "300 on both sides, release of PyPI", 0.5, True, in_turns(nothing_against_release)
    ),
    "ssh-large": Case("1 GiB in 4 files, over ssh", 1.0, True, in_turns(functools.partial(full_over_ssh, LARGE))),
    "far-push": Case("512 MiB, 50 ms each way", 0.25, True, in_turns(functools.partial(far, True, 0.05, 0)), 3),
    "far-pull": Case("512 MiB, 50 ms each way", 0.25, True, in_turns(functools.partial(far, False, 0.05, 0)), 3),
    "nearer-push": Case("512 MiB, 10 ms each way", 0.6, True, in_turns(functools.partial(far, True, 0.01, 0)), 3),
    "nearer-pull": Case("512 MiB, 10 ms each way", 0.6, True, in_turns(functools.partial(far, False, 0.01, 0)), 3),
    "far-slow": Case(
        "the same at 20 MB/s", 1.02, True, in_turns(functools.partial(far, True, 0.05, 20e6)), 3
    ),
    "ssh-one": Case(
        "1 small, 50 ms each way, btrbk", 0.33, True, in_turns(functools.partial(pending_over_delay, 1))
    ),
    "far-list": Case(
        "300, 50 ms each way, beyond ssh", 1.0, False, functools.partial(looking_over_delay, "list", "")
    ),
    "far-history": Case(
        "300, 50 ms each way, beyond ssh", 1.0, False, functools.partial(looking_over_delay, "history", "file")
    ),
    "ssh-many": Case(
        "50 small, 50 ms each way, btrbk", 0.1, True, in_turns(functools.partial(pending_over_delay, PENDING)), 2
    ),
}


# ---- the report ----------------------------------------------------------------------------

LINE = "{:<18} {:<32} {:>10} {:>10} {:>6} {:>13} {:>6}  {}"


def verdict(case: Case, row: Row) -> str:
    if case.is_ratio and not row.theirs:
        return "not measured"
    reached = statistics.median(row.ratios() if case.is_ratio else row.ours)
    return "ok" if reached <= case.target else "over"


def format_median(values: List[float], unit: str) -> str:
    return "{:.3g} {}".format(statistics.median(values), unit) if values else "-"


def format_row(name: str, case: Case, row: Row) -> str:
    ratios = row.ratios()
    return LINE.format(
        name,
        case.about,
        format_median(row.ours, row.unit),
        format_median(row.theirs, row.unit),
        "{:.2f}".format(statistics.median(ratios)) if ratios else "-",
        "{:.2f}..{:.2f}".format(min(ratios), max(ratios)) if ratios else "-",
        "{:g}".format(case.target),
        verdict(case, row),
    )


def as_json(case: Case, row: Row) -> Dict[str, Any]:
    ratios = row.ratios()
    return {
        "about": case.about,
        "unit": row.unit,
        "ours": row.ours,
        "theirs": row.theirs,
        "median_ours": statistics.median(row.ours),
        "median_theirs": statistics.median(row.theirs) if row.theirs else None,
        "median_ratio": statistics.median(ratios) if ratios else None,
        "target": case.target,
        "verdict": verdict(case, row),
    }


def about_system() -> Dict[str, Any]:
    return {
        "python": run_quietly([INTERPRETER, "-V"]).strip(),
        "kernel": platform.release(),
        "btrfs-progs": run_quietly(["btrfs", "--version"]).split("\n", 1)[0],
        "processors": os.cpu_count(),
    }


# ---- the command ---------------------------------------------------------------------------


def images_folder() -> str:
    """Memory where there is enough of it: a disk's own pace would drown the differences."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage(MEMORY).free >= MEMORY_NEEDED:
            return MEMORY
    return tempfile.gettempdir()


@contextlib.contextmanager
def stage_with(scale: float) -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder("bench.", images_folder()))
        # Discards of what the last run has left would go on during the next one.
        source = stack.enter_context(btrfs_on_loop(scratch, "source", IMAGE_SIZE, "noatime,nodiscard"))
        destination = stack.enter_context(
            btrfs_on_loop(scratch, "destination", IMAGE_SIZE, "noatime,nodiscard")
        )
        stage = Stage(source, destination, scratch, scale)
        with stage.closing:
            yield stage


def run_cases(names: Sequence[str], options: argparse.Namespace, rows: Dict[str, Row]) -> None:
    """Measure and print one case after the other; each that is done is in `rows` from then on."""
    title = LINE.format("case", "", "ours", "theirs", "ratio", "low..high", "target", "")
    print(title.rstrip(), flush=True)
    for name in names:
        # A filesystem that earlier cases have used up would be part of the figures.
        with stage_with(options.scale) as stage:
            rows[name] = CASES[name].measure(stage, min(options.rounds, CASES[name].most_rounds))
        print(format_row(name, CASES[name], rows[name]), flush=True)


def write_json(path: str, rows: Dict[str, Row], options: argparse.Namespace) -> None:
    report = {
        "system": about_system(),
        "rounds": options.rounds,
        "scale": options.scale,
        "cases": {name: as_json(CASES[name], row) for name, row in rows.items()},
    }
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(report, stream, indent=2)
        stream.write("\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure against btrfs send | btrfs receive.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--json", metavar="FILE", help="write all figures there as well")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="F", help="smaller trees, to try the bench itself"
    )
    options = parser.parse_args()
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error("no case {}; there are: {}".format(" ".join(unknown), ", ".join(CASES)))
    if options.rounds < 1:
        parser.error("--rounds takes a number from 1")
    return options


def main() -> int:
    options = parse_arguments()
    find_system_programs()
    if os.geteuid() != 0 or not os.path.exists(ZIPAPP) or not shutil.which("mkfs.btrfs"):
        print("bench: needs root, btrfs-progs and a built zipapp; try: sudo make bench", file=sys.stderr)
        return 1
    end_cleanly_on_signals()
    rows: Dict[str, Row] = {}
    try:
        run_cases(options.cases or list(CASES), options, rows)
    except (BenchError, ScratchError) as error:
        print("bench: {}".format(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        # Also when a later case could not run: much time has gone into those before.
        if options.json and rows:
            write_json(options.json, rows, options)
    return 1 if any(verdict(CASES[name], row) == "over" for name, row in rows.items()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
