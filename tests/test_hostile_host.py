"""A host that was broken into: it can make its own backups wrong, and nothing else here."""

import os
import shlex
import shutil
import sys
import unittest
from typing import Any

import remote
import support

import btrfs_backup_ng as program

AGENT = os.path.join(support.HERE, "hostile_agent.py")


class Forged(remote.RemoteTestCase):
    """Over a real sshd, whose key leads to a hostile agent."""

    def setUp(self):
        super().setUp()
        self.owned = os.path.join(support.scratch_folder(), "owned")
        words = map(shlex.quote, [sys.executable, AGENT, self.owned])
        self.server.authorize("root", 'restrict,command="{}"'.format(" ".join(words)))
        self.other = support.create(os.path.join(self.source_disk.path, "other"))
        self.write("file", "content")

    def test_what_it_tells_is_not_obeyed(self):
        """With two tasks, whose processes ask their parent for connections: a host's word is not theirs."""
        result = self.run_remote("-p", "home", self.source, self.remote_target, ":", "-p", "other",
                                 *self.program_options() + [self.other, self.remote_target])
        self.assertFalse(os.path.exists(self.owned), "the host has run a command here")
        self.assertEqual(0, result.status, result.stderr)
        self.assertEqual(2, len(support.names(self.target)))
        for word in ("this is a bug", "Traceback", "owned", "interrupted"):
            self.assertNotIn(word, result.stderr)


class Told(unittest.TestCase):
    """What a host tells of its progress: a little, of what was asked for, in numbers that can be shown."""

    FACTS = {"snapshot": "home20260131-093000", "destination": "nas", "done": 1, "expected": 2, "rate": 1.0}

    def test_only_what_fits(self):
        for fact, bad in (("done", -1), ("done", 1 << 64), ("expected", 10 ** 19 * 2), ("rate", 1e300), ("rate", -1.0),
                          ("destination", "x" * 5000), ("snapshot", "x" * 5000)):
            told = ("progress", "progress", "", dict(self.FACTS, **{fact: bad}))
            self.assertIsNone(program.told_event(told), fact)
        self.assertIsNotNone(program.told_event(("progress", "progress", "", dict(self.FACTS, expected=None))))

    def test_only_of_what_it_was_asked_to_read(self):
        events: Any = []
        told = ("progress", "progress", "", self.FACTS)
        host: Any = object.__new__(program.AgentHost)
        host.machine, host.labels, host.tellers = "nas", set(), {}
        host.events = program.Events(events.append)
        host.pass_on(told)
        self.assertEqual([], events)
        host.call = lambda *arguments: host.pass_on(told)
        host.digest_tree("/there", "home20260131-093000", "nas")
        self.assertEqual([self.FACTS], [event.facts for event in events])


class LookedInto(support.BackupTestCase):
    """What a host answers when it is asked what files and changes there are."""

    def host(self, **answers):
        return type("Liar", (program.LocalHost,), {name: lambda *_, answer=answer: answer for name, answer in
                                                   answers.items()})(program.Events())

    def test_changes(self):
        both = program.TreesAt(self.host(), ("/b", "one"), ("/b", "two"))
        for kind in ("", "\x1b[2J", "Added"):
            page = program.Changes(1, (program.Change(kind, "a"),))
            with self.assertRaisesRegex(program.Nonsense, "changes that are none"):
                program.all_changes(both._replace(host=self.host(changes=page)))
        self.assertNotIn("\x1b", "".join(program.change_cells(program.Change("added", "a", "", "\x1b[2J"))))
        before, program.MOST_CHANGED = program.MOST_CHANGED, 1 << 23
        self.addCleanup(setattr, program, "MOST_CHANGED", before)
        endless = program.Changes(1, (program.Change("added", "a"),) * program.PAGE_OF_CHANGES)
        with self.assertRaisesRegex(program.BackupError, "more has changed than can be told"):
            program.all_changes(both._replace(host=self.host(changes=endless)))

    def test_a_folder_that_is_never_there(self):
        with self.assertRaisesRegex(program.BackupError, "there is no folder"):
            program.find_path(self.host(look=program.Place("/", "missing")), "/a/b")

    def test_names_in_a_tree_that_nobody_asked_about(self):
        self.take(1)
        history = program.PathHistory(program.Task(verb="history", source=self.source, prefix="home"), program.Events())
        self.addCleanup(history.survey.end)
        history.look()
        other = program.HeldName("x", program.Sighting("another", "x", "file"))
        history.host_of = lambda number: self.host(held_names=[other])  # type: ignore[method-assign]
        self.assertEqual([], history.deleted())


class Listed(unittest.TestCase):
    """What only stream files are: a host that says so of subvolumes is not taken for a place of such files."""

    def test_a_chain_of_subvolumes(self):
        run = program.RestoreRun(program.Task(), program.Events())
        run.listing = program.Listing(chained=True)
        run.host = program.LocalHost(program.Events())
        self.assertEqual("", run.blame())


class ModulesThatLieAbout(remote.RemoteTestCase):
    """Files that are called like modules of Python: none is imported from where anybody may have put it."""

    NAMES = ("hashlib", "stat", "zlib", "json", "queue", "select", "struct", "tempfile", "pwd", "ctypes", "typing",
             "traceback", "collections", "contextlib", "fcntl", "shutil", "syslog", "usercustomize")

    def planted(self, folder):
        """{path: content} of such modules: whoever imports one has left a mark."""
        mark = os.path.join(support.scratch_folder(), "imported")
        text = "import os\nos.close(os.open({!r}, os.O_CREAT | os.O_WRONLY, 0o666))\n"
        return mark, {os.path.join(folder, name + ".py"): text.format(mark + "-" + name) for name in self.NAMES}

    def assertNothingImported(self, mark):
        folder, name = os.path.split(mark)
        self.assertEqual([], [found for found in os.listdir(folder) if found.startswith(name)])

    def test_the_home_of_a_login_that_becomes_root(self):
        account = self.user(sudo=True)
        for shell_says_home in (False, True):
            account.sudoers('Defaults:{0} env_keep += "{1}"\n{0} ALL=(root) NOPASSWD: ALL\n'.format(
                account.name, "XDG_CACHE_HOME " + remote.MARK + " HOME" * shell_says_home))
            self.server.authorize(account.name)
            self.set_endpoints(user=account.name)
            users = ".local/lib/python{}.{}/site-packages/".format(*sys.version_info)
            for place in ("", users):
                mark, files = self.planted(place)
                for path, text in files.items():
                    account.write(path, text)
            account.write(users + "evil.pth", "import usercustomize\n")
            self.write("file", "content")
            self.push("--ssh-sudo")
            self.push("--ssh-sudo", to=["raw+" + self.remote_target])
            self.assertNothingImported(mark)

    def test_the_folder_of_the_program_and_the_current_one(self):
        folder = os.path.join(support.scratch_folder(), "downloads")
        os.mkdir(folder)
        self.addCleanup(shutil.rmtree, folder)
        mark, files = self.planted(folder)
        for path, text in files.items():
            remote.write_file(path, text)
        source = os.path.join(os.path.dirname(support.HERE), "btrfs_backup_ng.py")
        copy = shutil.copy(source, folder)
        for called in ([support.PYTHON, copy], [support.PYTHON, support.PROGRAM]):
            self.write("file", " ".join(called))
            self.run_program("-p", "home", self.source, self.target, program=called, wrapper=["env", "-C", folder])
        self.assertNothingImported(mark)


class LocksOfAHost(remote.RemoteTestCase):
    """A source on another machine has its locks there: that machine decides what they say."""

    def test_destinations_that_it_names_are_not_added(self):
        """A command to run as root here, folders and links to write to, machines to connect to."""
        self.write("file", "content")
        self.pull()
        owned, folder = os.path.join(support.scratch_folder(), "owned"), os.path.join(self.target_disk.path, "another")
        key = "ssh://" + os.uname().nodename + folder
        for named in ("shell://touch " + owned, key, "raw+" + key, folder, "/", "ssh://127.0.0.1:1/x"):
            with self.subTest(named):
                name = support.names(self.snapshots)[0]
                support.write_locks(self.snapshots, {name: {"locks": [named], "parent_locks": []}})
                result = self.pull("-S", "--locked-destinations", status=1)
                self.assertFalse(os.path.exists(owned), "the host has run a command here")
                self.assertFalse(os.path.exists(folder))
                self.assertIn(named, result.stderr)
                self.assertIn("name it as a destination", result.stderr)
