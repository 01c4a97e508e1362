"""The agent of a host that was broken into: of files that are wanted it sends what nobody may send.

Usage: hostile_files.py ITEMS [MODE], a list in Python of the items that it sends after the folder `a`, and the mode
that it tells of what is asked for.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import btrfs_backup_ng as program


class HostileFiles(program.PackedFiles):

    def __init__(self, *arguments):
        super().__init__(*arguments)
        items = [program.FileEntry(b"a", 0o40755)] + eval(sys.argv[1], vars(program))
        self.chunks = program.pack_items(items)


def tell_mode(_self, _folder, _name, paths):
    return program.FilesFound(tuple(int(sys.argv[2], 8) for _ in paths), 1, 1)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        program.LocalHost.look_at_files = tell_mode  # type: ignore[method-assign]
    program.PackedFiles = HostileFiles  # type: ignore[misc]
    raise SystemExit(program.main(["agent"]))
