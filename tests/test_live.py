"""What a person sees: progress lines, the live view, and the terminal as it was before."""

import os
import random
import re
import shutil
import signal
import sys
import termios
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import remote
import support
from remote import SshdTestCase
from support import TasksTestCase, go_on, is_stopped, names, wait_until
from terminal import OnTerminal, Screen

from btrfs_backup_ng import Board, Event, clip, fold, format_progress, live_lines, progress_lines, shown_width

STRANGE = ("/home", "/mnt/backup/" + "long/" * 20,
           "/日本語/バックアップ", "/e\u0301", "/tab\there", "/\udcff\x1b[2J", "",
           "/a b")


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


class LaidOut(unittest.TestCase):
    """Pure: events in, lines out."""

    def board(self, tasks, seed=1):
        """A board on which so many tasks are in all kinds of states."""
        chance = random.Random(seed)
        titles = ["{}{}".format(chance.choice(STRANGE), number) for number in range(tasks)]
        board = Board(dict(zip(titles, titles)), clock=Clock())
        for title in titles:
            for _ in range(chance.randrange(6)):
                board.take(self.event(chance, title if tasks > 1 else titles[0]))
        return board

    def event(self, chance, task):
        facts = {"task": task}
        kind = chance.choice(["snapshot", "sending", "sent", "error", "done", "waiting", "task",
                              "progress", "progress"])
        if kind == "task":
            facts.update(state=chance.choice(["done", "failed", "waiting"]), ended=chance.random() < 0.5)
            return Event(kind, "state", "", facts)
        if kind == "progress":
            facts.update(snapshot="home-20260131-093000", destination=chance.choice(STRANGE),
                         done=chance.randrange(10 ** 13), expected=chance.choice([None, 0, 10 ** 12]),
                         rate=chance.choice([0.0, 1e-300, 1.0, 10.0 ** 11]))
            return Event(kind, "progress", "", facts)
        facts["snapshot"] = "home-20260131-093000"
        return Event(kind, "error" if kind == "error" else "info", chance.choice(STRANGE) + "\n  more", facts)

    def test_nothing_is_wider_or_higher_than_the_terminal(self):
        for seed in range(60):
            tasks = seed % 12 + 1
            for width, height in ((80, 24), (120, 40), (40, 8), (200, 60), (17, 5), (1, 1)):
                with self.subTest(seed=seed, width=width, height=height):
                    board = self.board(tasks, seed)
                    messages = ["{} {}".format(text, seed) for text in STRANGE[:4]]
                    frame = live_lines(board, messages, width, height)
                    self.assertEqual(height, len(frame))
                    block = progress_lines(board, width, height - 1)
                    self.assertLessEqual(len(block), max(0, height - 1))
                    for line in frame + block:
                        self.assertLessEqual(shown_width(line), width, line)
                        self.assertTrue(line.isprintable(), line)

    def test_every_task_is_shown_or_counted(self):
        for tasks in (1, 8, 30):
            for width, height in ((80, 24), (120, 40), (80, 10)):
                board = Board({"/s%d" % n: "/s%d" % n for n in range(tasks)})
                frame = live_lines(board, [], width, height)
                self.assertIn("{} task{}: {} starting".format(tasks, "" if tasks == 1 else "s", tasks), frame[0])
                shown = sum(line.startswith(" /s") for line in frame)
                counted = [line for line in frame if "more task" in line]
                self.assertEqual(tasks, shown + sum(int(line.split()[2]) for line in counted))

    def test_those_at_work_come_before_the_others(self):
        board = Board({"/s%d" % n: "/s%d" % n for n in range(30)})
        board.take(Event("progress", "progress", "", {"task": "/s29", "snapshot": "s", "destination": "/b", "done": 1,
                                                      "expected": 2, "rate": 1.0}))
        frame = live_lines(board, [], 80, 12)
        self.assertTrue(any(line.startswith(" /s29 ") for line in frame), frame)
        self.assertTrue(any("to /b" in line and "50%" in line for line in frame), frame)

    def test_each_destination_has_its_line(self):
        board = Board({"": "/home"})
        facts = {"snapshot": "home-1", "done": 5 << 20, "expected": 10 << 20, "rate": 1 << 20}
        for destination in ("/a", "/b"):
            board.take(Event("progress", "progress", "", dict(facts, destination=destination)))
        self.assertEqual(["home-1 to /a   50%  5.0 MiB of 10.0 MiB  1.0 MiB/s  5 s left",
                          "home-1 to /b   50%  5.0 MiB of 10.0 MiB  1.0 MiB/s  5 s left"], progress_lines(board, 80, 5))
        self.assertEqual(["… and 2 more transfers"], progress_lines(board, 80, 1))
        board.take(Event("progress", "progress", "", {"destination": "/a"}))
        self.assertEqual(1, len(progress_lines(board, 80, 5)))
        board.take(Event("progress", "progress", "", {}))
        self.assertEqual([], progress_lines(board, 80, 5))

    def test_where_others_are_at_work_it_says_which_destination_failed(self):
        board = Board({"": "/home"}, clock=Clock())
        facts = {"snapshot": "home-1", "done": 5 << 20, "expected": 10 << 20, "rate": 1 << 20}
        for destination in ("/away", "ssh://nas/" + "long/" * 20 + "home", "/away"):
            board.take(Event("error", "error", "no such destination", {
                "destination": "key", "endpoint": destination}))
        board.take(Event("error", "error", "the source's own", {}))
        board.take(Event("progress", "progress", "", dict(facts, destination="/b")))
        frame = live_lines(board, [], 60, 20)
        self.assertEqual(["    to /away  FAILED", "    to …" + ("long/" * 20 + "home")[-44:] + "  FAILED"],
                         [line for line in frame if "FAILED" in line])
        self.assertEqual(1, sum("50%" in line for line in frame), frame)
        board.take(Event("task", "state", "", {"state": "failed", "ended": True}))
        self.assertNotIn("FAILED", "".join(live_lines(board, [], 60, 20)))

    def test_what_gives_way_where_room_is_short(self):
        facts = {"label": "laptop-20260201-093000 to /mnt/backup/home", "to": "/mnt/backup/home", "done": 243 << 20,
                 "expected": 300 << 20, "rate": 62 << 20}
        for width, line in (
                (100, "laptop-20260201-093000 to /mnt/backup/home  81%  243.0 MiB of 300.0 MiB  62.0 MiB/s  1 s left"),
                (81, "laptop-20260201-093000 to /mnt/backup/home  81%  243.0 MiB  62.0 MiB/s  1 s left"),
                (77, "…op-20260201-093000 to /mnt/backup/home  81%  243.0 MiB  62.0 MiB/s  1 s left"),
                (60, "…1-093000 to …kup/home  81%  243.0 MiB  62.0 MiB/s  1 s left")):
            self.assertEqual(line, format_progress(facts, width))
        self.assertEqual("…1-093000 to …kup/home  3 of 28  81%  243.0 MiB  62.0 MiB/s  1 s left",
                         format_progress(dict(facts, position="3 of 28"), 69))
        self.assertEqual("/home to /mnt/backup/home   81%  243.0 MiB of 300.0 MiB  62.0 MiB/s  1 s left",
                         format_progress(facts, 100, "/home", 1))

    def test_clip(self):
        for text in STRANGE:
            for width in range(12):
                for from_left in (False, True):
                    self.assertLessEqual(shown_width(clip(text, width, from_left)), width)
        self.assertEqual("日…", clip("日本語", 4))
        self.assertEqual("…語", clip("日本語", 4, from_left=True))

    def test_fold(self):
        self.assertEqual(["one two", "    three", "    four"], fold("one two three four", 9))
        self.assertEqual(["    in", "        deep"], fold("    in deep", 8))
        self.assertEqual(["a", "    /long/path", "    b"], fold("a /long/path b", 6))
        self.assertEqual([""], fold("", 5))
        hint = "error: not here; name it: btrfs-backup-ng -f 'a; b' {} X; or not".format("x" * 40)
        self.assertEqual([hint], fold(hint, 120))
        self.assertEqual(["error: not here;", "    name it:", " " * 8 + hint[26:-8], "    or not"], fold(hint, 20))
        self.assertEqual(["error: a: btrfs", "    send failed"], fold("error: a: btrfs send failed", 16))
        self.assertEqual(["at", "    1.5 KiB/s", "    12", "    Bees"], fold("at 1.5 KiB/s 12 Bees", 5))
        typed = " " * 8 + "again: btrfs-backup-ng /home /mnt/backup"
        self.assertEqual([typed], fold(typed, 20))


class LiveTestCase(TasksTestCase):

    def on_terminal(self, *arguments, **options):
        running = OnTerminal(*arguments, **options)
        self.addCleanup(running.close)
        return running

    def assertSane(self, running):
        """The terminal is as it was."""
        screen = running.screen
        self.assertIsNone(running.failure)
        self.assertFalse(screen.is_alternate)
        self.assertTrue(screen.cursor_shown)
        self.assertTrue(screen.wraps)
        self.assertEqual(running.settings, termios.tcgetattr(running.master))


class Lines(LiveTestCase):

    def test_one_line_for_each_transfer_below_the_log(self):
        for columns, lines in ((80, 24), (120, 40)):
            with self.subTest(columns=columns):
                support.next_second()
                running = self.on_terminal(*self.command(tasks=self.tasks("-I")), columns=columns, lines=lines,
                                           env=support.gate("receive"))
                held = running.met_at_gate("receive", 4)
                running.wait_to_show(*["{} to ".format(source[-8:]) for source in self.sources])
                running.wait_for("four lines", lambda shown=running.shown: all(" MiB" in line for line in shown()[-4:]))
                go_on(held)
                result = running.finish()
                self.assertEqual(0, result.status)
                self.assertEqual(0, running.screen.wrapped)
                self.assertSane(running)
                left = result.stderr.split("\n")
                self.assertEqual(4, sum(bool(re.search("  ok +1 sent, ", line)) for line in left), result.stderr)
                self.assertFalse(any("left" in line or "%" in line for line in left), result.stderr)
                self.assertFalse(running.screen.was_alternate)

    def test_resized_meanwhile(self):
        running = self.on_terminal(*self.command(), columns=100, lines=30, env=support.gate("receive"))
        held = running.met_at_gate("receive", 4)
        running.wait_to_show(*["{} to ".format(source[-8:]) for source in self.sources])
        running.resize(60, 20)
        go_on(held)
        self.assertEqual(0, running.finish().status)
        self.assertEqual(0, running.screen.wrapped)

    def test_resized_before_it_is_shown(self):
        """What was laid out for a wider terminal is cut off at its edge: the lines stay as many as are erased."""
        running = self.on_terminal(*self.command(), columns=100, lines=30, env=support.gate("receive"))
        held = running.met_at_gate("receive", 4)
        running.screen.resize(30, 30)  # the terminal itself tells nobody
        running.wait_for("lines cut off", lambda: running.screen.dropped)
        go_on(held)
        self.assertEqual(0, running.finish().status)

    def test_no_display_where_it_is_not_wanted(self):
        for options, env in ((["-P"], {}), ([], {"TERM": "dumb"}), (["-q"], {})):
            support.next_second()
            running = self.on_terminal(*self.command(*options), env=dict(support.gate("receive"), **env))
            held = running.met_at_gate("receive", 4)
            self.assertEqual([], self.measuring(running))
            go_on(held)
            result = running.finish()
            self.assertEqual(0, result.status)
            self.assertNotIn("% ", result.stderr)

    @staticmethod
    def measuring(running):
        """What asks for a stream without its data, which is the measuring of a size for a display."""
        return [argv for argv in running.processes().values() if b"--no-data" in argv]

    def test_a_size_is_measured_for_a_display(self):
        """So that what the test above looks for is there."""
        running = self.on_terminal(*self.command(), env=support.gate("send"))
        running.wait_for("a measuring", lambda: self.measuring(running))
        go_on(running.processes())

    def test_in_a_locale_of_few_characters(self):
        env = dict(support.gate("receive"), LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0",
                   PYTHONIOENCODING="ascii:backslashreplace")
        running = self.on_terminal(*self.command(), env=env)
        held = running.met_at_gate("receive", 4)
        running.wait_to_show(" MiB")
        go_on(held)
        self.assertEqual(0, running.finish().status)
        self.assertEqual(0, running.screen.wrapped)


class View(LiveTestCase):

    def live(self, *options, **more):
        return self.on_terminal(*self.command("-l", *options), **more)

    def test_all_is_on_the_screen(self):
        for columns, lines in ((80, 24), (120, 40)):
            with self.subTest(columns=columns):
                support.next_second()
                tasks = self.tasks("-I")
                running = self.on_terminal(*self.command("-l", tasks=tasks), columns=columns, lines=lines,
                                           env=support.gate("receive"))
                held = running.met_at_gate("receive", 4)
                shown = running.wait_to_show("4 tasks: 4 at work", "took snapshot", " MiB")
                self.assertTrue(running.screen.is_alternate)
                self.assertFalse(running.screen.cursor_shown)
                self.assertIn("btrfs-backup-ng", shown[0])
                self.assertLessEqual(max(map(len, shown)), columns)
                self.assertEqual(2, sum(set(line) == {"─"} and len(line) == columns for line in shown))
                works = shown[2:shown.index("─" * columns, 2)]
                for source in self.sources:
                    self.assertEqual(1, sum(" sending " in line and source[-8:] in line for line in works), works)
                self.assertGreaterEqual(sum("░" in line for line in shown), 1)
                go_on(held)
                result = running.finish()
                self.assertEqual(0, result.status)
                self.assertSane(running)
                self.assertTrue(running.screen.was_alternate)
                self.assertEqual((0, 0), (running.screen.wrapped, running.screen.dropped))
                self.assertEqual(4, len(re.findall("  ok +1 sent, ", result.stderr)), result.stderr)
                self.assertNotIn("─", result.stderr)

    def test_a_failure_stays_to_be_read(self):
        tasks = self.tasks()
        tasks[1][-1] = os.path.join(self.disks[1].path, "away")
        running = self.on_terminal(*self.command("-l", tasks=tasks), columns=200)
        result = running.finish()
        self.assertEqual(1, result.status)
        self.assertIn("error: 1 of 4 tasks failed", result.stderr)
        self.assertIn("again: btrfs-backup-ng -S", result.stderr)
        self.assertSane(running)

    def test_one_task(self):
        running = self.on_terminal("-l", *self.tasks()[0], env=support.gate("receive"))
        held = running.met_at_gate("receive")
        running.wait_to_show("1 task: 1 at work", "to ")
        go_on(held)
        self.assertEqual(0, running.finish().status)
        self.assertSane(running)
        self.assertAllBackedUp(self.sources[0], self.targets[0])

    def test_resized_meanwhile(self):
        running = self.live(env=support.gate("receive"))
        held = running.met_at_gate("receive", 4)
        running.wait_to_show("4 at work")
        for columns, lines in ((120, 40), (60, 12), (100, 30)):
            running.resize(columns, lines)
            shown = running.wait_for("a new frame", lambda width=columns: [
                line for line in running.shown() if line == "─" * width])
            self.assertTrue(shown)
        go_on(held)
        self.assertEqual(0, running.finish().status)
        self.assertSane(running)

    def end(self, number, status):
        running = self.live(env=support.gate("receive"))
        held = running.met_at_gate("receive", 4)
        running.wait_to_show("4 at work")
        os.kill(running.pid, number)
        result = running.finish()
        self.assertEqual(status, result.status)
        self.assertSane(running)
        self.assertIn("interrupted by " + signal.Signals(number).name, result.stderr)
        self.assertGone(running, held)

    def test_the_terminal_is_given_back_on_ctrl_c(self):
        running = self.live(env=support.gate("receive"))
        held = running.met_at_gate("receive", 4)
        running.wait_to_show("4 at work")
        running.type(b"\x03")
        result = running.finish()
        self.assertEqual(130, result.status)
        self.assertSane(running)
        self.assertGone(running, held)
        for source in self.sources:
            self.assertEqual(1, len(support.read_locks(os.path.join(source, ".btrfs-backup-ng", "snapshots"))))

    def test_the_terminal_is_given_back_on_ctrl_backslash(self):
        running = self.live(env=support.gate("receive"))
        held = running.met_at_gate("receive", 4)
        running.wait_to_show("4 at work")
        running.type(b"\x1c")
        self.assertEqual(131, running.finish().status)
        self.assertSane(running)
        self.assertGone(running, held)

    def test_the_terminal_is_given_back_on_signals(self):
        for number, status in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            with self.subTest(number=number):
                support.next_second()
                self.end(number, status)

    def test_the_terminal_is_given_back_by_the_children_of_one_that_was_killed(self):
        running = self.live(env=support.gate("receive"))
        held = running.met_at_gate("receive", 4)
        running.wait_to_show("4 at work")
        os.kill(running.pid, signal.SIGKILL)
        running.process.wait()
        self.wait_until_gone(running, held)
        wait_until(lambda: not running.screen.is_alternate and running.screen.cursor_shown)
        self.assertSane(running)

    def test_the_terminal_is_given_back_on_ctrl_z(self):
        running = self.live(env=support.gate("receive"))
        held = running.met_at_gate("receive", 4)
        running.wait_to_show("4 at work")
        os.kill(running.pid, signal.SIGTSTP)
        running.wait_for("the main screen", lambda: not running.screen.is_alternate)
        self.assertTrue(running.screen.cursor_shown)
        running.wait_for("a stopped process", lambda: is_stopped(running.pid))
        os.kill(running.pid, signal.SIGCONT)
        running.wait_for("the live view", lambda: running.screen.is_alternate)
        running.wait_to_show("4 at work")
        go_on(held)
        self.assertEqual(0, running.finish().status)
        self.assertSane(running)

    def test_the_terminal_is_closed(self):
        for options in ((), ("-l",)):
            with self.subTest(options=options):
                support.next_second()
                running = self.on_terminal(*self.command(*options), env=support.gate("receive"))
                held = running.met_at_gate("receive", 4)
                running.hang_up()
                result = running.finish()
                self.assertEqual(129, result.status)
                self.assertGone(running, held)
                for source in self.sources:
                    self.assertNotEqual({}, support.read_locks(os.path.join(source, ".btrfs-backup-ng", "snapshots")))
        support.next_second()
        self.run_tasks()
        for source, target in zip(self.sources, self.targets):
            self.assertAllBackedUp(source, target)

    def test_without_a_terminal_one_line_says_so(self):
        result = self.run_tasks("-l")
        self.assertEqual(1, result.stderr.count("no live view"))
        self.assertNotIn("\x1b", result.stderr)
        self.assertEqual(4, sum(len(names(target)) for target in self.targets))
        support.next_second()
        running = self.live(columns=30, lines=6)
        result = running.finish()
        self.assertEqual(0, result.status)
        self.assertFalse(running.screen.was_alternate)
        self.assertIn("no live view", result.stderr.replace("\n    ", " "))


class Asked(SshdTestCase, LiveTestCase):
    """While a person is asked for a secret nothing is written over the question."""

    count = 2

    def setUp(self):
        super().setUp()
        there = os.path.join(support.scratch_folder(), "there")
        self.server = self.sshd({self.disks[3].path: there})
        locked = os.path.join(self.server.folder, "locked")
        shutil.copy(remote.key("client"), locked)
        support.command("ssh-keygen", "-q", "-p", "-N", "a secret", "-f", locked)
        place = self.server.endpoint(os.path.join(there, os.path.basename(self.targets[1])))
        for options in (remote.ssh_options(), ["IdentityFile=" + locked] + remote.ssh_options()[1:]):
            self.job = self.tasks()
            self.job[1][:0] = remote.as_program_options(options)
            self.job[1][-1] = place
            if options == remote.ssh_options():  # so that the place is known, and snapshots are taken without it
                self.run_tasks(tasks=self.job)
        self.forget_log()
        support.next_second()

    def ask(self, *options):
        running = self.on_terminal(*self.command(*options, tasks=self.job), env=support.gate("receive"))
        held = running.met_at_gate("receive")
        running.wait_for("a line for the question", lambda: [
            line for line in running.shown() if line.startswith("Enter passphrase")], 30)
        before = running.shown()
        go_on(held)  # from here on there is something to tell
        running.wait_for("the other task", lambda: self.events("done"))
        time.sleep(0.5)  # a view is drawn each 0.1 s
        self.assertEqual(before, running.shown())
        running.type(b"a secret\n")
        result = running.finish()
        self.assertEqual(0, result.status, result.stderr)
        self.assertSane(running)
        for source, target in zip(self.sources, self.targets):
            self.assertAllBackedUp(source, target)
        return result

    def test_below_lines(self):
        self.assertIn("took snapshot", self.ask().stderr)

    def test_in_the_view(self):
        self.ask("-l")


class TheScreen(unittest.TestCase):
    """A screen that shows anything would let everything pass."""

    def test_it_wraps_and_scrolls(self):
        screen = Screen(10, 3)
        screen.feed("0123456789ab\r\nc\r\nd")
        self.assertEqual(["ab", "c", "d"], screen.text())
        self.assertEqual(["0123456789"], screen.scrolled)
        self.assertEqual(1, screen.wrapped)

    def test_it_erases(self):
        screen = Screen(10, 3)
        screen.feed("one\r\ntwo\r\nthree\x1b[1A\r\x1b[J")
        self.assertEqual(["one"], screen.text())

    def test_it_changes_screens(self):
        screen = Screen(10, 3)
        screen.feed("one\x1b[?1049h\x1b[?25l\x1b[H")
        screen.feed("other\x1b")
        self.assertEqual(["other"], screen.text())
        screen.feed("[?1049l")
        self.assertEqual(["one"], screen.text())
        self.assertFalse(screen.cursor_shown)

    def test_it_knows_what_it_does_not_know(self):
        with self.assertRaises(AssertionError):
            Screen().feed("\x1b]0;a title that is longer than it may be\x07")


if __name__ == "__main__":
    unittest.main()
