"""Restricted keys: a client may add backups below one folder, and nothing else, however hostile it is."""

import contextlib
import json
import os
import shlex
import struct
import subprocess
import sys
import threading
import time
import unittest
import uuid
from typing import Any, get_type_hints
from unittest import mock

import remote
import support

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import btrfs_backup_ng as program
from btrfs_backup_ng import (
    A_CLONE_PATH,
    A_CLONE_UUID,
    A_PATH,
    A_PATH_LINK,
    A_PATH_TO,
    A_UUID,
    CALLS,
    END,
    PATH_ARGUMENTS,
    RECEIVERS,
    SNAPSHOT,
    STREAM_HEADER,
    STREAM_MAGIC,
    SUBVOL,
    BackupError,
    ExpectedStream,
    LockChange,
    Refused,
    Subvolume,
    make_command,
    parse_uuid,
)

A_CTRANSID, A_CLONE_CTRANSID, A_CLONE_OFFSET, A_CLONE_LEN, A_OFFSET, A_DATA, A_INO = 2, 21, 23, 24, 18, 19, 3
MKFILE, MKDIR, SYMLINK, RENAME, UNLINK, RMDIR, WRITE, CLONE = 3, 4, 8, 9, 11, 12, 15, 16
LINK = 10
NUMBER = struct.Struct("<Q").pack


class RestrictedTestCase(remote.RestrictedTestCase):

    def outside(self, name="outside"):
        """A subvolume beside the folder, with a file, as a complete backup of something."""
        path = support.create(os.path.join(self.target_disk.path, name))
        support.snapshot(path, path + ".ro")
        with open(os.path.join(path, "secret"), "w") as file:
            file.write("secret" * 10000)
        return path


class OrdinaryUse(RestrictedTestCase):

    def test_full_and_incremental(self):
        churn = support.Churn(self.source)
        churn.fill()
        self.push()
        churn.change()
        support.next_second()
        second = self.push()
        self.assertIn("incrementally", second.stderr)
        self.assertBackedUp(support.names(self.snapshots))
        self.assertNothingLeft(self.server)

    def test_the_folder_may_be_made(self):
        self.push(to=[self.remote_target + "/deep/down"])
        self.assertEqual(support.names(self.snapshots), support.names(os.path.join(self.target, "deep/down")))

    def test_what_may_not_be_deleted_stays_and_is_said_once(self):
        for _ in range(3):
            self.push()
            support.next_second()
        before = support.names(self.target)
        planned = self.push("-n", "1", "--dry-run").stdout
        for name in before:
            self.assertIn("keep {}: older than the newest 1, but this key may not delete it".format(name), planned)
        at, = json.loads(self.push("-n", "1", "--dry-run", "--json").stdout)["tasks"][0]["destinations"]
        self.assertEqual([], at["delete"])
        result = self.push("-n", "1")
        self.assertEqual([], result.errors)
        self.assertIn("not deleted at {}, as this key may not: {}".format(
            self.remote_target, ", ".join(before)), result.stderr)
        self.assertNotIn("deleting", result.stderr)
        self.assertEqual(before, support.names(self.target)[:3])
        self.assertEqual(4, len(support.names(self.target)))

    def test_what_is_refused_leaves_no_lock(self):
        self.take(1)
        self.push("-S")
        self.restrict("list")
        self.take(2)
        self.assertErrorSays(self.push("-S", status=1), "this key may not")
        self.assertEqual({}, support.read_locks(self.snapshots))

    def test_but_that_of_what_is_left_there(self):
        proxy = self.proxy(self.server.port)
        self.set_endpoints(port=proxy.port)
        with open(os.path.join(self.source, "big"), "wb") as file:
            file.write(os.urandom(16 << 20))
        self.take(1)
        run = self.start(*self.program_options() + ["-p", "home", "-S", "--limit", "4M", self.source,
                                                    self.remote_target])
        run.wait_for("partial backup", lambda: support.partials(self.target))
        self.restrict("list")
        proxy.cut()
        self.assertErrorSays(run.finish(), "this key may not")
        self.assertEqual([self.name(1)], list(support.read_locks(self.snapshots)))

    def test_a_killed_client_leaves_what_the_next_run_clears(self):
        self.write("big", os.urandom(64 << 19).hex())
        running = self.start(*self.program_options() + ["-p", "home", self.source, self.remote_target])
        running.wait_for("a partial", lambda: support.partials(self.target))
        running.kill()
        self.assertEqual({}, self.server.left_over())
        self.assertEqual([], support.names(self.target))
        self.push("-S")
        self.assertBackedUp(support.names(self.snapshots))

    def test_a_broken_transfer_is_taken_up(self):
        """The connection is cut twice, then everything is killed; what had arrived is not sent again."""
        proxy = self.proxy(self.server.port)
        self.set_endpoints(port=proxy.port)
        size = 48 << 20
        with open(os.path.join(self.source, "big"), "wb") as file:
            file.write(os.urandom(size))
        proxy.cut_after(10 << 20, 12 << 20)
        result = self.push()
        self.assertIn("resumed", result.stderr)
        self.assertLess(proxy.up, 1.3 * size)
        self.assertBackedUp(support.names(self.snapshots))
        self.assertNothingLeft(self.server)

    def test_another_folder_is_refused(self):
        result = self.push(to=[self.server.endpoint(self.target_there + "/elsewhere")], status=1)
        self.assertEqual(1, len(result.errors), result.stderr)
        self.assertIn("not below " + self.under, result.errors[0])
        self.assertFalse(os.path.exists(os.path.join(self.target_disk.path, "elsewhere")))


class Hostile(RestrictedTestCase):
    """Every call, every path: nothing outside changes, no backup changes."""

    def setUp(self):
        super().setUp()
        self.write("file", "content")
        self.push()
        self.complete = support.names(self.target)[0]
        self.secret = self.outside()
        os.symlink(self.target_there, os.path.join(self.target, "link"))
        os.symlink("/", os.path.join(self.target, "root"))
        self.host = self.connect()
        self.before = self.everything()

    def everything(self):
        """What there is on the server's disk, but for partials."""
        found = support.tree(self.target_disk.path)
        return {path: facts for path, facts in found.items()
                if b".partial" not in path and path not in (b"backups", b".", b"")}

    def refused(self, act, *words):
        with self.assertRaises(BackupError) as caught:
            act()
        self.assertIsInstance(caught.exception, Refused, caught.exception)
        for word in words:
            self.assertIn(word, caught.exception.message)
        self.assertNotIn("/proc/", caught.exception.message)

    def ask(self, call, arguments):
        """Does a call; of one that begins a stream, no more than its beginning."""
        if call not in RECEIVERS:
            return self.host.call(call, *arguments)
        connection = self.host.borrow()
        try:
            connection.channel.send_value(program.CALL, (call, arguments, ""))
            connection.channel.send(program.ABORT)
            return connection.channel.result(20)
        finally:
            self.host.give_back(connection)

    def arguments(self, call, path):
        """Arguments of a call that would do, but for the path; found by what it declares, so of new calls too."""
        hints = get_type_hints(program.declaration(call))
        return tuple(path if name in PATH_ARGUMENTS else self.sample(name, hint)
                     for name, hint in hints.items() if name != "return")

    def sample(self, name, hint):
        origin, inner = getattr(hint, "__origin__", None), getattr(hint, "__args__", None) or ()
        if hint is Subvolume:
            return Subvolume(self.complete, support.subvolume(os.path.join(self.target, self.complete)).uuid)
        if hasattr(hint, "_fields"):
            return hint(*(self.sample(field, kind) for field, kind in get_type_hints(hint).items()))
        if type(None) in inner:
            return None
        if origin is not None:
            empty = {"doomed": [self.sample("", Subvolume)] if name == "doomed" else []}
            return empty.get(name, {} if "ict" in str(origin) else () if "uple" in str(origin) else [])
        if hint is str and name in program.TEXT_RULES and not program.TEXT_RULES[name](self.complete):
            return ""  # may stand anywhere
        return {str: self.complete, int: 0, float: 0.0, bool: False}[hint]

    def tearDown(self):
        self.assertEqual(self.before, self.everything())
        super().tearDown()

    def test_every_call_with_a_path_outside(self):
        paths = ["/", "/etc", self.target_there, self.target_there + "/outside", self.under + "/..",
                 self.under + "/../outside", self.under + "/link", self.under + "/link/outside", self.under + "/root",
                 self.under + "/root/etc", self.under + "x", self.under + "/./x", "", "relative", "~",
                 self.under + "/a\nb", self.under + "/" + self.complete, self.under + "/" + self.complete + "/sub"]
        for call in CALLS:
            for path in paths:
                arguments = self.arguments(call, path)
                if path in arguments:
                    with self.subTest(call=call, path=path):
                        self.refused(lambda call=call, arguments=arguments: self.ask(call, arguments))

    def test_no_folder_is_made_in_the_place_of_notes(self):
        for name in (".outstanding_transfers", ".home.source", ".destinations.json/below"):
            with self.subTest(name), self.assertRaises(BackupError):
                self.host.call("make_folder", self.under + "/" + name)

    def test_no_folder_is_made_in_the_place_of_a_backup_to_come(self):
        for name in ("home20990101-000000", "home20990101-000000.btrfs", "deep/home20990101-000000.btrfs.zst/er"):
            with self.subTest(name):
                self.refused(lambda name=name: self.host.call("make_folder", self.under + "/" + name), "of a backup")
        os.rmdir(os.path.join(self.target, "deep"))

    def test_folders_of_transfers_are_not_entered(self):
        for name in (program.begun_name(self.complete), program.partial_name(self.complete)):
            path = os.path.join(self.target, name)
            os.mkdir(path)
            self.addCleanup(os.rmdir, path)
            for call, more in (("list", ()), ("look", ()), ("idle_partials", ())):
                with self.subTest(name=name, call=call):
                    self.refused(lambda name=name, call=call, more=more: self.host.call(
                        call, self.under + "/" + name, *more), "of a transfer")

    def test_a_path_that_changes_while_it_is_looked_at(self):
        """A folder that becomes a link to / and a folder again, all the time: never is more seen than the folder."""
        path, aside = os.path.join(self.target, "x"), os.path.join(self.target, "aside")
        os.symlink("/", aside)
        stop = threading.Event()

        def swap():
            while not stop.is_set():
                os.mkdir(path)
                os.rename(path, path + "2")
                os.rename(aside, path)
                os.rename(path, aside)
                os.rmdir(path + "2")

        swapper = threading.Thread(target=swap)
        swapper.start()
        try:
            seen, deadline = [], time.monotonic() + 3
            while time.monotonic() < deadline:
                with contextlib.suppress(BackupError):
                    seen.append(self.host.list(self.under + "/x"))
        finally:
            stop.set()
            swapper.join()
            os.unlink(aside)
        self.assertEqual({program.Listing()}, set(seen))

    def test_a_mount_below_the_folder(self):
        bound = os.path.join(self.target, "bound")
        os.mkdir(bound)
        support.command("mount", "--bind", self.secret, bound)
        self.addCleanup(support.unmount, bound)
        guard = program.Guard(program.Restriction(self.target, ("list",)))
        for path in (bound, bound + "/deeper"):
            with self.assertRaises(Refused) as caught:
                guard.open_path(path, make=False)
            self.assertIn("mount point", caught.exception.message)

    def test_what_is_mounted_on_a_name(self):
        """A subvolume of another filesystem, or one of this filesystem that lies elsewhere."""
        other = support.create(os.path.join(self.disk().path, "other"))
        for number, source in enumerate((other, self.secret)):
            with contextlib.ExitStack() as undo:
                name = self.name(20 + number)
                point = os.path.join(self.target, name)
                os.mkdir(point)
                undo.callback(os.rmdir, point)
                support.command("mount", "--bind", source, point)
                undo.callback(support.unmount, point)
                self.check_no_call_enters(name)

    def check_no_call_enters(self, name):
        found = 0
        for call in (call for call, groups in CALLS.items() if groups):
            hints = [key for key in get_type_hints(program.declaration(call)) if key != "return"]
            arguments = dict(zip(hints, self.arguments(call, self.target)))
            if set(arguments) & PATH_ARGUMENTS and set(arguments) & program.NAME_ARGUMENTS:
                found += 1
                for key in set(arguments) & program.NAME_ARGUMENTS:
                    arguments[key] = name if isinstance(arguments[key], str) else [[name]]
                guard = program.Guard(program.Restriction(self.target, tuple(program.AGENT_GROUPS)))
                with self.subTest(call=call), contextlib.closing(guard.opened):
                    self.refused(lambda call=call, guard=guard, arguments=arguments: guard.checked(call, arguments),
                                 "mount point")
        self.assertGreater(found, 10)

    def test_every_call_of_another_group(self):
        for call, groups in CALLS.items():
            if not {"receive", "list"} & set(groups):
                with self.subTest(call=call):
                    self.refused(lambda call=call: self.ask(call, self.arguments(call, self.under)), "may not")

    def test_a_backup_cannot_be_deleted(self):
        listed = self.host.list(self.under).named(self.complete)
        self.refused(lambda: self.host.delete(self.under, [listed], False), "may not delete")
        self.refused(lambda: self.host.delete(self.under, [listed._replace(name="../outside")], False))
        disguised = listed._replace(name=".{}.partial".format(self.complete))
        error, = self.host.delete(self.under, [disguised._replace(received_uuid=None)], False)
        self.assertIn(" " + self.under + "/" + disguised.name, error.message)

    def test_no_command_and_no_forwarding(self):
        mark = os.path.join(self.server.home, "mark")
        with subprocess.Popen(self.server.argv("touch " + shlex.quote(mark)), stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
            said = b""
            for _ in range(200):  # what it says before is for whom it concerns
                said += client.stdout.read(1) if not said.endswith(program.MARKER) else b""
            self.assertTrue(said.endswith(program.MARKER), said)
            self.assertIn(b"runs no command: end this with Ctrl-C\n", said)
            client.communicate(timeout=support.HANGS)
        self.assertFalse(os.path.exists(mark))
        port = remote.free_port()
        argv = self.server.argv("x", options=["ExitOnForwardFailure=yes"])
        forward = argv[:1] + ["-N", "-R", "{}:127.0.0.1:{}".format(port, self.server.port)] + argv[1:-1]
        done = subprocess.run(forward, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=support.HANGS)
        self.assertNotEqual(0, done.returncode)


class HostileStreams(RestrictedTestCase):
    """A stream can do nothing but to its own subvolume."""

    def setUp(self):
        super().setUp()
        self.write("file", "content" * 10000)
        self.push()
        self.complete = support.names(self.target)[0]
        self.backup = support.subvolume(os.path.join(self.target, self.complete))
        self.host = self.connect()
        self.before = support.tree(os.path.join(self.target, self.complete))
        self.secret = self.outside()
        self.before_outside = support.tree(self.secret)

    def tearDown(self):
        self.assertEqual(self.before, support.tree(os.path.join(self.target, self.complete)))
        self.assertEqual(self.before_outside, support.tree(self.secret))
        self.assertEqual([self.complete], support.names(self.target))
        self.assertEqual([], [name for name in os.listdir(self.target)
                              if name not in (self.complete, ".home.source", ".sizes") and not name.startswith(".new.")
                              and ".partial" not in name])
        super().tearDown()

    def receive(self, *commands, name="new", expected=None, first=None):
        """Sends a stream of these commands; what the server says against it."""
        own = uuid.uuid4()
        expected = expected or ExpectedStream(name, str(own), None, 0, 0, 0o755)
        first = first or make_command(SUBVOL, [(A_PATH, name.encode()), (A_UUID, parse_uuid(expected.uuid)),
                                               (A_CTRANSID, NUMBER(1))])
        stream = STREAM_HEADER.pack(STREAM_MAGIC, 1) + first + b"".join(commands) + make_command(END, [])
        receiver = self.host.open_receive(self.under, expected, False)
        try:
            receiver.offer(memoryview(stream))
            return receiver.finish(60)
        finally:
            receiver.end()

    def refuse(self, *commands, **more):
        with self.assertRaises(BackupError) as caught:
            self.receive(*commands, **more)
        return caught.exception

    def test_names(self):
        for name in ("../x", "x/y", "/etc/x", ".hidden", ".x.partial", "..", ".", "", "a\nb", "x" * 300):
            with self.subTest(name=name):
                self.refuse(name=name)

    def test_an_existing_name(self):
        self.refuse(name=self.complete)

    def test_another_name_than_was_said(self):
        first = make_command(SUBVOL, [(A_PATH, b"other"), (A_UUID, uuid.uuid4().bytes), (A_CTRANSID, NUMBER(1))])
        self.assertIn("not the planned one", self.refuse(first=first).message)

    def test_a_second_subvolume(self):
        second = make_command(SUBVOL, [(A_PATH, b"second"), (A_UUID, uuid.uuid4().bytes), (A_CTRANSID, NUMBER(1))])
        self.assertIn("second subvolume", self.refuse(second).message)

    def test_a_parent_outside(self):
        parent = support.subvolume(self.secret + ".ro")
        expected = ExpectedStream("new", str(uuid.uuid4()), parent.uuid, 0, 0, 0o755, parent.uuid)
        first = make_command(SNAPSHOT, [(A_PATH, b"new"), (A_UUID, parse_uuid(expected.uuid)), (A_CTRANSID, NUMBER(1)),
                                        (A_CLONE_UUID, parse_uuid(parent.uuid)), (A_CLONE_CTRANSID, NUMBER(1))])
        self.assertIn("parent", self.refuse(expected=expected, first=first).message)

    def test_paths_that_lead_up(self):
        good = [(A_PATH, b"x"), (A_INO, NUMBER(257))]
        for number, attributes in [
                (MKFILE, [(A_PATH, b"../evil")]), (MKDIR, [(A_PATH, b"a/../../evil")]),
                (SYMLINK, [(A_PATH, b"../evil"), (A_PATH_LINK, b"/")]),
                (RENAME, good + [(A_PATH_TO, b"../evil")]), (RENAME, [(A_PATH, b"../" + self.complete.encode())] + [
                    (A_PATH_TO, b"x")]),
                (LINK, good + [(A_PATH_LINK, b"../" + self.complete.encode() + b"/file")]),
                (UNLINK, [(A_PATH, b"..")]), (RMDIR, [(A_PATH, b"../" + self.complete.encode())]),
                (WRITE, [(A_PATH, b"../" + self.complete.encode() + b"/file"),
                         (A_OFFSET, NUMBER(0)), (A_DATA, b"evil")])]:
            with self.subTest(command=number, attributes=attributes):
                self.assertIn("leads up", self.refuse(make_command(MKFILE, good),
                                                      make_command(number, attributes)).message)

    def test_links_lead_nowhere(self):
        """In a stream nothing is reached through a link that it made itself."""
        for target in (b"/", b"..", b"/" + self.complete.encode(), b"/root", os.fsencode(self.under)):
            for number, attributes in [
                    (MKFILE, [(A_PATH, b"s/evil"), (A_INO, NUMBER(300))]),
                    (RENAME, [(A_PATH, b"s/" + self.complete.encode()), (A_PATH_TO, b"s/gone")]),
                    (WRITE, [(A_PATH, b"s/file"), (A_OFFSET, NUMBER(0)), (A_DATA, b"evil")])]:
                with self.subTest(target=target, command=number):
                    self.refuse(make_command(SYMLINK, [(A_PATH, b"s"), (A_INO, NUMBER(258)), (A_PATH_LINK, target)]),
                                make_command(number, attributes))

    def test_cloning_from_outside(self):
        source = support.subvolume(self.secret + ".ro")
        clone = [(A_PATH, b"x"), (A_OFFSET, NUMBER(0)), (A_CLONE_LEN, NUMBER(4096)),
                 (A_CLONE_UUID, parse_uuid(source.uuid)), (A_CLONE_CTRANSID, NUMBER(1)),
                 (A_CLONE_PATH, b"secret"), (A_CLONE_OFFSET, NUMBER(0))]
        self.refuse(make_command(MKFILE, [(A_PATH, b"x"), (A_INO, NUMBER(257))]), make_command(CLONE, clone))

    def test_a_stream_that_is_fine_arrives(self):
        # so that the others do not fail for a reason of their own
        backup = self.receive(make_command(MKFILE, [(A_PATH, b"x"), (A_INO, NUMBER(257))]),
                              make_command(SYMLINK, [(A_PATH, b"s"), (A_INO, NUMBER(258)), (A_PATH_LINK, b"/")]),
                              make_command(WRITE, [(A_PATH, b"x"), (A_OFFSET, NUMBER(0)), (A_DATA, b"fine")]))
        self.assertEqual("new", backup.name)
        support.delete(os.path.join(self.target, "new"))


class TooManyPartials(RestrictedTestCase):
    more = ("--most-partials", "2")

    def test_the_server_cannot_be_filled_with_them(self):
        for name in (".a.partial", ".b.partial"):
            support.create(os.path.join(self.target, name))
        result = self.push(status=1)
        self.assertIn("broken transfers", result.stderr)


class Pruning(RestrictedTestCase):
    allow = "send,list"

    def test_a_deletion_that_is_refused_is_not_told(self):
        names = self.take(1, 2)
        self.transfer()
        for more in (), ("--dry-run",):
            result = self.run_program("prune", *self.program_options() + ["-n", "1", self.remote_target] + list(more),
                                      status=1)
            self.assertIn("may not delete", result.stderr)
            self.assertNotIn("delet", result.stderr.replace("may not delete", "") + result.stdout)
        self.assertBackedUp(names)


class Pulling(RestrictedTestCase):
    """A server that fetches: its key may read snapshots on the client, and nothing else."""

    allow = "send,list"

    def setUp(self):
        super().setUp()
        self.under = self.source_there + "/home"
        command = " ".join(map(shlex.quote, support.PROGRAM_ARGV + ["agent", "--under", self.under,
                                             "--allow", self.allow]))
        self.server.authorize("root", 'restrict,command="{}"'.format(command))

    def test_what_is_there_can_be_pulled(self):
        names = self.take(1, 2)
        self.pull("-S")
        self.assertBackedUp(names)
        self.assertEqual({}, support.read_locks(self.snapshots))

    def test_what_may_not_be_deleted_stays(self):
        names = self.take(1, 2)
        planned = self.pull("-S", "-N", "1", "--dry-run").stdout
        self.assertIn("keep {}: older than the newest 1, but this key may not delete it".format(names[0]), planned)
        result = self.pull("-S", "-N", "1")
        self.assertIn("as this key may not: " + names[0], result.stderr)
        self.assertNotIn("deleting", result.stderr)
        self.assertEqual(names, support.names(self.snapshots))

    def test_no_snapshot_can_be_taken(self):
        names = self.take(1)
        result = self.pull(status=1)
        self.assertIn("may not take snapshots", result.stderr)
        self.assertEqual(names, support.names(self.snapshots))

    def test_it_keeps_no_run_of_the_machine_itself_waiting(self):
        """However long it holds its lock; nor does what that run deletes cost it what it has locked."""
        one, two = self.take(1, 2)
        host, folder = self.connect(), self.under + "/.btrfs-backup-ng/snapshots"
        with host.hold(folder, "home", 0.0):
            host.change_locks(folder, [LockChange(one, "ssh://server/backups")], [])
            self.assertErrorSays(self.pull("-S", status=75), "another run is at work")
            self.assertIn("a run is at work", self.run_program("doctor", "-p", "home", self.source).stdout)
            self.run_program("-p", "home", "-N", "1", self.source, os.path.join(self.target_disk.path, "own"))
        self.assertEqual([one], support.names(self.snapshots)[:-1])
        self.pull("-S")

    def test_notes_of_the_machines_own_destinations_stay(self):
        name, = self.take(1)
        here, nas = program.LocalHost(program.Events()), "ssh://root@nas/backups"
        lock, pin = program.LockChange(name, nas), program.Pin(name, str(uuid.uuid4()), "2024-01-01T00:00:00Z", None)
        here.change_locks(self.snapshots, [lock], [])
        here.change_pins(self.snapshots, "home", {nas: pin})
        before = here.read_locks(self.snapshots), here.read_pins(self.snapshots)
        host, folder = self.connect(), self.under + "/.btrfs-backup-ng/snapshots"
        self.assertEqual(({}, {}), (host.call("read_locks", folder), host.call("read_pins", folder)))
        for call, more in (("change_locks", ([], [lock])), ("change_pins", ("home", {nas: None}))):
            with contextlib.suppress(BackupError):
                host.call(call, folder, *more)
        self.assertEqual(before, (here.read_locks(self.snapshots), here.read_pins(self.snapshots)))
        own = program.LockChange(name, "ssh://server/backups")
        host.call("change_locks", folder, [own], [])
        self.assertEqual([nas, own.destination], here.read_locks(self.snapshots)[name]["locks"])
        host.call("change_locks", folder, [], [own])
        self.assertEqual(before[0], here.read_locks(self.snapshots))

    def test_destinations_that_it_notes_are_not_sent_to(self):
        name, = self.take(1)
        theirs, ours = ("ssh://root@127.0.0.1:1/" + folder for folder in ("theirs", "ours"))
        self.connect().call("change_locks", self.under + "/.btrfs-backup-ng/snapshots",
                            [program.LockChange(name, theirs)], [])
        program.LocalHost(program.Events()).change_locks(self.snapshots, [program.LockChange(name, ours)], [])
        result = self.run_remote("-p", "home", "-S", "--locked-destinations", "--retries", "0", self.source, status=1)
        self.assertEqual(["error: a lock at {} names {}".format(self.source, theirs),
                          "error: {}: connection refused".format(ours)], [line.split(";")[0] for line in result.errors])

    def test_its_notes_have_bounds(self):
        """Else they would grow until nobody could read those of the machine itself, which then backs up nothing."""
        name, = self.take(1)
        host, folder = self.connect(), self.under + "/.btrfs-backup-ng/snapshots"
        *far, last = ("ssh://{}/{}".format(number, "x" * 60000) for number in range(18))
        pin = program.Pin(name, str(uuid.uuid4()), "2024-01-01T00:00:00Z", None)
        locks = [program.LockChange(name, one) for one in far]
        for call, before, after in (
                ("change_locks", (locks, []), ([program.LockChange(name, last)], [])),
                ("change_pins", ("home", dict.fromkeys(far, pin)), ("home", {last: pin}))):
            with self.subTest(call):
                host.call(call, folder, *before)
                for _ in range(2):
                    with self.assertRaisesRegex(Refused, "no room for more notes"):
                        host.call(call, folder, *after)
        host.call("change_locks", folder, [], locks)
        self.assertEqual({}, support.read_locks(self.snapshots))

    def test_what_it_notes_of_no_destination_has_the_same_bounds(self):
        name, = self.take(1)
        host, folder = self.connect(), self.under + "/.btrfs-backup-ng/snapshots"
        pin = program.Pin(name, str(uuid.uuid4()), "2024-01-01T00:00:00Z")

        def note(number):
            disk = pin._replace(filesystem="/dev/{}{}".format(number, "x" * 60000))
            host.call("change_pins", folder, "home{}-".format(number % 2), {program.UNNAMED: disk})

        for number in range(17):
            note(number)
        with self.assertRaisesRegex(Refused, "no room for more notes"):
            note(17)

    def test_notes_at_once_have_the_same_bounds(self):
        """Each of two is allowed before the other has noted anything."""
        self.take(1)
        agent: Any = program.Agent(mock.Mock(), program.Restriction(self.source, ("list", "send")))
        self.addCleanup(agent.guard.forget)
        one, other = (agent.method("change_locks", (
            self.snapshots, [program.LockChange("home", "ssh://{}{}/{}".format(who, number, "x" * 60000))
                             for number in range(12)], [])) for who in "ab")
        one()
        with self.assertRaisesRegex(Refused, "no room for more notes"):
            other()
        self.assertEqual(12, len(support.read_locks(self.snapshots)["home"]["locks"]))

    def test_a_prefix_leads_nowhere(self):
        self.take(1)
        host, folder = self.connect(), self.under + "/.btrfs-backup-ng/snapshots"
        for prefix in ("/../../../evil", "a/b", "/etc/evil", "a\nb"):
            for call, more in (("hold", (0.0, "token")), ("release", (0.0,))):
                with self.subTest(call=call, prefix=prefix), self.assertRaises(Refused):
                    host.call(call, folder, prefix, *more)
        self.assertFalse(os.path.lexists(os.path.join(self.source_disk.path, "evil.lock")))

    def test_a_link_to_another_subvolume_is_not_sent(self):
        secret = support.snapshot(self.source, os.path.join(self.source_disk.path, "secret"))
        self.take(1)
        os.symlink(os.path.relpath(secret, self.snapshots), self.snapshot_path("link"))
        host, folder = self.connect(), self.under + "/.btrfs-backup-ng/snapshots"
        for name, parent in (("link", None), (self.name(1), "link")):
            with self.subTest(name=name), self.assertRaises(Refused) as caught:
                host.call("open_send", folder, name, parent, program.SendOptions())
            self.assertIn("link", caught.exception.message)

    def test_notes_of_the_machine_itself_stay(self):
        names = self.take(1)
        support.write_locks(self.snapshots, {names[0]: {"locks": ["/mnt/disk"], "parent_locks": []}})
        host = self.connect()
        folder = self.under + "/.btrfs-backup-ng/snapshots"
        with self.assertRaises(Refused):
            host.change_locks(folder, [], [LockChange(names[0], "/mnt/disk")])
        self.assertEqual({names[0]: {"locks": ["/mnt/disk"], "parent_locks": []}}, support.read_locks(self.snapshots))


OLDER = """
import sys
sys.path.insert(0, {folder!r})
import btrfs_backup_ng as program
program.NOVELTIES = b"\\nsays nothing"
unpack_class = program.unpack_class

def unpack_strictly(name, items):
    if len(items) > {fields!r}.get(name, len(items)):
        raise TypeError("takes fewer arguments")
    return unpack_class(name, items)

program.unpack_class = unpack_strictly
for name in {calls!r}:
    del program.CALLS[name]
for name in {classes!r}:
    del program.WIRE_CLASSES[name]
for name in "digest_tree", "folder_digests", "describe_folder":
    del getattr(program.Host, name).__annotations__["way"]
sys.exit(program.main())
"""


class NeverTaken(RestrictedTestCase):
    """Whoever may fetch snapshots begins to, and takes nothing of one: so long it cannot be deleted."""

    allow = "send,list"

    def begin(self, *more):
        self.under = self.source_there + "/home"
        command = " ".join(map(shlex.quote, support.PROGRAM_ARGV + ["agent", "--under", self.under,
                                             "--allow", self.allow, *more]))
        self.server.authorize("root", 'restrict,command="{}"'.format(command))
        support.bulk(os.path.join(self.source, "large"), 32)
        self.take(1, 2)
        host = self.connect()
        sender = host.open_send(self.under + "/.btrfs-backup-ng/snapshots", self.name(1), None, program.SendOptions())
        self.addCleanup(sender.end)
        self.assertTrue(support.wait_until(lambda: sender.read(bytearray(1))), "nothing comes")
        return host

    def test_who_holds_it_is_said(self):
        self.begin()
        result = self.run_program("-p", "home", "-S", "-N", "1", self.source, status=1)
        self.assertErrorSays(result, "cannot delete", "not permitted", "it is being sent, or else open, in process ",
                             " of root, logged in from 127.0.0.1, for 0 min")

    def test_it_is_broken_off(self):
        self.begin("--stall-timeout", "1")
        self.assertTrue(support.wait_until(lambda: not self.server.find("agent"), 60), "it goes on")
        self.run_program("-p", "home", "-S", "-N", "1", self.source)
        self.assertEqual([self.name(2)], support.names(self.snapshots))


class OlderVersion(RestrictedTestCase):
    """One side knows no more calls, classes and fields than release 0.7.0, takes no others, and tells none."""

    allow = "receive,list,delete,verify,send,snapshot"
    released = {"ExpectedStream": 12, "Health": 5, "Place": 8, "ResumePoint": 3, "Subvolume": 9}
    later_calls = ("claim", "find_subvolume", "prove_writable", "read_notes", "transfer_sizes")
    later_classes = ("Claim", "FolderNotes")

    def setUp(self):
        super().setUp()
        script = os.path.join(support.scratch_folder(), "older.py")
        with open(script, "w") as file:
            file.write(OLDER.format(folder=os.path.dirname(program.__file__), fields=self.released,
                                    calls=self.later_calls, classes=self.later_classes))
        self.older = [sys.executable, "-I", script]

    def authorize(self, agent, under):
        words = agent + ["agent", "--under", under, "--allow", self.allow]
        self.server.authorize("root", 'restrict,command="{}"'.format(" ".join(map(shlex.quote, words))))

    def use(self, client, agent):
        """Backups, list, verify, restore and prune. Who does not learn whose backups a folder holds deletes none."""
        self.authorize(agent, self.under)
        for more in ((), (), ("-n", "1")):
            support.next_second()
            result = self.push(*more, program=client)
        self.assertIn("an older version of this program answers there", result.stderr)
        names = support.names(self.snapshots)
        self.assertEqual(names, support.names(self.target))
        options, restored = self.program_options(), os.path.join(self.source_disk.path, "restored")
        for before, after, found in ((["list"], [], "3 complete"), (["verify", "-p", "home", self.source], [], "equal"),
                                     (["restore", "--latest"], [restored], "restored"),
                                     (["prune", "-p", "home", "-n", "1"], [], "1 backup kept")):
            result = self.run_program(*before[:1] + options + before[1:] + [self.remote_target] + after,
                                      program=client)
            self.assertIn(found, result.stdout + result.stderr)
        self.assertTrue(os.path.isdir(restored))
        self.assertEqual(names[-1:], support.names(self.target))

    def fetch(self, client, agent):
        """Pulled backups, of which the older ones are deleted in the end on both sides."""
        self.under = self.source_there + "/home"
        self.take(1)
        self.authorize(agent, self.under)
        for more in ((), ("-N", "1", "-n", "1")):
            self.pull(*more, program=client)
            support.next_second()
        newest, = support.names(self.snapshots)
        self.assertEqual([newest], support.names(self.target))
        self.assertEqual({}, support.read_locks(self.snapshots))

    def test_an_older_agent(self):
        self.use(support.PROGRAM_ARGV, self.older)

    def test_an_older_client(self):
        self.use(self.older, support.PROGRAM_ARGV)

    def test_an_older_agent_that_is_pulled_from(self):
        self.fetch(support.PROGRAM_ARGV, self.older)

    def test_an_older_client_that_pulls(self):
        self.fetch(self.older, support.PROGRAM_ARGV)

    def test_an_older_client_is_told_one_pin_of_each_place_or_nothing(self):
        """It would take the disks that take turns there for one, and delete what the others need."""
        pins = [program.Pin("home20240101-000000", str(uuid.uuid4()), "2024-01-01T00:00:00Z", str(uuid.uuid4()))
                for _ in range(2)]
        here = program.LocalHost(program.Events())
        with mock.patch.object(program, "NOVELTIES", b"\nsays nothing"):
            connection = self.connect().borrow()

        def ask():
            connection.channel.send_value(program.CALL, ("read_pins", (self.under,), ""))
            return connection.channel.result(20)

        here.change_pins(self.target, "home", {"/mnt/disk": pins[0]})
        self.assertEqual({"/mnt/disk": {"home": pins[0]}}, ask())
        here.change_pins(self.target, "home", {"/mnt/disk": pins[1]})
        with self.assertRaisesRegex(BackupError, "more is noted here"):
            ask()


class Refusals(RestrictedTestCase):

    def test_refused_calls_are_logged(self):
        said = []
        original = program.log_refusal
        self.addCleanup(setattr, program, "log_refusal", original)
        setattr(program, "log_refusal", said.append)  # noqa: B010
        read_end, write_end = os.pipe()
        self.addCleanup(os.close, write_end)
        agent = program.Agent(program.Channel(read_end, os.dup(1), "x"), program.Restriction(self.target, ("list",)))
        self.addCleanup(agent.channel.close)
        with self.assertRaises(Refused):
            agent.method("delete", (self.target, [], False))
        self.assertEqual(["this key may not delete snapshots and backups: it allows list"],
                         [refusal.message for refusal in said])
        agent.guard.restriction = agent.guard.restriction._replace(allow=("receive",))
        parent = program.ExpectedStream("home20240101-000000", str(uuid.uuid4()), None, 0, 0, 0, str(uuid.uuid4()))
        with self.assertRaises(Refused):
            agent.method("open_receive", (self.target, parent, False))
        self.assertEqual("the parent is not in " + self.target, said[-1].message)


class Deleting(RestrictedTestCase):

    allow = "list,delete"

    def test_what_is_no_snapshot_or_backup_stays(self):
        """A stolen key must not cost what is worked in below its folder."""
        for name in ("work", "home20240101-000000"):
            support.create(os.path.join(self.target, name))
        host = self.connect()
        backup, work = sorted(host.list(self.under).subvolumes, key=lambda s: s.name)
        with self.assertRaisesRegex(Refused, "work is no snapshot or backup"):
            host.delete(self.under, [backup, work], False)
        self.assertEqual([], host.delete(self.under, [backup], False))
        self.assertEqual(["work"], support.names(self.target))


class TenClients(RestrictedTestCase):
    """Ten clients at once into one server, one of them killed each second."""

    usual_seconds = 12
    source_size = "2G"
    target_size = "3G"
    clients = 10
    kills = int(os.environ.get("TORTURE", "6"))

    def setUp(self):
        super().setUp()
        self.chance = support.chance(self)
        self.sources = []
        for number in range(self.clients):
            source = support.create(os.path.join(self.source_disk.path, "client%d" % number))
            for name in range(4):
                with open(os.path.join(source, "data%d" % name), "wb") as file:
                    file.write(os.urandom(4 << 20))
            self.sources.append(source)

    def begin(self, number):
        return self.start(*self.program_options() + ["-p", "c-", self.sources[number],
                                                     "{}/{}".format(self.remote_target, number)])

    def memory(self):
        """MiB that the agents on the server take, each."""
        sizes = []
        for pid, argv in self.server.processes().items():
            if b"agent" in argv:
                with contextlib.suppress(OSError, ValueError):
                    with open("/proc/%d/statm" % pid) as statm:
                        sizes.append(int(statm.read().split()[1]) * 4096 / (1 << 20))
        return sizes

    def test_all_backups_are_complete_in_the_end(self):
        running = {number: self.begin(number) for number in range(self.clients)}
        peaks, kills, deadline = [], 0, time.monotonic() + 4 * support.HANGS + 10 * self.kills
        while running:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(1)
            peaks += self.memory()
            if kills < self.kills:
                victim = self.chance.choice(sorted(running))
                running.pop(victim).kill()
                kills += 1
                time.sleep(0.1)
                running[victim] = self.begin(victim)
            for number, run in list(running.items()):
                if run.process.poll() is not None:
                    result = run.finish()
                    del running[number]
                    if kills < self.kills or result.status != 0:
                        running[number] = self.begin(number)
        for number, source in enumerate(self.sources):
            folder = os.path.join(self.target, str(number))
            snapshots = os.path.join(source, ".btrfs-backup-ng", "snapshots")
            self.assertEqual(support.names(snapshots), support.names(folder))
            self.assertEqual([], support.partials(folder))
            for name in support.names(folder):
                self.assertComplete(os.path.join(folder, name), os.path.join(snapshots, name))
        self.assertLess(max(peaks), 80, "MiB of one agent")
        self.assertEqual({}, self.server.left_over())


class Fuzz(RestrictedTestCase):
    """Whatever comes over the channel: no traceback, no hang, no file touched."""

    usual_seconds = 15
    seconds, rounds = (3600.0, 0) if os.environ.get("TORTURE") else (0.0, 40)
    allow = "receive,list,send,delete,verify,snapshot"

    def frames(self, chance):
        """Some bytes: noise, cut frames, calls of all kinds with arguments of all kinds."""
        names = sorted(CALLS) + ["", "x", "__init__", "command", "serve"]
        values = [None, 0, -1, 2 ** 63, 1.5, True, "", "/", "..", "/etc", self.under + "/x/../../y", "a\nb", "\udcff",
                  "x" * 5000, [], [[]], (), {}, {"a": 1}, frozenset(), Subvolume("../x", "y"), Subvolume("x", None),
                  ExpectedStream("../x", "y", None, 0, 0, 0), [Subvolume(".x.partial", "y")]]
        for _ in range(chance.randrange(1, 12)):
            kind = chance.choice([program.CALL] * 8 + [program.DATA, program.FINISH, program.ABORT, program.RESULT,
                                                       program.FAILED, program.EVENT, b"?"])
            payload = bytes(chance.randrange(256) for _ in range(chance.randrange(60)))
            if kind == program.CALL and chance.random() < 0.9:
                arguments = tuple(chance.choice(values) for _ in range(chance.randrange(5)))
                call = (chance.choice(names), arguments, chance.choice(["", "", "gzip", "x"]))
                payload = json.dumps(program.pack_value(call)).encode()
            length = len(payload) if chance.random() < 0.95 else chance.randrange(1 << 32)
            frame = program.FRAME.pack(kind, length) + payload
            yield frame if chance.random() < 0.8 else frame[:chance.randrange(len(frame))]

    def test_nothing_gets_through(self):
        path = os.path.join(self.target_disk.path, "backups", "kept")
        support.create(path)
        before = support.tree(self.target_disk.path)
        chance, begun, rounds = support.chance(self), time.monotonic(), 0
        argv = support.PROGRAM_ARGV + ["agent", "--under", self.target, "--allow", self.allow]
        while time.monotonic() - begun < self.seconds or rounds <= max(self.rounds, 10):
            sent = (program.MARKER if chance.random() < 0.9 else b"") + b"".join(self.frames(chance))
            done = subprocess.run(argv, input=sent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  timeout=support.HANGS)
            rounds += 1
            self.assertNotIn(b"Traceback", done.stderr, sent)
            self.assertNotIn(b"this is a bug", done.stderr + done.stdout, sent)
            self.assertIn(done.returncode, (0, 1, 143), (done, sent))
            self.assertLessEqual(set(os.listdir(self.target_disk.path)), {"backups", "home"})
        after = {path for path in support.tree(self.target_disk.path)
                 if b".partial" not in path and not path.endswith(b".lock")}
        self.assertEqual(set(before), after)
        self.assertGreater(rounds, 10)


if __name__ == "__main__":
    unittest.main()
