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
from typing import Tuple, get_type_hints

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
    AgentHost,
    BackupError,
    Connection,
    Events,
    ExpectedStream,
    LocalHost,
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


class RestrictedTestCase(remote.RemoteTestCase):
    allow = "receive,list"
    more: Tuple[str, ...] = ()

    def setUp(self):
        super().setUp()
        self.under = self.target_there + "/backups"
        words = [support.PYTHON, support.PROGRAM, "agent", "--under", self.under, "--allow", self.allow]
        words += self.more
        command = " ".join(map(shlex.quote, words))
        self.server.authorize("root", 'restrict,command="{}"'.format(command))

    def connect(self):
        """A client of its own, which says what it likes."""
        host = AgentHost("server", lambda first: Connection("server", self.server.argv("true")), Events())
        self.addCleanup(host.end)
        return host

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

    def test_deletion_is_refused_and_said_once(self):
        for _ in range(3):
            self.push()
            support.next_second()
        before = support.names(self.target)
        result = self.push("-n", "1", status=1)
        self.assertEqual(1, len(result.errors), result.stderr)
        self.assertIn("may not delete", result.errors[0])
        self.assertEqual(before, support.names(self.target)[:3])
        self.assertEqual(4, len(support.names(self.target)))

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
        self.assertIn("taken up", result.stderr)
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
        declared = getattr(LocalHost, {"release": "hold"}.get(call, call))
        hints = get_type_hints(declared)
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
        errors = self.host.delete(self.under, [disguised._replace(received_uuid=None)], False)
        self.assertEqual(1, len(errors))

    def test_no_command_and_no_forwarding(self):
        mark = os.path.join(self.server.home, "mark")
        with subprocess.Popen(self.server.argv("touch " + shlex.quote(mark)), stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
            self.assertEqual(program.MARKER, client.stdout.read(len(program.MARKER)))
            client.communicate(timeout=support.HANGS)
        self.assertFalse(os.path.exists(mark))
        port = remote.free_port()
        argv = self.server.argv("x", options=["ExitOnForwardFailure=yes"])
        forward = argv[:1] + ["-N", "-R", "{}:127.0.0.1:{}".format(port, self.server.port)] + argv[1:-1]
        done = subprocess.run(forward, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=20)
        self.assertNotEqual(0, done.returncode)

    def test_sizes_of_its_own_folder_alone(self):
        guard = program.Guard(program.Restriction(self.target, ("list",)))
        ids = [support.subvolume(support.create(os.path.join(folder, "sub"))).id
               for folder in (self.target, self.target_disk.path)]
        shown = guard.allowed_part("own_sizes", [self.target], dict.fromkeys(ids, 1))
        self.assertEqual({ids[0]: 1}, shown)


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
                              if name not in (self.complete, ".home.source") and not name.startswith(".new.")
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


class Pulling(RestrictedTestCase):
    """A server that fetches: its key may read snapshots on the client, and nothing else."""

    allow = "send,list"

    def setUp(self):
        super().setUp()
        self.under = self.source_there + "/home"
        command = " ".join(map(shlex.quote, [support.PYTHON, support.PROGRAM, "agent", "--under", self.under,
                                             "--allow", self.allow]))
        self.server.authorize("root", 'restrict,command="{}"'.format(command))

    def test_what_is_there_can_be_pulled(self):
        names = self.take(1, 2)
        self.pull("-S")
        self.assertBackedUp(names)
        self.assertEqual({}, support.read_locks(self.snapshots))

    def test_no_snapshot_can_be_taken(self):
        names = self.take(1)
        result = self.pull(status=1)
        self.assertIn("may not take snapshots", result.stderr)
        self.assertEqual(names, support.names(self.snapshots))

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


class TenClients(RestrictedTestCase):
    """Ten clients at once into one server, one of them killed each second."""

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
        peaks, kills, deadline = [], 0, time.monotonic() + 240 + 10 * self.kills
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

    seconds = 3600.0 if os.environ.get("TORTURE") else 60.0
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
        argv = [support.PYTHON, support.PROGRAM, "agent", "--under", self.target, "--allow", self.allow]
        while time.monotonic() - begun < self.seconds:
            sent = (program.MARKER if chance.random() < 0.9 else b"") + b"".join(self.frames(chance))
            done = subprocess.run(argv, input=sent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30)
            rounds += 1
            self.assertNotIn(b"Traceback", done.stderr, sent)
            self.assertNotIn(b"internal error", done.stderr + done.stdout, sent)
            self.assertIn(done.returncode, (0, 1, 143), (done, sent))
            self.assertLessEqual(set(os.listdir(self.target_disk.path)), {"backups", "home"})
        after = {path for path in support.tree(self.target_disk.path)
                 if b".partial" not in path and not path.endswith(b".lock")}
        self.assertEqual(set(before), after)
        self.assertGreater(rounds, 10)


if __name__ == "__main__":
    unittest.main()
