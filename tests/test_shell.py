"""shell:// destinations: a command takes each stream, and what it took is remembered."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unittest

import remote
import support
from support import HANGS, names, read_locks

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import btrfs_backup_ng as program

TO_A_FILE = 'shell://cat > {}/"$BTRFS_BACKUP_SNAPSHOT".btrfs'


class ShellTestCase(support.BackupTestCase):

    def setUp(self):
        super().setUp()
        self.folder = self.target_disk.path + "-streams"
        os.mkdir(self.folder)
        self.addCleanup(lambda: subprocess.call(["rm", "-rf", self.folder]))
        self.to_file = TO_A_FILE.format(self.folder)

    def send(self, *options, to=None, **more):
        return self.transfer(*options, to=[to or self.to_file], **more)

    def pin(self, destination=None):
        with open(os.path.join(self.snapshots, ".destinations.json")) as pins:
            return json.load(pins)["destinations"][destination or self.to_file]["home"]

    def files(self):
        return sorted(os.listdir(self.folder))

    def path(self, name):
        return os.path.join(self.folder, name + ".btrfs")

    def receive(self, name, into):
        with open(self.path(name), "rb") as stream:
            subprocess.check_call(["btrfs", "receive", "-q", into], stdin=stream)

    def is_incremental(self, name):
        with open(self.path(name), "rb") as stream:
            first = program.parse_first_command(stream.read(4096))
        return first is not None and first.number == program.SNAPSHOT


class Streams(ShellTestCase):

    def test_each_stream_is_the_one_that_btrfs_send_writes(self):
        first, second = self.take(1, 2)
        self.send()
        self.assertEqual([first + ".btrfs", second + ".btrfs"], self.files())
        for name, parent in ((first, None), (second, first)):
            more = ["-p", self.snapshot_path(parent)] if parent else []
            sent = subprocess.run(["btrfs", "send", "-q"] + more + [self.snapshot_path(name)],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
            with open(self.path(name), "rb") as stream:
                self.assertEqual(sent, stream.read())

    def test_what_was_sent_can_be_received_in_order(self):
        churn = support.Churn(self.source, seed=5)
        churn.fill()
        taken = []
        for day in (1, 2, 3):
            taken += self.take(day)
            self.send()
            churn.change()
        for name in taken:
            self.receive(name, self.target)
            self.assertTreesEqual(self.snapshot_path(name), os.path.join(self.target, name))

    def test_the_environment_tells_what_comes(self):
        first, second = self.take(1, 2)
        said = os.path.join(self.folder, "said")
        self.send(to='shell://cat > /dev/null; env | grep ^BTRFS_BACKUP_[SPU] >> {}'.format(said))
        with open(said) as lines:
            facts = [line.strip().split("=", 1) for line in lines]
        halves = [dict(facts[:4]), dict(facts[4:])]
        self.assertEqual([
            {"BTRFS_BACKUP_SNAPSHOT": name, "BTRFS_BACKUP_PARENT": parent, "BTRFS_BACKUP_SOURCE": self.source,
             "BTRFS_BACKUP_UUID": support.subvolume(self.snapshot_path(name)).uuid}
            for name, parent in ((first, ""), (second, first))], halves)

    def test_beside_another_destination_it_reads_the_same_stream(self):
        first, = self.take(1)
        result = self.transfer("-v", "debug", to=[self.target, self.to_file])
        self.assertBackedUp([first])
        self.assertEqual([first + ".btrfs"], self.files())
        self.assertEqual(1, result.stderr.count("starting btrfs send"))


class WhoStays(ShellTestCase):
    """What a command leaves behind, or does after its input has ended, is its own affair."""

    def test_a_process_left_behind_that_holds_its_errors(self):
        first, second = self.take(1, 2)
        begun = time.monotonic()
        self.send(to=self.to_file + "; sleep 600 & echo a word >&2")
        self.assertLess(time.monotonic() - begun, HANGS)
        self.assertEqual([first + ".btrfs", second + ".btrfs"], self.files())

    def test_its_words_are_told_all_the_same(self):
        self.take(1)
        result = self.send(to=self.to_file + "; sleep 600 & echo the tape is full >&2; exit 3", status=1)
        self.assertErrorSays(result, "the tape is full")

    def at_work(self, *options, to):
        """The program, when everything but its command is done, which waits for the file that comes second."""
        gate = os.path.join(self.folder, "gate")
        command = "shell://cat > {0}/got; touch {0}/works; while [ ! -e {1} ]; do sleep 0.05; done".format(
            self.folder, gate)
        running = self.start("-p", "home", "-S", "--stall-timeout", "1", *options, self.source, *to, command)
        running.wait_for("the whole stream to be taken", lambda: os.path.exists(os.path.join(self.folder, "works")))
        return running, gate

    def test_it_may_work_for_longer_than_the_stall_timeout(self):
        first, = self.take(1)
        running, gate = self.at_work(to=[self.target])
        running.wait_for("the other destination to be done", lambda: names(self.target) == [first])
        time.sleep(2.5)
        self.assertIsNone(running.process.poll(), "the command was not waited for")
        with open(gate, "w"):
            pass
        result = running.finish()
        self.assertEqual(0, result.status, result.stderr)
        self.assertBackedUp([first])

    def test_a_signal_ends_it_within_seconds(self):
        self.take(1)
        running, _ = self.at_work(to=[])
        begun = time.monotonic()
        os.kill(running.pid, signal.SIGINT)
        result = running.finish()
        self.assertEqual(130, result.status, result.stderr)
        self.assertLess(time.monotonic() - begun, 0.5 * HANGS)
        self.assertEqual({}, running.processes())

    def test_killed_by_a_signal_without_a_name(self):
        self.take(1)
        result = self.send(to="shell://cat > /dev/null; kill -40 $$", status=1)
        self.assertErrorSays(result, "killed by signal 40")


class Remembered(ShellTestCase):

    def test_what_was_sent_is_not_sent_again_and_is_the_next_parent(self):
        first, = self.take(1)
        self.send()
        before = os.stat(self.path(first)).st_mtime_ns
        self.send()
        self.assertEqual(before, os.stat(self.path(first)).st_mtime_ns)
        second, = self.take(2)
        result = self.send()
        self.assertIn("incrementally from " + first, result.stderr)
        self.assertEqual([False, True], [self.is_incremental(n) for n in (first, second)])
        self.assertEqual({}, read_locks(self.snapshots))
        self.assertEqual({support.subvolume(self.snapshot_path(n)).uuid for n in (first, second)},
                         set(self.pin()["sent"]))

    def test_in_full_with_no_incremental(self):
        self.take(1, 2)
        self.send("-I")
        self.assertEqual([False, False], [self.is_incremental(self.name(day)) for day in (1, 2)])

    def test_only_what_the_source_still_has_is_remembered(self):
        self.take(1, 2, 3)
        self.send("-N", "1")
        self.assertEqual([self.name(3)], names(self.snapshots))
        self.take(4)
        self.send()
        self.assertEqual(2, len(self.pin()["sent"]))
        self.assertTrue(self.is_incremental(self.name(4)))

    def test_the_last_one_sent_is_kept_as_parent_while_the_command_fails(self):
        self.take(1)
        stop = os.path.join(self.folder, "stop")
        text = "shell://test -e {} && exit 1; cat > /dev/null".format(stop)
        self.send(to=text)
        self.take(2, 3, 4)
        open(stop, "w").close()
        self.send("-N", "1", to=text, status=1)
        self.assertEqual([self.name(day) for day in (1, 2, 4)], names(self.snapshots), "2 is locked, 3 may go")
        os.unlink(stop)
        result = self.send("-N", "1", to=text)
        self.assertIn("incrementally from " + self.name(1), result.stderr)

    def test_forgotten_it_gets_all_in_full_again(self):
        self.take(1)
        self.send()
        self.transfer("--forget-destination", self.to_file, to=[])
        os.unlink(self.path(self.name(1)))
        self.send()
        self.assertFalse(self.is_incremental(self.name(1)))

    def test_a_pin_without_the_list_is_no_list(self):
        """As a path's pin has none, and as older versions wrote it."""
        text = program.format_pins({"/d": {"home": (program.Pin("n", "u", "t", "f"),)},
                                    "shell://x": {"home": (program.Pin("n", "u", "t", None, ("a", "b")),)}})
        self.assertEqual(1, text.count("sent"))
        self.assertEqual(("a", "b"), program.parse_pins(text)["shell://x"]["home"][0].sent)
        self.assertEqual((), program.parse_pins(text)["/d"]["home"][0].sent)

    def test_a_dry_run_runs_nothing(self):
        self.take(1)
        result = self.send("--dry-run")
        self.assertEqual([], self.files())
        self.assertIn("destination " + self.to_file, result.stdout)
        self.assertIn("send {} in full".format(self.name(1)), result.stdout)


class Failures(ShellTestCase):

    def fails(self, text, *words):
        self.take(1)
        result = self.send(to="shell://" + text, status=1)
        self.assertErrorSays(result, *words)
        self.assertEqual(["shell://" + text], read_locks(self.snapshots)[self.name(1)]["locks"])
        self.assertFalse(os.path.exists(os.path.join(self.snapshots, ".destinations.json")))
        return result

    def test_its_exit_status(self):
        self.fails("cat > /dev/null; echo the tape is full >&2; exit 3", "the tape is full")

    def test_what_it_prints_is_told_when_it_fails(self):
        self.fails("cat > /dev/null; echo first; echo second; exit 3", "second", "first")

    def test_it_does_not_read_to_the_end(self):
        self.fails("head -c 20 > /dev/null", "did not read")

    def test_it_ends_before_the_stream_does(self):
        support.bulk(os.path.join(self.source, "large"), 8)
        self.fails("head -c 2000000 > /dev/null", "did not read")

    def test_it_does_not_exist(self):
        self.fails("no-such-program-here", "not found")

    def test_the_next_run_sends_it_again_and_clears_the_lock(self):
        self.take(1)
        flag = os.path.join(self.folder, "ready")
        text = "shell://test -e {0} || exit 1; cat > {0}".format(flag)
        self.send(to=text, status=1)
        open(flag, "w").close()
        self.send("--locked-destinations", to=text)
        self.assertEqual({}, read_locks(self.snapshots))
        self.assertGreater(os.path.getsize(flag), 100)

    def test_a_slash_at_its_end_belongs_to_it(self):
        self.take(1)
        text = "shell://cat > {}/stream; ls /".format(self.folder)
        self.send(to=text.replace("ls", "false"), status=1)
        self.send(to=text)
        self.send("--locked-destinations", to=text, status=1)
        self.assertEqual([text.replace("ls", "false")], read_locks(self.snapshots)[self.name(1)]["locks"])

    def test_a_failure_does_not_stop_another_destination(self):
        first, = self.take(1)
        self.transfer(to=["shell://exit 1", self.target], status=1)
        self.assertBackedUp([first])

    def test_what_reaches_it_when_send_fails_is_never_taken_for_whole(self):
        """The command is killed before its pipe closes, else `cat && mv` would make a cut file final.

        One that takes no notice of being asked to end shows which comes first.
        """
        support.bulk(os.path.join(self.source, "large"), 64)
        self.take(1)
        final = os.path.join(self.folder, "final")
        run = self.start("-S", "--retries", "0", "-p", "home", self.source,
                         "shell://trap '' TERM; cat > {0}.new && mv {0}.new {0}".format(final))
        pid = run.hold("send")
        os.kill(pid, signal.SIGKILL)
        self.assertEqual(1, run.finish().status)
        self.assertFalse(os.path.exists(final))
        self.assertIn(self.name(1), read_locks(self.snapshots))

    def test_interrupted_it_leaves_no_process(self):
        self.take(1)
        run = self.start("-S", "-p", "home", self.source,
                         "shell://(trap '' TERM; sleep 600) & sleep 600 | cat; true")
        run.wait_for("sleep", lambda: sum(b"sleep" in argv for argv in run.processes().values()) >= 2)
        os.kill(run.pid, signal.SIGTERM)
        self.assertEqual(143, run.finish().status)
        self.assertEqual({}, run.left())
        self.assertIn(self.name(1), read_locks(self.snapshots))

    def test_what_was_sent_before_a_kill_is_remembered(self):
        first, second = self.take(1, 2)
        text = self.to_file + '; case $BTRFS_BACKUP_SNAPSHOT in {}) kill -9 $PPID; sleep 5;; esac'.format(second)
        run = self.start("-S", "-p", "home", self.source, text)
        self.assertEqual(-signal.SIGKILL, run.finish().status)
        before = os.stat(self.path(first)).st_mtime_ns
        self.assertEqual([text], read_locks(self.snapshots)[second]["locks"])
        run = self.start("-S", "-p", "home", self.source, text)
        result = run.finish()
        self.assertNotIn("sending " + first, result.stderr)
        self.assertEqual(before, os.stat(self.path(first)).st_mtime_ns)
        self.assertIn("sending {} to".format(second), result.stderr)

    def test_killed_at_random_the_next_run_converges(self):
        support.bulk(os.path.join(self.source, "large"), 4)
        taken = self.take(1, 2)
        for attempt in range(8):
            run = self.start("-S", "-p", "home", self.source, self.to_file)
            time.sleep(0.08 + 0.04 * attempt)
            run.kill()
        self.send()
        self.assertEqual({}, read_locks(self.snapshots))
        for name in taken:
            self.receive(name, self.target)
            self.assertTreesEqual(self.snapshot_path(name), os.path.join(self.target, name))


class Refused(ShellTestCase):

    def test_n_cannot_be_kept_where_nothing_can_be_deleted(self):
        self.take(1)
        for option, value in (("-n", "3"), ("--keep-backups", "7d")):
            self.assertErrorSays(self.send(option, value, status=2), option, "shell://")
        self.assertEqual([], self.files())

    def test_it_is_no_source(self):
        self.run_program("shell://cat", self.target, status=2)

    def test_it_must_be_a_command(self):
        self.send(to="shell:// ", status=2)


class Examples(remote.SshdTestCase, ShellTestCase):
    """What README shows, with paths of the test's in place of README's."""

    def example(self, sign):
        with open(os.path.join(os.path.dirname(support.HERE), "README.md"), encoding="utf-8") as readme:
            lines = [line.strip() for line in readme if line.startswith("    ")]
        found, = [line for line in lines if line.startswith("btrfs-backup-ng /home 'shell://" + sign)]
        self.assertEqual("'", found[-1])
        return found[len("btrfs-backup-ng /home '"):-1]

    def check(self, text):
        first, second = self.take(1, 2)
        self.send(to=text)
        self.assertEqual([first + ".btrfs", second + ".btrfs"], self.files())
        for name in (first, second):
            self.receive(name, self.target)
            self.assertTreesEqual(self.snapshot_path(name), os.path.join(self.target, name))

    def test_to_a_file(self):
        self.check(self.example("cat").replace("/mnt/nas", self.folder))

    def test_over_ssh(self):
        ssh = " ".join(map(shlex.quote, self.sshd().argv("")[:-1]))
        self.check(self.example("ssh").replace("ssh nas", ssh).replace("streams/", self.folder + "/"))

    @unittest.skipUnless(shutil.which("rclone"), "needs the program rclone")
    def test_to_rclone(self):
        self.check(self.example("rclone").replace("cloud:home", ":local:" + self.folder))


class Watched(unittest.TestCase):
    """The stream passes as it is, in chunks of any size, and only what was planned passes at all."""

    EXPECTED = program.ExpectedStream("name", "11111111-2222-3333-4444-555555555555", None, 0, 0, 0o755)

    def stream(self, name="name"):
        return (program.STREAM_HEADER.pack(program.STREAM_MAGIC, 1)
                + program.make_command(program.SUBVOL, ((program.A_PATH, name.encode()), (
                    program.A_UUID, program.parse_uuid(self.EXPECTED.uuid)), (2, bytes(8))))
                + program.make_command(program.CHMOD, ((program.A_PATH, b"file"), (program.A_MODE, bytes(8))))
                + program.make_command(program.END, ()))

    def pass_through(self, data, size):
        watched = program.WatchedStream(self.EXPECTED)
        passed = b"".join(bytes(watched.watch(memoryview(data)[at:at + size])) for at in range(0, len(data), size))
        return passed, watched.ended

    def test_any_chunks(self):
        data = self.stream()
        for size in range(1, len(data) + 1):
            self.assertEqual((data, True), self.pass_through(data, size))

    def test_a_cut_stream_has_not_ended(self):
        data = self.stream()
        for end in range(1, len(data)):
            self.assertFalse(self.pass_through(data[:end], 7)[1])

    def test_what_comes_after_the_end(self):
        for size in (1, 7, 1000):
            with self.assertRaisesRegex(program.BackupError, "after its end"):
                self.pass_through(self.stream() + b"x", size)

    def test_another_stream(self):
        with self.assertRaisesRegex(program.BackupError, "not the planned one"):
            self.pass_through(self.stream("other"), 1000)


if __name__ == "__main__":
    unittest.main()
