"""Colour: a little on terminals, and none anywhere else."""

import fcntl
import os
import pty
import subprocess
import sys
import termios
import unittest

import support

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from btrfs_backup_ng import COLOURS, PAINTED, UNCOLOURED

LINES = {
    "red": ("error: no such source: /x", "  problem      space       only 1.0 GiB free",
            "laptop-20260131-093000  /mnt/backup/home  different: a: content", "    /mnt/backup  FAILED: 1 of 2 sent",
            "2       nas:/backups/home  error: connection refused"),
    "yellow": ("warning: /mnt/b is on the source's own filesystem", "  not checked  quotas      run as root"),
    "green": ("  ok           kernel      Linux 6.1", "a  /mnt/backup/home  equal: 3 files and folders"),
    "dim": ("laptop-20260131-093000  present", "20260131-093000  present"),
    None: ("sent laptop-20260131-093000 to /mnt/error: x", "an error: none", "destination /mnt/ok  or problem",
           "took snapshot laptop-20260131-093000 of /home", "  okay         x", "120260131-093000  x"),
}


class Words(unittest.TestCase):

    def test_which_are_painted(self):
        for colour, lines in LINES.items():
            for line in lines:
                found = {match.lastgroup for match in PAINTED.finditer(line)} - ({"dim"} if colour != "dim" else set())
                self.assertEqual({colour} - {None}, found, line)


class OnATerminal(unittest.TestCase):

    def written(self, *arguments, stdout=None, env=None, program=support.PROGRAM_ARGV):
        """What the program writes to a terminal: on both streams, or with stdout elsewhere on stderr alone."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        environment = dict(os.environ, **dict({"TERM": "xterm"}, **(env or {})))
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x18\0\x50\0\0\0\0\0")
        process = subprocess.Popen(program + list(arguments), stdin=subprocess.DEVNULL,
                                   stdout=slave if stdout is None else stdout, stderr=slave, env=environment)
        os.close(slave)
        data = b""
        with self.assertRaises(OSError):  # EIO, at the end
            while True:
                data += os.read(master, 65536)
        process.wait()
        return data.decode()

    def test_errors_and_results(self):
        self.assertIn(COLOURS["red"] + "error:" + UNCOLOURED, self.written("--no-such-option"))
        self.assertIn(COLOURS["red"] + "error:" + UNCOLOURED, self.written("list", "--no-elevate", "/no/such"))
        text = self.written("doctor", "--no-elevate")
        self.assertIn("\n  " + COLOURS["green"] + "ok" + UNCOLOURED + "  ", text)

    def test_none_where_it_is_not_wanted(self):
        for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": ""}):
            for arguments in (("--no-such-option",), ("doctor", "--no-elevate")):
                self.assertNotIn("\x1b", self.written(*arguments, env=env))
        self.assertIn("\x1b", self.written("doctor", "--no-elevate", env={"NO_COLOR": ""}))
        through_sudo = [support.PYTHON, "-X", "no_color"] + support.PROGRAM_ARGV[1:]
        self.assertNotIn("\x1b", self.written("doctor", "--no-elevate", program=through_sudo))

    def test_none_in_json_nor_in_files(self):
        self.assertNotIn("\x1b[3", self.written("doctor", "--json", "--no-elevate").partition("error:")[0][:-5])
        read_end, write_end = os.pipe()
        self.addCleanup(os.close, read_end)
        self.written("doctor", "--no-elevate", stdout=write_end)
        os.close(write_end)
        self.assertNotIn(b"\x1b", os.read(read_end, 1 << 20))


if __name__ == "__main__":
    unittest.main()
