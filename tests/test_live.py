"""What a person sees: progress lines, the live view, and the terminal as it was before."""

import os
import random
import signal
import sys
import termios
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support
from remote import wait_until
from support import names
from terminal import OnTerminal, Screen, go_on
from test_tasks import TasksTestCase

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

    def test_what_gives_way_where_room_is_short(self):
        facts = {"label": "laptop-20260201-093000 to /mnt/backup/home", "to": "/mnt/backup/home", "done": 243 << 20,
                 "expected": 300 << 20, "rate": 62 << 20}
        for width, line in (
                (100, "laptop-20260201-093000 to /mnt/backup/home  81%  243.0 MiB of 300.0 MiB  62.0 MiB/s  1 s left"),
                (81, "laptop-20260201-093000 to /mnt/backup/home  81%  243.0 MiB  62.0 MiB/s  1 s left"),
                (77, "…op-20260201-093000 to /mnt/backup/home  81%  243.0 MiB  62.0 MiB/s  1 s left"),
                (60, "…1-093000 to …kup/home  81%  243.0 MiB  62.0 MiB/s  1 s left")):
            self.assertEqual(line, format_progress(facts, width))
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
        typed = " " * 8 + "again: btrfs-backup-ng /home /mnt/backup"
        self.assertEqual([typed], fold(typed, 20))


class LiveTestCase(TasksTestCase):

    mib = 48

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
                self.assertEqual(4, sum("done: 1 backup sent" in line for line in left), result.stderr)
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
                self.assertEqual(4, result.stderr.count("done: 1 backup sent"), result.stderr)
                self.assertNotIn("─", result.stderr)

    def test_a_failure_stays_to_be_read(self):
        tasks = self.tasks()
        tasks[1][-1] = os.path.join(self.sources[1], "inside")
        running = self.on_terminal(*self.command("-l", tasks=tasks), columns=200)
        result = running.finish()
        self.assertEqual(1, result.status)
        self.assertIn("error: 1 of 4 tasks was not done as asked", result.stderr)
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
        go_on(held)
        os.kill(running.pid, signal.SIGKILL)
        running.process.wait()
        self.wait_until_gone(running)
        wait_until(lambda: not running.screen.is_alternate and running.screen.cursor_shown)
        self.assertSane(running)

    @staticmethod
    def is_stopped(pid):
        with open("/proc/%d/stat" % pid, "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] == b"T"

    def test_the_terminal_is_given_back_on_ctrl_z(self):
        running = self.live(env=support.gate("receive"))
        held = running.met_at_gate("receive", 4)
        running.wait_to_show("4 at work")
        os.kill(running.pid, signal.SIGTSTP)
        running.wait_for("the main screen", lambda: not running.screen.is_alternate)
        self.assertTrue(running.screen.cursor_shown)
        running.wait_for("a stopped process", lambda: self.is_stopped(running.pid))
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
