"""State: locks and pins on disk, one run at a time."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
import unittest
from typing import Any, Dict, List
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from btrfs_backup_ng import (
    ASIDE,
    FORMAT_ERRORS,
    LOCK_FILE,
    PIN_FILE,
    BackupError,
    Busy,
    Events,
    Interrupted,
    LocalHost,
    LockChange,
    Mark,
    PartialLock,
    Pin,
    PrivateFolder,
    Record,
    ResumePoint,
    SwapJournal,
    add_locks,
    bound_changes,
    clear_idle,
    clear_locks,
    folder_mutex,
    format_locks,
    format_pins,
    format_record,
    format_sources,
    idle_raw_partials,
    locks_of,
    parse_locks,
    parse_own,
    parse_pins,
    parse_record,
    parse_sources,
    parse_state,
    read_raw_folder,
    read_record,
    read_state_file,
    read_swap_journal,
    record_name,
    replace_file,
    run_lock,
    run_lock_name,
    try_run_lock,
    write_swap_journal,
)

REPOSITORY = sys.path[0]
NOTHING: Any = {}  # where there is no file

# As release 0.6.6 wrote it: the last transfer of two, of which the second had the first as parent.
OLD_LOCKS = """\
{
    "home20260130-093000": {
        "parent_locks": [
            "ssh://nas/backups"
        ]
    },
    "home20260131-093000": {
        "locks": [
            "/mnt/backup/home",
            "ssh://nas/backups"
        ]
    }
}"""

# Each is not what it has to be.
DAMAGED = {
    "empty": "",
    "blank": " \n",
    "torn": OLD_LOCKS[:-3],
    "torn in a text": OLD_LOCKS[:60],
    "two at once": OLD_LOCKS + OLD_LOCKS,
    "zeros": "\0" * 100,
    "not JSON": "locks:\n- home",
    "no object": "[]",
    "nothing": "null",
    "a number": "7",
    "so deep that the parser gives up": "[" * 200000,
}

DAMAGED_LOCKS = {
    "no entry": '{"a": null}',
    "a list for an entry": '{"a": ["/b"]}',
    "another kind": '{"a": {"locks": [], "more": []}}',
    "no list": '{"a": {"locks": "/b"}}',
    "a number for a destination": '{"a": {"locks": ["/b", 7]}}',
    "the format of the pins": '{"version": 1, "destinations": {}}',
}

DAMAGED_PINS = {
    "without destinations": '{"version": 1}',
    "a list of destinations": '{"version": 1, "destinations": []}',
    "no pins": '{"version": 1, "destinations": {"/b": null}}',
    "a pin without name": '{"version": 1, "destinations": {"/b": {"home": {"uuid": "u", "time": "t"}}}}',
    "no pin in a list": '{"destinations": {"/b": {"home": ["home20260131-093000"]}}}',
    "no pin": '{"version": 1, "destinations": {"/b": {"home": "home20260131-093000"}}}',
    "a number for the id": '{"destinations": {"/b": {"home": {"name": "n", "uuid": 7, "time": "t"}}}}',
    "nothing for the name": '{"destinations": {"/b": {"home": {"name": null, "uuid": "u", "time": "t"}}}}',
    "a text for what was sent":
        '{"destinations": {"/b": {"home": {"name": "n", "uuid": "u", "time": "t", "sent": "abc"}}}}',
    "more than a pin": '{"destinations": {"/b": {"home": {"name": "n", "uuid": "u", "time": "t", "more": 1}}}}',
    "the format of the locks": OLD_LOCKS,
}

PATHS = ["/b", "/", "/two words", "/it's \"so\"", "/back\\slash", "/t\u00fcr", "/caf\udce9", "/\udcff\udcfe",
         "/\U0001f4be", "ssh://user@host:22/b", "shell://cat > /b", "/\x01\t"]


def without(locks, destination, prefix):
    """The locks less what those of a prefix have for a destination."""
    return clear_locks(locks, locks_of(locks, destination, prefix))


class InFolder(unittest.TestCase):

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)

    def content(self, name):
        with open(self.path(name), "rb") as file:
            return file.read()

    def child(self, *lines):
        """A second process that runs these lines of Python, with the folder in `folder`."""
        start = ["import sys", "sys.path.insert(0, {!r})".format(REPOSITORY), "from btrfs_backup_ng import *",
                 "folder = {!r}".format(self.folder)]
        process = subprocess.Popen([sys.executable, "-B", "-c", "\n".join(start + list(lines))],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)
        self.addCleanup(self.end, process)
        return process

    @staticmethod
    def end(process):
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def entry(locks=(), notes=()):
    return {"locks": list(locks), "parent_locks": list(notes)}


ONE = entry(["/b"])
UUIDS = ["{}0000000-0000-0000-0000-000000000000".format(digit) for digit in "ab"]


class Locks(unittest.TestCase):

    def test_the_format_of_0_6_6(self):
        locks = parse_locks(OLD_LOCKS)
        self.assertEqual({"home20260130-093000": {"parent_locks": ["ssh://nas/backups"]},
                          "home20260131-093000": {"locks": ["/mnt/backup/home", "ssh://nas/backups"]}}, locks)
        self.assertEqual({}, parse_locks("{}\n"))

    def test_anything_else(self):
        for what, text in dict(DAMAGED, **DAMAGED_LOCKS).items():
            with self.subTest(what):
                self.assertRaises((ValueError, RecursionError), parse_locks, text)

    def test_adding(self):
        one = LockChange("a", "/b")
        self.check(add_locks, (
            ({}, [], {}),
            ({}, [one], {"a": ONE}),
            ({"a": ONE}, [one], {"a": ONE}),
            ({"a": {}}, [one], {"a": ONE}),
            ({"a": {"parent_locks": ["/c"]}}, [one], {"a": entry(["/b"], ["/c"])}),
            ({"a": ONE}, [LockChange("a", "/c")], {"a": entry(["/b", "/c"])}),
            ({}, [LockChange("b", "/b", "a")], {"a": entry([], ["/b"]), "b": ONE}),
            ({}, [LockChange("b", "/b", "a"), LockChange("b", "/c", "a")],
             {"a": entry([], ["/b", "/c"]), "b": entry(["/b", "/c"])}),
            ({"other": ONE}, [one], {"other": ONE, "a": ONE}),
        ))

    def test_clearing(self):
        self.check(clear_locks, (
            ({}, [LockChange("a", "/b")], {}),
            ({"a": ONE}, [], {"a": ONE}),
            ({"a": ONE}, [LockChange("a", "/b")], {}),
            ({"a": {"locks": ["/b/"]}}, [LockChange("a", "/b")], {}),
            ({"a": ONE}, [LockChange("a", "/c")], {"a": ONE}),
            ({"a": ONE}, [LockChange("b", "/b")], {"a": ONE}),
            ({"a": ONE}, [LockChange("b", "/b", "a")], {"a": ONE}),
            ({"a": {"parent_locks": ["/b"]}}, [LockChange("a", "/b")], {"a": entry([], ["/b"])}),
            ({"a": {"parent_locks": ["/b", "/c"]}, "b": ONE}, [LockChange("b", "/b", "a")],
             {"a": entry([], ["/c"])}),
        ))

    def check(self, change, table):
        for before, changes, after in table:
            with self.subTest(before=before, changes=changes):
                self.assertEqual(after, change(before, changes))

    def test_what_is_added_is_cleared_again(self):
        changes = [LockChange("b", destination, "a") for destination in PATHS]
        locks = add_locks({"other": ONE}, changes)
        self.assertEqual({"other": ONE}, clear_locks(locks, changes))

    def test_what_is_bound_to_a_filesystem(self):
        (name, parent), change = self.NAMES, LockChange(self.NAMES[0], "/b", self.NAMES[1])
        bound = LockChange(name + " on " + UUIDS[0], "/b", parent + " on " + UUIDS[0])
        self.assertEqual([change, bound], bound_changes([change], UUIDS[0]))
        for filesystem in (None, "mounted at /b", "/dev/sdb"):
            self.assertEqual([change], bound_changes([change], filesystem))
        self.assertEqual([bound._replace(parent=None)], bound_changes([change._replace(parent=None)], UUIDS[0])[1:])
        long = LockChange("x" * 220 + name, "/b")
        self.assertEqual([long], bound_changes([long], UUIDS[0]))

    NAMES = ("home20260131-093000", "home20260130-093000")

    def test_each_disk_has_its_own(self):
        """One clears what is its own, and the plain entry, which older releases read."""
        change = LockChange(self.NAMES[0], "/b", self.NAMES[1])
        on_a, on_b = (bound_changes([change], uuid) for uuid in UUIDS)
        only_a = add_locks({}, on_a[1:])
        for begun in (on_a + on_b, on_b + on_a):
            self.assertEqual(only_a, clear_locks(add_locks({}, begun), on_b))
        self.assertEqual({}, clear_locks(only_a, on_a))
        locks = add_locks({}, on_a)
        self.assertEqual([], locks_of(locks, "/b", "home", UUIDS[1]))
        for filesystem in (UUIDS[0], None):
            self.assertEqual({}, clear_locks(locks, locks_of(locks, "/b", "home", filesystem)))
        self.assertEqual({}, clear_locks(only_a, locks_of(only_a, "/b", "home")))
        parse_locks(format_locks(locks))

    def test_the_locks_given_stay_as_they_are(self):
        before = parse_locks(OLD_LOCKS)
        change = LockChange("home20260131-093000", "/new", "home20260130-093000")
        add_locks(before, [change])
        clear_locks(before, [change._replace(destination="ssh://nas/backups")])
        self.assertEqual(parse_locks(OLD_LOCKS), before)

    def test_a_destination_is_cleared_for_its_own_prefix_only(self):
        both, rest = entry(["/b", "/c"], ["/c", "/b"]), entry(["/c"], ["/c"])
        others = dict.fromkeys(("home-data20260131-093000", "20260131-093000", "home"), both)
        own = {"home20260131-093000": both, "home20260130-093000": {"parent_locks": ["/b"]}}
        locks = dict(others, **own)
        after = dict(others, **{"home20260131-093000": rest})
        self.assertEqual(after, without(locks, "/b", "home"))
        self.assertEqual(set(locks), set(without(locks, "/d", "home")))
        self.assertEqual(rest, without(locks, "/b", "")["20260131-093000"])


class Pins(unittest.TestCase):

    def test_there_and_back(self):
        pin = Pin("20260131-093000", "u", "2026-01-31T08:30:00Z", "f")
        entry = {"": (pin,), "home": (pin._replace(filesystem=None), pin, pin._replace(filesystem="g")),
                 "\udcff": (pin._replace(name="\udcff"),)}
        pins = dict.fromkeys(PATHS, entry)
        self.assertEqual(pins, parse_pins(format_pins(pins)))
        self.assertEqual({}, parse_pins(format_pins({})))

    def test_one_alone_is_as_0_7_0_wrote_it(self):
        text = """{"destinations": {"/b": {"home": {"filesystem": "f", "name": "n", "time": "t", "uuid": "u"}}},
                   "version": 1}"""
        pins = parse_pins(text)
        self.assertEqual({"/b": {"home": (Pin("n", "u", "t", "f"),)}}, pins)
        self.assertEqual(json.loads(text), json.loads(format_pins(pins)))

    def test_anything_else(self):
        errors = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
        for what, text in dict(DAMAGED, **DAMAGED_PINS).items():
            with self.subTest(what):
                self.assertRaises(errors, parse_pins, text)


class Formats(unittest.TestCase):
    """As they stand in the files: releases before and after read them, and so do people."""

    UUID, OTHER = "01234567-89ab-cdef-0123-456789abcdef", "11234567-89ab-cdef-0123-456789abcdef"
    RECORD = Record("n", UUID, OTHER, OTHER, True, 2, 7, ".n.2.partial", UUID,
                    ResumePoint((Mark(1, "a"), Mark(5, "b")), 3, acl="00ff"), ".n.3.partial", "boot")
    RECORD_TEXT = """\
{
 "base": "11234567-89ab-cdef-0123-456789abcdef",
 "boot": "boot",
 "compressed": true,
 "ctransid": 7,
 "finished": ".n.3.partial",
 "name": "n",
 "parent_id": "11234567-89ab-cdef-0123-456789abcdef",
 "piece": ".n.2.partial",
 "point": {
  "acl": "00ff",
  "file_data": 3,
  "marks": [
   [
    1,
    "a"
   ],
   [
    5,
    "b"
   ]
  ]
 },
 "private": "01234567-89ab-cdef-0123-456789abcdef",
 "stream_id": "01234567-89ab-cdef-0123-456789abcdef",
 "version": 2
}
"""

    def test_locks(self):
        self.assertEqual('{\n "a": {\n  "locks": [\n   "/b"\n  ],\n  "parent_locks": []\n },\n "b": {}\n}\n',
                         format_locks({"b": {}, "a": {"parent_locks": [], "locks": ["/b"]}}))

    def test_pins(self):
        pin = Pin("n", "u", "t")
        single = '{{\n{0}"filesystem": null,\n{0}"name": "n",\n{0}"time": "t",\n{0}"uuid": "u"\n{1}}}'
        start, end = '{\n "destinations": {\n  "/b": {\n   "": ', '\n  }\n },\n "version": 1\n}\n'
        self.assertEqual(start + single.format("    ", "   ") + end, format_pins({"/b": {"": (pin,)}}))
        several = "[\n    {},\n    {}\n   ]".format(*[single.format("     ", "    ")] * 2)
        self.assertEqual(start + several + end, format_pins({"/b": {"": (pin, pin)}}))
        sent = pin._replace(sent=("v", "u"))
        self.assertEqual(["v", "u"], json.loads(format_pins({"/b": {"": (sent,)}}))["destinations"]["/b"][""]["sent"])
        self.assertEqual({"/b": {"": (sent, pin)}}, parse_pins(format_pins({"/b": {"": (sent, pin)}})))

    def test_sources(self):
        for sources in ((), (self.UUID,), (self.OTHER, self.UUID)):
            text = json.dumps({"sources": list(sources), "version": 1}) + "\n"
            self.assertEqual((text, sources), (format_sources(sources), parse_sources(text)))

    def test_no_sources(self):
        damaged: Any = ("", self.UUID, None, {}, [7], [None], [""], ["x"], [self.UUID[:-2]], [self.UUID + "00"],
                        [self.UUID, 7], [[self.UUID]], {self.UUID: 1})
        for sources in damaged:
            with self.subTest(sources=sources):
                self.assertRaises(FORMAT_ERRORS, parse_sources, json.dumps({"version": 1, "sources": sources}))
        for text in DAMAGED.values():
            self.assertRaises(FORMAT_ERRORS, parse_sources, text)

    def test_own_destinations(self):
        for destinations in ([], ["ssh://h/b"], ["ssh://h/b", "raw+ssh://h/c"]):
            self.assertEqual({"destinations": destinations}, parse_own(json.dumps({"destinations": destinations})))
        damaged: Any = ("abc", None, {"a": 1}, [7], [None], ["a", ["b"]], 7)
        for destinations in damaged:
            with self.subTest(destinations=destinations):
                self.assertRaises(FORMAT_ERRORS, parse_own, json.dumps({"destinations": destinations}))
        for text in DAMAGED.values():
            self.assertRaises(FORMAT_ERRORS, parse_own, text)

    def test_records(self):
        self.assertEqual(self.RECORD_TEXT, format_record(self.RECORD))
        self.assertEqual(self.RECORD, parse_record(self.RECORD_TEXT))
        least = Record("n", self.UUID)
        self.assertEqual(least, parse_record(format_record(least)))

    def test_no_records(self):
        changes: Any = [{field: None} for field in Record._fields if field not in ("parent_id", "base", "private")]
        changes += [{field: text} for field in ("stream_id", "parent_id", "base", "private")
                    for text in ("", "x", self.UUID[:-2], self.UUID + "00", 7)]
        changes += [{"point": dict(json.loads(self.RECORD_TEXT)["point"], **point)} for point in (
            {"marks": [[5, "b"], [1, "a"]]}, {"marks": [[1, "a"], [1, "a"]]}, {"marks": [[1, "a"], [1, "b"]]},
            {"marks": [[0, "a"]]}, {"marks": [[-1, "a"]]}, {"marks": [[1]]}, {"marks": [[1, "a", 2]]}, {"marks": 7},
            {"marks": [["1", "a"]]}, {"file_data": True}, {"file_data": None}, {"file_data": 1.5},
            {"acl": "0"}, {"acl": "xx"}, {"acl": 7}, {"acl": []})]
        changes += [{"more": 1}, {"version": "2"}, {"compressed": 1}]
        for changed in changes:
            with self.subTest(changed=changed):
                text = json.dumps(dict(json.loads(self.RECORD_TEXT), **changed))
                self.assertRaises(FORMAT_ERRORS, parse_record, text)
        for missing in ("point", "name", "stream_id"):
            fields = json.loads(self.RECORD_TEXT)
            del fields[missing]
            self.assertRaises(FORMAT_ERRORS, parse_record, json.dumps(fields))
        for text in DAMAGED.values():
            self.assertRaises(FORMAT_ERRORS, parse_record, text)

    def test_damage_says_what_to_do(self):
        for name, words in ((".outstanding_transfers", "if no transfer is unfinished"),
                            (".destinations.json", "no longer protected"),
                            (".own-destinations.json", "run the backups"),
                            (".home.source", "whose the backups are"), (".source", "whose the backups are")):
            with self.subTest(name=name), self.assertRaises(BackupError) as caught:
                parse_state("/folder/" + name, "{", json.loads)
            self.assertEqual("/folder/{} is damaged or was not written by this program, so nothing was changed".format(
                name), caught.exception.message)
            self.assertIn(words, caught.exception.hint)
        self.assertEqual({}, parse_state("/folder/.source", "{}", json.loads))

    def test_names_of_run_locks(self):
        self.assertEqual([".lock", ".home-.lock"], [run_lock_name(prefix) for prefix in ("", "home-")])


class StateFiles(InFolder):

    def setUp(self):
        super().setUp()
        self.host = LocalHost(Events())

    def test_none_is_empty(self):
        self.assertEqual({}, self.host.read_locks(self.folder))
        self.assertEqual({}, self.host.read_pins(self.folder))

    def test_damage_is_an_error_that_names_the_file(self):
        for name, read, more in ((LOCK_FILE, self.host.read_locks, DAMAGED_LOCKS),
                                 (PIN_FILE, self.host.read_pins, DAMAGED_PINS)):
            for what, text in dict(DAMAGED, **more).items():
                with self.subTest(what, name=name):
                    self.write(name, text)
                    with self.assertRaises(BackupError) as caught:
                        read(self.folder)
                    self.assertIn(self.path(name), caught.exception.message)
                    self.assertTrue(caught.exception.hint)
                    self.assertEqual(text.encode(), self.content(name))

    def test_what_is_no_file(self):
        os.mkdir(self.path(LOCK_FILE))
        with self.assertRaises(BackupError) as caught:
            self.host.read_locks(self.folder)
        self.assertIn(self.path(LOCK_FILE), caught.exception.message)

    def test_damaged_locks_are_not_written_over(self):
        self.write(LOCK_FILE, OLD_LOCKS[:-3])
        with self.assertRaises(BackupError):
            self.host.change_locks(self.folder, [LockChange("a", "/b")], [])
        self.assertEqual(OLD_LOCKS[:-3].encode(), self.content(LOCK_FILE))

    def test_locks_come_back_with_any_path(self):
        changes = [LockChange(name, path, "parent") for path in PATHS for name in ("a", "caf\udce9")]
        after = self.host.change_locks(self.folder, changes, [])
        self.assertEqual(after, self.host.read_locks(self.folder))
        self.assertEqual(PATHS, after["caf\udce9"]["locks"])

    def test_others_read_what_was_written(self):
        """In 0.6.6's format, with the json module and in UTF-8."""
        change = LockChange("a", "/t\u00fcr", "p")
        self.host.change_locks(self.folder, [change], [])
        with open(self.path(LOCK_FILE), encoding="utf-8") as file:
            self.assertEqual({"a": {"locks": ["/t\u00fcr"], "parent_locks": []},
                              "p": {"locks": [], "parent_locks": ["/t\u00fcr"]}}, json.load(file))

    def test_raw_bytes_of_a_path(self):
        """As a program in another locale may write them."""
        with open(self.path(LOCK_FILE), "wb") as file:
            file.write(b'{"a": {"locks": ["/caf\xe9"]}}')
        self.assertEqual({"a": {"locks": ["/caf\udce9"]}}, self.host.read_locks(self.folder))

    def test_nothing_is_written_where_nothing_changes(self):
        self.assertEqual({}, self.host.change_locks(self.folder, [], [LockChange("a", "/b", "p")]))
        self.host.change_pins(self.folder, "home", {"/b": None})
        self.assertEqual([], os.listdir(self.folder))

    def test_each_prefix_has_its_own_pin(self):
        pin, newer = Pin("a", "1", "t"), Pin("b", "2", "t", "f")
        self.host.change_pins(self.folder, "home", {"/b": pin, "/c": pin})
        self.host.change_pins(self.folder, "data", {"/b": pin})
        self.host.change_pins(self.folder, "home", {"/b": newer, "/c": newer._replace(filesystem=None)})
        self.assertEqual({"/b": {"home": (pin, newer), "data": (pin,)},
                          "/c": {"home": (newer._replace(filesystem=None),)}}, self.host.read_pins(self.folder))
        self.host.change_pins(self.folder, "home", {"/b": None, "/c": None})
        self.assertEqual({"/b": {"data": (pin,)}}, self.host.read_pins(self.folder))


class Replacing(InFolder):

    def replace(self, text="new"):
        replace_file(self.folder, "state", text)

    def test_it_is_replaced(self):
        self.replace("old")
        before = os.stat(self.path("state")).st_ino
        self.replace("new")
        self.assertEqual(b"new", self.content("state"))
        self.assertEqual(["state"], os.listdir(self.folder))
        self.assertNotEqual(before, os.stat(self.path("state")).st_ino, "written in place")

    def test_a_crash_at_any_step_leaves_the_old_one_or_the_new(self):
        self.replace("old")
        for step, left in (("os.fsync", b"old"), ("os.rename", b"old"),
                           ("btrfs_backup_ng.sync_folder", b"new")):
            with self.subTest(step):
                self.replace("old")
                with mock.patch(step, side_effect=KeyboardInterrupt):
                    self.assertRaises(KeyboardInterrupt, self.replace)
                self.assertEqual(left, self.content("state"))

    def test_a_failure_is_said_and_leaves_the_old_one(self):
        self.replace("old")
        for step in ("os.fsync", "os.rename"):
            with self.subTest(step), mock.patch(step, side_effect=OSError(28, "No space left on device")):
                with self.assertRaises(BackupError) as caught:
                    self.replace()
                self.assertEqual("cannot write {}: no space left on device".format(self.path("state")),
                                 caught.exception.message)
                self.assertEqual(b"old", self.content("state"))

    def test_what_a_crash_left_does_not_matter(self):
        for name in ("state.new", "state"):
            self.write(name, "much longer than what follows " * 100)
        self.replace()
        self.assertEqual(b"new", self.content("state"))

    def test_the_bytes_are_durable_before_the_name_and_the_name_before_the_end(self):
        steps = mock.Mock(fsync=mock.Mock(wraps=os.fsync), rename=mock.Mock(wraps=os.rename))
        with mock.patch("os.fsync", steps.fsync), mock.patch("os.rename", steps.rename):
            self.replace()
        self.assertEqual(["fsync", "rename", "fsync"], [call[0] for call in steps.method_calls])

    def test_reading(self):
        self.assertEqual({}, read_state_file(self.folder, "state", str, NOTHING))
        self.replace("caf\udce9")
        self.assertEqual(b"caf\xe9", self.content("state"))
        self.assertEqual("caf\udce9", read_state_file(self.folder, "state", str, NOTHING))

    def test_a_small_one_takes_little_memory(self):
        with open(os.path.join(self.folder, "state"), "w") as file:
            file.write("x" * 100000)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assertEqual(100000, len(read_state_file(self.folder, "state", str, NOTHING)))
        self.assertLess(tracemalloc.get_traced_memory()[1], 4 << 20)


@contextlib.contextmanager
def within(seconds):
    """The test fails where what is done takes longer, for it would wait for ever."""
    def late(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Planted(InFolder):
    """What others may have put where our files go: nothing is followed, waited for or changed."""

    RECORD = Record("home20260131-093000", "0" * 8 + "-0000-0000-0000-" + "0" * 12)

    def setUp(self):
        super().setUp()
        self.elsewhere = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.elsewhere)
        self.victim = os.path.join(self.elsewhere, "victim")
        with open(self.victim, "w", encoding="utf-8") as file:
            file.write("{}")

    def plants(self):
        return {"link": lambda path: os.symlink(self.victim, path),
                "link to nothing": lambda path: os.symlink(os.path.join(self.elsewhere, "new"), path),
                "pipe": os.mkfifo, "hard link": lambda path: os.link(self.victim, path), "folder": os.mkdir,
                "socket": self.make_socket}

    @staticmethod
    def make_socket(path):
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path)

    def each(self, name):
        """Each kind of thing at `name`; afterwards nothing elsewhere is other than it was."""
        for kind, plant in self.plants().items():
            with self.subTest(kind, name=name), within(5):
                path = self.path(name)
                plant(path)
                yield kind
                self.assertEqual(["victim"], os.listdir(self.elsewhere))
                with open(self.victim, encoding="utf-8") as file:
                    self.assertEqual("{}", file.read())
                if os.path.lexists(path):
                    (os.rmdir if kind == "folder" and os.path.isdir(path) else os.unlink)(path)

    def test_a_signal_in_the_midst_leaves_no_file_aside(self):
        with mock.patch.object(os, "rename", side_effect=Interrupted(15)):
            self.assertRaises(Interrupted, replace_file, self.folder, "notes", "text")
        self.assertEqual([], os.listdir(self.folder))

    def test_where_a_file_is_written_aside(self):
        for kind in self.each("state" + ASIDE):
            if kind == "folder":
                self.assertRaises(BackupError, replace_file, self.folder, "state", "new")
            else:
                replace_file(self.folder, "state", "new")
                self.assertEqual((b"new", 0o600), (self.content("state"), os.stat(self.path("state")).st_mode & 0o777))

    def test_in_the_place_of_a_state_file(self):
        for _ in self.each("state"):
            with self.assertRaises(BackupError) as caught:
                read_state_file(self.folder, "state", parse_locks, NOTHING)
            self.assertIn("cannot read {}: it is not a regular file".format(self.path("state")),
                          caught.exception.message)

    def test_in_the_place_of_a_lock(self):
        for _ in self.each(".home.lock"):
            with self.assertRaises(BackupError) as caught:
                run_lock(self.folder, ".home.lock", 0, print).__enter__()
            self.assertIn("cannot write {}: it is not a regular file".format(self.path(".home.lock")),
                          caught.exception.message)
        for _ in self.each(".h.partial.lock"):
            with self.assertRaises(BackupError) as caught:
                PartialLock(self.folder, "h", "id")
            self.assertIn("it is not a regular file", caught.exception.message)
            with contextlib.suppress(OSError):
                clear_idle(self.folder, "h")

    def test_in_the_place_of_a_record_or_sidecar(self):
        for _ in self.each(record_name("h")):
            self.assertIsNone(read_record(self.folder, "h"))
        for _ in self.each("h.btrfs.json"):
            self.assertEqual(["h.btrfs.json"], [name for name, _ in read_raw_folder(self.folder).broken])
        for _ in self.each(".h.partial"):
            idle_raw_partials(self.folder)

    def test_in_the_place_of_the_notes_of_a_swap(self):
        for _ in self.each(".place.restoring.json"):
            with self.assertRaises(BackupError) as caught:
                read_swap_journal(self.path("place"))
            self.assertIn("look by hand", caught.exception.hint)

    def test_a_record_or_notes_of_a_swap_that_another_made(self):
        replace_file(self.folder, record_name(self.RECORD.name), format_record(self.RECORD))
        self.assertEqual(self.RECORD, read_record(self.folder, self.RECORD.name))
        write_swap_journal(self.path("place"), SwapJournal("n", "i", "r", "u", False, "", None, "o"))
        self.assertEqual("n", read_swap_journal(self.path("place")).name)
        for name in os.listdir(self.folder):
            os.chown(self.path(name), 65534, 65534)
        self.assertIsNone(read_record(self.folder, self.RECORD.name))
        with self.assertRaises(BackupError) as caught:
            read_swap_journal(self.path("place"))
        self.assertIn("it belongs to user 65534", caught.exception.message)

    def test_notes_with_values_of_other_types(self):
        fields: Dict[str, Any] = json.loads(format_record(self.RECORD))
        changes: Any = ({"compressed": 1}, {"name": 7}, {"piece": None}, {"version": True}, {"boot": []},
                        {"point": {"marks": [], "file_data": "7", "acl": None}},
                        {"point": {"marks": [], "file_data": 7}},
                        {"point": {"marks": [[1.5, "a"]], "file_data": 7, "acl": None}},
                        {"point": {"marks": [[1, 7]], "file_data": 7, "acl": None}})
        for changed in changes:
            with self.subTest(changed):
                self.assertRaises((ValueError, TypeError, KeyError), parse_record, json.dumps(dict(fields, **changed)))
        notes = SwapJournal("n", "i", "r", "u", False, "", None, "o")
        changes = ({"temporary": "no"}, {"kept": None}, {"new_uuid": 7})
        for changed in changes:
            with self.subTest(changed):
                write_swap_journal(self.path("place"), notes._replace(**changed))
                self.assertRaises(BackupError, read_swap_journal, self.path("place"))

    def test_a_file_that_is_larger_than_any_of_ours(self):
        with open(self.path("state"), "wb") as file:
            file.truncate(1 << 40)
        with self.assertRaises(BackupError) as caught, within(5):
            read_state_file(self.folder, "state", parse_locks, NOTHING)
        self.assertIn("larger than", caught.exception.message)

    def test_no_empty_file_is_left_where_nothing_can_be_written(self):
        full = OSError(errno.ENOSPC, "No space left on device")
        with mock.patch("os.pwrite", side_effect=full):
            with self.assertRaises(BackupError) as caught:
                PartialLock(self.folder, "h", "id")
        self.assertIn("no space left on device", caught.exception.message)
        self.assertIn("free some space", caught.exception.hint)
        with mock.patch("os.fsync", side_effect=full):
            self.assertRaises(BackupError, replace_file, self.folder, "state", "new")
        self.assertEqual([], os.listdir(self.folder))

    def test_an_idle_lock_that_another_has_just_made_stays(self):
        """Between opening and removing it the file may have become another's."""
        lock = self.path(".h.partial.lock")
        self.write(".h.partial.lock", "old")

        def replace(_):
            os.unlink(lock)
            self.write(".h.partial.lock", "new")
            return True

        with mock.patch("btrfs_backup_ng.try_flock", side_effect=replace):
            clear_idle(self.folder, "h")
        self.assertEqual(b"new", self.content(".h.partial.lock"))
        clear_idle(self.folder, "h")
        self.assertEqual([], os.listdir(self.folder))


class Mutex(InFolder):

    def test_a_lock_that_somebody_keeps_is_not_waited_for_for_ever(self):
        fd = os.open(self.folder, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_SH)
        with mock.patch("btrfs_backup_ng.MUTEX_PATIENCE", 0.1), self.assertRaises(BackupError) as caught, within(5):
            LocalHost(Events()).change_locks(self.folder, [LockChange("a", "/b")], [])
        self.assertIn("another program holds a lock on the folder " + self.folder, caught.exception.message)

    def test_the_changes_of_two_processes_both_stay(self):
        """The second one must not read before the first one has written."""
        host, own = LocalHost(Events()), LockChange("a", "/b")
        with folder_mutex(self.folder):
            before = host.read_locks(self.folder)
            child = self.child("host, change = LocalHost(Events()), LockChange('c', '/d')",
                               "import btrfs_backup_ng as program",
                               "look, said = program.try_flock, []",
                               "def try_flock(fd):",
                               "    is_free = look(fd)",
                               "    if not is_free and not said: said.append(print('waits', flush=True))",
                               "    return is_free",
                               "program.try_flock = try_flock",
                               "host.change_locks(folder, [change], [])",
                               "print('done', flush=True)")
            self.assertEqual("waits\n", child.stdout.readline())
            replace_file(self.folder, LOCK_FILE, json.dumps(add_locks(before, [own])))
        self.assertEqual("done\n", child.stdout.readline())
        self.assertEqual({"a", "c"}, set(host.read_locks(self.folder)))

    def test_many_changes_of_two_processes(self):
        changing = ["host = LocalHost(Events())",
                    "for number in range(30):",
                    "    change = LockChange(sys.stdin.readline().strip(), '/b')",
                    "    host.change_locks(folder, [change], [])"]
        children = [self.child(*changing) for _ in range(2)]
        for at, child in enumerate(children):
            child.stdin.write("".join("{}-{}\n".format(at, number) for number in range(30)))
            child.stdin.close()
        self.assertEqual([0, 0], [child.wait(30) for child in children])
        self.assertEqual(60, len(LocalHost(Events()).read_locks(self.folder)))

    def test_it_is_free_again_after_an_error(self):
        with self.assertRaises(ZeroDivisionError):
            with folder_mutex(self.folder):
                raise ZeroDivisionError
        with folder_mutex(self.folder):
            pass


class RunLock(InFolder):

    def hold_in_child(self, prefix="home"):
        child = self.child("with run_lock(folder, {!r}, 0, print):".format(run_lock_name(prefix)),
                           "    print('held', flush=True)",
                           "    sys.stdin.read()")
        self.assertEqual("held\n", child.stdout.readline())
        return child

    def run_lock(self, prefix="home", wait=0.0):
        self.waits: List[str] = []
        return run_lock(self.folder, run_lock_name(prefix), wait, lambda: self.waits.append("waiting"))

    def test_the_second_run_is_refused_at_once(self):
        self.hold_in_child()
        with self.assertRaises(Busy) as caught:
            self.run_lock().__enter__()
        self.assertEqual(75, caught.exception.status)
        self.assertIn(self.folder, caught.exception.message)
        self.assertIn("--wait", caught.exception.hint)
        self.assertEqual([], self.waits)

    def test_it_waits_so_long_and_says_so_once(self):
        self.hold_in_child()
        begun = time.monotonic()
        self.assertRaises(Busy, self.run_lock(wait=0.4).__enter__)
        self.assertGreaterEqual(time.monotonic() - begun, 0.4)
        self.assertEqual(["waiting"], self.waits)

    def test_it_goes_on_when_the_other_has_ended(self):
        child = self.hold_in_child()
        child.stdin.close()
        with self.run_lock(wait=float("inf")):
            self.assertEqual(0, child.wait(10))

    def test_a_killed_run_leaves_nothing_behind(self):
        child = self.hold_in_child()
        child.kill()
        child.wait()
        with self.run_lock():
            pass

    def test_prefixes_do_not_disturb_each_other(self):
        self.hold_in_child("")
        for prefix in ("home", "home-", ".", "\udcff", "two words"):
            with self.run_lock(prefix):
                self.assertRaises(Busy, self.run_lock(prefix).__enter__)
        self.assertRaises(Busy, self.run_lock("").__enter__)

    def test_it_is_free_again_after_an_error(self):
        with self.assertRaises(ZeroDivisionError):
            with self.run_lock():
                raise ZeroDivisionError
        with self.run_lock():
            pass

    def test_one_that_was_removed_while_it_was_opened_is_none(self):
        """Else two runs would hold a lock each: on the file that is gone, and on the one that is there."""
        def remove_first(fd, token):
            if trying.call_count == 1:
                os.unlink(self.path(".home.lock"))
            return try_run_lock(fd, token)

        with mock.patch("btrfs_backup_ng.try_run_lock", side_effect=remove_first) as trying, self.run_lock():
            self.assertEqual(2, trying.call_count)
            self.assertRaises(Busy, self.run_lock().__enter__)

    def test_its_file_stays_or_is_removed_while_it_is_held(self):
        for lasting in (True, False):
            with run_lock(self.folder, ".home.lock", 0, print, lasting=lasting):
                self.assertRaises(Busy, self.run_lock().__enter__)
            self.assertEqual(lasting, os.path.exists(self.path(".home.lock")))

    def test_changes_go_on_beside_a_run(self):
        """A run of one prefix holds its lock for hours; those of others change the state meanwhile."""
        self.hold_in_child()
        change = LockChange("a", "/b")
        LocalHost(Events()).change_locks(self.folder, [change], [])

    def test_a_link_is_not_followed(self):
        os.symlink(self.path("elsewhere"), self.path(".home.lock"))
        with self.assertRaises(BackupError) as caught:
            self.run_lock().__enter__()
        self.assertIn(".home.lock", caught.exception.message)
        self.assertFalse(os.path.exists(self.path("elsewhere")))

    def test_a_folder_that_is_not_there(self):
        with self.assertRaises(BackupError) as caught:
            run_lock(self.path("missing"), ".home.lock", 0, print).__enter__()
        self.assertIn("missing", caught.exception.message)


class Private(InFolder):
    """Folders for sockets: whoever was killed leaves one behind."""

    LINES = ["import tempfile, socket", "tempfile.tempdir = folder", "private = PrivateFolder()",
             "socket.socket(socket.AF_UNIX).bind(private.path + '/ssh')", "print(private.path, flush=True)",
             "sys.stdin.readline()", "private.end()"]

    def setUp(self):
        super().setUp()
        patch = mock.patch.object(tempfile, "tempdir", self.folder)
        patch.start()
        self.addCleanup(patch.stop)

    def age(self, path, seconds=120):
        os.utime(path, (time.time() - seconds,) * 2)
        return os.path.basename(path)

    def test_it_goes_at_the_end(self):
        process = self.child(*self.LINES)
        path = process.stdout.readline().rstrip()
        self.assertEqual((["ssh"], 0o40700), (os.listdir(path), os.stat(path).st_mode))
        process.communicate("\n", timeout=120)
        self.assertEqual([], os.listdir(self.folder))

    def test_the_next_removes_what_a_killed_one_left(self):
        killed, alive = self.child(*self.LINES), self.child(*self.LINES)
        left, kept = (process.stdout.readline().rstrip() for process in (killed, alive))
        self.end(killed)
        names = {os.path.basename(left), self.age(kept)}
        for name in ("bbng-with-a-file", "bbng-young", "other"):
            os.mkdir(self.path(name))
        self.write("bbng-with-a-file/file", "a user's")
        names |= {self.age(self.path("bbng-with-a-file")), "bbng-young", self.age(self.path("other"))}
        one = PrivateFolder()
        names.add(os.path.basename(one.path))
        self.assertEqual(names, set(os.listdir(self.folder)))  # the killed one's is young
        names.remove(self.age(left))
        other = PrivateFolder()
        self.assertEqual(names | {os.path.basename(other.path)}, set(os.listdir(self.folder)))
        one.end()
        other.end()
        self.assertEqual(["ssh"], os.listdir(kept))
        self.assertEqual({os.path.basename(kept), "bbng-with-a-file", "bbng-young", "other"},
                         set(os.listdir(self.folder)))

    @unittest.skipUnless(os.geteuid() == 0, "gives a folder to another user")
    def test_not_in_a_folder_of_another_user(self):
        os.chown(self.folder, 65534, 65534)
        private = PrivateFolder()
        self.addCleanup(private.end)
        self.assertEqual(("/tmp", []), (os.path.dirname(private.path), os.listdir(self.folder)))

    def test_a_link_is_not_followed(self):
        os.mkdir(self.path("elsewhere"))
        os.symlink("elsewhere", self.path("bbng-link"))
        os.utime(self.path("bbng-link"), (0, 0), follow_symlinks=False)
        self.age(self.path("elsewhere"))
        PrivateFolder().end()
        self.assertEqual({"elsewhere", "bbng-link"}, set(os.listdir(self.folder)))


if __name__ == "__main__":
    unittest.main()
