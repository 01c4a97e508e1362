"""Remote hosts without a Python that can run the program: plain commands over ssh do the main job."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
import uuid
from typing import Any

import fakes
import pythons
import remote
import support
from support import subvolume

sys.path.insert(0, os.path.dirname(support.HERE))
import btrfs_backup_ng as program


class PlainTestCase(remote.RemoteTestCase):
    """No Python there."""

    sshd_options = {"hide": ("python*",)}

    def plain_host(self):
        endpoint = program.parse_endpoint(self.server.endpoint(self.source_there))
        events = program.Events()
        options = program.SshOptions(tuple(remote.ssh_options()), False)
        connector = program.SshConnector(endpoint, options, events)
        self.addCleanup(connector.end)
        host: Any = program.PlainHost(connector, events)
        self.addCleanup(host.end)
        return host

    def at_each(self, words, script):
        """Has a script run there before each `btrfs` with these first words."""
        self.there_is("btrfs", 'case "$1 $2" in "{}") ({});; esac\nexec REAL "$@"\n'.format(words, script))

    def there_is(self, name, text):
        """Has a script be the program of that name there."""
        folder = fakes.folder_with(name, text)
        self.server.stop()
        self.server.environment["PATH"] = folder + ":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        self.server.start()


class WithoutPython(PlainTestCase):
    """Plain commands do the main job, and the run says what is lost."""

    def check(self):
        self.take(1)
        first = self.push("-S")
        self.assertIn("python", first.stderr.lower())
        self.assertRegex(first.stderr, "(?m)^warning: ")
        self.take(2, 3)
        self.push("-S", "-n", "2")
        self.assertBackedUp([self.name(2), self.name(3)])
        self.assertIsNotNone(subvolume(self.backup_path(self.name(3))).parent_uuid)
        self.assertNothingLeft(self.server)

    def test_push(self):
        self.check()

    def test_files_are_not_looked_for_there(self):
        one, two = self.take(1, 2)
        self.push("-S")
        result = self.run_remote("history", os.path.join(self.source, "day1"), status=1)
        self.assertIn("now; {} and {} here, ".format(one, two), result.stdout)
        self.assertErrorSays(result, self.remote_target, "has no Python 3.6")
        result = self.run_remote("history", self.remote_source + "/day1", status=1)
        self.assertErrorSays(result, "cannot be looked for there", "Python 3.6")
        result = self.run_remote("diff", self.remote_target + "/" + one, self.remote_target + "/" + two, status=1)
        self.assertErrorSays(result, "has no Python 3.6")

    def test_old_python(self):
        """python3 is in truth a Python 2."""
        found = dict(pythons.all_pythons()).get((2, 7))
        self.there_is("python3", 'exec %s "$@"\n' % found if found else fakes.fails("Unknown option: -I"))
        self.check()

    def busybox_tools(self):
        """A folder in which all tools but btrfs are busybox's."""
        folder = tempfile.mkdtemp(prefix="busybox tools", dir=remote.folder_for_keys())
        os.chmod(folder, 0o755)
        support.command(os.path.realpath(remote.login_shell("busybox")), "--install", "-s", folder)
        os.symlink(remote.find_program("btrfs"), os.path.join(folder, "btrfs"))
        return folder

    def test_slashes_too_many(self):
        """bash keeps two at the beginning, busybox goes up from them to themselves."""
        place, limit = program.LocalHost(program.Events()).look(self.target), remote.find_program("timeout")
        os.symlink("/" + self.target, os.path.join(self.target_disk.path, "link"))
        for shell, tools in (("sh", os.environ["PATH"]), ("bash", os.environ["PATH"]), ("sh", self.busybox_tools())):
            for path in ("/" + self.target, self.target + "/", os.path.join(self.target_disk.path, "link//")):
                with self.subTest(path, shell=shell, tools=tools):
                    script = program.shell_command(program.PLAIN_LOOK, (path,)).replace("sh", shell, 1)
                    done = subprocess.run([limit, "20", "/bin/sh", "-c", script], env={"PATH": tools},
                                          stdout=subprocess.PIPE, check=True)
                    found = program.parse_plain_look(os.fsdecode(done.stdout))
                    self.assertEqual((place.path, place.filesystem), (found.path, found.filesystem))

    def test_busybox(self):
        busybox, folder = remote.login_shell("busybox"), self.busybox_tools()
        account = self.user(shell=busybox)
        self.server.stop()
        self.server.environment["PATH"] = folder
        self.server.start()
        self.assertIn("BusyBox", self.server.ssh("ls --help 2>&1"))
        self.assertTrue(account.name)
        self.check()

    def test_contents_that_could_not_be_written(self):
        """What `sync` says then names the folder, whose name may have in it what it says where it knows no -f."""
        self.take(1)
        self.there_is("sync", "case \"$1\" in -f) echo \"sync: error syncing '$2': Input/output error\" >&2; exit 1;; "
                              "esac; exec REAL\n")
        for name in ("optional", "messages"):
            with self.subTest(name):
                os.mkdir(os.path.join(self.target_disk.path, name), 0o700)
                to = self.server.endpoint(os.path.join(self.target_there, name))
                result = self.push("-S", "--retries", "0", to=[to], status=1)
                self.assertErrorSays(result, "contents of files were lost")
                self.assertEqual([], support.names(os.path.join(self.target_disk.path, name)))

    def test_pull(self):
        self.take(1)
        self.pull("-S")
        self.take(2)
        self.pull("-S")
        self.assertBackedUp([self.name(1), self.name(2)])
        self.assertNothingLeft(self.server)

    def test_a_restore_from_there(self):
        self.take(1)
        self.push("-S")
        folder = os.path.join(self.source_disk.path, "restored")
        os.mkdir(folder)
        words = ["restore"] + self.program_options() + [self.remote_target, "--latest", folder]
        planned = self.run_program(*words + ["--dry-run"])
        self.assertRegex(planned.stdout, "restore {} in full to {}, about [0-9]+ ".format(self.name(1), folder))
        self.assertEqual([], support.names(folder))
        self.run_program(*words)
        self.assertTreesEqual(self.snapshot_path(self.name(1)), os.path.join(folder, self.name(1)))


class AnyShellAndPath(PlainTestCase):
    """Whatever the login shell, as a user with sudo."""

    usual_seconds = 25

    SHELLS = ("sh", "dash", "bash", "zsh", "fish", "tcsh", "busybox", "rbash")
    # What one of them takes for something else: doubled backslashes, an exclamation mark, a brace, a caret.
    FOLDER = "a \\\\ b\\'c\\ \"d\" $HOME `id` !! {a,b} ^ ~ % \udce9 \u00e9 *?[x] #;&|<>()-"

    def setUp(self):
        super().setUp()
        self.account = self.user(sudo=True)
        self.server.authorize(self.account.name)
        self.set_endpoints(user=self.account.name)
        self.churn = support.Churn(self.source)
        self.churn.fill(30)

    def program_options(self, options=None):
        return super().program_options(options) + ["--ssh-sudo"]

    def test_push(self):
        folder = os.path.join(self.target, self.FOLDER)
        self.remote_target += "/" + self.FOLDER
        for day, shell in enumerate(self.SHELLS, 1):
            with self.subTest(shell=shell):
                self.account.set_shell(remote.login_shell(shell))
                self.account.write(".bashrc", "echo welcome\n")
                self.account.write(".zshenv", "echo welcome\n")
                self.account.write(".cshrc", "echo welcome\n")
                self.account.write(".config/fish/config.fish", "echo welcome\n")
                self.churn.change(20)
                self.take(day)
                before = self.server.accepted()
                self.push("-S")
                # one to learn that there is no Python, one for all the rest
                self.assertEqual(2, self.server.accepted() - before)
                self.assertBackedUp([self.name(n) for n in range(1, day + 1)], folder)
        self.push("-S", "-N", "3", "-n", "2")
        last = len(self.SHELLS)
        self.assertBackedUp([self.name(last - 1), self.name(last)], folder)
        self.assertNothingLeft(self.server)

    def test_pull(self):
        self.source = support.create(os.path.join(self.source_disk.path, self.FOLDER))
        self.remote_source = self.server.endpoint(self.source_there + "/" + self.FOLDER, user=self.account.name)
        self.snapshots = os.path.join(self.source, ".btrfs-backup-ng", "snapshots")
        for day, shell in enumerate(self.SHELLS, 1):
            with self.subTest(shell=shell):
                self.account.set_shell(remote.login_shell(shell))
                self.take(day)
                self.pull("-S")
                self.assertBackedUp([self.name(n) for n in range(1, day + 1)])
                self.assertEqual({}, support.read_locks(self.snapshots))
        self.pull("-S", "-N", "3", "-n", "2")
        self.assertEqual(3, len(support.names(self.snapshots)))
        self.pull()
        self.assertEqual(4, len(support.names(self.snapshots)))
        self.assertNothingLeft(self.server)


class UnderWay(PlainTestCase):
    """What happens while much is sent."""

    def setUp(self):
        super().setUp()
        self.take(1)
        self.push("-S")
        support.bulk(os.path.join(self.source, "bulk"), 64)
        self.take(2)

    def start_push(self, *options):
        return self.start(*self.program_options() + list(options) + [
            "-S", "-p", "home", self.source, self.remote_target])

    def under_way(self, running):
        running.wait_for("a partial", lambda: support.partials(self.target))
        running.wait_for("receive", lambda: running.find("receive"))
        return running

    def check_end(self, running, statuses):
        result = running.finish(120)
        self.assertIn(result.status, statuses, result.stderr)
        self.assertNotIn("Traceback", result.stderr)
        self.assertTrue(support.wait_until(lambda: not running.processes()), running.processes())
        self.assertNothingLeft(self.server)
        self.push("-S")
        self.assertBackedUp([self.name(1), self.name(2)])
        self.assertEqual({}, support.read_locks(self.snapshots))

    def test_the_receive_there_is_killed(self):
        running = self.under_way(self.start_push("--retries", "0"))
        os.kill(running.find("receive"), signal.SIGKILL)
        self.check_end(running, (1,))

    def test_the_connection_is_cut(self):
        between = self.proxy(self.server.port)
        self.set_endpoints(port=between.port)
        between.cut_after(20 << 20)
        self.check_end(self.start_push("--retries", "0"), (1,))

    def test_a_cut_connection_is_tried_again(self):
        """Each way: what ends by ssh's own status is the connection, whatever ssh says of it."""
        for run in (self.push, self.pull):
            with self.subTest(run=run.__name__):
                between = self.proxy(self.server.port)
                self.set_endpoints(port=between.port)
                between.cut_after(20 << 20)
                result = run("-S", "--retries", "3")
                self.assertIn("trying again", result.stderr)
                for name in support.names(self.target):
                    support.delete(self.backup_path(name))

    def test_the_program_is_killed(self):
        running = self.under_way(self.start_push())
        os.kill(running.pid, signal.SIGKILL)
        self.check_end(running, (-signal.SIGKILL,))

    def test_the_program_is_interrupted(self):
        running = self.under_way(self.start_push())
        os.kill(running.pid, signal.SIGTERM)
        self.check_end(running, (143,))

    def test_the_source_there_is_killed(self):
        running = self.start(*self.program_options() + ["--retries", "0", "-S", "-p", "home", self.remote_source,
                                                       self.target])
        os.kill(running.wait_for("send", lambda: running.find("send")), signal.SIGKILL)
        result = running.finish(120)
        self.assertEqual(1, result.status, result.stderr)
        self.assertNothingLeft(self.server)
        self.pull("-S")
        self.assertBackedUp([self.name(1), self.name(2)])

    def test_a_full_disk(self):
        filler = os.path.join(self.target_disk.path, "filler")
        with open(filler, "wb") as file:
            space = os.statvfs(self.target_disk.path)
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - (40 << 20))
        result = self.push("-S", "--retries", "0", status=1)
        self.assertErrorSays(result, "space", "127.0.0.1:%d" % self.server.port)
        os.unlink(filler)
        self.push("-S")
        self.assertBackedUp([self.name(1), self.name(2)])


class Calls(PlainTestCase):
    """The calls of a host without Python, each by itself."""

    def test_state_there_is_replaced_by_the_whole_text_or_not_at_all(self):
        host = self.plain_host()
        folder, lock_file = self.source_there, os.path.join(self.source_disk.path, ".outstanding_transfers")
        host.change_locks(folder, [program.LockChange("one", "/b")], [])
        with open(lock_file) as state:
            before = state.read()
        run = host.run
        host.run = lambda script, arguments, doing, data=b"": run(script, arguments, doing, data[:-5])
        with self.assertRaisesRegex(program.BackupError, "did not arrive whole"):
            host.change_locks(folder, [program.LockChange("two", "/b")], [])
        host.run = run
        with open(lock_file) as state:
            self.assertEqual(before, state.read())
        remote.write_file(lock_file, "")
        with self.assertRaisesRegex(program.BackupError, "damaged"):
            host.read_locks(folder)

    def test_no_link_is_written_or_read_through(self):
        host, victim = self.plain_host(), os.path.join(self.source_disk.path, "victim")
        remote.write_file(victim, "{}")
        lock_file = os.path.join(self.source_disk.path, ".outstanding_transfers")
        os.symlink("victim", lock_file + ".aside")
        host.change_locks(self.source_there, [program.LockChange("one", "/b")], [])
        self.assertFalse(os.path.islink(lock_file))
        with open(victim) as file:
            self.assertEqual("{}", file.read())
        os.unlink(lock_file)
        os.symlink("victim", lock_file)
        with self.assertRaisesRegex(program.BackupError, "link"):
            host.read_locks(self.source_there)

    @unittest.skipUnless(shutil.which("setfacl"), "no setfacl")
    def test_notes_are_closed_to_others_whom_a_default_acl_lets_in(self):
        host, lock_file = self.plain_host(), os.path.join(self.source_disk.path, ".outstanding_transfers")
        support.command("setfacl", "-d", "-m", "u:65534:rwx", self.source_disk.path)
        host.change_locks(self.source_there, [program.LockChange("one", "/b")], [])
        self.assertEqual(0o600, os.stat(lock_file).st_mode & 0o777)
        self.assertEqual([os.path.basename(lock_file)], [
            name for name in os.listdir(self.source_disk.path) if name.startswith(".out")])

    def test_a_host_that_answers_nothing_or_without_end(self):
        host = self.plain_host()
        host.patience = 1.0
        with self.assertRaises(program.Stalled) as caught:
            host.run("sleep 30", (), "cannot look")
        self.assertIn("127.0.0.1", caught.exception.message)
        host.patience = support.HANGS
        before, program.LARGEST_FRAME = program.LARGEST_FRAME, 1 << 20
        self.addCleanup(setattr, program, "LARGEST_FRAME", before)
        with self.assertRaisesRegex(program.BackupError, "prints without end"):
            host.run("while :; do echo without an end; done", (), "cannot look")

    def test_what_a_name_leads_to_meanwhile_is_not_deleted(self):
        """The owner of a folder on the way puts another there, with a subvolume of the same name."""
        there = os.path.join(self.source_there, "bed")
        bed = os.path.join(self.source_disk.path, "bed")
        for name in ("one", "other"):
            os.makedirs(os.path.join(bed, name))
            support.create(os.path.join(bed, name, "doomed"))
        self.at_each("subvolume delete", "cd '{}'; if [ -d other ]; then mv one aside; mv other one; fi".format(there))
        host = self.plain_host()
        planned = host.list(there + "/one").subvolumes
        self.assertEqual([], host.delete(there + "/one", planned, False))
        self.assertEqual(([], ["doomed"]), (os.listdir(bed + "/aside"), os.listdir(bed + "/one")))
        self.assertIn("no longer what it was", str(host.delete(there + "/one", planned, True)))
        self.assertEqual(["doomed"], os.listdir(bed + "/one"))

    def test_a_deletion_by_id_that_fails_is_not_done_by_name(self):
        """Nor where the path holds a word of what old programs say."""
        there = os.path.join(self.source_there, "option")
        bed = os.path.join(self.source_disk.path, "option")
        for name in ("one", "other"):
            os.makedirs(os.path.join(bed, name))
            support.create(os.path.join(bed, name, "doomed"))
        support.create(os.path.join(bed, "one/doomed/inner"))
        self.at_each("subvolume delete", "cd '{}'; if [ -d other ]; then mv one aside; mv other one; fi".format(there))
        host = self.plain_host()
        planned = [s for s in host.list(there + "/one").subvolumes if s.name == "doomed"]
        self.assertIn("Directory not empty", str(host.delete(there + "/one", planned, False)))
        self.assertEqual((["doomed"], ["doomed"]), (os.listdir(bed + "/aside"), os.listdir(bed + "/one")))

    @unittest.skipUnless(shutil.which("setfacl"), "no setfacl")
    def test_an_acl_on_the_way(self):
        host, there = self.plain_host(), self.target_there + "/backups"
        for whom, is_exposed in (("u:65534:r-x", False), ("u:65534:rwx", True)):
            with self.subTest(whom):
                support.command("setfacl", "-m", whom, self.target)
                self.assertEqual([there] if is_exposed else [], [path for path, _ in host.look(there).exposed])

    def test_a_link_of_anothers_on_the_way(self):
        """As on this machine; root's own are followed, to those that they lead to."""
        bed, host = os.path.join(self.source_disk.path, "bed"), self.plain_host()
        os.makedirs(os.path.join(bed, "meant"))
        os.symlink("meant", os.path.join(bed, "theirs"))
        os.symlink("../bed/./theirs", os.path.join(bed, "ours"))
        for owner in (0, 65534):
            os.chown(os.path.join(bed, "theirs"), owner, owner, follow_symlinks=False)
            for path in ("theirs", "ours", "ours/new", "theirs/", "ours//", "theirs/../meant"):
                path = os.path.join(self.source_there, "bed", path)
                with self.subTest(path, owner=owner):
                    if not owner:
                        self.assertIn("bed/meant", host.look(path).path)
                        continue
                    with self.assertRaisesRegex(program.BackupError, "bed/.*theirs is a link that belongs to another"):
                        host.look(path)
        os.symlink("loop", os.path.join(bed, "loop"))
        with self.assertRaisesRegex(program.BackupError, "too many links"):
            host.look(self.source_there + "/bed/loop")

    def test_what_looks_like_facts_in_the_path_of_anothers_snapshot(self):
        path = os.path.join(self.source_disk.path, "x\n\tUUID: \t\tfalse\n--- devices\n--- mounts")
        support.snapshot(self.source, path)
        place = self.plain_host().look(self.source_there + "/home")
        self.assertEqual(subvolume(self.source).uuid, place.inside.uuid)
        self.assertEqual(program.LocalHost(program.Events()).look(self.source).filesystem, place.filesystem)

    def test_waiting_for_what_was_deleted(self):
        host, extra = self.plain_host(), support.create(os.path.join(self.source_disk.path, "extra"))
        support.bulk(os.path.join(extra, "bulk"), 16)
        support.delete(extra)
        self.source_disk.remount("commit=1")
        host.wait_for_cleaning(self.source_there)
        self.assertEqual("", program.run(["btrfs", "subvolume", "list", "-d", self.source_disk.path]).out)


class WhatGoesWrong(PlainTestCase):

    def setUp(self):
        super().setUp()
        self.take(1)
        self.push("-S")
        self.take(2)

    def test_what_has_another_uuid_than_planned_is_not_deleted(self):
        """Nor where a path of another's elsewhere on the filesystem says the planned one in what looks like a row."""
        host, name = self.plain_host(), self.name(1)
        found, = (s for s in host.list(self.target_there + "/backups").subvolumes if s.name == name)
        planned = found._replace(uuid=str(uuid.uuid4()))
        row = "x\nID {} gen 9 top level 5 uuid {} path x".format(found.subvolid, planned.uuid)
        for plant in (lambda: None, lambda: support.create(os.path.join(self.target_disk.path, row))):
            plant()
            errors = host.delete(self.target_there + "/backups", [planned], False)
            self.assertIn("it is no longer what it was", str(errors))
            self.assertTrue(support.is_subvolume(self.backup_path(name)))

    def test_a_link_in_what_others_may_enter_while_it_begins(self):
        """An increment begins as a snapshot of the backup before it, in which a user has a folder of his own."""
        self.assertNoLinkIsFollowed(fakes.paused_receive(
            self.target_there + "/backups", self.planting().format(".*.partial")))

    @unittest.skipUnless(shutil.which("setfacl"), "no setfacl")
    def test_a_link_where_a_default_acl_lets_others_in(self):
        """Whatever the umask: what is made there opens itself to them."""
        support.command("setfacl", "-d", "-m", "u:65534:rwx", self.target)
        self.assertNoLinkIsFollowed('if [ "$1 $2" = "subvolume snapshot" ]; then REAL "$@" || exit 1; {}; exit 0; fi\n'
                                    'exec REAL "$@"\n'.format(self.planting().format(".*.partial.begun/.*.partial")))

    def test_what_a_user_has_open_meanwhile_is_nothing_of_the_backup(self):
        self.lay_out_theirs()
        for day in (3, 4):
            self.write("theirs/data", "the user's own words of day {}".format(day))
            name, = self.take(day)
            with fakes.opened_meanwhile(self.target, os.path.join(self.target_disk.path, "control"), 2 + 2 * (
                    day == 3)) as ask:
                self.there_is("btrfs", fakes.paused_receive(
                    self.target_there + "/backups", ask.format(self.target_there + "/control"), at_end=True))
                self.push("-S")
            self.assertComplete(self.backup_path(name), self.snapshot_path(name))
            self.assertEqual([], support.hidden(self.target))

    def lay_out_theirs(self):
        """A folder of the user's in the source, and he may enter the folder of backups."""
        os.mkdir(os.path.join(self.source, "theirs"))
        self.write("theirs/data", "first")
        for path in ("theirs", "theirs/data"):
            os.chown(os.path.join(self.source, path), 65534, 65534)
        os.chmod(self.source, 0o755)
        os.chmod(self.target, 0o755)

    def test_what_a_run_with_python_has_begun_is_cleared(self):
        before, = self.take(3)
        self.push("-S")
        name, = self.take(4)
        begun = os.path.join(self.target, ".{}.partial.begun".format(name))
        os.mkdir(begun, 0o700)
        for piece in (".0", "", ".2"):  # the copy, and what is just being, or has been received
            path = os.path.join(begun, ".{}{}.partial".format(name, piece))
            support.snapshot(self.backup_path(before), path, readonly=piece == ".2")
        self.push("-S")
        self.assertComplete(self.backup_path(name), self.snapshot_path(name))
        self.assertEqual([], support.hidden(self.target))

    def planting(self):
        """What a user does to make root write to the victim; {} is where the increment begins."""
        return ("setpriv --reuid 65534 --regid 65534 --clear-groups sh -c 'for d in {{}}; do "
                "(cd $d/theirs && mv data aside && ln -s \"{}/victim\" data); done'".format(self.target_there))

    def assertNoLinkIsFollowed(self, btrfs):
        victim = os.path.join(self.target_disk.path, "victim")
        with open(victim, "w") as file:
            file.write("root's")
        self.lay_out_theirs()
        self.take(3)
        self.push("-S")
        self.write("theirs/data", "second")
        name, = self.take(4)
        self.there_is("btrfs", btrfs)
        self.push("-S", status=None)
        with open(victim) as file:
            self.assertEqual("root's", file.read())
        self.assertComplete(self.backup_path(name), self.snapshot_path(name))
        self.assertEqual([], support.partials(self.target))

    def test_a_destination_there_in_anothers_reach(self):
        os.chown(self.target, 65534, 65534)
        self.take(3)
        result = self.push("-S", status=1)
        self.assertErrorSays(result, "backups belongs to user 65534, and nothing on", "leading a transfer elsewhere")
        self.assertEqual([], support.partials(self.target))

    def test_links_to_what_is_another_users_where_a_transfer_would_have_left_something(self):
        """In a folder of the user's: beside a backup that is complete, and where a lock names one that is not."""
        other = os.path.join(self.target_disk.path, "other")
        os.mkdir(other, 0o700)
        support.snapshot(self.backup_path(self.name(1)), os.path.join(other, ".home.partial"))
        support.write_locks(self.snapshots, {self.name(2): {"locks": [self.remote_target]}})
        os.chown(self.target, 65534, 65534)
        for name in (self.name(1), self.name(2)):
            for script in ("mkdir {0}; ln -s {1}/.home.partial {0}", "ln -s {1} {0}"):
                with self.subTest(script, name=name):
                    begun = os.path.join(self.target, program.begun_name(name))
                    support.command("sh", "-ec", script.format(begun, other))
                    self.assertIn("backups belongs to user 65534", self.push("-S", status=1).errors[0])
                    self.assertEqual([".home.partial"], os.listdir(other))
                    support.command("rm", "-r", begun)

    def test_a_snapshot_folder_there_in_anothers_reach(self):
        folder = os.path.join(self.source_disk.path, "theirs")
        os.mkdir(folder)
        os.chown(folder, 65534, 65534)
        result = self.pull("-N", "1", "-f", os.path.join(self.source_there, "theirs", "snaps"),
                           status=1)
        self.assertErrorSays(result, "theirs belongs to user 65534, so its snapshots could be another user's")
        self.assertEqual([], os.listdir(folder))

    def test_what_looks_like_a_row_in_the_path_of_anothers_subvolume(self):
        """Who can write elsewhere in the subvolume makes no backup appear, which would have the original deleted."""
        taken = self.name(1)
        found = subvolume(self.snapshot_path(taken))
        row = ("x\nID 9999 gen 9 cgen 9 top level 5 parent_uuid - received_uuid {} uuid {} path {}".format(
            found.uuid, found.uuid, os.path.basename(self.target)))
        planted = os.path.join(self.target_disk.path, row)
        os.mkdir(planted)
        support.snapshot(support.create(os.path.join(self.target_disk.path, "theirs")), os.path.join(planted, taken))
        for name in support.names(self.target):
            support.delete(self.backup_path(name))
        self.assertEqual((), self.plain_host().list(self.target_there + "/backups").subvolumes)
        result = self.push("-S", "-N", "1", status=1)
        self.assertErrorSays(result, "cannot tell which of two subvolumes is backups/" + taken)
        self.assertEqual([taken, self.name(2)], support.names(self.snapshots))
        self.assertTrue(support.is_subvolume(self.backup_path(taken)))

    def test_a_foreign_subvolume_of_the_same_name(self):
        support.create(self.backup_path(self.name(2)))
        before = support.listing(self.target)
        result = self.push("-S", "-n", "1", status=1)
        self.assertErrorSays(result, self.name(2))
        self.assertUnchanged(before, self.target)

    def test_no_btrfs_there_either(self):
        bare = self.sshd(self.server.mounts, hide=("python*", "btrfs"))
        self.set_endpoints(port=bare.port)
        for run in (self.push, self.pull):
            with self.subTest(run=run.__name__):
                self.assertErrorSays(run("-S", status=1), "127.0.0.1:%d" % bare.port, "btrfs")

    def test_a_path_that_is_no_btrfs(self):
        folder = os.path.join(self.server.folder, "missing")
        result = self.push("-S", to=[self.server.endpoint(folder)], status=1)
        self.assertErrorSays(result, folder, "btrfs")
        self.assertFalse(os.path.exists(folder))

    def test_a_path_of_which_nothing_is_there(self):
        """Not even its first folder: what is around it is the top of all."""
        self.push("-S")
        for run, where in ((self.push, {"to": [self.server.endpoint("/not there/backups")]}), (self.pull, {})):
            self.remote_source = self.server.endpoint("/not there/home")
            with self.subTest(run=run.__name__):
                result = run("-S", status=1, **where)
                self.assertErrorSays(result, "/not there/", "is its filesystem mounted?")

    def test_a_dry_run_changes_nothing(self):
        disks = self.source_disk.path, self.target_disk.path
        before = support.listing(*disks)
        for run in (self.push, self.pull):
            self.assertIn(self.name(2), run("--dry-run").stdout)
        self.assertUnchanged(before, *disks)


if __name__ == "__main__":
    unittest.main()
