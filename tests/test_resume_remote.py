"""Transfers over a real sshd that break: cut, silent, killed. They go on where they stopped.

TORTURE in the environment makes them long: 256 MiB, ten cuts, twenty kills.
"""

import json
import os
import re
import shlex
import signal
import sys
import time
import unittest

import remote
import support
from fakes import btrfs_where, swapped_and_killed
from support import MIB, bulk, names, partials, wait_until

from btrfs_backup_ng import CHECKPOINT_DISTANCE, CHECKPOINT_INTERVAL

TORTURE = int(os.environ.get("TORTURE", 0))
LARGE = 256 if TORTURE else 64  # MiB
CUTS = 10 if TORTURE else 3
WINDOW = 32 * MIB
DYING = os.path.join(support.HERE, "dying_agent.py")
SILENT = ["--ssh-opt", "ServerAliveInterval=1", "--ssh-opt", "ServerAliveCountMax=3"]


class ResumeTestCase(remote.RemoteTestCase):

    source_size = "2G"
    target_size = "2G"
    large = LARGE

    def setUp(self):
        super().setUp()
        self.random = support.chance(self)
        self.take(1)
        self.push("-S")
        self.between = self.proxy(self.server.port)
        self.set_endpoints(port=self.between.port)
        bulk(os.path.join(self.source, "large"), self.large)
        self.name2, = self.take(2)
        self.passed = self.between.up + self.between.down

    def carried(self):
        """Bytes over the wire since the test began."""
        return self.between.up + self.between.down - self.passed

    def start_push(self, *options):
        return self.start(*self.program_options() + list(options) + [
            "-S", "-p", "home", self.source, self.remote_target])

    def pull_folder(self):
        """Snapshots of the source there that are pulled: the same ones."""
        return [self.remote_source, self.target]

    def start_pull(self, *options):
        return self.start(*self.program_options() + list(options) + ["-S", "-p", "home"] + self.pull_folder())

    def half_way(self, run, mib=20):
        """Wait until so many MiB have come over the wire."""
        begun = self.carried()
        run.wait_for("some of it", lambda: self.carried() - begun > mib * MIB)

    @staticmethod
    def kill_program(run):
        """kill -9 of the program alone; Running.kill() would also end what it has started there."""
        run.process.kill()
        run.process.wait()

    def assertConverged(self):
        self.between.cut()  # sshd waits long at the end of one that was lost in silence
        self.assertEqual([self.name(1), self.name2], names(self.snapshots))
        super().assertConverged()
        self.assertNothingLeft(self.server)

    def check(self, result, taken_up=1):
        self.assertEqual(0, result.status, result.stderr)
        self.assertGreaterEqual(result.stderr.count("resuming"), taken_up, result.stderr)
        self.assertLessEqual(self.carried(), 1.05 * LARGE * MIB + CUTS * WINDOW)
        self.assertConverged()


class Cut(ResumeTestCase):

    def cut(self, start, *options):
        share = LARGE * MIB // (CUTS + 1)
        self.between.cut_after(*[self.random.randrange(share // 2, share) for _ in range(CUTS)])
        run = start("--retries", "20", *options)
        result = run.finish(240)
        self.assertEqual(0, len(self.between.cuts), result.stderr)
        self.assertEqual(CUTS, result.stderr.count("trying again"), result.stderr)
        self.check(result)

    def test_pushing(self):
        self.cut(self.start_push)

    def test_pulling(self):
        self.cut(self.start_pull)

    def test_pushing_compressed(self):
        self.cut(self.start_push, "--compress", "gzip")  # which does not see that the data repeats itself

    def test_from_there_to_there(self):
        """Source and destination are the same machine, but nobody here knows that: it has two names."""
        target = self.server.endpoint(self.target_there + "/backups", host="localhost", port=self.between.port)
        run = self.start(*self.program_options() + ["--retries", "20", "-S", "-p", "home", self.remote_source, target])
        self.half_way(run)
        self.between.cut()
        self.check(run.finish(120))


class Silent(ResumeTestCase):

    usual_seconds = 13

    def lose(self, start):
        run = start(*SILENT)
        self.half_way(run)
        self.between.forget()
        self.check(run.finish(120))

    def test_pushing(self):
        """The agent there knows nothing of it, and has to be ended first."""
        self.lose(self.start_push)

    def test_pulling(self):
        self.lose(self.start_pull)

    def test_the_next_run_ends_what_still_waits(self):
        run = self.start_push()
        self.half_way(run)
        self.between.forget()
        self.kill_program(run)
        self.assertTrue(partials(self.target))
        result = self.push("-S", timeout=120)
        self.assertIn("resuming " + self.name2, result.stderr)
        self.assertConverged()


class Killed(ResumeTestCase):

    def agents(self):
        return self.server.find("python")

    def test_the_client_is_killed(self):
        """The agent makes a checkpoint when its channel ends."""
        run = self.start_push()
        self.half_way(run)
        self.kill_program(run)
        self.assertTrue(wait_until(lambda: not self.agents(), 30))
        result = self.push("-S")
        self.assertIn("resuming " + self.name2, result.stderr)
        self.assertLessEqual(self.carried(), 1.05 * LARGE * MIB + 8 * MIB)
        self.assertConverged()

    def test_the_agent_is_asked_to_end(self):
        run = self.start_push()
        self.half_way(run)
        for pid in self.agents():
            os.kill(pid, signal.SIGTERM)
        result = run.finish(60)
        self.check(result)

    def test_the_agent_is_killed(self):
        run = self.start_push()
        self.half_way(run)
        for pid in self.agents():
            os.kill(pid, signal.SIGKILL)
        result = run.finish(60)
        self.assertEqual(0, result.status, result.stderr)
        self.assertConverged()

    def test_the_client_of_a_pull_is_interrupted(self):
        run = self.start_pull()
        self.half_way(run)
        run.process.terminate()
        self.assertEqual(143, run.finish(30).status)
        result = self.pull("-S")
        self.assertIn("resuming " + self.name2, result.stderr)
        self.assertLessEqual(self.carried(), 1.05 * LARGE * MIB + WINDOW)  # what is under way was sent
        self.assertConverged()


class KilledAtOnce(ResumeTestCase):
    """Nobody is left to make a checkpoint: what the periodic ones do not save is sent again."""

    usual_seconds = 13

    large = 1024 if TORTURE else LARGE
    rate = 50  # MiB a second, for which the distance in time is not the larger one

    def test_client_and_agent_are_killed_at_once(self):
        options = ["--limit", "%dM" % self.rate] if TORTURE else []
        killed = 0
        while killed < (20 if TORTURE else 2) and self.name2 not in names(self.target):
            run = self.start_push(*options)
            # Without checkpoints the long ones would send more than their distance, and never all of it.
            time.sleep(self.random.uniform(4, 12) if TORTURE else self.random.uniform(0.5, 2))
            for pid in self.server.find("python"):
                os.kill(pid, signal.SIGKILL)
            run.kill()
            killed += 1
        self.push("-S", timeout=240)
        if TORTURE:
            distance = max(CHECKPOINT_DISTANCE, CHECKPOINT_INTERVAL * self.rate * MIB)
            print("%d kills, %d MiB over the wire" % (killed, self.carried() // MIB))
            self.assertLessEqual(self.carried(), 1.05 * self.large * MIB + killed * (distance + WINDOW))
        self.assertConverged()


class SeveralDestinations(ResumeTestCase):

    def test_local_ones_do_not_wait_for_a_broken_one(self):
        near = os.path.join(self.disk("2G").path, "near")
        os.mkdir(near)
        run = self.start(*self.program_options() + ["--retries", "20", "-S", "-p", "home", self.source,
                                                    self.remote_target, near])
        self.half_way(run)
        self.between.cut()
        result = run.finish(120)
        self.assertEqual(0, result.status, result.stderr)
        self.assertBackedUp([self.name(1), self.name2], near)
        self.assertConverged()
        self.assertTrue(re.search("sent {} to ssh.*resumed once".format(self.name2), result.stderr), result.stderr)

    def test_one_that_stays_away_fails_alone(self):
        near = os.path.join(self.disk("2G").path, "near")
        os.mkdir(near)
        run = self.start(*self.program_options() + ["--retries", "2", "-S", "-p", "home", self.source,
                                                    self.remote_target, near])
        self.half_way(run)
        self.between.refuse()
        self.between.cut()
        result = run.finish(120)
        self.assertEqual(1, result.status, result.stderr)
        self.assertEqual(1, len(result.errors), result.stderr)
        self.assertBackedUp([self.name(1), self.name2], near)
        self.assertNotIn(self.name2, names(self.target))
        self.between.listen()
        self.assertIn("resuming", self.push("-S", to=[self.remote_target, near]).stderr)
        self.assertConverged()


class LostInCalls(remote.RemoteTestCase):
    """The connection is lost before, between and after transfers, in whatever is asked of the host then."""

    def setUp(self):
        super().setUp()
        self.plan = os.path.join(support.scratch_folder(), "calls to die in")
        self.answer_with()

    def answer_with(self, *words):
        command = " ".join(map(shlex.quote, [*words, sys.executable, DYING, self.plan]))
        self.server.authorize("root", 'restrict,command="{}"'.format(command))

    def dies(self, *lines):
        remote.write_file(self.plan, "".join(line + "\n" for line in lines))

    def assertLost(self, result, times):
        with open(self.plan, encoding="ascii") as file:
            self.assertEqual("", file.read(), "some calls were not made\n" + result.stderr)
        self.assertEqual(times, result.stderr.count("was lost; trying again"), result.stderr)

    def test_pushing(self):
        target = os.path.join(self.remote_target, "below")
        self.take(1, 2)
        self.dies("before look", "after make_folder", "after claim")
        self.assertLost(self.push("-S", to=[target]), 3)
        self.take(3)
        self.dies("after list", "after look", "after read_notes", "after delete", "before wait_for_cleaning")
        result = self.push("-S", "-n", "2", "-s", to=[target])
        self.assertLost(result, 5)
        self.assertBackedUp([self.name(2), self.name(3)], os.path.join(self.target, "below"))
        self.assertEqual("done: 1 backup sent, 1 subvolume deleted", result.stderr.splitlines()[-1])

    def test_what_is_deleted_already_is_no_error(self):
        self.take(1, 2, 3)
        self.dies()
        self.push("-S")
        self.dies("before delete", "after delete")
        result = self.push("-S", "-n", "1", "-v", "info")
        self.assertLost(result, 2)
        self.assertBackedUp([self.name(3)])
        self.assertIn("2 subvolumes deleted", result.stderr)

    def test_but_only_once_it_is_on_the_disk(self):
        """The agent dies in the sync that follows a deletion: the next one finds nothing left to delete."""
        self.take(1, 2)
        self.dies()
        self.push("-S")
        first = os.path.join(support.scratch_folder(), "first sync")
        env = btrfs_where("if mkdir '{0}'; then kill -9 $PPID; exit 1; fi 2>/dev/null; touch '{0}'/another".format(
            first), "filesystem sync")
        self.answer_with("env", "PATH=" + env["PATH"])
        self.assertLost(self.push("-S", "-n", "1"), 1)
        self.assertBackedUp([self.name(2)])
        self.assertEqual(["another"], os.listdir(first))

    def test_pulling(self):
        self.write("file", "content")
        self.dies("lost hold", "after prove_writable", "after snapshot", "before change_locks", "after change_locks",
                  "after change_locks", "after change_pins")
        result = self.pull()
        self.assertLost(result, 7)
        self.assertBackedUp(names(self.snapshots))
        self.assertEqual(1, len(names(self.snapshots)))

    def test_a_stream_file_that_has_its_name_already(self):
        self.take(1, 2)
        self.dies("before publish_raw", "after publish_raw")
        self.assertLost(self.push("-S", to=["raw+" + self.remote_target]), 2)
        self.dies()
        self.assertIn("nothing to do", self.push("-S", to=["raw+" + self.remote_target]).stderr)

    def test_the_end_of_a_broken_swap(self):
        """What was completed without an answer is not taken for undone, and swapped in once more."""
        self.take(1)
        self.transfer()
        self.assertEqual(9, swapped_and_killed(self.backup_path(self.name(1)), self.source))
        self.dies("after finish_swap")
        result = self.run_program("restore", *self.program_options() + [
            self.target, "--latest", "--in-place", self.remote_source], status=1)
        self.assertLost(result, 0)
        self.assertErrorSays(result, "the connection to", "was lost")
        self.assertEqual(1, len([name for name in names(self.source_disk.path) if ".old-" in name]))

    def test_one_that_is_lost_each_time(self):
        """What was sent was sent, whatever comes then."""
        self.take(1)
        self.dies("after claim", "before look", "before look", "before look")
        result = self.push("-S", "--retries", "2", "--json", status=1)
        self.assertLost(result, 3)
        self.assertErrorSays(result, "the connection to", "was lost")
        self.assertBackedUp([self.name(1)])
        at, = json.loads(result.stdout)["tasks"][0]["destinations"]
        self.assertEqual(([self.name(1)], []), ([one["snapshot"] for one in at["sent"]], at["doubtful"]))


if __name__ == "__main__":
    unittest.main()
