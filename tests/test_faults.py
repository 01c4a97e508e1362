"""Kills, full disks, torn files: nothing incomplete bears a final name, and the next run converges.

TORTURE in the environment is the number of random moments at which a run is killed.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
import unittest
from unittest import mock

import support
from fakes import btrfs_where, fails
from support import bulk, command, names, partials, snapshot, subvolume

import btrfs_backup_ng as program

MOMENTS = int(os.environ.get("TORTURE", 3))


class FaultTestCase(support.BackupTestCase):

    usual_seconds = 2
    source_size = "1G"
    target_size = "1G"

    def start_large_transfer(self, *options):
        """A transfer that takes long enough to be met half-way; its name and the run."""
        bulk(os.path.join(self.source, "large"), 48)
        name, = self.take(9)
        return name, self.start_backup("-S", "--limit", "96M", *options)

    def stop_half_way(self, run):
        """Stop the receiving process while it has written a part; its pid."""
        run.wait_for("partial backup", lambda: partials(self.target))
        return run.hold("receive")


class KilledAtRandomMoments(FaultTestCase):
    """kill -9 of the whole process group; then a look, then a clean run."""

    usual_seconds = 25
    options = ("-N", "3", "-n", "3")

    def setUp(self):
        super().setUp()
        self.random = support.chance(self)
        self.churn = support.Churn(self.source, seed=self.random.getrandbits(32))
        self.churn.fill()
        self.trees = {}

    def test_every_clean_run_converges(self):
        self.back_up()
        duration = self.back_up()
        for moment in range(MOMENTS):
            delay = self.random.uniform(0, duration)
            with self.subTest(moment=moment, delay=delay):
                self.change()
                run = self.start_backup(*self.options)
                time.sleep(delay)
                self.strike(run)
                self.remember_snapshots()
                self.look_at_the_target()
                self.back_up()

    def strike(self, run):
        run.kill()

    def change(self):
        self.churn.change()
        bulk(os.path.join(self.source, "large"), 48, seed=self.random.random())

    def back_up(self):
        """A clean run; the seconds it took."""
        self.change()
        started = time.monotonic()
        self.backup(*self.options)
        took = time.monotonic() - started
        self.remember_snapshots()
        self.look_at_the_target()
        self.assertEqual([], support.hidden(self.target))
        self.assertEqual({}, support.read_locks(self.snapshots))
        self.assertEqual(names(self.snapshots)[-1], names(self.target)[-1])
        return took

    def remember_snapshots(self):
        """What each snapshot holds, for retention may take it away before its backup."""
        for name in set(names(self.snapshots)) - set(self.trees):
            path = self.snapshot_path(name)
            self.trees[name] = subvolume(path).uuid, support.tree(path)

    def look_at_the_target(self):
        for name in names(self.target):
            found = subvolume(self.backup_path(name))
            uuid, content = self.trees[name]
            self.assertTrue(found.readonly, name)
            self.assertEqual(uuid, found.received_uuid, name)
            self.assertTreesEqual(content, self.backup_path(name))


class PowerCutAtRandomMoments(KilledAtRandomMoments):
    """The machine of the destination loses its power, and with it all that was not written yet."""

    def setUp(self):
        super().setUp()
        outer = self.disk("3G")
        self.target_disk = self.disk(self.target_size, image_in=outer.path)
        self.target = os.path.join(self.target_disk.path, "backups")
        os.mkdir(self.target)
        support.command("btrfs", "filesystem", "sync", self.target)

    def strike(self, run):
        run.kill()
        self.target_disk.cut_power()

    def test_what_was_said_to_be_complete_is_there(self):
        self.change()
        self.backup(*self.options)
        self.target_disk.cut_power()
        self.remember_snapshots()
        self.look_at_the_target()
        self.backup("-S")  # what had been cleared away may be there again
        self.assertConverged()

    def test_a_checkpoint_is_not_back_when_no_lock_names_it(self):
        self.change()
        self.take(1)
        pid = os.fork()
        if not pid:
            try:
                with mock.patch.multiple(program, CHECKPOINT_DISTANCE=8 << 20, CHECKPOINT_INTERVAL=0.0):
                    os._exit(program.main(["-q", "-p", "home", "-S", self.source, self.target]))
            finally:
                os._exit(8)
        self.assertEqual(0, os.waitpid(pid, 0)[1])
        self.target_disk.cut_power()
        self.assertEqual([self.name(1)], names(self.target))
        self.assertEqual([], partials(self.target))


class FailedBeforeACheckpoint(FaultTestCase):
    """What a receive says of a write that failed holds the name of the file."""

    def test_in_a_file_whose_name_speaks_of_the_streams_end(self):
        """It has failed near a checkpoint, of all places, and the next piece would go on behind it."""
        bulk(os.path.join(self.source, "unexpected EOF in stream"), 24)
        name, = self.take(1)
        env = support.fake("btrfs", """
            d="${0%/*}"
            if [ "$1" = receive ]; then
                cat > "$d/stream"
                trap "" 25
                [ -e "$d/once" ] || { touch "$d/once"; ulimit -f 14000; }
                exec REAL "$@" < "$d/stream"
            fi
            exec REAL "$@"
            """)
        pid = os.fork()
        if not pid:
            try:
                os.environ.update(env)
                with mock.patch.multiple(program, CHECKPOINT_DISTANCE=8 << 20, CHECKPOINT_INTERVAL=0.0):
                    os._exit(program.main(["-q", "-p", "home", "-S", self.source, self.target]))
            finally:
                os._exit(8)
        self.assertEqual(1, os.waitpid(pid, 0)[1] >> 8)
        self.assertEqual([], names(self.target))
        self.transfer()
        self.assertConverged()


class ContentsThatAreNotWritten(FaultTestCase):
    """A disk that takes the trees of btrfs but not the contents of files: a sync by btrfs succeeds all the same."""

    def setUp(self):
        if tuple(map(int, re.findall("[0-9]+", os.uname().release)[:2])) < (5, 8):
            self.skipTest("needs Linux 5.8")
        super().setUp()
        self.store = os.path.join(support.scratch_folder(), "store")
        os.mkdir(self.store)
        support.command("mount", "-t", "tmpfs", "-o", "size=1G", "tmpfs", self.store)
        self.addCleanup(shutil.rmtree, self.store)
        self.addCleanup(support.unmount, self.store)
        self.target_disk = self.disk("400M", options="nodiscard", image_in=self.store)
        self.target = os.path.join(self.target_disk.path, "backups")
        os.mkdir(self.target)
        self.take(1)
        self.transfer()

    def let_contents_fail(self):
        """All space of the image is there for the trees, none for more contents."""
        image = self.target_disk.image
        found = support.command("btrfs", "inspect-internal", "dump-tree", "-t", "chunk", self.target_disk.loop)
        trees = []
        for chunk in found.split(" CHUNK_ITEM ")[1:]:
            length, kind = re.findall(r"length (\d+) [^$]*?type ([A-Z]+)", chunk)[0]
            trees += [(int(at), int(length)) for at in re.findall(r"devid 1 offset (\d+)", chunk) if kind != "DATA"]
        self.assertTrue(trees)
        with open(image, "r+b") as file:
            for offset, length in trees:
                content = os.pread(file.fileno(), length, offset)
                os.pwrite(file.fileno(), content, offset)
        space = os.statvfs(self.store)
        used = (space.f_blocks - space.f_bfree) * space.f_frsize
        support.command("mount", "-o", "remount,size=%d" % used, self.store)

    def mend(self):
        support.command("mount", "-o", "remount,size=1G", self.store)
        support.command("btrfs", "filesystem", "sync", self.target_disk.path)
        self.target_disk.unmount()
        self.target_disk.mount()

    def test_what_was_lost_is_not_complete(self):
        bulk(os.path.join(self.source, "large"), 24)
        name, = self.take(2)
        self.let_contents_fail()
        result = self.transfer(status=1)
        self.assertErrorSays(result, "cannot sync", "contents of files were lost")
        self.assertNotIn(name, names(self.target))
        self.mend()
        self.transfer()
        self.assertConverged()

    def test_nor_is_what_was_received_before_by_a_run_that_was_killed(self):
        """It has noted that nothing is missing but the name."""
        bulk(os.path.join(self.source, "large"), 24)
        name, = self.take(2)
        self.let_contents_fail()
        run = self.start_backup("-S", env=support.gate("sync"))
        run.wait_for("sync", lambda: any(support.is_stopped(pid) for pid in run.processes()))
        run.kill()
        self.transfer(status=1)
        self.assertNotIn(name, names(self.target))
        self.mend()
        self.transfer()
        self.assertConverged()


class TracesOfWhatIsComplete(FaultTestCase):
    """A backup had its name and its lock at the source was cleared; of that there was left only the name."""

    def test_they_go(self):
        name, _ = self.take(1, 2)
        self.transfer()
        traces = [".{}.partial{}".format(snapshot, end) for snapshot in (name, "home20200101-000000")
                  for end in (".json", ".lock")]
        for trace in traces:
            open(os.path.join(self.target, trace), "w").close()
        self.transfer()
        self.assertEqual(traces[2:], support.hidden(self.target))

    def test_they_stay_where_there_is_a_partial(self):
        name, = self.take(1)
        self.transfer()
        partial = support.create(os.path.join(self.target, "." + name + ".partial"))
        open(partial + ".lock", "w").close()
        self.transfer()
        self.assertEqual(["." + name + ".partial", "." + name + ".partial.lock"], support.hidden(self.target))


class TakenAway(FaultTestCase):

    def test_a_disk_that_is_unmounted_in_the_middle(self):
        name, run = self.start_large_transfer()
        pid = self.stop_half_way(run)
        support.command("umount", "-l", self.target_disk.path)
        os.kill(pid, signal.SIGCONT)
        result = run.finish()
        self.assertEqual(1, result.status)
        self.assertErrorSays(result, "sending " + name, "was its disk unmounted? Mount it and run again")
        support.command("mount", self.target_disk.loop, self.target_disk.path)
        self.transfer()
        self.assertConverged()


class Interrupted(FaultTestCase):

    def interrupt_half_way(self, send_signal, status):
        self.take(1)
        self.transfer()
        name, run = self.start_large_transfer()
        self.stop_half_way(run)
        send_signal(run.pid)
        self.assertEqual(status, run.finish().status)
        self.assertNothingRuns(run)
        self.assertEqual([self.target], support.read_locks(self.snapshots)[name]["locks"])
        self.assertNotIn(name, names(self.target))
        self.transfer()
        self.assertConverged()

    def test_ctrl_c_reaches_the_whole_group(self):
        self.interrupt_half_way(lambda pid: os.killpg(pid, signal.SIGINT), 130)

    def test_sigint_to_the_program_alone(self):
        self.interrupt_half_way(lambda pid: os.kill(pid, signal.SIGINT), 130)

    def test_sigterm_to_the_program_alone(self):
        self.interrupt_half_way(lambda pid: os.kill(pid, signal.SIGTERM), 143)

    def test_sigterm_to_the_whole_group(self):
        self.interrupt_half_way(lambda pid: os.killpg(pid, signal.SIGTERM), 143)

    def test_while_the_interpreter_ends(self):
        """The status of what was done stays."""
        line = ("import os, sys; sys.path.insert(0, {!r}); from btrfs_backup_ng import main\n"
                "class Late:\n    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, {:d})\n"
                "late = Late(); sys.exit(main(['--version']))")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.subTest(signal=number):
                ended = subprocess.run([support.PYTHON, "-c", line.format(os.path.dirname(support.PROGRAM), number)],
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                self.assertEqual((0, b""), (ended.returncode, ended.stderr))

    def test_at_random_moments(self):
        chance = support.chance(self)
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            for moment in range(max(3, MOMENTS // 5)):
                with self.subTest(signal=number, moment=moment):
                    self.interrupt_after(chance.uniform(0, 0.4), number, status)

    def interrupt_after(self, seconds, number, status):
        before = names(self.snapshots)
        bulk(os.path.join(self.source, "large"), 64)
        run = self.start_backup("-N", "2", "-n", "2")
        # Before there is a snapshot, Python itself may still be starting up.
        run.wait_for("new snapshot", lambda: set(names(self.snapshots)) - set(before))
        time.sleep(seconds)
        os.kill(run.pid, number)
        result = run.finish()
        self.assertIn(result.status, (0, status), result.stderr)
        self.assertNotIn("Traceback", result.stderr)
        self.assertNothingRuns(run)
        locked = support.read_locks(self.snapshots)
        for partial in partials(self.target):
            self.assertTrue([name for name in locked if partial.startswith("." + name + ".")], partial)
        self.backup("-N", "2", "-n", "2")
        self.assertConverged()


class ChildKilled(FaultTestCase):

    def kill_child(self, verb):
        name, run = self.start_large_transfer("--retries", "0")
        receiver = self.stop_half_way(run)
        os.kill(run.find(verb), signal.SIGKILL)
        if verb == "send":
            with contextlib.suppress(ProcessLookupError):  # the program may have ended it
                os.kill(receiver, signal.SIGCONT)
        result = run.finish()
        self.assertEqual(1, result.status, result.stderr)
        self.assertTrue(result.errors, result.stderr)
        self.assertIn(verb, result.errors[0])
        self.assertNothingRuns(run)
        self.assertNotIn(name, names(self.target))
        self.assertIn(name, support.read_locks(self.snapshots))
        self.transfer()
        self.assertConverged()

    def test_send(self):
        self.kill_child("send")

    def test_receive(self):
        self.kill_child("receive")

    def test_a_stalled_transfer_is_given_up(self):
        name, run = self.start_large_transfer("--stall-timeout", "2")
        self.stop_half_way(run)
        result = run.finish()
        self.assertEqual(1, result.status, result.stderr)
        self.assertRegex(result.errors[0], "(?i)stall")
        self.assertNothingRuns(run)
        self.assertNotIn(name, names(self.target))
        self.transfer()
        self.assertConverged()


class FullDisk(FaultTestCase):

    target_size = "160M"

    def test_it_says_so_and_converges_once_there_is_room(self):
        self.take(1)
        self.transfer()
        bulk(os.path.join(self.source, "large"), 200)
        second, = self.take(2)
        result = self.transfer(status=1)
        self.assertErrorSays(result, "No space left", self.target)
        self.assertIn("No space left", result.errors[0])
        self.assertEqual([self.name(1)], names(self.target))
        self.assertIn(second, support.read_locks(self.snapshots))
        self.target_disk.grow("1G")
        self.transfer()
        self.assertConverged()


class OneOfTwoDestinations(FaultTestCase):
    """One that fails stops neither the snapshot nor the other one."""

    target_size = "160M"

    def run_with_a_good_one(self, *words):
        good = self.disk("1G").path
        before = names(self.target)
        result = self.backup(to=[self.target, good], status=1)
        self.assertBackedUp(names(self.snapshots), good)
        self.assertEqual(before, names(self.target))
        said = "\n".join(result.errors)
        for word in words:
            self.assertRegex(said, word)
        self.assertIn(self.target, said)

    def test_full(self):
        bulk(os.path.join(self.source, "large"), 200)
        self.run_with_a_good_one("No space left")

    def test_away(self):
        self.take(1)
        self.transfer()
        self.target_disk.unmount()
        self.run_with_a_good_one()

    def test_read_only(self):
        self.target_disk.remount("ro")
        self.run_with_a_good_one("(?i)read-only; mount it writable; see dmesg")

    def test_a_file_in_the_place_of_the_folder(self):
        os.rmdir(self.target)
        open(self.target, "w").close()
        self.run_with_a_good_one()


class DiskThatGoes(FaultTestCase):
    """The destination is the mount point itself, below which lies another disk: what is sent there is not done."""

    def setUp(self):
        super().setUp()
        self.below = self.disk()
        self.point = os.path.join(self.below.path, "mnt")
        os.mkdir(self.point)
        self.above = self.disk(at=self.point)
        self.taken = self.take(1)
        self.transfer(to=[self.point])
        for day in (2, 3, 4):
            bulk(os.path.join(self.source, "large"), 4, day)
            self.taken += self.take(day)

    def run_while_it_goes(self, go, *options):
        run = self.start("-p", "home", "-S", "-I", "-N", "1", "--limit", "8M", *options, self.source, self.point)
        run.wait_to_say("sent " + self.taken[1])
        go()
        result = run.finish()
        self.assertEqual(1, result.status, result.stderr)
        told = [error for error in result.errors if "was replaced during" in error and "mount it" in error.lower()]
        self.assertEqual(1, len(told), result.stderr)  # what was under way at that moment may have failed besides
        self.assertIn(self.point, told[0])
        self.assertIn("finished with errors: ", result.stderr)
        self.assertNotIn("backups sent", result.stderr)
        return result

    def check(self, go, come):
        self.run_while_it_goes(go)
        self.assertLessEqual(set(names(self.point)), set(self.taken[2:]))  # what was said to be sent lies elsewhere
        self.assertLessEqual({self.taken[0], self.taken[3]}, set(names(self.snapshots)))  # the parent is what it was
        come()
        self.assertEqual(self.taken[:2], names(self.point))
        result = self.transfer(to=[self.point])
        self.assertIn("incrementally from " + self.taken[0], result.stderr)
        self.assertComplete(os.path.join(self.point, self.taken[3]), self.snapshot_path(self.taken[3]))

    def test_unmounted(self):
        self.check(lambda: command("umount", "-l", self.point), lambda: command("mount", self.above.loop, self.point))

    def test_another_mounted_over_it(self):
        other = self.disk()
        self.check(lambda: command("mount", "--bind", other.path, self.point), lambda: command("umount", self.point))

    def test_nothing_is_deleted_there(self):
        self.run_while_it_goes(lambda: command("umount", "-l", self.point), "-n", "3")
        command("mount", self.above.loop, self.point)
        self.assertEqual(self.taken[:2], names(self.point))


class TakenOver(FaultTestCase):
    """What 0.6.6 left: a writable subvolume without received UUID under the final name, and a lock."""

    def half_received(self, lock):
        first, second = self.take(1, 2)
        support.send_receive(self.snapshot_path(first), self.target)
        snapshot(self.backup_path(first), self.backup_path(second), readonly=False)
        os.unlink(os.path.join(self.backup_path(second), "day1"))
        support.write_locks(self.snapshots, {second: {"locks": [lock], "parent_locks": []},
                                             first: {"locks": [], "parent_locks": [lock]}})

    def test_it_is_deleted_and_sent_again(self):
        self.half_received(self.target)
        self.transfer()
        self.assertConverged()

    def test_the_lock_may_end_with_a_slash(self):
        self.half_received(self.target + "/")
        self.transfer()
        self.assertConverged()

    def test_it_is_left_alone_when_the_lock_is_of_another_destination(self):
        self.half_received("/mnt/other")
        before = support.listing(self.target)
        self.transfer(status=1)
        self.assertUnchanged(before, self.target)

    def test_nothing_was_received_at_all(self):
        taken = self.take(1, 2)
        support.write_locks(self.snapshots, {taken[1]: {"locks": [self.target], "parent_locks": []}})
        self.transfer()
        self.assertConverged()

    def test_a_complete_backup_that_a_stale_lock_names_is_kept(self):
        taken = self.take(1, 2)
        self.transfer()
        before = support.listing(self.target)
        support.write_locks(self.snapshots, {taken[1]: {"locks": [self.target], "parent_locks": []},
                                             taken[0]: {"locks": [], "parent_locks": [self.target]}})
        self.transfer()
        self.assertUnchanged(before, self.target)
        self.assertConverged()

    def test_the_snapshot_is_gone(self):
        self.half_received(self.target)
        support.delete(self.snapshot_path(self.name(2)))
        self.transfer()
        self.assertConverged()


class LockFile(FaultTestCase):

    OTHER = {"work20240101-000000": {"locks": ["/mnt/other", "ssh://nas/backups"], "parent_locks": []},
             "work20230101-000000": {"locks": [], "parent_locks": ["/mnt/other", "shell://cat"]}}

    def test_one_that_cannot_be_read_stops_the_run(self):
        self.backup()
        for content in (b'{"home20240101-000000": {"lo', b"\xff\xfe\0", b"[]", b'"none of ours"',
                        b'{"home20240101-000000": "/mnt"}', b'{"home20240101-000000": {"locks": "/mnt"}}'):
            with self.subTest(content=content):
                support.write_locks(self.snapshots, content)
                self.check_that_the_run_stops()

    def check_that_the_run_stops(self):
        before = support.listing(self.source, self.target)
        result = self.backup("-N", "1", "-n", "1", status=1)
        self.assertErrorSays(result, ".outstanding_transfers")
        self.assertUnchanged(before, self.source, self.target)

    def test_a_folder_in_its_place_stops_the_run(self):
        self.backup()
        path = os.path.join(self.snapshots, ".outstanding_transfers")
        if os.path.exists(path):
            os.unlink(path)
        os.mkdir(path)
        self.check_that_the_run_stops()

    def test_locks_of_other_prefixes_survive(self):
        support.write_locks(self.snapshots, self.OTHER)
        self.backup()
        self.assertEqual(self.OTHER, support.read_locks(self.snapshots))
        name, run = self.start_large_transfer()
        self.stop_half_way(run)
        found = support.read_locks(self.snapshots)
        run.kill()
        self.assertEqual([self.target], found[name]["locks"])
        self.assertLessEqual(set(self.OTHER), set(found))
        self.transfer()
        self.assertEqual(self.OTHER, support.read_locks(self.snapshots))

    def test_the_parent_is_noted_while_it_is_needed(self):
        first, = self.take(1)
        self.transfer()
        _, run = self.start_large_transfer()
        self.stop_half_way(run)
        self.assertEqual([self.target], support.read_locks(self.snapshots)[first]["parent_locks"])

    def test_remove_locks(self):
        name, = self.take(1)
        support.write_locks(self.snapshots, {name: {"locks": [self.target, "/mnt/other"], "parent_locks": []}})
        self.transfer("-T", "--remove-locks")
        self.assertEqual(["/mnt/other"], support.read_locks(self.snapshots)[name]["locks"])

    def test_remove_locks_of_locked_destinations(self):
        name, = self.take(1)
        support.write_locks(self.snapshots, {name: {"locks": [self.target], "parent_locks": []}})
        self.transfer("-T", "--remove-locks", "--locked-destinations", to=[])
        self.assertEqual({}, support.read_locks(self.snapshots))

    ELSEWHERE = ["ssh://nas/x", "shell://cat"]

    def lock_elsewhere(self):
        """A backed-up snapshot with locks of ours, of destinations elsewhere, and of another prefix."""
        name, = self.take(1)
        self.transfer()
        kinds = ("locks", "parent_locks")
        self.entry = {kind: ["/mnt/other"] + self.ELSEWHERE for kind in kinds}
        support.write_locks(self.snapshots, dict(self.OTHER, **{name: self.entry}))
        return name

    def assertOnlyLocksGo(self, expected, *options):
        kept = [self.snapshot_path(self.name(1)), os.path.join(self.snapshots, ".destinations.json"), self.target]
        before = support.listing(*kept)
        self.transfer("-T", *options, to=[])
        self.assertEqual(dict(self.OTHER, **expected), support.read_locks(self.snapshots))
        self.assertUnchanged(before, *kept)

    def test_remove_locks_of_destinations_elsewhere(self):
        self.lock_elsewhere()
        self.assertOnlyLocksGo({}, "--remove-locks", "--locked-destinations")

    def test_forget_destinations_elsewhere(self):
        name = self.lock_elsewhere()
        for gone in self.ELSEWHERE:
            for destinations in self.entry.values():
                destinations.remove(gone)
            self.assertOnlyLocksGo({name: self.entry}, "--forget-destination", gone)

    def test_no_transfer_does_not_reach_out(self):
        name = self.lock_elsewhere()
        self.assertOnlyLocksGo({name: self.entry}, "--locked-destinations")

    def test_remove_locks_of_a_disk_that_is_away(self):
        name, = self.take(1)
        support.write_locks(self.snapshots, {name: {"locks": [self.target], "parent_locks": []}})
        self.target_disk.unmount()
        self.transfer("-T", "--remove-locks")
        self.assertEqual({}, support.read_locks(self.snapshots))

    def test_a_parent_note_without_a_lock_goes_once_the_destination_was_reached(self):
        first, _ = self.take(1, 2)
        self.transfer()
        entry = {"locks": [], "parent_locks": [self.target, "/mnt/other"]}
        support.write_locks(self.snapshots, {first: entry})
        self.target_disk.unmount()
        self.transfer(status=1)
        self.assertEqual({first: entry}, support.read_locks(self.snapshots))
        self.target_disk.mount()
        self.transfer()
        entry["parent_locks"].remove(self.target)
        self.assertEqual({first: entry}, support.read_locks(self.snapshots))

    def test_locked_destinations(self):
        taken = self.take(1)
        support.write_locks(self.snapshots, {taken[0]: {"locks": [self.target], "parent_locks": []}})
        self.transfer("--locked-dests", to=[])
        self.assertConverged()

    def test_a_locked_destination_may_be_given_as_well(self):
        taken = self.take(1)
        support.write_locks(self.snapshots, {taken[0]: {"locks": [self.target], "parent_locks": []}})
        self.transfer("--locked-destinations", to=[self.target + "/"])
        self.assertConverged()

    def test_locked_destinations_without_locks_do_nothing(self):
        self.take(1)
        self.transfer("--locked-destinations", to=[])
        self.assertEqual([], names(self.target))


class TwoRunsAtOnce(FaultTestCase):

    def setUp(self):
        super().setUp()
        _, self.first = self.start_large_transfer()
        self.receiver = self.stop_half_way(self.first)

    def go_on(self):
        os.kill(self.receiver, signal.SIGCONT)
        self.assertEqual(0, self.first.finish().status)

    def test_the_second_fails_at_once(self):
        before = support.listing(self.snapshots)
        result = self.backup(status=75)
        self.assertNotIn("waiting", result.stderr)
        self.assertEqual(1, len(result.errors))
        self.assertUnchanged(before, self.snapshots)
        self.go_on()
        self.assertConverged()

    def test_wait_waits_for_the_first(self):
        second = self.start_backup("--wait")
        second.wait_to_say("waiting for another run")
        self.go_on()
        result = second.finish()
        self.assertEqual(0, result.status, result.stderr)
        self.assertEqual(2, len(names(self.target)))
        self.assertConverged()

    def test_wait_gives_up_after_its_seconds(self):
        started = time.monotonic()
        self.backup("--wait", "1", status=75)
        self.assertGreaterEqual(time.monotonic() - started, 1)

    def test_another_prefix_is_free_to_run(self):
        other = os.path.join(self.target_disk.path, "work")
        before = support.read_locks(self.snapshots)
        self.run_program("-p", "work", self.source, other)
        self.assertEqual(1, len(names(other)))
        self.assertEqual(before, support.read_locks(self.snapshots))
        self.go_on()

    def test_a_killed_run_does_not_lock_out_the_next(self):
        self.first.kill()
        self.transfer()
        self.assertConverged()


class BrokenBtrfs(FaultTestCase):
    """A `btrfs` found earlier on the PATH, one of whose verbs fails."""

    def path_where(self, verb, on=""):
        """An environment in which the verb fails; `on` what is so named, else always."""
        return btrfs_where(fails("ERROR: out of luck"), " " + verb + " ", on)

    def test_snapshot(self):
        result = self.backup(status=1, env=self.path_where("snapshot"))
        self.assertErrorSays(result, self.source)
        self.assertIn("out of luck", result.stderr)

    def test_send(self):
        result = self.backup("-d", status=1, env=self.path_where("send"))  # else the program is not asked
        self.assertIn("out of luck", result.stderr)
        self.assertEqual(1, len(names(self.snapshots)))
        self.assertEqual([], names(self.target))
        self.transfer()
        self.assertConverged()

    def test_a_snapshot_that_cannot_be_read_stops_no_other(self):
        """As one with a damaged extent: each destination gets the rest."""
        other = self.disk("1G").path
        taken = self.take(1, 2, 3)
        result = self.transfer("-d", to=[self.target, other], status=1, env=self.path_where("send", taken[0]))
        for place in (self.target, other):
            self.assertRegex(result.stderr, "(?m)^error: sending {} to {}: ".format(taken[0], place))
            self.assertBackedUp(taken[1:], place)
        self.assertIn("out of luck", result.stderr)

    def test_receive(self):
        result = self.backup(status=1, env=self.path_where("receive"))
        self.assertIn("out of luck", result.stderr)
        self.transfer()
        self.assertConverged()

    def test_delete(self):
        taken = self.take(1, 2, 3)
        self.transfer()
        result = self.transfer("-N", "1", status=1, wrapper=support.without_deletions())
        for name in taken[:2]:
            self.assertRegex(result.stderr, "(?m)^error: .*" + name)
        self.assertEqual(taken, names(self.snapshots))
        self.transfer("-N", "1")
        self.assertEqual(taken[-1:], names(self.snapshots))

    def test_delete_at_one_of_two_destinations(self):
        other = self.disk("1G").path
        taken = self.take(1, 2, 3)
        to = [self.target, other]
        self.transfer(to=to)
        result = self.transfer("-n", "1", "-N", "2", to=to, status=1, env=self.path_where("delete", self.target + "/"))
        for name in taken[:2]:
            self.assertRegex(result.stderr, "(?m)^error: .*" + name)
        self.assertEqual((taken, taken[-1:], taken[-2:]), (names(self.target), names(other), names(self.snapshots)))
        self.transfer("-n", "1", to=to)
        self.assertEqual(taken[-1:], names(self.target))


if __name__ == "__main__":
    unittest.main()
