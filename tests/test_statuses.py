"""What restore, prune, list and a run answer where something failed: status, message, and that the rest was done."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import remote
import support
from fakes import fake
from support import (
    BackupTestCase,
    command,
    create,
    listing,
    names,
    partials,
    read_locks,
    scratch_folder,
    snapshot,
)

from btrfs_backup_ng import (
    ConnectionLost,
    Listing,
    Location,
    Place,
    Policy,
    Situation,
    SshOptions,
    Subvolume,
    UsageError,
    destination_at,
    format_interruption,
    format_man,
    judged_rows,
    no_agent_error,
    open_settings,
    parse_command,
    parse_encryption,
    parse_endpoint,
    parse_rate,
    print_systemd,
    source_entries,
)


class Words(unittest.TestCase):

    def test_a_rate_has_its_unit(self):
        for text in ("20", "1.5", "0K", "20MB"):
            with self.assertRaises(ValueError):
                parse_rate(text)
        self.assertEqual(20 << 20, parse_rate("20M"))

    def test_half_a_url_is_no_host(self):
        for text, right in (("raw:/mnt/nas", "raw:///mnt/nas?"), ("ssh:/nas/mnt", "ssh://nas/mnt?"),
                            ("shell:/x", "shell://x?"), ("raw+ssh:/x/y", "raw+ssh://x/y?"), ("raw:a", "raw:///a?"),
                            ("ssh:nas:/mnt", "ssh://nas/mnt?"), ("ssh:u@nas:2/mnt", "ssh://u@nas:2/mnt?"),
                            ("ssh//nas/mnt", "ssh://nas/mnt?"), ("raw+ssh//nas/mnt", "raw+ssh://nas/mnt?")):
            with self.assertRaises(UsageError) as caught:
                parse_endpoint(text)
            self.assertIn(right, caught.exception.hint)
        self.assertEqual("raw", parse_endpoint("ssh://raw/mnt").login)
        self.assertEqual("me@raw", parse_endpoint("me@raw:/mnt").login)

    def test_a_connection_that_is_cut_during_login_may_come_back(self):
        for status, words in ((255, ""), (-15, ""), (None, ""), (255, "Connection to nas closed by remote host.\r"),
                              (255, "client_loop: send disconnect: Broken pipe"),
                              (255, "ssh_dispatch_run_fatal: Connection to 10.0.0.1 port 22: message authentication "
                                    "code incorrect"),
                              (255, "Timeout, server nas not responding."),
                              (255, "mux_client_request_session: read from master failed: Broken pipe")):
            with self.subTest(status=status, words=words):
                error = no_agent_error("ssh://nas", status, words, "")
                self.assertIsInstance(error, ConnectionLost)
                self.assertTrue(error.transient)
                self.assertIn("the connection was lost", error.message)
        for status, words in ((1, ""), (0, ""), (255, "This account is for scp only"), (1, "not available")):
            error = no_agent_error("ssh://nas", status, words, "")
            self.assertNotIsInstance(error, ConnectionLost)
            self.assertIn("restricted", error.hint)

    def test_a_login_that_fails_without_a_word(self):
        """ssh may be told to say nothing: then it may have been refused as well."""
        self.assertIn("LogLevel=ERROR", open_settings({"loglevel": "QUIET"}, "", True))
        self.assertNotIn("LogLevel=ERROR", open_settings({"loglevel": "INFO"}, "", True))
        self.assertTrue(SshOptions(("Port=1", "LogLevel QUIET")).are_quiet)
        self.assertFalse(SshOptions(("LogLevel=ERROR",)).are_quiet)
        error = no_agent_error("me@nas:23", 255, "", "", is_quiet=True)
        self.assertIn("login refused, or the connection was lost", error.message)
        self.assertIn("ssh -p 23 me@nas true", error.hint)

    def test_what_ssh_will_say_again_is_not_tried_again(self):
        for words in ("Invalid key length", "error in libcrypto", "incorrect signature", "DH GEX group out of range"):
            said = "ssh_dispatch_run_fatal: Connection to 10.0.0.1 port 22: " + words
            error = no_agent_error("ssh://nas", 255, said, "")
            self.assertFalse(error.transient, words)
            self.assertIn(words, error.message)

    def test_a_snapshot_folder_of_that_path_on_another_machine_is_no_obstacle(self):
        here, there = (Place("/snapshots", "folder", uuid) for uuid in ("here", "there"))
        for text in ("ssh://nas/snapshots", "raw+ssh://nas/snapshots"):
            self.assertEqual([], list(destination_at(text, text).doubts(Situation(there, here, here, False, ""))))
            self.assertIn("the snapshot folder itself", str(
                list(destination_at(text, text).doubts(Situation(here, here, here, False, "")))))

    def test_an_interruption_promises_only_what_is_true(self):
        backup, restore = support.task_of(["/s", "/b"]), support.task_of(["restore", "/b/x", "/r"])
        dry, look = backup._replace(dry_run=True), support.task_of(["list", "/s"])
        for tasks in ([backup], [restore], [dry, backup]):
            self.assertEqual("interrupted by SIGINT; the next run goes on", format_interruption("SIGINT", tasks))
        for tasks in ([dry], [look], [restore._replace(dry_run=True)]):
            self.assertEqual("interrupted by SIGINT", format_interruption("SIGINT", tasks))

    def test_a_colon_without_a_port(self):
        for text in ("ssh://nas:/mnt/x", "ssh://me@[::1]:/mnt/x"):
            with self.assertRaises(UsageError) as caught:
                parse_endpoint(text)
            self.assertIn("no valid port", caught.exception.message)

    def test_a_relative_file_of_recipients(self):
        for text in ("age:./keys", "age:key.txt"):
            with self.assertRaises(ValueError):
                parse_encryption(text)
        for text in ("age:/keys", "age:age1xyz", "age:ssh-ed25519 AAAA", "gpg:KEY"):
            self.assertEqual(text, parse_encryption(text))

    def test_units_have_no_relative_paths_in_options(self):
        with self.assertRaises(UsageError) as caught:
            print_systemd(support.task_of(["print", "systemd", "--", "--log-json", "log.json", "/home"]))
        self.assertIn("log.json is a relative path", caught.exception.message)

    def test_the_manual_can_be_copied_from(self):
        self.assertIn("\n.nh\n.ad l\n", format_man())

    def test_each_prefix_has_its_parent(self):
        def one(name, number):
            return Subvolume(name, name, readonly=True, otime=number)
        here = Listing((one("a-20260101-000000", 1), one("b-20260102-000000", 2)))
        there = Listing(tuple(s._replace(uuid="x" + s.name, received_uuid=s.uuid) for s in here.subvolumes))
        source = Location("/s", True, source_entries(here, "/s", None, {}), None, here)
        backups = Location("/b", False, source_entries(there, "/b", None, {}), None, there)
        rows = judged_rows([source, backups], Policy(), 2e9)
        self.assertEqual([("complete", "parent")] * 2, [row.states[1] for row in rows])

    def test_a_verb_reads_the_file_of_a_backup(self):
        """What does not concern it is passed over, in the file alone; a mistake in it still is one."""
        path = os.path.join(scratch_folder(), "job")
        with open(path, "w") as file:
            file.write("-N 3\n--keep-backups 14d 8w\n-p home-\n--convert-rw\n/home\n/mnt/backup\n--ssh-opt Port=22\n")
        for verb in ("list", "doctor", "verify"):
            task = support.task_of([verb, "@" + path])
            self.assertEqual(("home-", "/home", ("/mnt/backup",), ("Port=22",), 0),
                             (task.prefix, task.source, task.destinations, task.ssh_options, task.num_snapshots))
            with self.assertRaises(UsageError):
                support.task_of([verb, "-N", "3", "@" + path])
        self.assertEqual("/mnt/backup", support.task_of(["restore", "@" + path]).source)
        with open(path, "a") as file:
            file.write("-n many\n")
        with self.assertRaises(UsageError) as caught:
            support.task_of(["list", "@" + path])
        self.assertIn(path + ":8: ", caught.exception.message)

    def test_verbs_that_look_do_not_ask_for_one_prefix(self):
        for verb in ("list", "doctor"):
            self.assertIsNone(parse_command([verb, "/x"])[0].task.prefix)


class Prune(BackupTestCase):

    def setUp(self):
        super().setUp()
        os.makedirs(self.snapshots)
        for prefix in ("a-", "b-", "c-"):
            for day in (1, 2):
                snapshot(self.source, self.snapshot_path(f"{prefix}2024010{day}-000000"))
            self.run_program("-S", "-p", prefix, self.source, self.target)

    def make_undeletable(self, name):
        """The kernel keeps the subvolume that is mounted where none is named."""
        command("btrfs", "subvolume", "set-default", self.backup_path(name))

    def left(self):
        return sorted({re.sub("-.*", "", name): None for name in names(self.target) if "0101" in name})

    def test_a_busy_prefix_keeps_no_other(self):
        with open(os.path.join(self.target, ".a-.lock"), "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            result = self.run_program("prune", "-n", "1", self.target, status=75)
        self.assertErrorSays(result, "another run is at work")
        self.assertEqual(["a"], self.left())

    def test_one_that_fails_keeps_no_other(self):
        self.make_undeletable("b-20240101-000000")
        result = self.run_program("prune", "-n", "1", self.target, status=1)
        self.assertErrorSays(result, "cannot delete", "b-20240101")
        self.assertIn("finished with errors: 2 subvolumes deleted, 3 backups kept", result.stderr)
        self.assertEqual(["b"], self.left())

    def test_busy_and_failed_is_failed(self):
        self.make_undeletable("b-20240101-000000")
        with open(os.path.join(self.target, ".a-.lock"), "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            self.run_program("prune", "-n", "1", self.target, status=1)
        self.assertEqual(["a", "b"], self.left())

    def test_what_is_wrong_with_the_folder_is_said_once(self):
        with open(os.path.join(self.target, ".outstanding_transfers"), "w") as locks:
            locks.write("{")
        self.assertErrorSays(self.run_program("prune", "-n", "1", self.target, status=1), ".outstanding_transfers")

    def test_a_mistyped_prefix(self):
        result = self.run_program("prune", "-n", "1", "-p", "d-", self.target, status=1)
        self.assertErrorSays(result, "no backups of prefix 'd-'", "'a-', 'b-', 'c-'")

    def test_a_lock_file_alone(self):
        held = self.backup_path(".a-20240109-000000.partial.lock")
        lone = self.backup_path(".a-20240108-000000.partial.lock")
        beside = self.backup_path(".a-20240107-000000.partial")
        create(beside)
        for path in (held, lone, beside + ".lock"):
            with open(path, "w"):
                pass
        before = listing(self.target)
        words = ("prune", "-p", "a-", "--partials-older-than", "1h", self.target)
        self.assertIn(os.path.basename(lone), self.run_program(*words + ("--dry-run",)).stdout)
        self.assertUnchanged(before, self.target)
        with open(held) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.assertIn("deleted " + os.path.basename(lone) + " at", self.run_program(*words).stderr)
        self.assertEqual((True, False, True), tuple(map(os.path.lexists, (held, lone, beside + ".lock"))))
        self.assertEqual(1, len(partials(self.target)))


class SomethingElseIsThere(BackupTestCase):
    """A folder that seems to be empty: what was meant is named as it can be typed."""

    def setUp(self):
        super().setUp()
        self.take(1)

    def test_stream_files_without_their_scheme(self):
        self.transfer(to=["raw://" + self.target])
        listed = self.run_program("list", self.target)
        self.assertIn("it holds stream files: name it raw://" + self.target, listed.stderr)
        pruned = self.run_program("prune", "-n", "1", self.target, status=1)
        self.assertErrorSays(pruned, "no backups in " + self.target, "raw://" + self.target)
        for verb in (["list"], ["prune", "-n", "1"]):
            self.assertNotIn("name it", self.run_program(*verb, "raw://" + self.target).stderr)

    def test_a_snapshot_folder_and_others_of_such_names_are_no_stream_files(self):
        for name in (".btrfs-backup-ng", "notes.btrfs"):
            os.mkdir(os.path.join(self.target, name))
        for words in (["list"], ["prune", "-n", "1"], ["prune", "-n", "1", "-p", "other"]):
            self.assertNotIn("stream files", self.run_program(*words, self.target, status=None).stderr)

    def test_it_can_be_typed_as_it_stands(self):
        """Though the path that was given is relative, and holds blanks."""
        folder = os.path.join(self.target, "two words")
        os.mkdir(folder)
        self.transfer(to=["raw://" + folder])
        for verb, status in ((["list"], 0), (["prune", "-n", "1"], 1)):
            said = self.run_program(*verb, os.path.relpath(folder, scratch_folder()), status=status).stderr
            words = shlex.split(re.search("name it (.*)", said).group(1))
            self.assertEqual(["raw://" + folder], words)
            self.assertNotIn("name it", self.run_program(*verb, *words).stderr)

    def test_another_prefix(self):
        self.transfer()
        listed = self.run_program("list", "-p", "hone", self.target)
        self.assertIn(f"no backups of prefix 'hone' in {self.target}; there are backups of 'home'", listed.stderr)
        self.assertEqual("", self.run_program("list", "-p", "home", self.target).stderr)


class Restore(BackupTestCase):

    def setUp(self):
        super().setUp()
        self.raw = "raw://" + self.target
        self.taken = self.take(1, 2)
        self.transfer(to=[self.raw])
        self.disk_there = self.disk()
        self.into = os.path.join(self.disk_there.path, "restored")

    def test_what_was_restored_is_although_a_step_stays(self):
        """The stream that it builds on cannot be deleted afterwards: that is an error, and not that of the restore."""
        result = self.run_program("restore", "--latest", self.raw, self.into, status=1,
                                  wrapper=support.without_deletions())
        self.assertErrorSays(result, "cannot delete", self.taken[0])
        self.assertIn(f"restored {self.taken[1]} to {self.into}", result.stderr)
        self.assertComplete(os.path.join(self.into, self.taken[1]), self.snapshot_path(self.taken[1]))
        result = self.run_program("restore", "--latest", self.raw, self.into)
        self.assertIn("is already in", result.stderr)
        self.assertEqual([self.taken[1]], names(self.into))
        self.assertEqual({}, read_locks(self.into))

    def test_in_place_all_the_same(self):
        place = create(os.path.join(self.disk_there.path, "home"))
        result = self.run_program("restore", "--latest", self.raw, self.into, "--in-place", place, status=1,
                                  wrapper=support.without_deletions())
        self.assertErrorSays(result, "cannot delete")
        self.assertTrue(os.path.exists(os.path.join(place, "day2")))

    def test_an_error_is_not_forgotten(self):
        """Where the backup is there already, and what a broken transfer left beside it cannot be deleted."""
        self.run_program("restore", "--latest", self.raw, self.into)
        create(os.path.join(self.into, f".{self.taken[1]}.2.partial"))
        with open(os.path.join(self.into, ".outstanding_transfers"), "w") as locks:
            locks.write(f'{{"{self.taken[1]}": {{"locks": ["{self.into}"], "parent_locks": []}}}}')
        result = self.run_program("restore", "--latest", self.raw, self.into, status=1,
                                  wrapper=support.without_deletions())
        self.assertErrorSays(result, "cannot delete")

    def test_a_disk_that_is_away(self):
        fstab = "/dev/none {} btrfs defaults 0 0\n".format(os.path.join(scratch_folder(), "away"))
        path = os.path.join(scratch_folder(), "fstab")
        with open(path, "w") as file:
            file.write(fstab)
        result = self.run_program("restore", "--latest", os.path.join(scratch_folder(), "away", "home"), self.into,
                                  status=1, wrapper=["unshare", "-m", "sh", "-c",
                                                     'mount --bind "$0" /etc/fstab && exec "$@"', path])
        self.assertErrorSays(result, "no such backup", "nothing is mounted at")


class RestoreThere(remote.RemoteTestCase):

    def test_the_host_is_named(self):
        name, = self.take(1)
        self.transfer()
        there = self.server.endpoint(os.path.join(self.target_there, "restored"))
        result = self.run_program("restore", *self.program_options() + [self.target, "--latest", there])
        self.assertIn(f"restored {name} to {there}", result.stderr)


class Runs(BackupTestCase):

    def test_nothing_was_done_with_errors(self):
        self.take(1)
        create(self.backup_path(f".{self.name(1)}.partial"))
        self.assertIn("finished with errors: nothing was done", self.transfer(status=1).stderr)

    def test_nested_subvolumes_are_a_handful_also_in_a_dry_run(self):
        for number in range(9):
            create(os.path.join(self.source, f"nested{number}"))
        said = "nested0, nested1, nested2 and 6 more"
        self.assertIn(said, self.backup(to=[]).stderr)
        self.assertIn(said, self.backup("--dry-run").stdout)
        self.assertIn("nested7, nested8", self.run_program("doctor", "-p", "home", self.source).stdout)

    def test_nested_subvolumes_are_told_once_and_not_if_they_are_meant_to_be_left_out(self):
        for name in ("docker", "docker/one", "mail"):
            create(os.path.join(self.source, name))
        skip = ["--skip", "docker", "--skip=docker/*"]
        self.assertNotIn("docker", self.backup(*skip, to=[]).stderr)
        support.next_second()
        self.assertNotIn("nested", self.backup(to=[]).stderr)
        self.assertIn("docker", self.backup("-v", "debug", to=[]).stderr)
        self.assertNotIn("docker", self.backup("--dry-run", *skip, to=[]).stdout)
        create(os.path.join(self.source, "new"))
        self.assertIn("docker, mail, new; use --skip", self.backup(to=[]).stderr)

    def test_a_read_only_source_is_refused_in_a_dry_run_as_well(self):
        path = os.path.join(self.source_disk.path, "frozen")
        snapshot(self.source, path)
        before = listing(self.target)
        for options in ([], ["--dry-run"], ["-S"], ["-S", "--dry-run"]):
            result = self.run_program("-p", "home", *options + [path, self.target], status=1)
            self.assertErrorSays(result, "read-only snapshot", "-f")
        self.source_disk.remount("ro")
        for options in ([], ["--dry-run"]):
            self.assertErrorSays(self.backup(*options, status=1), "mounted read-only")
        self.assertUnchanged(before, self.target)
        self.source_disk.remount("rw")

    def test_what_only_looks_leaves_nothing(self):
        disks = (self.source_disk.path, self.target_disk.path)
        looks = [("-p", "home", "--dry-run", self.source, self.target), ("list", self.source, self.target),
                 ("doctor", self.source, self.target), ("verify", self.source, self.target), ("list", self.target),
                 ("prune", "--dry-run", "-n", "1", self.target), ("doctor", "--max-age", "1h", self.source),
                 ("restore", "--dry-run", "--latest", self.target, self.source_disk.path),
                 ("restore", "--dry-run", "--latest", "--in-place", self.source, self.target)]
        for taken in (False, True):
            if taken:
                self.take(1, 2)
                self.transfer()
            before = listing(*disks)
            for look in looks:
                with self.subTest(taken=taken, look=look):
                    self.assertIn(self.start(*look).finish().status, (0, 1))
                    self.assertUnchanged(before, *disks)

    def test_another_snapshot_folder_serves_a_read_only_source(self):
        path = os.path.join(self.source_disk.path, "frozen")
        snapshot(self.source, path)
        self.run_program("-p", "x", "-f", os.path.join(self.source_disk.path, "snapshots"), path, self.target)
        self.assertEqual(1, len(names(self.target)))

    def test_a_dry_run_says_that_another_run_is_at_work(self):
        self.take(1)
        self.transfer()
        for folder, words in ((self.snapshots, ["-p", "home", self.source, self.target]),
                              (self.target, ["prune", "-n", "1", self.target])):
            with open(os.path.join(folder, ".home.lock"), "a") as held:
                self.assertNotIn("at work", self.run_program(*words + ["--dry-run"]).stderr)
                fcntl.flock(held, fcntl.LOCK_EX)
                said = "warning: another run is at work in {}: until it ends none of this is done\n".format(folder)
                self.assertIn(said, self.run_program(*words + ["--dry-run"]).stderr)
                self.run_program(*words, status=75)

    def test_json_of_what_was_found_until_a_signal_ends_it(self):
        name, = self.take(1)
        silent = fake("ssh", "exec sleep {}\n".format(10 * support.HANGS))
        found = {}
        for verb in ("list", "verify", "doctor"):
            run = self.start(verb, "--json", "-p", "home", self.source, "ssh://away/backups", env=silent)
            run.wait_for("ssh", lambda run=run: any("sleep" in str(argv) for argv in run.processes().values()))
            os.kill(run.pid, signal.SIGINT)
            result = run.finish()
            self.assertEqual(130, result.status)
            found[verb] = json.loads(result.stdout)
        here, there = found["list"]["locations"]
        self.assertEqual(([name], []), ([one["name"] for one in here["snapshots"]], there["snapshots"]))
        self.assertEqual((None, "interrupted"), (here["error"], there["error"]))
        self.assertEqual([], found["verify"]["results"])
        self.assertIn("snapshots", [check["name"] for check in found["doctor"]["checks"]])
        self.assertEqual(("not checked", "interrupted"), (found["doctor"]["checks"][-1]["state"],
                                                          found["doctor"]["checks"][-1]["text"]))

    def test_a_result_that_nobody_gets_is_an_error(self):
        self.take(1)
        closed = ["sh", "-c", '"$@" >&-', "sh"] + support.PROGRAM_ARGV
        for words in (["list", self.source], ["doctor", self.source], ["--help"], ["list", "--json", self.source],
                      ["-p", "home", "--dry-run", self.source], ["print", "man"]):
            done = subprocess.run(closed + words, stderr=subprocess.PIPE)
            self.assertEqual((1, b"error: cannot write the result: bad file descriptor; is stdout open?\n"),
                             (done.returncode, done.stderr), words)
        self.assertEqual(0, subprocess.call(closed + ["-S", "-q", "-p", "home", self.source, self.target]))
        self.assertEqual([self.name(1)], names(self.target))

    def test_waiting_ends_with_what_it_was(self):
        os.makedirs(self.snapshots)
        with open(os.path.join(self.snapshots, ".home.lock"), "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            result = self.backup("--wait", "0.1", status=75)
            self.assertErrorSays(result, "did not end within 0.1 s")
            self.assertErrorSays(self.backup(status=75), "or use --wait")


if __name__ == "__main__":
    unittest.main()
