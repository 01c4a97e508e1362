"""A terminal for the tests: the program runs on a pty, and a screen shows what a person would see.

The screen knows the few sequences that the program uses, and what a real terminal does with the rest
of its output: lines wrap and scroll. An unknown sequence is an error.
"""

import errno
import fcntl
import os
import pty
import re
import struct
import subprocess
import tempfile
import termios
import threading
import unicodedata

from support import HANGS, PROGRAM_ARGV, Running, scratch_folder

SEQUENCE = re.compile(r"\x1b(?:\[(\??)([0-9;]*)([A-Za-z]))")


class Screen:
    """What stands on a terminal of so many columns and lines."""

    def __init__(self, columns=80, lines=24):
        self.columns, self.lines = columns, lines
        self.rows = [""] * lines
        self.row = self.column = 0
        self.scrolled = []  # lines that have left the screen at its top
        self.erased = []  # what stood where the rest of the screen was erased
        self.wraps = True
        self.wrapped = 0  # how often a line was continued on the next
        self.dropped = 0  # characters beyond the right edge while it does not wrap
        self.cursor_shown = True
        self.other = None  # the main screen while the alternate one is shown
        self.was_alternate = False
        self.rest = ""

    @property
    def is_alternate(self):
        return self.other is not None

    def text(self):
        """The lines, without blanks at their ends and empty lines at the bottom."""
        return "\n".join(row.rstrip() for row in self.rows).rstrip("\n").split("\n")

    def everything(self):
        return [row.rstrip() for row in self.scrolled] + self.text()

    def resize(self, columns, lines):
        """Cut off, not wrapped anew."""
        self.columns, self.lines = columns, lines
        self.rows = [row[:columns] for row in self.rows[:lines]] + [""] * (lines - len(self.rows))
        self.row = min(self.row, lines - 1)

    def feed(self, text):
        text = self.rest + text
        at = 0
        while at < len(text):
            if text[at] == "\x1b":
                match = SEQUENCE.match(text, at)
                if match is None:
                    if len(text) - at > 20:
                        raise AssertionError("unknown sequence %r" % text[at:at + 20])
                    break
                self.control(*match.groups())
                at = match.end()
            else:
                self.put(text[at])
                at += 1
        self.rest = text[at:]

    def control(self, private, numbers, kind):
        number = int(numbers.split(";")[0] or 0) if numbers else 0
        if private:
            on = kind == "h"
            if number == 1049:
                self.switch(on)
            elif number == 25:
                self.cursor_shown = on
            elif number == 7:
                self.wraps = on
            else:
                raise AssertionError("unknown mode %d" % number)
        elif kind == "A":
            self.row = max(0, self.row - max(1, number))
        elif kind == "H":
            self.row, self.column = (min(max(1, int(part or 1)), most) - 1 for part, most in zip(
                (numbers + ";").split(";"), (self.lines, self.columns)))
        elif kind == "J":
            first = 0 if number == 2 else self.row + 1
            if number == 0:
                self.erased += self.rows[self.row:]
                self.rows[self.row] = self.rows[self.row][:self.column]
            self.rows[first:] = [""] * (self.lines - first)
        elif kind != "m":
            raise AssertionError("unknown sequence %s%s" % (numbers, kind))

    def switch(self, on):
        if on:
            self.was_alternate = True
            self.other = (self.rows, self.row, self.column)
            self.rows, self.row, self.column = [""] * self.lines, 0, 0
        elif self.other is not None:
            self.rows, self.row, self.column = self.other
            self.other = None
            self.resize(self.columns, self.lines)

    def put(self, char):
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self.row += 1
            if self.row == self.lines:
                self.row -= 1
                self.scrolled.append(self.rows.pop(0))
                self.rows.append("")
        elif char >= " ":
            width = 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
            if self.column + width > self.columns:
                if not self.wraps:
                    self.dropped += 1
                    return
                self.wrapped += 1
                self.put("\r")
                self.put("\n")
            row = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = row[:self.column] + char + "\0" * (width - 1) + row[self.column + width:]
            self.column += width


class OnTerminal(Running):
    """The program at work on a terminal of its own, whose `screen` follows what it writes there.

    Its stdout is a file, unless results are to be seen as well; a mark in the environment finds its processes.
    """

    def __init__(self, *arguments, columns=80, lines=24, env=None, results=False, wrapper=(), program=PROGRAM_ARGV):
        self.screen = Screen(columns, lines)
        mark = "BTRFS_BACKUP_NG_TEST_RUN=%d-t%d" % (os.getpid(), next(self.numbers))
        self.mark = mark.encode()
        name, _, value = mark.partition("=")
        self.stdout, self.stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.before = set(os.listdir("/proc"))
        self.master, slave = pty.openpty()
        self.set_size(columns, lines)
        self.settings = termios.tcgetattr(self.master)

        def take_terminal():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [os.fsencode(word) for word in list(wrapper) + list(program) + list(arguments)], stdin=slave,
            stdout=slave if results else self.stdout, stderr=slave, cwd=scratch_folder(), start_new_session=True,
            preexec_fn=take_terminal,
            env=dict(os.environ, **dict({"TERM": "xterm", "LC_ALL": "C.UTF-8", name: value}, **(env or {}))))
        os.close(slave)
        self.pid = self.process.pid
        self.mutex, self.failure = threading.Lock(), None
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        """Follows the output to its end."""
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EBADF):
                    raise
                data = b""
            if not data:
                return
            with self.mutex:
                try:
                    self.screen.feed(data.decode("utf-8", "replace"))
                except AssertionError as failure:
                    self.failure = failure

    def set_size(self, columns, lines):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns, lines):
        with self.mutex:
            self.screen.resize(columns, lines)
        self.set_size(columns, lines)

    def shown(self):
        """The screen's lines as they stand."""
        with self.mutex:
            if self.failure:
                raise self.failure
            return self.screen.text()

    def wait_to_show(self, *words, timeout=HANGS):
        """The screen once all the words are on it."""
        def has_them():
            lines = self.shown()
            return lines if all(any(word in line for line in lines) for word in words) else None
        return self.wait_for(" and ".join(words) + " on the screen", has_them, timeout)

    def type(self, data):
        os.write(self.master, data)

    def hang_up(self):
        """Closes the terminal, as closing its window does."""
        os.close(self.master)
        self.master = -1

    def finish(self, timeout=HANGS):
        result = Running.finish(self, timeout)
        if self.master >= 0:
            self.reader.join(5)
        return result._replace(stderr="\n".join(self.screen.everything()))

    def close(self):
        Running.close(self)
        if self.master >= 0:
            os.close(self.master)
        self.reader.join(5)
