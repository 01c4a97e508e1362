"""What goes wrong at one destination, of whatever kind and at whatever call, is its own affair.

A wrapped host raises an error at its Nth call. Every verb is run so with two places, one of which is on that host:
the other gets what is due to it, all is told in lines, the status tells, and the next run converges.
"""

import errno
import io
import os
import signal
import sys
import unittest
from typing import Any, Dict, List

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support
from fakes import btrfs_where, fails
from faulty import Faults, faulty_at
from support import BackupTestCase, names, partials, read_locks

import btrfs_backup_ng as program

ERRORS = (program.ConnectionLost("the connection was lost"), OSError(errno.EIO, os.strerror(errno.EIO)),
          OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file"), OSError(errno.EMFILE, "Too many open files"),
          program.BackupError("it did not want to"), RuntimeError("something broke"), KeyError("nobody"),
          MemoryError(), UnicodeDecodeError("ascii", b"\xff", 0, 1, "no"))
ALL = bool(os.environ.get("TORTURE"))


class OneSeam(BackupTestCase):

    def setUp(self):
        super().setUp()
        self.other = self.disk("512M")
        self.names = self.take(1, 2, 3)
        self.rounds = 0
        self.faults = Faults()
        self.where = ""
        faulty_at(self, lambda: (self.where, self.faults))

    def run_verb(self, *words):
        """(status, what was told as errors, everything told, what was printed) of a command in this process."""
        told: List[Any] = []
        request, = program.parse_command(list(words))
        printed, before = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), sys.stdout
        sys.stdout = printed
        try:
            account = program.Account({"": request.task.accounted_source})
            status = program.run_and_report(program.RUNS[request.task.verb][1], request.task,
                                            program.Events(told.append, account), account)
        finally:
            sys.stdout = before
        errors = [event.text for event in told if event.level == "error"]
        for event in told:
            self.assertNotIn("Traceback", event.text if event.level != "debug" else "")
            self.assertNotIn("internal error", event.text)
        return status, errors, told, printed.buffer.getvalue().decode()  # type: ignore[attr-defined]

    def new_folders(self):
        """A folder at each disk with the first of three backups; at the bad one a broken transfer of the second."""
        self.rounds += 1
        bad = os.path.join(self.target_disk.path, "bad%d" % self.rounds)
        good = os.path.join(self.other.path, "good%d" % self.rounds)
        for folder in (bad, good):
            os.mkdir(folder)
            support.send_receive(self.snapshot_path(self.names[0]), folder)
        support.create(os.path.join(bad, ".%s.partial" % self.names[1]))
        support.write_locks(self.snapshots, {self.names[1]: {"locks": [bad]}})
        return bad, good

    def chosen(self, calls, random):
        """Which calls fail, and how: all with all, or each kind of call once."""
        if ALL:
            return [(at, error) for at in range(len(calls)) for error in ERRORS]
        firsts: Dict[str, int] = {}
        for at, name in enumerate(calls):
            firsts.setdefault(name, at)
        return [(at, random.choice(ERRORS)) for at in firsts.values()]

    def each_fault(self, act):
        """Does `act` once with no error, then with each; act gets the folders and a text that says which."""
        chance = support.chance(self)
        self.faults = Faults()
        act("no error at all")
        calls = self.faults.calls
        self.assertGreater(len(calls), 1)
        for at, error in self.chosen(calls, chance):
            self.faults = Faults(at, error)
            act("call {} ({}) raises {!r}".format(at, calls[at], error))

    def check_told(self, status, errors, what):
        if self.faults.error is None:
            self.assertEqual((0, []), (status, errors), what)
        self.assertEqual(bool(errors), status != 0, (what, status, errors))
        self.assertLessEqual(len(errors), 2, (what, errors))
        for error in errors:
            self.assertEqual(1, len(error.splitlines()), (what, error))


class Backup(OneSeam):

    usual_seconds = 20

    def backup_once(self, what):
        bad, good = self.where, good = self.new_folders()
        words = ["-p", "home", "-S", "-n", "2", "--stall-timeout", "20", self.source, bad, good]
        status, errors, told, _ = self.run_verb(*words)
        self.check_told(status, errors, what)
        wanted = self.names[1:]
        self.assertEqual(wanted, names(good), (what, errors))
        self.assertEqual([], partials(good), what)
        if not errors:
            self.assertEqual(wanted, names(bad), (what, told))
        self.where = ""
        status, errors, told, _ = self.run_verb(*words)
        self.assertEqual((0, []), (status, errors), what)
        self.assertEqual([wanted, wanted], [names(bad), names(good)], (what, told))
        self.assertEqual([], partials(bad), what)
        self.assertEqual({}, read_locks(self.snapshots), what)

    def test_the_other_destination_gets_its_backups(self):
        self.each_fault(self.backup_once)

    def dry_run_once(self, what):
        bad, good = self.where, good = self.new_folders()
        status, errors, _, printed = self.run_verb("--dry-run", "-p", "home", "-S", self.source, bad, good)
        self.check_told(status, errors, what)
        self.assertIn("send " + self.names[2], printed.partition("destination " + good)[2], what)

    def test_a_dry_run_shows_the_other(self):
        self.each_fault(self.dry_run_once)


class ParentGone(OneSeam):

    def test_a_parent_that_is_deleted_right_before_the_send(self):
        before, path = program.LocalHost.expected_stream, self.snapshot_path(self.names[1])

        def expected_stream(host: Any, folder: str, snapshot: Any, parent: Any) -> Any:
            if parent is not None and parent.name == self.names[1] and os.path.exists(path):
                support.delete(path)
            return before(host, folder, snapshot, parent)

        self.addCleanup(setattr, program.LocalHost, "expected_stream", before)
        setattr(program.LocalHost, "expected_stream", expected_stream)  # noqa: B010
        status, errors, told, _ = self.run_verb("-p", "home", "-S", self.source, self.target)
        self.assertEqual((1, 1), (status, len(errors)), told)
        self.assertEqual(self.names, names(self.target))
        self.assertEqual((0, []), self.run_verb("-p", "home", "-S", self.source, self.target)[:2])

    def test_a_connection_that_breaks_when_the_stream_is_asked_about(self):
        """Is tried again, as one that breaks later is."""
        before, broken = program.LocalHost.expected_stream, []  # type: Any, List[int]

        def expected_stream(*arguments: Any) -> Any:
            if not broken:
                broken.append(1)
                raise program.ConnectionLost("the connection to x was lost")
            return before(*arguments)

        self.addCleanup(setattr, program.LocalHost, "expected_stream", before)
        setattr(program.LocalHost, "expected_stream", expected_stream)  # noqa: B010
        self.assertEqual((0, []), self.run_verb("-p", "home", "-S", self.source, self.target)[:2])
        self.assertEqual(self.names, names(self.target))


class Looking(OneSeam):
    """Verbs that go over several places."""

    def setUp(self):
        super().setUp()
        self.bad, self.good = (os.path.join(disk.path, "b") for disk in (self.target_disk, self.other))
        for folder in (self.bad, self.good):
            os.mkdir(folder)
        self.run_verb("-p", "home", "-S", self.source, self.bad, self.good)
        self.where = self.bad

    def once(self, words, shown):
        def act(what):
            status, errors, told, printed = self.run_verb(*words)
            if self.faults.error is None:
                self.assertEqual(0, status, (what, errors, printed))
            self.assertTrue(status == 0 or errors or "problem" in printed or "error" in printed, (what, printed))
            self.assertLessEqual(len(errors), 3, (what, errors))
            for name in self.names:
                self.assertRegex(printed, shown.format(name=name, good=self.good), (what, errors))

        return act

    def test_list(self):
        self.each_fault(self.once(["list", "--all", "-p", "home", self.source, self.bad, self.good]
                                  if "--all" in program.format_help("list") else
                                  ["list", "-p", "home", self.source, self.bad, self.good], "{name}"))

    def test_verify(self):
        self.each_fault(self.once(["verify", "-p", "home", self.source, self.bad, self.good],
                                  "{name}  {good}  equal"))

    def test_doctor(self):
        def act(what):
            status, _, _, printed = self.run_verb("doctor", "-p", "home", self.source, self.bad, self.good)
            self.assertIn(self.good, printed, what)
            self.assertRegex(printed, "3 complete backups", what)
            if self.faults.error is not None and "problem" in printed:
                self.assertEqual(1, status, (what, printed))

        self.each_fault(act)

    def test_prune(self):
        def act(what):
            self.rounds += 1
            folders = [os.path.join(disk.path, "p%d" % self.rounds) for disk in (self.target_disk, self.other)]
            for folder in folders:
                os.mkdir(folder)
                for name in self.names[:2]:
                    support.send_receive(self.snapshot_path(name), folder)
            self.where = folders[0]
            status, errors, _, _ = self.run_verb("prune", "-p", "home", "-n", "1", *folders)
            self.check_told(status, errors, what)
            self.assertEqual(self.names[1:2], names(folders[1]), (what, errors))
            self.where = ""
            self.assertEqual(0, self.run_verb("prune", "-p", "home", "-n", "1", *folders)[0], what)
            self.assertEqual(self.names[1:2], names(folders[0]), what)

        self.each_fault(act)

    def test_restore(self):
        def act(what):
            self.rounds += 1
            self.where = self.bad
            folder = os.path.join(self.other.path, "r%d" % self.rounds)
            words = ["restore", os.path.join(self.bad, self.names[1]), folder]
            status, errors, _, _ = self.run_verb(*words)
            self.check_told(status, errors, what)
            self.where = ""
            self.assertEqual(0, self.run_verb(*words)[0], what)
            self.assertEqual([self.names[1]], names(folder), what)
            self.assertEqual([], partials(folder), what)

        self.each_fault(act)


class Meanwhile(BackupTestCase):
    """Real troubles, with the real program."""

    def setUp(self):
        super().setUp()
        self.other_disk = self.disk("512M")
        self.other = os.path.join(self.other_disk.path, "b")
        os.mkdir(self.other)

    def with_sync_failing_at(self, folder):
        return btrfs_where(fails("ERROR: could not sync filesystem: Input/output error"), "filesystem sync " + folder)

    def delete_while_the_first_is_sent(self, deleted, *tasks):
        """The program's end, where that snapshot was deleted by somebody while the first one was under way."""
        support.bulk(os.path.join(self.source, "bulk"), 40)
        taken = self.take(1, 2, 3, 4)
        running = self.start("-p", "home", "-S", self.source, self.target, self.other, *tasks)
        held = running.hold("receive")
        support.delete(self.snapshot_path(taken[deleted]))
        os.kill(held, signal.SIGCONT)
        result = running.finish()
        self.assertNotRegex(result.stderr, "Traceback|internal error|unexpected")
        return taken, result

    def check_without(self, taken, deleted, result):
        self.assertEqual(1, result.status, result.stderr)
        left = [name for name in taken if name != taken[deleted]]
        self.assertIn(taken[deleted], "".join(result.errors))
        for target in (self.target, self.other):
            self.assertEqual(left, names(target), result.stderr)
        self.transfer(to=[self.target, self.other])
        for target in (self.target, self.other):
            self.assertBackedUp(left, target)

    def test_a_snapshot_is_deleted_that_is_still_to_come(self):
        taken, result = self.delete_while_the_first_is_sent(1)
        self.check_without(taken, 1, result)

    def test_with_several_tasks(self):
        srv = support.create(os.path.join(self.source_disk.path, "srv"))
        taken, result = self.delete_while_the_first_is_sent(1, ":", "-p", "srv", srv, self.other_disk.path + "/srv")
        self.check_without(taken, 1, result)

    def test_clearing_a_broken_transfer_fails(self):
        first, = self.take(1)
        support.create(os.path.join(self.target, ".%s.partial" % first))
        support.write_locks(self.snapshots, {first: {"locks": [self.target]}})
        result = self.transfer(to=[self.target, self.other], status=1,
                               env=self.with_sync_failing_at(self.target))
        self.assertErrorSays(result, "cannot sync", "input/output error", self.target)
        self.assertBackedUp([first], self.other)
        self.transfer(to=[self.target, self.other])
        self.assertBackedUp([first])

    def test_retention_fails_at_one(self):
        taken = self.take(1, 2, 3)
        self.transfer(to=[self.target, self.other])
        result = self.transfer("-n", "1", "-N", "1", to=[self.target, self.other], status=1,
                               env=self.with_sync_failing_at(self.target))
        self.assertErrorSays(result, "cannot sync", self.target)
        self.assertEqual(taken[2:], names(self.other))
        self.assertEqual(taken[2:], names(self.snapshots))


if __name__ == "__main__":
    unittest.main()
