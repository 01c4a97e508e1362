"""Finds the Python interpreters of this system, and runs tests under each of them.

    python3 tests/pythons.py           prints them, a line each
    python3 tests/pythons.py --each    runs the tests that need no disks, and a backup, under each; as many
                                       at once as there are processors

Under the newest the program then runs with -W error -X dev: no warning, nothing left open.

Looked for on the PATH (python3.6, python3.7, ...) and in ~/.pyenv/versions; one of each minor
version is enough.
"""

import concurrent.futures
import functools
import glob
import os
import shutil
import subprocess
import sys
from typing import Dict, Iterator, List, Optional, Tuple

Version = Tuple[int, int]

OLDEST: Version = (3, 6)

TESTS = os.path.dirname(os.path.abspath(__file__))

# Without disks, but for the last line: full and incremental backups.
QUICK = ["test_names.", "test_options.", "test_planning.", "test_retention_time.", "test_shape.", "test_state.",
         "test_main_job.TreesAreEqual.test_one", "test_main_job.Retention.test_the_newest_are"]

ASK = "import os, sys; print('%d %d ' % sys.version_info[:2] + os.path.realpath(sys.executable))"


def candidates() -> Iterator[str]:
    """Paths that may be an interpreter. A pyenv's shims are none, and take long; what they lead to is found as well."""
    yield sys.executable
    folders = os.pathsep.join(folder for folder in os.get_exec_path() if os.path.basename(folder) != "shims")
    names = ["python3", "python2"]
    names += ["python2.7"] + ["python3.{}".format(minor) for minor in range(OLDEST[1], 30)]
    for name in names:
        found = shutil.which(name, path=folders)
        if found:
            yield found
    yield from sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python")))


def identify(candidate: str) -> Optional[Tuple[Version, str]]:
    """Version and real path of an interpreter, or None for what does not run."""
    try:
        answer = subprocess.run(
            [candidate, "-E", "-s", "-c", ASK],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    except OSError:
        return None
    if answer.returncode != 0:
        return None
    major, minor, path = os.fsdecode(answer.stdout).rstrip("\n").split(" ", 2)
    return (int(major), int(minor)), path


@functools.lru_cache(maxsize=None)
def all_pythons() -> List[Tuple[Version, str]]:
    """One interpreter of each minor version, the oldest first."""
    found: Dict[Version, str] = {}
    for candidate in candidates():
        identity = identify(candidate)
        if identity:
            found.setdefault(*identity)
    return sorted(found.items())


def pythons() -> List[str]:
    """The interpreters that the program supports."""
    return [path for version, path in all_pythons() if version >= OLDEST]


def old_pythons() -> List[str]:
    """The interpreters that the program refuses, Python 2 for example."""
    return [path for version, path in all_pythons() if version < OLDEST]


def run_quick_tests(python: str, is_newest: bool) -> "subprocess.CompletedProcess[bytes]":
    flags = ["-W", "error", "-X", "dev"] if is_newest else ["-W", "error::SyntaxWarning"]
    environment = dict(os.environ, PYTHON=python)
    if is_newest:
        environment["BTRFS_BACKUP_NG_FLAGS"] = "-E -s -W error -X dev"
    return subprocess.run(
        [python] + flags + [os.path.join(TESTS, "run.py")] + QUICK,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def run_under_each() -> int:
    """The number of interpreters under which a test failed; says one line for each, and what failed."""
    found = pythons()
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [pool.submit(run_quick_tests, python, python == found[-1]) for python in found]
        for python, run in zip(found, runs):
            done = run.result()
            output = done.stdout.decode(errors="replace")
            print("{}: {}".format(python, (output.splitlines() or ["nothing ran"])[-1]), flush=True)
            if done.returncode != 0:
                failed += 1
                print(output[output.find("\n==== "):], flush=True)
    return failed


if __name__ == "__main__":
    if sys.argv[1:] == ["--each"]:
        raise SystemExit(1 if run_under_each() else 0)
    print("\n".join(pythons()))
