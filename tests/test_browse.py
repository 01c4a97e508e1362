"""`browse`: what keys make of what is shown, on terminals of all sizes, and what is found and restored there."""

import fcntl
import functools
import os
import re
import signal
import struct
import sys
import termios
import unicodedata
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import remote
import support
from fakes import in_own_mounts
from running import is_stopped
from support import BackupTestCase, chance, delete
from terminal import OnTerminal

import btrfs_backup_ng as program
from btrfs_backup_ng import (
    ANY_TIME,
    BROWSE_KEYS,
    NOW,
    Browser,
    Entry,
    FileStart,
    Followed,
    HeldAt,
    Line,
    Location,
    Row,
    Sighting,
    Spot,
    Subvolume,
    browser_lines,
    compared_lines,
    folder_page,
    lines_of_data,
    moment_of,
    moments_page,
    places_page,
    press,
    press_line,
    shown_in,
    shown_width,
    split_keys,
)

FILE, FOLDER = "file", "folder"
HOSTILE = ["a\nb", "\x1b[2Jx", "\x9b5n", "\udcff\udcfe", "x" * 4000, "漢字" * 200, "e\u0301" * 90, "\u202egnp.exe",
           "\t", " ", "-rf", "\x07\x08\x7f", "\U0001f600" * 60]


def row(name, *places):
    entries = {place: Entry(Subvolume(name, "id-" + name, received_uuid="id-" + name), "/p%d/%s" % (place, name),
                            "complete", 1.7e9) for place in places}
    return Row(name, 1.7e9, entries)


def line_of(*rows, live="/home", pending=()):
    places = sorted({place for one in rows for place in one.cells})
    locations = tuple(Location("/p%d" % place, bool(live) and place == 0, tuple(
        one.cells[place] for one in rows if place in one.cells)) for place in places)
    return Line("/home", Followed("/home", "", bool(live)), locations, tuple(rows), live, pending)


def held(name, moment="id-b", kind=FILE, inner=""):
    return HeldAt(name, moment, Sighting("t", os.path.join(inner, name), kind, 0o644, 0, 0, 12, 10 ** 18))


def shown(text, encoding="utf-8"):
    return shown_in(encoding, text)


class Keys(unittest.TestCase):

    def keys(self, data, is_all=True):
        return split_keys(data, is_all)

    def test_what_terminals_send(self):
        for data, keys in ((b"\x1b[A", ["up"]), (b"\x1bOB", ["down"]), (b"\x1b[1;5C", ["right"]),
                           (b"\x1b[5~", ["pageup"]), (b"\x1b[1~\x1b[4~", ["home", "end"]),
                           (b"\x1b[[A", ["up"]), (b"\x1b[H", ["home"]),
                           (b"\r\n\x7f\x08 \x15", ["enter", "enter", "backspace", "backspace", "space", "clear"]),
                           (b"\x1b", ["esc"]), (b"\x1bq", ["esc", "q"]), (b"\x1b[99~x", ["x"]),
                           (b"a\xc3\xa9", ["a", "é"]),
                           (b"\xff", ["\udcff"]), (b"\xe2\x82", ["\udce2", "\udc82"]), (b"\x00\x01", []),
                           (b"\x1b[200~", [])):
            with self.subTest(data):
                self.assertEqual((keys, b""), self.keys(data))

    def test_they_come_in_pieces(self):
        data = "é\x1b[A\x1bOB\x1b[1;5C\x1b[6~x€".encode()
        whole = self.keys(data)[0]
        self.assertEqual(["é", "up", "down", "right", "pagedown", "x", "€"], whole)
        for cut in range(len(data)):
            keys, rest = self.keys(data[:cut], False)
            more, left = self.keys(rest + data[cut:], False)
            self.assertEqual((whole, b""), (keys + more, left), cut)

    def test_every_action_of_the_table_is_done_and_told(self):
        self.assertEqual({key.action for key in BROWSE_KEYS}, set(program.DOES))
        keys = [key for one in BROWSE_KEYS for key in one.keys]
        self.assertEqual(len(keys), len(set(keys)))
        about = program.VERBS["browse"].about
        for key in BROWSE_KEYS:
            self.assertIn(key.help, about)
            self.assertIn(key.help, "\n".join(item.name for item in program.help_page().items))


class Pages(unittest.TestCase):

    def setUp(self):
        self.lines = (line_of(row("b", 0, 1), row("a", 1), pending=("ssh://nas/b",)),)
        self.browser = Browser(self.lines, (places_page(self.lines),), folder="/cwd")

    def press(self, *keys, browser=None):
        browser = browser or self.browser
        for key in keys:
            browser = press(browser, key)
        return browser

    def in_folder(self, *found, moment=ANY_TIME, inner=""):
        return self.browser.onto(folder_page(self.lines, Spot(0, moment, inner), found))

    def test_the_way_in(self):
        at_times = self.press("enter")
        self.assertEqual([ANY_TIME, "now", "b", "a", "(more)"], [item.name for item in at_times.page.items])
        for keys, wish in ((["enter"], ("folder", (Spot(0, ANY_TIME),))), (["down", "l"], ("folder", (Spot(0, NOW),))),
                           (["down", "down", "right"], ("folder", (Spot(0, "id-b"),))),
                           (["end", "enter"], ("connect", (Spot(0, ANY_TIME),)))):
            self.assertEqual(wish, self.press(*keys, browser=at_times).wish[:2])

    def test_what_is_gone(self):
        browser = self.in_folder(held("x", NOW), held("y", "id-b"), held("z", NOW, FOLDER))
        self.assertEqual([("z", False), ("x", False), ("y", True)],
                         [(item.name, item.is_gone) for item in browser.page.items])
        only = self.press("g", browser=browser)
        self.assertEqual(["y"], [item.name for item in only.page.items])
        self.assertEqual(3, len(self.press("g", browser=only).page.items))

    def test_opening(self):
        browser = self.in_folder(held("f", "id-a"), held("d", NOW, FOLDER), held("l", NOW, "symbolic link"))
        self.assertEqual(("folder", (Spot(0, ANY_TIME, "d"),)), self.press("enter", browser=browser).wish[:2])
        self.assertEqual(("text", (Spot(0, "id-a", "f"),)), self.press("down", "enter", browser=browser).wish[:2])
        link = self.press("end", "enter", browser=browser)
        self.assertIsNone(link.wish)
        self.assertIn("not followed", link.message)

    def test_marks_stay_across_times_and_what_is_now_cannot_be_marked(self):
        browser = self.press("m", "m", browser=self.in_folder(held("f", "id-b"), held("g", NOW)))
        self.assertEqual((Spot(0, "id-b", "f"),), browser.marks)
        self.assertIn("versions", browser.message)
        other = browser.onto(folder_page(self.lines, Spot(0, "id-a"), [held("f", "id-a")]))
        self.assertEqual((Spot(0, "id-b", "f"), Spot(0, "id-a", "f")), self.press("space", browser=other).marks)
        self.assertEqual((), self.press("home", "m", browser=browser).marks)

    def test_nothing_is_restored_without_a_question(self):
        browser = self.in_folder(held("f", "id-b"), inner="d")
        asked = self.press("r", browser=browser)
        self.assertEqual(("where", "/home/d"), (asked.question.kind, asked.question.text))
        self.assertIsNone(asked.wish)
        typed = self.press("clear", "/", "x", "space", "q", "backspace", browser=asked)
        self.assertEqual("/x ", typed.question.text)
        self.assertEqual(("where", (Spot(0, "id-b", "d/f"),), "/x "), self.press("enter", browser=typed).wish[:3])
        self.assertIsNone(self.press("esc", browser=typed).question)
        sure = browser._replace(question=program.Question("sure", "do it?", "/x", False, (Spot(0, "id-b", "d/f"),)))
        for key in ("n", "enter", "esc", "q", "space", "r"):
            after = self.press(key, browser=sure)
            self.assertEqual((None, None), (after.question, after.wish), key)
        self.assertEqual(("restore", (Spot(0, "id-b", "d/f"),), "/x"), self.press("y", browser=sure).wish[:3])

    def test_no_keys_whatever_wish_to_restore_but_y_to_a_question(self):
        choices, keys = chance(self), [key for one in BROWSE_KEYS for key in one.keys] + ["Y", "x", "clear", "\udcff"]
        for _ in range(200):
            browser = self.in_folder(held("f", "id-b"), held("d", NOW, FOLDER))
            for _ in range(30):
                before, key = browser, choices.choice(keys)
                browser = press(browser, key)
                if browser.wish is not None:
                    self.assertNotEqual("restore", browser.wish.kind)
                    browser = browser._replace(wish=None)
                self.assertTrue(browser.pages, (before, key))

    def test_where_it_goes_as_a_rule(self):
        browser = self.in_folder(held("f", "id-b"))
        marks = (Spot(0, "id-a", "d/f"), Spot(0, "id-b", "d/g"))
        for spots, folder in ((marks[:1], "/home/d"), (marks, "/home/d"), (marks + (Spot(0, "id-a", "e/h"),), "/cwd")):
            self.assertEqual(folder, self.press("r", browser=browser._replace(marks=spots)).question.text)
        gone = Browser((line_of(row("a", 1), live=""),), (), (Spot(0, "id-a", "d/f"),), folder="/cwd")
        self.assertEqual("/cwd", program.usual_target(gone, gone.marks))

    def test_through_time(self):
        browser = self.in_folder(held("f", "id-b"), held("g", "id-b"), moment="id-b")
        older = self.press("down", "[", browser=browser).wish
        self.assertEqual(("folder", (Spot(0, "id-a"),), "instead", "g"), tuple(older))
        self.assertEqual((Spot(0, NOW),), self.press("]", browser=browser).wish.spots)
        last = self.in_folder(held("f", "id-a"), moment="id-a")
        self.assertIn("no older", self.press("[", browser=last).message)

    def test_lines_that_are_typed(self):
        browser = self.in_folder(held("f", "id-b"), held("g", "id-a"))
        self.assertEqual((Spot(0, "id-a", "g"),), press_line(browser, "2 m").marks)
        self.assertEqual("text", press_line(browser, "1").wish.kind)
        self.assertIn("no line 7", press_line(browser, "7").message)
        asked = press_line(browser, "1 r")
        self.assertEqual("/home", press_line(asked, "").wish.text)
        self.assertEqual("/some where", press_line(asked, "/some where").wish.text)
        sure = browser._replace(question=program.Question("sure", "do it?", "/x", False, (Spot(0, "id-b", "d/f"),)))
        self.assertEqual("restore", press_line(sure, "y").wish.kind)
        self.assertIsNone(press_line(sure, "").wish)

    def test_exactly_as_large_as_the_terminal_whatever_the_names(self):
        found = [held(name, moment) for name in HOSTILE for moment in ("id-a",)] + [held("d", NOW, FOLDER)]
        pages = [self.browser.page, moments_page(self.lines, 0), folder_page(self.lines, Spot(0, ANY_TIME), found),
                 program.help_page(), program.text_page("a\nb\x1b", HOSTILE), program.text_page("none", []),
                 folder_page(self.lines, Spot(0, NOW), [])]
        questions = [None, program.Question("where", "restore \x1b to: ", "/" + "x" * 300),
                     program.Question("sure", "one\ntwo " + "word " * 90, "", False)]
        for width, height in ((80, 24), (120, 40), (20, 5), (1, 1), (3, 2), (40, 8)):
            for page in pages:
                for cursor, question, message in ((0, None, ""), (5, None, "m\x1b " * 99)) + tuple(
                        (0, question, "") for question in questions):
                    browser = Browser(self.lines, (page.at_line(cursor),), message=message, question=question)
                    for encoding in ("utf-8", "ascii", "latin-1"):
                        lines = browser_lines(browser, functools.partial(shown_in, encoding), width, height)
                        self.assertEqual(height, len(lines))
                        for line in lines:
                            self.check_line(line.text, width)

    def check_line(self, text, width):
        self.assertLessEqual(shown_width(text), width, text)
        self.assertFalse([c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Cf", "Zl", "Zp")], repr(text))

    def test_the_cursor_is_always_seen(self):
        found = [held("f%03d" % number, "id-b") for number in range(100)]
        browser, choices = self.in_folder(*found), chance(self)
        for _ in range(200):
            browser = press(browser, choices.choice(["up", "down", "pageup", "pagedown", "end", "home"]))
            lines = browser_lines(browser, shown, 40, choices.choice((5, 9, 24)))
            self.assertEqual(1, sum(line.text.startswith(">") and line.is_bright for line in lines))


class Texts(unittest.TestCase):

    def test_what_is_in_a_file(self):
        self.assertEqual(["a", "", "b       c"], lines_of_data(b"a\r\n\nb\tc\n"))
        self.assertEqual(["\udcff"], lines_of_data(b"\xff"))
        self.assertEqual([], lines_of_data(b""))
        self.assertEqual("000000  00 61 1b                                         .a.", lines_of_data(b"\0a\x1b")[0])

    def test_what_differs(self):
        def compared(one, other):
            return compared_lines(FileStart(one, len(one)), FileStart(other, len(other)), ("old", "new"))

        self.assertEqual(["their contents are equal"], compared(b"x", b"x"))
        self.assertEqual(["--- old", "+++ new", "@@ -1,2 +1,2 @@", " a", "-b", "+c"], compared(b"a\nb\n", b"a\nc\n"))
        self.assertEqual(["their contents differ: 2 B and 1 B"], compared(b"\0a", b"b"))
        self.assertIn("only the first", compared_lines(FileStart(b"x", 9), FileStart(b"x", 9), ("", ""))[1])


class BrowseTestCase(BackupTestCase):

    def browse(self, *arguments, **more):
        running = OnTerminal("browse", *arguments, **more)
        self.addCleanup(running.close)
        return running

    def leave(self, running, status=0):
        running.type(b"q")
        result = running.finish()
        self.assertEqual(status, result.status, result.stderr)
        self.check_given_back(running)
        return result

    def check_given_back(self, running):
        self.assertFalse(running.screen.is_alternate)
        self.assertTrue(running.screen.cursor_shown and running.screen.wraps)
        self.assertEqual(running.settings, termios.tcgetattr(running.master))
        self.assertEqual(0, running.screen.dropped)

    @staticmethod
    def wait_for_words(running, words):
        """Waits until words are said, which may go on in the next line."""
        running.wait_for(words, lambda: words in " ".join(" ".join(running.shown()).split()))

    @staticmethod
    def cursor_on(running, name):
        return running.wait_for("the cursor on " + name, lambda: any(
            re.match(">[ *]" + re.escape(name), text) for text in running.shown()))

    def keys_to(self, running, name, most=40):
        """Moves the cursor down to a line; how many keys that takes."""
        count = 0
        while not any(re.match(">[ *]" + re.escape(name), text) for text in running.shown()):
            count += 1
            self.assertLess(count, most, "no line " + name)
            before = running.shown()
            running.type(b"\x1b[B")
            running.wait_for("another line", lambda before=before: running.shown() != before)
        return count


ONLY = """
mount --make-rprivate /  # what others mount from now on does not come here
awk '$3 == "btrfs" { print $2 }' /proc/self/mounts | grep -v -x -F -e "$1" -e "$2" | xargs -r -n 1 umount -l
shift 2
exec "$@"
"""


class OnDisk(BrowseTestCase):

    def only_these_disks(self):
        return in_own_mounts(ONLY) + [self.source_disk.path, self.target_disk.path]

    def prepare(self):
        os.mkdir(os.path.join(self.source, "letters"))
        for name in ("aunt", "bank", "plan.txt"):
            self.write("letters/" + name, name + "\n")
        self.take(1)
        self.write("letters/plan.txt", "the last plan\n")
        self.take(2)
        self.lost = os.path.join(self.source, "letters", "plan.txt")
        os.unlink(self.lost)
        self.take(3)
        self.transfer()

    def check_restored(self, content="the last plan\n"):
        with open(self.lost) as file:
            self.assertEqual(content, file.read())
        os.unlink(self.lost)

    def test_a_deleted_file_is_found_and_restored_in_at_most_twelve_keys(self):
        for columns, lines in ((80, 24), (120, 40)):
            with self.subTest(columns=columns):
                self.setUp()
                self.prepare()
                running = self.browse(columns=columns, lines=lines, wrapper=self.only_these_disks())
                self.cursor_on(running, "any time")
                keys = 1
                running.type(b"\r")
                self.cursor_on(running, "letters/")
                running.type(b"\r")
                running.wait_to_show("plan.txt", "gone")
                keys += 1 + self.keys_to(running, "plan.txt")
                running.type(b"r")
                running.wait_to_show("restore plan.txt to folder: ")
                running.type(b"\r")
                running.wait_to_show("y or n")
                running.type(b"y")
                running.wait_to_show("restored 1 path to")
                keys += 3
                self.assertLessEqual(keys, 12)
                self.check_restored()
                self.assertFalse([line for line in running.shown() if line.endswith(" gone")][:-1])
                self.assertIn("restored " + self.lost, self.leave(running).stderr.replace("\n    ", " "))

    def test_what_is_there_stays_beside_what_is_restored(self):
        self.prepare()
        self.write("letters/plan.txt", "another")
        running = self.browse(os.path.join(self.source, "letters"))
        running.wait_to_show("plan.txt")
        running.type(b"\x1b[F")
        self.cursor_on(running, "plan.txt")
        running.type(b"v")
        running.wait_to_show("versions of letters/plan.txt", "not there")
        self.keys_to(running, "2", 5)
        running.type(b"\x1b[F mr")
        running.wait_to_show("restore plan.txt to folder: ")
        running.type(b"\r")
        self.wait_for_words(running, "is there and stays as NAME.before-TIME. y or n")
        running.type(b"n")
        running.wait_to_show("nothing was done")
        running.type(b"r\r")
        running.wait_to_show("y or n")
        running.type(b"y")
        running.wait_to_show("restored 1 path")
        self.check_restored("plan.txt\n")
        folder = os.path.dirname(self.lost)
        kept, = (name for name in os.listdir(folder) if ".before-" in name)
        os.rename(os.path.join(folder, kept), self.lost)
        self.check_restored("another")
        self.leave(running)

    def test_what_comes_after_the_question_is_not_put_aside(self):
        self.prepare()
        running = self.browse(os.path.join(self.source, "letters"))
        running.wait_to_show("plan.txt")
        running.type(b"\x1b[F")
        self.cursor_on(running, "plan.txt")
        running.type(b"r\r")
        running.wait_to_show("y or n")
        self.write("letters/plan.txt", "quick")
        running.type(b"y")
        self.wait_for_words(running, "nothing was restored; error: plan.txt exists in")
        self.check_restored("quick")
        self.leave(running, status=1)

    def test_texts_and_what_differs(self):
        self.prepare()
        self.write("letters/bank", "bank\nmoney\n")
        running = self.browse(self.source)
        self.cursor_on(running, "any time")
        running.type(b"\x1b[B\x1b[B\r")
        self.cursor_on(running, "letters/")
        running.type(b"\r")
        running.wait_to_show(self.name(3), "bank")
        running.type(b"jd")
        running.wait_to_show("+money")
        running.type(b"hl")
        running.wait_to_show("letters/bank of " + self.name(3))
        running.type(b"h[")
        running.wait_to_show(self.name(2), "plan.txt")
        running.type(b"\x1b[FD")
        running.wait_to_show("+the last plan", "-plan.txt")
        self.leave(running)

    def test_names_of_others_cannot_touch_the_terminal(self):
        self.prepare()
        for name in HOSTILE:
            if len(os.fsencode(name)) <= 255:
                with open(os.path.join(os.fsencode(self.source), b"letters", os.fsencode(name)), "wb") as file:
                    file.write(b"\x1b[?1049l\x1b]0;x\x07\xff" * 20)
        self.take(4)
        running = self.browse(os.path.join(self.source, "letters"), lines=50)
        running.wait_to_show(r"a\nb", r"\x1b[2Jx", r"\xff\xfe", r"\u202egnp.exe")
        running.type(b"\r")
        running.wait_to_show(r"\x1b[?1049l\x1b]0;x\x07\xff")
        running.type(b"h")
        running.wait_to_show("plan.txt")
        self.leave(running)

    def test_a_name_is_found_in_all_snapshots(self):
        self.prepare()
        os.makedirs(os.path.join(self.source, "deep/er/Plans"))
        self.write("deep/er/Plans/other", "x")
        self.take(4)
        os.rename(os.path.join(self.source, "deep/er"), os.path.join(self.source, "deep/away"))
        self.take(5)
        self.transfer()
        for name in (1, 2, 3):
            delete(self.snapshot_path(self.name(name)))
        running = self.browse(self.source)
        self.cursor_on(running, "any time")
        running.type(b"/PLAN\r")
        running.wait_to_show("named like PLAN", "letters/plan.txt", "deep/er/Plans/", "deep/away/Plans/")
        gone = [text.endswith(" gone") for text in running.shown()[1:4]]
        self.assertEqual([True, True, False], gone, running.shown())
        self.keys_to(running, "letters/plan.txt")
        running.type(b"r\r")
        running.wait_to_show("y or n")
        running.type(b"y")
        running.wait_to_show("restored 1 path")
        self.check_restored()
        running.type(b"/nowhere\r")
        running.wait_to_show("has a name like that")
        self.leave(running)

    def test_names_of_random_histories(self):
        """Against a walk of all trees."""
        churn = support.Churn(self.source, seed=chance(self).randrange(1 << 30))
        churn.fill(60)
        os.mkdir(os.path.join(self.source, "many"))
        for number in range(1500):  # so that most leaves of the trees are those of the trees before
            self.write("many/" + str(number).translate({ord("1"): "x"}) + "1" * (number % 100 == 0), "")
        for day in range(1, 7):
            churn.change(20)
            self.take(day)
        self.transfer()
        for folder in (self.snapshots, self.target):
            names = [self.name(day) for day in range(6, 0, -1)]
            expected = {}
            for name in names:
                top = os.path.join(folder, name)
                for at, folders, files in os.walk(top):
                    folders[:] = [one for one in folders if one != ".btrfs-backup-ng"]  # where its snapshots stood
                    for one in folders + files:
                        if "1" in one:
                            expected.setdefault(os.path.relpath(os.path.join(at, one), top), name)
            found = program.find_names(folder, names, "1")
            self.assertEqual(expected, {one.sighting.inner: one.sighting.name for one in found}, len(found))
            self.assertEqual(sorted(expected, key=os.fsencode), [one.sighting.inner for one in found])

    def test_nothing_but_the_tree_itself_is_looked_into(self):
        """A subvolume in the source, and what is mounted over a folder of a snapshot."""
        os.mkdir(os.path.join(self.source, "m"))
        name, = self.take(1)
        nested, point = support.create(os.path.join(self.source, "nested")), os.path.join(self.snapshots, name, "m")
        for folder in (nested, self.target):
            os.mkdir(os.path.join(folder, "inner"))
        support.command("mount", "--bind", self.target, point)
        try:
            self.assertEqual([], program.held_names(self.snapshots, [name], ["m"]))
        finally:
            support.unmount(point)
        self.assertEqual([], program.held_names(self.source, [""], ["nested"]))

    def test_what_any_user_can_put_deep(self):
        """Subvolumes in each other, and a name that no path leads to, keep nobody from finding all else."""
        self.write("plan", "x")
        fd = os.open(self.source, os.O_RDONLY)
        try:
            for name in ["n"] * 1100 + [self.name(1)]:
                fcntl.ioctl(fd, 0x5000940E, bytearray(struct.pack("<q4088s", 0, name.encode())))  # SUBVOL_CREATE
                inner = os.open(name, os.O_RDONLY, dir_fd=fd)
                os.close(fd)
                fd = inner
        finally:
            os.close(fd)
        fd = os.open(self.source, os.O_RDONLY)
        try:
            for _ in range(20):
                os.mkdir("x" * 250, dir_fd=fd)
                inner = os.open("x" * 250, os.O_RDONLY, dir_fd=fd)
                os.close(fd)
                fd = inner
            os.close(os.open("plan", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
        finally:
            os.close(fd)
        name, = self.take(1)
        self.assertIn(os.path.realpath(self.snapshots), program.find_folders_of_snapshots(program.read_mounts()))
        self.assertEqual(["plan"], [one.sighting.inner for one in program.find_names(self.snapshots, [name], "plan")])

    def test_a_folder_that_was_a_file_and_a_link(self):
        self.write("x", "a file")
        self.take(1)
        os.unlink(os.path.join(self.source, "x"))
        os.symlink("/etc", os.path.join(self.source, "x"))
        self.take(2)
        os.unlink(os.path.join(self.source, "x"))
        os.mkdir(os.path.join(self.source, "x"))
        self.write("x/inner", "")
        self.take(3)
        self.transfer()
        for place in (self.source, self.target):
            reader = program.LineReader(support.task_of(["browse", place]), program.Events())
            self.addCleanup(reader.end)
            line, = reader.find()
            self.assertEqual(["inner"], [one.name for one in reader.folder(line, ANY_TIME, "x", self.fail)])
            for row_then in line.rows[1:]:
                with self.assertRaisesRegex(program.BackupError, "there is no folder x"):
                    reader.folder(line, moment_of(row_then), "x", self.fail)

    def test_stream_files_are_not_taken_for_empty(self):
        raw = "raw://" + os.path.join(self.target_disk.path, "raw")
        self.take(1, 2)
        self.transfer(to=[raw])
        running = self.browse(raw)
        for keys in (b"\r", b"\x1b[B\r", b"/day\r"):
            self.cursor_on(running, "any time" if keys == b"\r" else "")
            running.type(keys)
            self.wait_for_words(running, "is kept in stream files alone, which cannot be looked into here")
        self.leave(running)
        self.transfer()
        delete(self.snapshot_path(self.name(1)))
        delete(self.backup_path(self.name(1)))
        running = self.browse(self.source, raw)
        self.cursor_on(running, "any time")
        running.type(b"\r")
        self.wait_for_words(running, "not looked into: 1 of 2 snapshots, kept in stream files alone")
        running.wait_to_show("day1", "day2")
        self.leave(running)

    def test_a_link_is_never_followed(self):
        os.symlink("/etc", os.path.join(self.source, "a"))
        self.take(1)
        running = self.browse(self.source)
        self.cursor_on(running, "any time")
        running.type(b"\r")
        self.cursor_on(running, "a@")
        running.type(b"\r")
        running.wait_to_show("a symbolic link is not followed")
        self.leave(running)

    def test_a_backup_that_goes_while_it_is_looked_at(self):
        self.prepare()
        running = self.browse(self.target)
        self.cursor_on(running, "any time")
        running.type(b"\x1b[B\r")
        self.cursor_on(running, "letters/")
        delete(self.backup_path(self.name(3)))
        running.type(b"\r")
        self.wait_for_words(running, "is gone: it was deleted meanwhile")
        running.type(b"[")
        running.wait_to_show(self.name(2), "letters/")
        running.type(b"\r")
        running.wait_to_show("plan.txt")
        self.leave(running)

    def test_resized_and_small(self):
        self.prepare()
        running = self.browse(self.source, columns=20, lines=5)
        for columns, lines in ((20, 5), (120, 40), (20, 5), (80, 24)):
            running.resize(columns, lines)
            running.wait_for("all of it", lambda lines=lines: len(running.shown()) == lines and running.shown()[-1])
            self.cursor_on(running, "any time")
        self.assertEqual(0, running.screen.dropped)
        self.leave(running)

    def test_the_terminal_is_given_back(self):
        self.take(1)
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            with self.subTest(number):
                running = self.browse(self.source)
                self.cursor_on(running, "any time")
                if number == signal.SIGINT:
                    running.type(b"\x1c\x03")
                else:
                    os.kill(running.pid, number)
                self.assertEqual(status, running.finish().status)
                self.check_given_back(running)

    def test_ctrl_z(self):
        self.take(1)
        running = self.browse(self.source)
        self.cursor_on(running, "any time")
        os.kill(running.pid, signal.SIGTSTP)
        running.wait_for("a stopped process", lambda: is_stopped(running.pid))
        running.wait_for("the main screen", lambda: not running.screen.is_alternate)
        self.check_given_back(running)
        os.kill(running.pid, signal.SIGCONT)
        running.wait_for("the screen", lambda: running.screen.is_alternate)
        self.cursor_on(running, "any time")
        running.type(b"\r")
        running.wait_to_show("day1")
        self.leave(running)

    def test_the_terminal_is_closed(self):
        self.take(1)
        running = self.browse(self.source)
        self.cursor_on(running, "any time")
        running.set_size(90, 30)  # what it draws then ends our reading, which keeps the terminal open
        running.hang_up()
        self.assertEqual(129, running.finish().status)

    def test_where_nothing_can_be_drawn_it_is_a_dialogue(self):
        self.prepare()
        for env, size in (({"TERM": "dumb"}, "80 24"), ({}, "0 0")):
            with self.subTest(env=env):
                sized = ["sh", "-c", "stty cols $1 rows $2; shift 2; exec \"$@\"", "sh"] + size.split()
                running = self.browse(self.source, env=env, columns=90, lines=80, results=True, wrapper=sized)
                running.wait_to_show("    1  any time")
                running.type(b"1\n")
                running.wait_to_show("letters/")
                running.type(b"1\n")
                running.wait_to_show("plan.txt", "gone")
                running.type(b"3 r\n")
                running.wait_to_show("restore plan.txt to folder: ")
                running.type(b"\n")
                running.wait_to_show("? y or n", "answer:")
                running.type(b"y\n")
                running.wait_to_show("restored 1 path")
                running.type(b"q\n")
                self.assertEqual(0, running.finish().status)
                self.assertFalse(running.screen.was_alternate)
                self.check_restored()

    def test_nothing_to_look_at(self):
        result = self.run_program("browse", wrapper=self.only_these_disks(), status=1)
        self.assertErrorSays(result, "no snapshots or backups were found")


class OverSsh(BrowseTestCase, remote.RemoteTestCase):

    def prepare(self):
        os.mkdir(os.path.join(self.source, "letters"))
        self.write("letters/plan", "one\n")
        self.take(1)
        self.write("letters/plan", "two\n")
        self.take(2)
        self.push("-S")
        delete(self.snapshot_path(self.name(1)))

    def browse(self, *arguments, **more):
        return super().browse(*self.program_options() + list(arguments), **more)

    def restored(self, content):
        with open(os.path.join(self.source, "letters", "plan")) as file:
            self.assertEqual(content, file.read())

    def test_a_remembered_host_is_asked_when_somebody_wants_to_see_it(self):
        self.prepare()
        running = self.browse(self.source)
        running.wait_to_show("any time", self.name(2), "not looked at yet")
        self.assertNotIn(self.name(1), "".join(running.shown()))
        logins = self.server.accepted()
        running.type(b"\x1b[F\r")
        running.wait_to_show(self.name(1), "here, 127.0.0.1")
        running.type(b"\x1b[F\r")
        self.cursor_on(running, "letters/")
        running.type(b"\r")
        self.cursor_on(running, "plan")
        running.type(b"mr\r")
        self.wait_for_words(running, "is there and stays as NAME.before-TIME. y or n")
        running.type(b"y")
        running.wait_to_show("restored 1 path")
        self.restored("one\n")
        running.type(b"d")
        running.wait_to_show("their contents are equal")
        self.leave(running)
        self.assertEqual(logins + 1, self.server.accepted())

    def test_one_folder_is_one_call(self):
        self.prepare()
        calls = []
        task = support.task_of(["browse"] + self.program_options() + [self.remote_target])
        reader = program.LineReader(task, program.Events())
        self.addCleanup(reader.end)
        line, = reader.find()
        host = reader.host_at(line, 0)
        ask = host.call

        def noted(name, *arguments):
            calls.append(name)
            return ask(name, *arguments)

        host.call = noted
        for moment in (ANY_TIME, moment_of(line.rows[0])):
            calls.clear()
            found = reader.folder(line, moment, "letters", self.fail)
            self.assertEqual((["plan"], ["held_names"]), ([one.name for one in found], calls))
        self.assertEqual(2, len(reader.versions(0, "letters/plan")[1]))
        self.assertEqual(b"two\n", reader.file(line, moment_of(line.rows[0]), "letters/plan").data)

    def test_a_host_that_is_away(self):
        self.prepare()
        self.server.stop()
        running = self.browse(self.source)
        running.wait_to_show("any time", "not looked at yet")
        running.type(b"\x1b[F\r")
        running.wait_to_show("not known: Enter looks again")
        running.type(b"\x1b[H\r")
        self.cursor_on(running, "letters/")
        self.leave(running, status=1)
        running = self.browse(self.source, self.remote_target)
        self.wait_for_words(running, "connection refused")
        running.wait_to_show("any time", self.name(2))
        self.leave(running, status=1)

    def test_a_connection_that_breaks_meanwhile(self):
        self.prepare()
        between = self.proxy(self.server.port)
        running = self.browse(self.server.endpoint(self.target_there + "/backups", port=between.port))
        self.cursor_on(running, "any time")
        between.cut()
        running.type(b"\r")
        self.cursor_on(running, "letters/")
        self.leave(running)

    def test_a_host_that_goes_meanwhile(self):
        self.prepare()
        running = self.browse(self.remote_target)
        self.cursor_on(running, "any time")
        running.type(b"\r")
        self.cursor_on(running, "letters/")
        self.server.stop()
        running.type(b"\r")
        self.wait_for_words(running, "connection refused")
        self.cursor_on(running, "letters/")
        self.leave(running, status=1)


if __name__ == "__main__":
    unittest.main()
