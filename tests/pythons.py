"""Finds the Python interpreters of this system; run as a program, it prints them a line each.

Looked for on the PATH (python3.6, python3.7, ...) and in ~/.pyenv/versions; one of each minor
version is enough.
"""

import glob
import os
import shutil
import subprocess
import sys
from typing import Dict, Iterator, List, Optional, Tuple

Version = Tuple[int, int]

OLDEST: Version = (3, 6)

ASK = "import os, sys; print('%d %d ' % sys.version_info[:2] + os.path.realpath(sys.executable))"


def candidates() -> Iterator[str]:
    """Paths that may be an interpreter: a pyenv shim, say, often is none."""
    yield sys.executable
    names = ["python3", "python2"]
    names += ["python2.7"] + ["python3.{}".format(minor) for minor in range(OLDEST[1], 30)]
    for name in names:
        found = shutil.which(name)
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


if __name__ == "__main__":
    print("\n".join(pythons()))
