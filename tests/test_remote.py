"""Remote hosts, over a real sshd: push, pull, relay, what the remote looks like, what goes wrong."""

import contextlib
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unittest

import pythons
import remote
import support
from fakes import write_script
from remote import as_program_options, ssh_options
from support import create, names, partials, read_locks, snapshot, subvolume, wait_until

# A path's worst characters; all but NUL and newline may be in it.
HOSTILE = "it's \"a\" $HOME `id` \\ * ~ %s #1 ?x=1 -rf \udce9 caf\u00e9 {a,b} ;!&|"


class TransferTestCase(remote.RemoteTestCase):
    """Churn at the source, snapshots of it, and a run that has to bring them over."""

    def setUp(self):
        super().setUp()
        self.churn = support.Churn(self.source)
        self.churn.fill()

    def take_churned(self, *days):
        taken = []
        for day in days:
            self.churn.change()
            taken += self.take(day)
        return taken

    def check_full_and_incremental(self, run, *targets):
        """run("-S") brings one snapshot in full, later two more incrementally, and leaves nothing open."""
        taken = []
        for target in targets or (self.target,):
            os.chmod(target, 0o700)  # where others may enter it, parents tell nothing
        for days in ((1,), (2, 3)):
            taken += self.take_churned(*days)
            result = run("-S")
            self.assertEqual([], result.errors)
            for target in targets or (self.target,):
                self.assertBackedUp(taken, target)
            self.assertEqual({}, read_locks(self.snapshots))
        for target in targets or (self.target,):
            parents = [subvolume(os.path.join(target, name)).parent_uuid is None for name in taken]
            self.assertEqual([True, False, False], parents)


class Transfers(TransferTestCase):

    def test_push(self):
        self.check_full_and_incremental(self.push)
        self.assertEqual(2, self.server.accepted())
        self.assertNothingLeft(self.server)

    def test_pull(self):
        self.check_full_and_incremental(self.pull)
        self.assertEqual(2, self.server.accepted())
        self.assertNothingLeft(self.server)

    def test_a_pull_takes_the_snapshot_there(self):
        self.pull()
        self.assertEqual(1, len(names(self.snapshots)))
        self.assertBackedUp(names(self.snapshots))

    def test_retention_there(self):
        self.take_churned(1, 2, 3, 4)
        self.push("-S")
        self.push("-S", "-N", "3", "-n", "2")
        self.assertBackedUp([self.name(3), self.name(4)])
        self.assertEqual([self.name(day) for day in (2, 3, 4)], names(self.snapshots))

    def test_retention_at_a_source_there(self):
        self.take_churned(1, 2, 3, 4)
        self.pull("-S", "-N", "2", "-n", "2")
        self.assertBackedUp([self.name(3), self.name(4)])
        self.assertEqual([self.name(3), self.name(4)], names(self.snapshots))

    def test_nothing_to_do(self):
        self.take_churned(1, 2)
        self.push("-S")
        before = support.listing(self.target)
        self.push("-S")
        self.assertUnchanged(before, self.target)

    def test_a_dry_run_changes_nothing(self):
        self.take_churned(1, 2)
        self.push("-S")
        self.take_churned(3)
        disks = self.source_disk.path, self.target_disk.path
        before = support.listing(*disks)
        for run in (self.push, self.pull):
            said = run("--dry-run", "-n", "1").stdout
            self.assertIn(self.name(3), said)
        self.assertUnchanged(before, *disks)
        self.assertNothingLeft(self.server)

    def test_full_on_request(self):
        self.take_churned(1)
        self.push("-S")
        self.take_churned(2)
        self.push("-S", "-I")
        self.assertBackedUp([self.name(1), self.name(2)])
        self.assertIsNone(subvolume(self.backup_path(self.name(2))).parent_uuid)

    def test_locks_name_the_endpoint(self):
        self.take_churned(1)
        support.bulk(os.path.join(self.source, "bulk"), 64)
        self.take_churned(2)
        running = self.start(*self.program_options() + ["-S", "-p", "home", self.source, self.remote_target])
        running.wait_for("a lock", lambda: read_locks(self.snapshots))
        locks = read_locks(self.snapshots)
        running.kill()
        self.assertEqual([[self.remote_target]], [entry["locks"] for entry in locks.values() if entry.get("locks")])
        self.push("-S")
        self.assertEqual({}, read_locks(self.snapshots))
        self.assertBackedUp([self.name(1), self.name(2)])

    def test_locks_of_a_source_there_are_kept_there(self):
        support.bulk(os.path.join(self.source, "bulk"), 64)
        self.take_churned(1)
        running = self.start(*self.program_options() + ["-S", "-p", "home", self.remote_source, self.target])
        running.wait_for("a lock", lambda: read_locks(self.snapshots))
        running.kill()
        self.assertEqual([self.name(1)], list(read_locks(self.snapshots)))
        self.pull("-S")
        self.assertEqual({}, read_locks(self.snapshots))
        self.assertBackedUp([self.name(1)])

    def test_the_form_of_scp(self):
        """host:/path has no place for a port: that comes from ssh's options."""
        self.take_churned(1)
        options = ssh_options() + ["Port=%d" % self.server.port]
        self.push("-S", options=options, to=["root@127.0.0.1:" + self.target_there + "/backups"])
        self.assertBackedUp([self.name(1)])

    @unittest.skipUnless(remote.has_ipv6(), "no IPv6 here")
    def test_ipv6(self):
        self.take_churned(1)
        self.push("-S", to=[self.server.endpoint(self.target_there + "/backups", host="[::1]")])
        self.assertBackedUp([self.name(1)])

    def test_paths_of_any_characters(self):
        for folder, run in ((self.target, self.push_to), (self.source_disk.path, self.pull_from)):
            with self.subTest(run=run.__name__):
                run(os.path.join(folder, HOSTILE))

    def push_to(self, folder):
        os.mkdir(os.fsencode(folder))
        self.check_full_and_incremental(
            lambda *options: self.push(*options, to=[self.remote_target + "/" + HOSTILE]), folder)

    def pull_from(self, source):
        self.source, self.remote_source = create(source), self.server.endpoint(self.source_there + "/" + HOSTILE)
        self.snapshots = os.path.join(self.source, ".btrfs-backup-ng", "snapshots")
        self.target = os.path.join(self.target_disk.path, "pulled")
        os.mkdir(self.target)
        self.churn = support.Churn(self.source)
        self.churn.fill()
        self.check_full_and_incremental(self.pull)

    def test_a_missing_folder_is_made_there(self):
        self.take_churned(1)
        self.push("-S", to=[self.remote_target + "/new/folder"])
        self.assertBackedUp([self.name(1)], os.path.join(self.target, "new", "folder"))


class SeveralMachines(TransferTestCase):
    """A second machine with a disk of its own, and a third disk here."""

    def setUp(self):
        super().setUp()
        disk = self.disk()
        self.other_target = os.path.join(disk.path, "backups")
        os.mkdir(self.other_target)
        there = os.path.join(support.scratch_folder(), "there", "other disk")
        self.other = self.sshd({disk.path: there})
        self.remote_other_target = self.other.endpoint(there + "/backups")
        self.local_target = os.path.join(self.disk().path, "backups")
        os.mkdir(self.local_target)

    def test_relay(self):
        self.check_full_and_incremental(
            lambda *options: self.pull(*options, to=[self.remote_other_target]), self.other_target)
        self.assertEqual((2, 2), (self.server.accepted(), self.other.accepted()))
        self.assertNothingLeft(self.server, self.other)

    def test_here_and_to_two_machines(self):
        to = [self.local_target, self.remote_target, self.remote_other_target]
        self.check_full_and_incremental(
            lambda *options: self.push(*options, to=to), self.local_target, self.target, self.other_target)
        self.assertEqual((2, 2), (self.server.accepted(), self.other.accepted()))
        self.assertNothingLeft(self.server, self.other)

    def test_from_there_to_here_and_to_two_machines(self):
        to = [self.local_target, self.remote_target, self.remote_other_target]
        self.check_full_and_incremental(
            lambda *options: self.pull(*options, to=to), self.local_target, self.target, self.other_target)
        # The source and one target are on the same machine.
        self.assertEqual((2, 2), (self.server.accepted(), self.other.accepted()))

    def test_one_machine_is_away(self):
        self.take_churned(1)
        self.server.stop()
        result = self.push(to=[self.local_target, self.remote_target, self.remote_other_target], status=1)
        self.assertErrorSays(result, "127.0.0.1:%d" % self.server.port, "refused")
        taken = names(self.snapshots)
        self.assertEqual(2, len(taken))
        for target in (self.local_target, self.other_target):
            self.assertBackedUp(taken, target)
        self.server.start()
        self.push("-S", to=[self.local_target, self.remote_target, self.remote_other_target])
        self.assertBackedUp(taken)

    def test_the_source_is_away(self):
        self.server.stop()
        result = self.pull(to=[self.local_target, self.remote_other_target], status=1)
        self.assertErrorSays(result, "127.0.0.1:%d" % self.server.port, "refused")
        self.assertEqual([], names(self.local_target))


class OnTheWire(TransferTestCase):
    """What passes between the machines."""

    def setUp(self):
        super().setUp()
        self.between = self.proxy(self.server.port)
        self.set_endpoints(port=self.between.port)

    def write_lines(self):
        """A file that shrinks well. Its size."""
        text = "".join("%d is a number, and %d is the next\n" % (n, n + 1) for n in range(150000))
        self.write("lines", text)
        return len(text)

    def test_compressed_by_each_program(self):
        for program in ("zstd", "lz4", "gzip"):
            if not remote.find_program(program):
                remote.require("needs the program " + program)
        for option in ("no", "auto", "zstd", "lz4", "gzip"):
            with self.subTest(compress=option):
                self.compare(option)

    def compare(self, option):
        size = {}
        for run in (self.push, self.pull):
            for name in names(self.snapshots):
                support.delete(self.snapshot_path(name))
            for name in names(self.target):
                support.delete(self.backup_path(name))
            before = self.between.up + self.between.down
            self.churn.change()
            least = self.write_lines()
            self.take(1)
            run("-S", "--compress", option)
            size[run.__name__] = self.between.up + self.between.down - before
            self.assertBackedUp([self.name(1)])
            self.take_churned(2)
            run("-S", "--compress", option)
            self.assertBackedUp([self.name(1), self.name(2)])
        for name, passed in size.items():
            if option == "no":
                self.assertGreater(passed, least, name)
            else:
                self.assertLess(passed, least, name)
        self.assertNothingLeft(self.server)

    def test_a_program_that_is_missing_there(self):
        bare = self.sshd(self.server.mounts, hide=("zstd", "lz4"))
        self.set_endpoints(port=bare.port)
        self.write_lines()
        self.take_churned(1)
        result = self.push("-S", "--compress", "zstd", status=1)
        self.assertErrorSays(result, "zstd", "127.0.0.1:%d" % bare.port)
        self.assertEqual([], names(self.target))
        self.push("-S", "--compress", "auto")
        self.assertBackedUp([self.name(1)])

    def test_limit(self):
        support.bulk(os.path.join(self.source, "bulk"), 8)
        self.take(1)
        started = time.monotonic()
        self.push("-S", "--limit", "4M")
        self.assertGreater(time.monotonic() - started, 2)
        self.assertBackedUp([self.name(1)])

    def test_little_for_one_that_has_all(self):
        """A run that finds nothing to do costs some kilobytes, once the program is there."""
        self.take_churned(1)
        self.push("-S")
        before = self.between.up + self.between.down
        self.push("-S")
        self.assertLess(self.between.up + self.between.down - before, 30000)


class OneAtATime(TransferTestCase):
    """The lock of a run on a source there is held there."""

    def setUp(self):
        super().setUp()
        self.churn.change()
        support.bulk(os.path.join(self.source, "bulk"), 16)
        self.take(1)

    def start_pull(self, *options):
        return self.start(*self.program_options() + list(options) + [
            "-S", "-p", "home", self.remote_source, self.target])

    def held_pull(self):
        running = self.start_pull("--limit", "8M")
        self.receive = running.hold("receive")
        return running

    def test_a_second_run_from_here_and_one_on_that_machine(self):
        running = self.held_pull()
        result = self.pull("-S", status=75)
        self.assertErrorSays(result, "another run", "127.0.0.1:%d" % self.server.port)
        self.run_program("-S", "-p", "home", self.source, status=75)
        os.kill(self.receive, signal.SIGCONT)
        self.assertEqual(0, running.finish().status)
        self.pull("-S")
        self.assertBackedUp([self.name(1)])

    def test_it_waits(self):
        running = self.held_pull()
        waiting = self.start_pull("--wait", "60")
        self.assertTrue(wait_until(lambda: "wait" in waiting.result().stderr))
        os.kill(self.receive, signal.SIGCONT)
        self.assertEqual([0, 0], [run.finish().status for run in (running, waiting)])
        self.assertBackedUp([self.name(1)])
        self.assertNothingLeft(self.server)

    def test_it_waits_no_longer_than_told(self):
        self.held_pull()
        started = time.monotonic()
        self.pull("-S", "--wait", "1", status=75)
        self.assertGreater(time.monotonic() - started, 1)

    def test_one_that_waits_and_is_killed(self):
        """Its agent there waits for nothing but the lock: it has to notice that nobody wants it any more."""
        running = self.held_pull()
        waiting = self.start_pull("--wait", "600")
        self.assertTrue(wait_until(lambda: "wait" in waiting.result().stderr))
        os.kill(waiting.pid, signal.SIGKILL)
        os.kill(self.receive, signal.SIGCONT)
        self.assertEqual(0, running.finish().status)
        self.assertNothingLeft(self.server)

    def test_one_that_waits_and_is_killed_while_the_other_goes_on(self):
        self.held_pull()
        before = set(self.server.processes())
        waiting = self.start_pull("--wait", "600")
        self.assertTrue(wait_until(lambda: "wait" in waiting.result().stderr))
        self.assertTrue(set(self.server.processes()) - before)
        os.kill(waiting.pid, signal.SIGKILL)
        self.assertTrue(wait_until(lambda: not set(self.server.processes()) - before))

    def test_free_again_once_the_holder_is_killed(self):
        running = self.held_pull()
        os.kill(running.pid, signal.SIGKILL)
        self.assertNothingLeft(self.server)
        self.pull("-S")
        self.assertBackedUp([self.name(1)])


class TheUsersOwnWay(TransferTestCase):
    """What the user has told ssh wins."""

    def test_a_shared_connection_of_the_users_own(self):
        """Which stays when we are done: its process must not keep the run from ending."""
        socket = os.path.join(self.server.folder, "socket")
        own = ["ControlMaster=auto", "ControlPath=" + socket, "ControlPersist=600"]
        self.take_churned(1)
        try:
            self.push("-S", options=ssh_options() + own)
            self.assertTrue(os.path.exists(socket))
            self.take_churned(2)
            self.push("-S", options=ssh_options() + own)
            self.assertEqual(1, self.server.accepted())
            self.assertBackedUp([self.name(1), self.name(2)])
        finally:
            subprocess.call(["ssh", "-F", "none", "-S", socket, "-O", "exit", "root@127.0.0.1"],
                            stderr=subprocess.DEVNULL)

    def test_no_shared_connection(self):
        self.take_churned(1, 2)
        self.push("-S", options=ssh_options() + ["ControlPath=none", "ControlMaster=no"])
        self.assertBackedUp([self.name(1), self.name(2)])

    def test_a_proxy_command_and_an_alias(self):
        """The host is one that only ssh's options know."""
        self.take_churned(1)
        own = ["HostName=127.0.0.1", "Port=%d" % self.server.port, "User=root", "RequestTTY=force",
               "LocalForward=%d 127.0.0.1:1" % remote.free_port(), "RemoteCommand=none", "Compression=yes"]
        endpoint = "a-name-of-the-users-own:%s/backups" % self.target_there
        self.push("-S", options=ssh_options() + own, to=[endpoint])
        self.assertBackedUp([self.name(1)])

    def test_nothing_of_ours_stays_in_tmp(self):
        folder = os.path.join(self.server.folder, "t")
        os.mkdir(folder)
        self.take_churned(1)
        self.push("-S", env={"TMPDIR": folder})
        self.assertEqual([], os.listdir(folder))

    def test_a_long_name_for_temporary_files(self):
        folder = os.path.join(self.server.folder, "t" * 100)
        os.mkdir(folder)
        self.take_churned(1)
        self.push("-S", env={"TMPDIR": folder})
        self.assertEqual(1, self.server.accepted())

    def test_no_place_for_temporary_files(self):
        self.take_churned(1)
        self.push("-S", env={"TMPDIR": "/proc/nowhere"})
        self.assertBackedUp([self.name(1)])


class OnATerminal(TransferTestCase):
    """With a person at hand ssh may ask."""

    def run_on_terminal(self, *arguments, answers=()):
        """The program's status and all that the terminal has shown; answers: {what is asked for: what to type}."""
        argv = support.PROGRAM_ARGV + list(arguments)
        pid, terminal = pty.fork()
        if pid == 0:
            os.execv(argv[0], [os.fsencode(word) for word in argv])
        shown, left, deadline = "", list(answers), time.monotonic() + 60
        try:
            while time.monotonic() < deadline:
                if not select.select([terminal], [], [], 0.2)[0]:
                    continue
                try:
                    more = os.read(terminal, 65536)
                except OSError:
                    break
                if not more:
                    break
                shown += os.fsdecode(more)
                if left and left[0][0] in shown:
                    os.write(terminal, left.pop(0)[1].encode() + b"\n")
        finally:
            os.close(terminal)
            with contextlib.suppress(ProcessLookupError):
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        return (os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)), shown

    def test_an_unknown_host_key_is_asked_about(self):
        self.take_churned(1)
        hosts = os.path.join(self.server.folder, "hosts")
        options = self.program_options(ssh_options(hosts=hosts))
        arguments = options + ["-S", "-p", "home", self.source, self.remote_target]
        status, shown = self.run_on_terminal(*arguments, answers=[("continue connecting", "yes")])
        self.assertEqual(0, status, shown)
        self.assertBackedUp([self.name(1)])
        self.assertEqual(1, self.server.accepted())
        self.assertTrue(os.path.exists(hosts))

    def test_a_passphrase_is_asked_for_once(self):
        self.take_churned(1)
        locked = os.path.join(self.server.folder, "locked")
        shutil.copy(remote.key("client"), locked)
        support.command("ssh-keygen", "-q", "-p", "-N", "a secret", "-f", locked)
        options = ["IdentityFile=" + locked] + ssh_options()[1:]
        arguments = self.program_options(options) + ["-S", "-p", "home", self.source, self.remote_target]
        status, shown = self.run_on_terminal(*arguments, answers=[("passphrase", "a secret")])
        self.assertEqual(0, status, shown)
        self.assertEqual(1, shown.count("passphrase"))
        self.assertBackedUp([self.name(1)])
        self.assertNothingLeft(self.server)


class OneAuthentication(remote.RemoteTestCase):

    def setUp(self):
        super().setUp()
        self.days = ["home2024%02d%02d-000000" % (number // 25 + 1, number % 25 + 1) for number in range(101)]
        os.makedirs(self.snapshots)
        for number, name in enumerate(self.days):
            self.write("file", "%d\n" % number)
            snapshot(self.source, self.snapshot_path(name))

    def bring_over(self, days):
        """All of them by hand, into one `btrfs receive`."""
        paths = [self.snapshot_path(name) for name in days]
        sends = ["btrfs send -q %s" % paths[0]]
        sends += ["btrfs send -q -p %s %s" % pair for pair in zip(paths, paths[1:])]
        subprocess.check_call(["sh", "-euc", "{ %s; } | btrfs receive -q %s" % ("; ".join(sends), self.target)])

    def test_a_push_with_a_hundred_backups_there(self):
        self.bring_over(self.days[:-1])
        self.push("-S")
        self.assertEqual(1, self.server.accepted())
        self.assertEqual(self.days, names(self.target))
        self.assertComplete(self.backup_path(self.days[-1]), self.snapshot_path(self.days[-1]))

    def test_a_pull_with_a_hundred_snapshots_there(self):
        self.bring_over(self.days[:-1])
        self.pull("-S", "-N", "90", "-n", "80")
        self.assertEqual(1, self.server.accepted())
        self.assertEqual(self.days[-90:], names(self.snapshots))
        self.assertEqual(self.days[-80:], names(self.target))

    def test_a_hundred_to_push(self):
        self.push("-S", timeout=200)
        self.assertEqual(1, self.server.accepted())
        self.assertEqual(self.days, names(self.target))
        self.assertNothingLeft(self.server)

    def test_a_dry_run(self):
        self.push("-S", "--dry-run")
        self.assertEqual(1, self.server.accepted())


class OneHostForBoth(remote.RemoteTestCase):
    """What goes from one folder of a host to another stays there."""

    mib = 32

    def setUp(self):
        super().setUp()
        self.between = self.proxy(self.server.port)
        self.set_endpoints(port=self.between.port)
        support.bulk(os.path.join(self.source, "bulk"), self.mib)
        self.taken = self.take(1)

    def transfer_there(self, *options, **more):
        return self.pull("-S", *options, to=[self.remote_target], **more)

    def moved(self):
        return self.between.up + self.between.down

    def test_the_stream_stays_there(self):
        result = self.transfer_there()
        self.assertRegex(result.stderr, "sent home20240101-000000 to [^\n]*: 3[2-9][.][0-9] MiB in ")
        self.assertBackedUp(self.taken)
        support.bulk(os.path.join(self.source, "more"), self.mib)
        self.taken += self.take(2)
        self.transfer_there()
        self.assertBackedUp(self.taken)
        self.assertLess(self.moved(), 1 << 20)
        self.assertEqual(2, self.server.accepted())
        self.assertNothingLeft(self.server)

    def test_two_folders(self):
        self.pull("-S", to=[self.remote_target, self.remote_target + "-2"])
        self.assertBackedUp(self.taken)
        self.assertBackedUp(self.taken, self.target + "-2")
        self.assertLess(self.moved(), 1 << 20)

    def test_one_that_was_killed_goes_on(self):
        run = self.start(*self.program_options() + ["-S", "-p", "home", "--limit", "16M", self.remote_source,
                                                    self.remote_target])
        run.wait_for("a partial", lambda: os.path.isdir(self.target) and [
            name for name in os.listdir(self.target) if ".partial" in name])
        os.kill(run.pid, signal.SIGKILL)
        run.finish()
        support.wait_until(lambda: not self.server.processes())
        self.transfer_there()
        self.assertBackedUp(self.taken)
        self.assertEqual({}, read_locks(self.snapshots))

    def test_a_cut_line(self):
        run = self.start(*self.program_options() + ["-S", "-p", "home", "--limit", "16M", self.remote_source,
                                                    self.remote_target])
        run.wait_for("a partial", lambda: os.path.isdir(self.target) and [
            name for name in os.listdir(self.target) if ".partial" in name])
        self.between.cut()
        result = run.finish()
        self.assertEqual(0, result.status, result.stderr)
        self.assertIn("broke off: the connection to", result.stderr)
        self.assertBackedUp(self.taken)
        self.assertNothingLeft(self.server)

    def test_what_fails_there_is_said(self):
        os.makedirs(os.path.join(self.target, self.taken[0]))
        result = self.transfer_there(status=1)
        self.assertErrorSays(result, self.taken[0])

    def test_a_restricted_key(self):
        """Nobody has looked at what it could do so: the stream comes here."""
        words = support.PROGRAM_ARGV + ["agent", "--under", self.source_there, "--allow", "receive,list,send,snapshot"]
        self.server.authorize("root", 'restrict,command="{}"'.format(" ".join(map(shlex.quote, words))))
        target = os.path.join(self.source_disk.path, "backups")
        os.makedirs(target)
        self.pull("-S", to=[self.server.endpoint(self.source_there + "/backups", port=self.between.port)])
        self.assertBackedUp(self.taken, target)
        self.assertGreater(self.moved(), self.mib << 20)


class AsAUserWithSudo(TransferTestCase):

    def setUp(self):
        super().setUp()
        self.account = self.user(sudo=True)
        self.server.authorize(self.account.name)
        self.set_endpoints(user=self.account.name)

    def program_options(self, options=None):
        return super().program_options(options) + ["--ssh-sudo"]

    def test_push(self):
        self.check_full_and_incremental(self.push)
        self.assertEqual(2, self.server.accepted())
        self.assertNothingLeft(self.server)

    def test_pull(self):
        self.check_full_and_incremental(self.pull)
        self.assertNothingLeft(self.server)

    def test_with_the_sudoers_line_of_the_readme(self):
        """That user may do nothing else as root."""
        with open(os.path.join(support.HERE, "..", "README.md"), encoding="utf-8") as readme:
            line, = [line.strip() for line in readme if line.strip().startswith("backup ALL=")]
        with open("/etc/sudoers.d/" + self.account.name) as sudoers:
            defaults = next(line for line in sudoers if line.startswith("Defaults"))
        self.account.sudoers(defaults + line.replace("backup", self.account.name, 1) + "\n")
        with self.assertRaises(RuntimeError):
            self.server.ssh("sudo -n id", user=self.account.name)
        self.check_full_and_incremental(self.push)


class LoginShells(TransferTestCase):

    SHELLS = [("sh", ""), ("dash", ""), ("bash", ".bashrc"), ("zsh", ".zshenv"),
              ("fish", ".config/fish/config.fish"), ("tcsh", ".cshrc"), ("busybox", ""), ("rbash", ".bashrc")]

    def setUp(self):
        super().setUp()
        self.account = self.user(sudo=True)
        self.server.authorize(self.account.name)
        self.set_endpoints(user=self.account.name)

    def test_each_with_the_noise_of_its_rc(self):
        for day, (name, rc) in enumerate(self.SHELLS, 1):
            with self.subTest(shell=name):
                self.account.set_shell(remote.login_shell(name))
                if rc:
                    self.account.write(rc, "echo welcome to this machine\n")
                self.take_churned(day)
                self.push("-S", "--ssh-sudo")
                self.assertBackedUp([self.name(n) for n in range(1, day + 1)])
        self.assertNothingLeft(self.server)

    def test_noise_without_end_of_line_and_much_of_it(self):
        self.account.set_shell(remote.login_shell("bash"))
        for day, noise in enumerate(("printf noise", "head -c 200000 /dev/urandom", "seq 30000", "echo noise >&2",
                                     "printf 'x\\0y\\r\\n\\033[2J'"), 1):
            with self.subTest(noise=noise):
                self.account.write(".bashrc", noise + "\n")
                self.take_churned(day)
                self.push("-S", "--ssh-sudo")
                self.assertBackedUp([self.name(n) for n in range(1, day + 1)])

    def test_what_is_not_there_in_the_words_of_each(self):
        """python3 and sudo are missed, and nothing else is."""
        self.take_churned(1)
        bare = self.sshd(self.server.mounts, hide=("python*", "sudo"))
        bare.authorize(self.account.name)
        self.set_endpoints(user=self.account.name, port=bare.port)
        for name, _ in self.SHELLS:
            self.account.set_shell(remote.login_shell(name))
            with self.subTest(shell=name, program="sudo"):
                result = self.push("-S", "--ssh-sudo", status=1)
                self.assertErrorSays(result, ":%d" % bare.port, "sudo is not installed there")
            with self.subTest(shell=name, program="python3"):
                result = self.push("-S", status=1)
                self.assertIn("python3", result.stderr)
                self.assertNotIn("sudo is not installed", result.stderr)

    def test_a_shell_that_changes_folder_and_mask(self):
        self.account.set_shell(remote.login_shell("bash"))
        self.account.write(".bashrc", "cd /; umask 0; export LC_ALL=C PYTHONPATH=/nowhere PYTHONHOME=/nowhere\n")
        self.take_churned(1)
        self.push("-S", "--ssh-sudo")
        self.assertBackedUp([self.name(1)])

    def test_what_its_rc_reads_is_not_taken_from_the_program(self):
        """An rc that reads stdin takes what was meant for the agent: an error, nothing that hangs."""
        self.account.set_shell(remote.login_shell("bash"))
        self.account.write(".bashrc", "head -c 100 >/dev/null\n")
        self.take_churned(1)
        result = self.push("-S", "--ssh-sudo", "--stall-timeout", "20", status=1)
        self.assertErrorSays(result, "127.0.0.1:%d" % self.server.port)
        self.assertNothingLeft(self.server)


class CacheFolder(TransferTestCase):
    """Where the program keeps itself over there: btrfs-backup-ng/SHA256 in the user's cache folder."""

    sshd_options = {"own_cache": True}

    def setUp(self):
        super().setUp()
        self.ours = os.path.join(self.server.cache, "btrfs-backup-ng")

    def cached(self, top=None):
        """The source that is kept there, without what Python has compiled of it."""
        found = [os.path.join(folder, name) for folder, _, files in os.walk(top or self.ours) for name in files]
        return [path for path in found if path.endswith(".py")]

    def check_push(self, day=1):
        self.take_churned(day)
        result = self.push("-S")
        self.assertBackedUp([self.name(n) for n in range(1, day + 1)])
        return result

    def test_kept_once_and_used_again(self):
        self.check_push(1)
        kept, = self.cached()
        with open(kept, "rb") as ours, open(support.PROGRAM, "rb") as there:
            self.assertEqual(ours.read(), there.read())
        before = os.stat(kept)
        between = self.proxy(self.server.port)
        self.set_endpoints(port=between.port)
        self.check_push(2)
        self.assertEqual((before.st_ino, before.st_mtime_ns), (os.stat(kept).st_ino, os.stat(kept).st_mtime_ns))
        # The rest of the stream is small, the program is not: it has not been sent again.
        self.assertLess(between.up, os.path.getsize(kept) + os.path.getsize(self.source))

    def test_private(self):
        self.check_push()
        kept, = self.cached()
        for path in (kept, os.path.dirname(kept)):
            self.assertEqual(0, os.stat(path).st_mode & 0o022, path)

    def test_a_file_of_another_content_is_not_run(self):
        self.check_push(1)
        kept, = self.cached()
        witness = os.path.join(self.server.folder, "witness")
        for day, content in enumerate(("open(%r, 'w')\n" % witness, "", None), 2):
            with self.subTest(content=content):
                os.unlink(kept)
                if content is None:
                    os.mkdir(kept)
                    self.addCleanup(os.rmdir, kept)
                else:
                    remote.write_file(kept, content)
                self.check_push(day)
                self.assertFalse(os.path.exists(witness), "the foreign file was run")

    def test_torn_bytecode(self):
        """As a crash of that system leaves it: the source beside it is right."""
        self.check_push(1)
        kept, = self.cached()
        folder = os.path.join(os.path.dirname(kept), "__pycache__")
        name, = os.listdir(folder)
        os.truncate(os.path.join(folder, name), 5000)
        self.check_push(2)

    def test_changed_at_its_end(self):
        self.check_push(1)
        kept, = self.cached()
        witness = os.path.join(self.server.folder, "witness")
        with open(kept, "a") as file:
            file.write("\nopen(%r, 'w')\n" % witness)
        self.check_push(2)
        self.assertFalse(os.path.exists(witness), "the foreign file was run")

    def test_another_users_folder(self):
        os.makedirs(self.ours)
        os.chown(self.ours, support.NOBODY, support.NOBODY)
        self.check_push(1)
        self.check_push(2)
        self.assertEqual([], os.listdir(self.ours))

    def test_a_folder_that_others_may_write_to(self):
        self.check_push(1)
        kept, = self.cached()
        os.chmod(os.path.dirname(kept), 0o777)
        self.check_push(2)

    def test_a_symbolic_link_in_place_of_the_folder(self):
        elsewhere = os.path.join(self.server.folder, "elsewhere")
        os.mkdir(elsewhere)
        os.chown(elsewhere, support.NOBODY, support.NOBODY)
        os.mkdir(self.server.cache)
        os.symlink(elsewhere, self.ours)
        self.check_push(1)
        self.assertEqual([], os.listdir(elsewhere))

    def test_a_file_in_place_of_the_folder(self):
        remote.write_file(self.server.cache, "")
        self.check_push(1)
        self.check_push(2)

    def test_a_full_home(self):
        support.command("mount", "-t", "tmpfs", "-o", "size=16k", "none", self.server.home)
        self.addCleanup(support.unmount, self.server.home)
        self.server.stop()
        self.server.start()
        self.check_push(1)
        self.check_push(2)

    def test_a_read_only_home(self):
        support.command("mount", "-t", "tmpfs", "-o", "ro", "none", self.server.home)
        self.addCleanup(support.unmount, self.server.home)
        self.server.stop()
        self.server.start()
        self.check_push(1)
        self.check_push(2)

    def test_in_the_home_of_the_account(self):
        """Where no XDG_CACHE_HOME says otherwise. That the user may not receive comes later."""
        account = self.user()
        self.server.authorize(account.name)
        self.set_endpoints(user=account.name)
        self.take_churned(1)
        self.push("-S", status=1)
        kept, = self.cached(os.path.join(account.home, ".cache", "btrfs-backup-ng"))
        self.assertEqual(account.uid, os.stat(kept).st_uid)


class Garbage(unittest.TestCase):

    SCRIPT = """import gc, sys
sys.path.insert(0, sys.argv[1])
import btrfs_backup_ng as program
imported = program.import_program("/nowhere", b"import gc; is_looked_for = gc.isenabled()", False)
print(imported.is_looked_for, gc.isenabled(), getattr(gc, "get_freeze_count", lambda: 1)() > 0)
"""

    def test_none_is_looked_for_while_the_program_is_imported_there(self):
        """Each look would go over all that has been made, the last one at the agent's end."""
        words = [sys.executable, "-c", self.SCRIPT, os.path.dirname(support.PROGRAM)]
        self.assertEqual("False True True\n", support.command(*words))


class OldPythons(remote.RemoteTestCase):
    """The remote's python3 is another one than ours."""

    def python(self, version):
        """A folder with that interpreter as python3, and none else there."""
        found = dict(pythons.all_pythons()).get(version)
        if found is None:
            self.skipTest("no Python %d.%d here" % version)
        folder = os.path.join(remote.folder_for_keys(), "python%d.%d" % version)
        if not os.path.isdir(folder):
            os.mkdir(folder)
            os.symlink(found, os.path.join(folder, "python3"))
        return folder

    def serve(self, folder):
        self.server.stop()
        self.server.hide = ("python*",)
        self.server.environment["PATH"] = folder + ":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        self.server.start()

    def check_push(self):
        self.take(1)
        result = self.push("-S")
        self.take(2)
        self.push("-S")
        self.assertBackedUp([self.name(1), self.name(2)])
        self.assertNothingLeft(self.server)
        return result

    def test_python_3_6(self):
        self.serve(self.python((3, 6)))
        self.assertIn("3.6", self.server.ssh("python3 -V 2>&1"))
        self.check_push()

    def test_python_3_6_in_the_c_locale(self):
        """Which it takes for one of ASCII, and so names for another text."""
        self.serve(self.python((3, 6)))
        folder = os.path.join(self.target, "caf\udce9 \u00e9")
        self.take(1)
        for _ in range(2):
            self.push("-S", to=[self.remote_target + "/" + os.path.basename(folder)])
        self.assertEqual([self.name(1)], names(folder))

    def test_the_newest_python(self):
        self.serve(self.python(max(version for version, _ in pythons.all_pythons())))
        self.check_push()


class BadInput(remote.RemoteTestCase):
    """One clear line, in seconds, and nothing deleted on either side."""

    def setUp(self):
        super().setUp()
        self.take(1, 2)
        self.push("-S", "-q")

    def assertFails(self, words, to=None, options=None, extra=(), server=None, run=None, env=None):
        """The run fails with one error that holds the words; what is common stays on both sides."""
        before = support.listing(self.target_disk.path)
        result = (run or self.push)("-S", "-N", "1", "-n", "1", *extra, to=to, options=options, status=1, env=env)
        self.assertErrorSays(result, *words)
        self.assertEqual("", result.stdout)
        self.assertUnchanged(before, self.target_disk.path)
        self.assertIn(self.name(2), names(self.snapshots))
        self.assertNothingLeft(server or self.server)
        return result

    def assertFailsBothWays(self, words, **more):
        for run in (self.push, self.pull):
            with self.subTest(run=run.__name__):
                self.assertFails(words, run=run, **more)

    def machine(self, port=None):
        return "127.0.0.1:%d" % (port or self.server.port)

    def someone_to_ask(self, answer):
        """An environment in which ssh finds a program that asks the user. It must not be used."""
        asked = os.path.join(self.server.folder, "asked")
        script = write_script(os.path.join(self.server.folder, "askpass"), "touch '%s'\necho '%s'\n" % (asked, answer))
        return {"SSH_ASKPASS": script, "DISPLAY": ":0"}

    def test_unknown_host(self):
        self.assertFails(["no-such-host.invalid"], to=["ssh://root@no-such-host.invalid/backups"])

    def test_refused(self):
        self.server.stop()
        self.assertFailsBothWays([self.machine(), "refused"])

    def test_wrong_key(self):
        allow = "ssh-copy-id -p %d root@127.0.0.1" % self.server.port
        self.assertFailsBothWays([self.machine(), "denied", "key", allow], options=ssh_options(identity="stranger"))

    def test_wrong_key_and_ssh_may_say_nothing(self):
        options = ssh_options(identity="stranger") + ["LogLevel=QUIET"]
        self.assertFailsBothWays([self.machine(), "login refused, or the connection was lost",
                                  "ssh -p %d root@127.0.0.1 true" % self.server.port], options=options)

    def test_changed_host_key(self):
        self.server.stop()
        self.server.host_key = "another_host"
        self.server.start()
        forget = "ssh-keygen -R '[127.0.0.1]:%d'" % self.server.port
        self.assertFailsBothWays([self.machine(), "host key", "changed", forget])

    def test_unknown_host_key(self):
        """Nobody is there to say yes, and host keys are never taken on trust."""
        hosts = os.path.join(self.server.folder, "no_known_hosts")
        log_in = "ssh -p %d root@127.0.0.1" % self.server.port
        self.assertFailsBothWays([self.machine(), "host key", log_in], options=ssh_options(hosts=hosts),
                                 env=self.someone_to_ask("yes"))
        self.assertFalse(os.path.exists(hosts))

    def test_password_needed_without_a_terminal(self):
        self.server.stop()
        self.server.lines = ["PasswordAuthentication yes"]
        self.server.configure(self.server.port)
        config = os.path.join(self.server.folder, "sshd_config")
        with open(config) as file:
            text = file.read().replace("PasswordAuthentication no\n", "")
        remote.write_file(config, text)
        self.server.configure = lambda port: None
        self.server.start()
        self.assertFailsBothWays([self.machine(), "denied"], options=ssh_options(identity="stranger"),
                                 env=self.someone_to_ask("a password"))
        self.assertFalse(os.path.exists(os.path.join(self.server.folder, "asked")))

    def test_no_right_to_sudo(self):
        account = self.user()
        self.server.authorize(account.name)
        self.set_endpoints(user=account.name)
        self.assertFailsBothWays([self.machine(), "sudo", "password"], extra=["--ssh-sudo"])

    def test_no_sudo_there(self):
        server = self.sshd(self.server.mounts, hide=("sudo",))
        self.set_endpoints(port=server.port)
        self.assertFailsBothWays([self.machine(server.port), "sudo"], extra=["--ssh-sudo"], server=server)

    def test_an_ordinary_user(self):
        account = self.user()
        self.server.authorize(account.name)
        self.set_endpoints(user=account.name)
        self.take(3)
        self.assertFailsBothWays([self.machine(), "--ssh-sudo"])

    def test_no_btrfs_there(self):
        server = self.sshd(self.server.mounts, hide=("btrfs",))
        self.set_endpoints(port=server.port)
        self.take(3)
        self.assertFailsBothWays([self.machine(server.port), "btrfs", "btrfs-progs"], server=server)

    def test_accounts_that_run_nothing(self):
        for shell, words in (("/usr/sbin/nologin", ["account is currently not available"]), ("/bin/false", [])):
            with self.subTest(shell=shell):
                account = self.user(shell=shell)
                self.server.authorize(account.name)
                self.set_endpoints(user=account.name)
                self.assertFailsBothWays([self.machine()] + words)

    def test_a_key_that_is_limited_to_another_command(self):
        self.server.authorize("root", 'command="echo backups only"')
        self.assertFailsBothWays([self.machine(), "backups only"])

    def test_a_login_that_says_several_lines(self):
        self.server.authorize("root", 'command="echo python3 is looked for >&2; echo no rules found >&2; '
                              'echo rules not found >&2; exit 3"')
        result = self.push("-S", status=1)
        self.assertErrorSays(result, "said: rules not found; is its login shell restricted?")
        self.assertIn("\n    python3 is looked for\n    no rules found\n", result.stderr)

    def test_a_path_that_is_missing_there(self):
        """On the disk of the system, which is no btrfs, or the disk of the source."""
        folder = os.path.join(self.server.folder, "missing")
        endpoint = self.server.endpoint(folder)
        self.assertFails([folder, self.machine()], to=[endpoint])
        self.assertFalse(os.path.exists(folder))
        self.remote_source = endpoint
        self.assertFails([folder, self.machine()], run=self.pull)

    def test_a_file_there(self):
        remote.write_file(os.path.join(self.target_disk.path, "file"), "")
        self.assertFails([self.target_there + "/file", self.machine()],
                         to=[self.server.endpoint(self.target_there + "/file")])

    def test_a_folder_that_is_no_subvolume_as_source(self):
        os.mkdir(os.path.join(self.source, "folder"))
        self.remote_source += "/folder"
        self.assertFails([self.source_there, "subvolume", self.machine()], run=self.pull)

    def test_a_read_only_target(self):
        self.server.inside("mount", "-o", "remount,ro,bind", self.target_there)
        self.take(3)
        self.assertFails(["read-only", self.machine()])

    def test_a_host_name_that_begins_with_a_dash(self):
        witness = os.path.join(self.server.folder, "witness")
        for endpoint in ("ssh://-oProxyCommand=touch%20" + witness + "/x", "-oProxyCommand=id:/x",
                         "ssh://-l@127.0.0.1/x", "ssh://root@-p/x"):
            for arguments in ([self.source, endpoint], [endpoint, self.target]):
                with self.subTest(arguments=arguments):
                    result = self.run_remote("-p", "home", "--", *arguments, status=2)
                    self.assertEqual(1, len(result.errors), result.stderr)
        self.assertFalse(os.path.exists(witness))

    def test_an_option_of_ssh_that_is_none(self):
        self.assertFails(["NoSuchOption"], options=ssh_options() + ["NoSuchOption=1"])

    def test_ssh_is_missing_here(self):
        folder = os.path.join(remote.folder_for_keys(), "no ssh")
        os.makedirs(folder, exist_ok=True)
        if any(os.path.exists(os.path.join(system, "ssh")) for system in ("/usr/local/sbin", "/usr/sbin", "/sbin")):
            self.skipTest("ssh is where it cannot be hidden")
        for program in ("btrfs", "sudo"):
            if not os.path.lexists(os.path.join(folder, program)):
                os.symlink(remote.find_program(program), os.path.join(folder, program))
        result = self.run_remote("-S", "-p", "home", self.source, self.remote_target, status=1, env={"PATH": folder})
        self.assertErrorSays(result, "ssh", "openssh")


class Faults(remote.RemoteTestCase):
    """Whatever is killed: nothing keeps running on either side, and the next run brings all over."""

    usual_seconds = 10

    def setUp(self):
        super().setUp()
        self.take(1)
        self.push("-S")
        support.bulk(os.path.join(self.source, "bulk"), 96)
        self.take(2)

    def start_push(self, *options):
        return self.start(*self.program_options() + list(options) + [
            "-S", "-p", "home", self.source, self.remote_target])

    def start_pull(self, *options):
        return self.start(*self.program_options() + list(options) + [
            "-S", "-p", "home", "-f", "again", self.remote_source, self.target])

    def under_way(self, running):
        """Wait until a partial of some size is there."""
        running.wait_for("a partial", lambda: partials(self.target))
        running.wait_for("receive", lambda: running.find("receive"))
        return running

    def check_end(self, running, status):
        """The program has ended so, nothing is left, and the next run finishes the job."""
        result = running.finish()
        self.assertIn(result.status, status, result.stderr)
        self.assertNotIn("Traceback", result.stderr)
        self.assertNotIn("this is a bug", result.stderr)
        if result.status == 1:
            self.assertEqual(1, len(result.errors), result.stderr)
        self.assertTrue(wait_until(lambda: not running.processes()), running.processes())
        self.assertNothingLeft(self.server)
        self.push("-S")
        self.assertBackedUp([self.name(1), self.name(2)])
        self.assertEqual({}, read_locks(self.snapshots))
        self.assertNothingLeft(self.server)

    def test_the_agent_is_killed(self):
        running = self.under_way(self.start_push())
        for pid in self.server.find("python"):
            os.kill(pid, signal.SIGKILL)
        self.check_end(running, (0,))

    def test_the_receive_there_is_killed(self):
        running = self.under_way(self.start_push())
        os.kill(running.find("receive"), signal.SIGKILL)
        self.check_end(running, (0,))

    def test_ssh_is_killed(self):
        running = self.under_way(self.start_push())
        for pid, argv in running.processes().items():
            if argv and os.path.basename(argv[0]).rstrip(b":") == b"ssh":
                os.kill(pid, signal.SIGKILL)
        self.check_end(running, (0,))

    def test_the_connection_is_cut(self):
        between = self.proxy(self.server.port)
        self.set_endpoints(port=between.port)
        between.cut_after(20 << 20)
        self.check_end(self.start_push(), (0,))

    def test_the_sshd_of_the_session_is_killed(self):
        running = self.under_way(self.start_push())
        for pid in self.server.find("sshd: "):
            os.kill(pid, signal.SIGKILL)
        self.check_end(running, (0,))

    def test_the_program_is_interrupted(self):
        for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            with self.subTest(signal=number):
                running = self.under_way(self.start_push())
                os.kill(running.pid, number)
                result = running.finish()
                self.assertEqual(status, result.status, result.stderr)
                self.assertEqual({}, running.processes())
                self.assertNothingLeft(self.server)
        self.check_end(running, (130,))

    def test_the_program_is_killed(self):
        running = self.under_way(self.start_push())
        os.kill(running.pid, signal.SIGKILL)
        self.check_end(running, (-signal.SIGKILL,))

    def test_the_program_is_killed_in_a_pull(self):
        running = self.start(*self.program_options() + ["-S", "-p", "home", self.remote_source, self.target])
        self.under_way(running)
        os.kill(running.pid, signal.SIGKILL)
        self.assertTrue(wait_until(lambda: not running.processes()), running.processes())
        self.assertNothingLeft(self.server)
        self.pull("-S")
        self.assertBackedUp([self.name(1), self.name(2)])

    def test_the_network_falls_silent(self):
        """ssh notices by its keepalives, which the user may set."""
        between = self.proxy(self.server.port)
        self.set_endpoints(port=between.port)
        options = as_program_options(["ServerAliveInterval=1", "ServerAliveCountMax=2"])
        running = self.start_push("--stall-timeout", "60", *options)
        self.under_way(running)
        between.hang()
        running.wait_for("a break", lambda: "broke off" in running.result().stderr)
        between.cut()
        between.go_on()
        self.check_end(running, (0,))

    def test_silence_that_only_the_stall_timeout_ends(self):
        between = self.proxy(self.server.port)
        self.set_endpoints(port=between.port)
        options = as_program_options(["ServerAliveInterval=600"])
        running = self.start_push("--stall-timeout", "3", *options)
        self.under_way(running)
        between.hang()
        result = running.finish()
        self.assertEqual(1, result.status)
        self.assertErrorSays(result, "stalled", "127.0.0.1:%d" % between.port)
        between.cut()
        between.go_on()
        self.check_end(running, (1,))

    def test_silence_before_the_greeting(self):
        between = self.proxy(self.server.port)
        self.set_endpoints(port=between.port)
        between.hang()
        running = self.start_push(*as_program_options(["ConnectTimeout=2"]))
        result = running.finish()
        self.assertEqual(1, result.status)
        self.assertErrorSays(result, "127.0.0.1:%d" % between.port)
        between.cut()
        between.go_on()
        self.assertNothingLeft(self.server)

    def test_a_full_disk_there(self):
        filler = os.path.join(self.target_disk.path, "filler")
        with open(filler, "wb") as file:
            space = os.statvfs(self.target_disk.path)
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - (60 << 20))
        running = self.start_push()
        result = running.finish()
        self.assertEqual(1, result.status)
        self.assertErrorSays(result, "space", "127.0.0.1:%d" % self.server.port)
        os.unlink(filler)
        self.check_end(running, (1,))


class RoundTrips(remote.RemoteTestCase):
    """How often a command waits for a far host, beyond what a login takes by itself."""

    usual_seconds = 8.0

    def setUp(self):
        super().setUp()
        self.write("plan", "one")
        self.taken = self.take(1, 2)
        self.between = self.proxy(self.server.port)
        self.set_endpoints(port=self.between.port)
        self.push("-S")  # which the source remembers
        self.between.delay = 0.03

    def round_trips(self, run):
        """The fewest of some runs: a busy machine sends in pieces what belongs together."""
        found = []
        for _ in range(3):
            before = self.between.turns
            run()
            self.assertNothingLeft(self.server)
            found.append((self.between.turns - before) // 2)
        return min(found)

    def assertRoundTrips(self, most, *arguments, status=0):
        accepted = self.server.accepted()
        login = self.round_trips(lambda: self.server.ssh("true", port=self.between.port))
        taken = self.round_trips(lambda: self.run_remote(*arguments, status=status))
        self.assertLessEqual(taken - login, most + 1)  # one more where a busy machine has sent in pieces each time
        self.assertEqual(6, self.server.accepted() - accepted)

    def test_list(self):
        self.assertRoundTrips(2, "list", self.remote_target)

    def test_list_with_its_source(self):
        self.assertRoundTrips(2, "list", self.source, self.remote_target)

    def test_history(self):
        self.assertRoundTrips(6, "history", self.remote_target + "/plan")

    def test_history_from_the_source(self):
        self.assertRoundTrips(3, "history", self.source + "/plan", self.remote_target)

    def test_nothing_to_back_up(self):
        self.assertRoundTrips(3, "-S", "-p", "home", self.source, self.remote_target)

    def test_diff(self):
        self.assertRoundTrips(3, "diff", *(self.remote_target + "/" + name for name in self.taken))

    def test_doctor(self):
        self.assertRoundTrips(7, "doctor", self.source, self.remote_target, status=None)


class BadNetworks(remote.RemoteTestCase):
    """A transfer that breaks goes on where it stopped: what has arrived is not sent again."""

    MIB = 96

    def setUp(self):
        super().setUp()
        self.between = self.proxy(self.server.port)
        self.set_endpoints(port=self.between.port)
        self.take(1)
        self.push("-S")
        support.bulk(os.path.join(self.source, "bulk"), self.MIB)
        self.take(2)
        self.passed = self.between.up + self.between.down

    def moved(self):
        """MiB through the network since the set-up."""
        return (self.between.up + self.between.down - self.passed) / support.MIB

    def assertGoneOn(self, result, to=None):
        self.assertEqual([], result.errors)
        self.assertBackedUp([self.name(1), self.name(2)] if to is None else to)
        self.assertEqual({}, read_locks(self.snapshots))
        # What was under way in pipes and buffers at each cut goes again.
        self.assertLess(self.moved(), 1.5 * self.MIB)
        self.assertNothingLeft(self.server)

    def test_a_push_is_cut_three_times(self):
        before = self.server.accepted()
        self.between.cut_after(20 << 20, 20 << 20, 20 << 20)
        self.assertGoneOn(self.push("-S", timeout=120))
        self.assertEqual(4, self.server.accepted() - before)

    def test_a_pull_is_cut_three_times(self):
        support.delete(self.backup_path(self.name(1)))
        self.between.cut_after(20 << 20, 20 << 20, 20 << 20)
        self.assertGoneOn(self.pull("-S", timeout=120))

    def test_the_next_run_goes_on(self):
        self.between.cut_after(60 << 20)
        result = self.push("-S", "--retries", "0", status=1)
        self.assertEqual(1, len(result.errors), result.stderr)
        self.assertEqual([self.name(1)], names(self.target))
        again = self.push("-S")
        self.assertIn("resuming " + self.name(2), again.stderr)
        self.assertGoneOn(again)

    def test_from_the_start_on_request(self):
        self.between.cut_after(60 << 20)
        self.push("-S", "--retries", "0", status=1)
        self.push("-S", "--no-resume")
        self.assertBackedUp([self.name(1), self.name(2)])
        self.assertGreater(self.moved(), 1.5 * self.MIB)

    def test_the_machine_is_away_for_a_while(self):
        running = self.start(*self.program_options() + ["-S", "-p", "home", self.source, self.remote_target])
        running.wait_for("something", lambda: self.moved() > 20)
        self.between.refuse()
        self.between.cut()
        time.sleep(2)
        self.between.listen()
        self.assertGoneOn(running.finish(120))

    def test_the_client_is_killed(self):
        running = self.start(*self.program_options() + ["-S", "-p", "home", self.source, self.remote_target])
        running.wait_for("something", lambda: self.moved() > 40)
        os.kill(running.pid, signal.SIGKILL)
        self.assertNothingLeft(self.server)
        self.assertGoneOn(self.push("-S"))

    def test_compressed_on_the_way(self):
        self.between.cut_after(20 << 20, 20 << 20)
        self.assertGoneOn(self.push("-S", "--compress", "auto", timeout=120))

    def test_a_relay_is_cut_on_both_sides(self):
        disk = self.disk()
        other_target = os.path.join(disk.path, "backups")
        os.mkdir(other_target)
        there = os.path.join(support.scratch_folder(), "there", "other disk")
        other = self.sshd({disk.path: there})
        beyond = self.proxy(other.port)
        self.between.cut_after(30 << 20)
        beyond.cut_after(60 << 20)
        result = self.pull("-S", to=[other.endpoint(there + "/backups", port=beyond.port)], timeout=120)
        self.assertEqual([], result.errors)
        self.assertBackedUp([self.name(1), self.name(2)], other_target)
        self.assertLess((beyond.up + beyond.down) / support.MIB, 1.5 * self.MIB)
        self.assertNothingLeft(self.server, other)


if __name__ == "__main__":
    unittest.main()
