"""Many tasks in one command: at once, each for itself, none left behind."""

import os
import shlex
import signal
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support
from remote import SshdTestCase, as_program_options, ssh_options
from support import TASKS, TasksTestCase, flatten, go_on, names, read_locks

from btrfs_backup_ng import SNAPSHOT_PATIENCE, Ending, format_request, parse_command, task_names


class Eight(TasksTestCase):

    count, mib = 8, 4

    def test_one_is_broken_the_others_succeed_at_the_same_time(self):
        tasks = self.tasks()
        tasks[3][-1] = os.path.join(self.disks[1].path, "away")
        running = self.start(*self.command(tasks=tasks), env=support.gate("receive"))
        go_on(running.met_at_gate("receive", 7))  # seven at one moment
        result = running.finish()
        self.assertEqual(1, result.status, result.stderr)
        for number in range(8):
            if number != 3:
                self.assertAllBackedUp(self.sources[number], self.targets[number])
        self.assertEqual(1, len(self.snapshots(self.sources[3])))
        summary = result.stderr[result.stderr.index("error: 1 of 8 tasks failed"):].splitlines()
        self.assertEqual(2, len(summary), summary)
        self.assertEqual(1, result.stderr.count("away; is its filesystem mounted?"))
        self.assertIn("again: btrfs-backup-ng -S ", summary[1])
        again = summary[1].partition("btrfs-backup-ng ")[2].split()
        self.assertEqual(1, self.run_program(*again, status=1).status)
        self.assertEqual(1, len(self.snapshots(self.sources[3])))

    def test_what_can_never_go_well_is_not_to_be_typed_again(self):
        tasks = self.tasks()
        tasks[0][-1] = tasks[0][-2]
        os.mkdir(tasks[1][-2] + "/folder")
        tasks[1][-2] += "/folder"
        tasks[2] += [tasks[2][-2]]
        tasks[3] += [tasks[3][-2], os.path.join(self.disks[1].path, "away")]
        result = self.run_tasks(tasks=tasks[:4], status=1)
        self.assertEqual(1, result.stderr.count(" is an ordinary folder, not a subvolume"), result.stderr)
        self.assertEqual(3, result.stderr.count(" is inside the source"), result.stderr)
        self.assertIn("error: {} is an ordinary folder".format(tasks[1][-2]), result.stderr)  # named once
        again = result.stderr[result.stderr.index("error: 4 of 4 tasks failed"):].splitlines()[1:]
        self.assertEqual(["        again: btrfs-backup-ng -S --snapshot-prefix={} {} {} {} {}".format(*tasks[3][1:])],
                         again)

    def test_all_snapshots_are_taken_first(self):
        self.run_tasks()
        events = [event["event"] for event in self.events("snapshot", "sending")]
        self.assertEqual(["snapshot"] * 8 + ["sending"] * 8, events)

    def test_jobs_bound_how_many_are_at_work(self):
        self.run_tasks("--jobs", "2")
        moments = []
        for source in self.sources:
            own = [event["time"] for event in self.events("sending", "done") if event["task"] == source]
            moments += [(own[0], 1), (own[-1], -1)]
        at_work, most = 0, 0
        for _, change in sorted(moments):
            at_work += change
            most = max(most, at_work)
        self.assertEqual(2, most)
        self.assertEqual(["snapshot"] * 8, [e["event"] for e in self.events("snapshot", "sending")][:8])

    def test_the_next_run_is_incremental(self):
        self.run_tasks()
        support.next_second()
        self.run_tasks()
        self.assertEqual([False] * 8 + [True] * 8, [bool(event["parent"]) for event in self.events("sending")])
        for source, target in zip(self.sources, self.targets):
            self.assertAllBackedUp(source, target)


class OverSshTestCase(SshdTestCase, TasksTestCase):

    def setUp(self):
        super().setUp()
        self.there = os.path.join(support.scratch_folder(), "there")
        self.server = self.server_with()

    def server_with(self, **options):
        return self.sshd({self.disks[0].path: self.there + "/sources", self.disks[3].path: self.there + "/targets"},
                         **options)

    def remote_tasks(self, push=(), pull=(), **where):
        tasks = self.tasks()
        for number in push:
            tasks[number][-1] = self.server.endpoint(self.there + "/targets/" + TASKS[number], **where)
        for number in pull:
            tasks[number][-2] = self.server.endpoint(self.there + "/sources/" + TASKS[number], **where)
        for number in set(push) | set(pull):
            tasks[number][:0] = as_program_options(ssh_options())
        return tasks

    def assertLogins(self, count, tasks, **more):
        before = self.server.accepted()
        self.run_tasks(tasks=tasks, **more)
        self.assertEqual(count, self.server.accepted() - before)
        for task in tasks:
            number = next(number for number, name in enumerate(TASKS) if task[-1].endswith("/" + name))
            self.assertAllBackedUp(self.sources[number], self.targets[number])
        self.assertNothingLeft(self.server)


class EightOverSsh(OverSshTestCase):

    count, mib = 8, 4

    def test_eight_tasks_on_four_filesystems_two_over_ssh_one_broken(self):
        tasks = self.remote_tasks(push=[1], pull=[2])
        tasks[3][-1] = os.path.join(self.sources[3], "inside")
        running = self.start(*self.command(tasks=tasks), env=support.gate("receive"))
        held = running.met_at_gate("receive", 6)  # the seventh runs on the server
        running.wait_for("all to be sent", lambda: len(self.events("sending")) == 7)
        go_on(held)
        result = running.finish()
        self.assertEqual(1, result.status, result.stderr)
        for number in range(8):
            if number != 3:
                self.assertAllBackedUp(self.sources[number], self.targets[number])
        self.assertIn("error: 1 of 8 tasks failed", result.stderr)
        self.assertNothingLeft(self.server)

    def test_eight_tasks_log_in_once(self):
        self.assertLogins(1, self.remote_tasks(push=[1, 3, 5, 7], pull=[0, 2, 4, 6]))

    def test_a_connection_that_is_lost_is_made_anew_for_all(self):
        between = self.proxy(self.server.port)
        between.cut_after(6 << 20)  # while all send: what is done with one calls its host without trying again
        tasks = self.remote_tasks(push=[1, 3, 5, 7], port=between.port)[1::2]
        self.assertLogins(2, [["--limit", "1M"] + task for task in tasks], timeout=120)


class OverSsh(OverSshTestCase):

    mib = 16  # at work still when a signal comes

    def test_streams_over_several_channels(self):
        """As far as all may have what they need; two tasks can."""
        tasks = self.remote_tasks(push=[1], pull=[2])[1:3]
        for task in tasks:
            task[:0] = ["--channels", "4", "--limit", "8M"]
        before = self.server.accepted()
        result = self.run_tasks("-v", "debug", tasks=tasks)
        self.assertEqual(1, self.server.accepted() - before)
        self.assertIn(": 2 channels", result.stderr)
        for number in (1, 2):
            self.assertAllBackedUp(self.sources[number], self.targets[number])
        self.assertNothingLeft(self.server)

    def test_a_server_that_lets_few_sessions_in(self):
        """Who finds no room logs in once more, and others with it."""
        self.server.stop()
        self.server.lines.append("MaxSessions 3")  # one of which keeps the connection
        self.server.start()
        self.assertLogins(2, self.remote_tasks(push=[1, 3], pull=[0, 2])[:4])

    def test_a_server_that_lets_one_session_in(self):
        """Nothing can be shared there, which is tried once, but for the second session of a pull."""
        self.server.stop()
        self.server.lines.append("MaxSessions 1")
        self.server.start()
        self.assertLogins(4, self.remote_tasks(push=[3], pull=[2])[2:4])

    def test_a_restricted_key_logs_in_once(self):
        words = support.PROGRAM_ARGV + ["agent", "--under", self.there + "/targets", "--allow", "receive,list"]
        self.server.authorize("root", 'restrict,command="{}"'.format(" ".join(map(shlex.quote, words))))
        self.assertLogins(1, self.remote_tasks(push=[1, 3])[1::2])

    def test_a_user_with_sudo_logs_in_once(self):
        account = self.user(sudo=True)
        self.server.authorize(account.name)
        tasks = self.remote_tasks(push=[1, 3], user=account.name)[1::2]
        for task in tasks:
            task.insert(0, "--ssh-sudo")
        self.assertLogins(1, tasks)

    def test_plain_commands_log_in_once(self):
        self.server = self.server_with(hide=("python3*",))
        self.assertLogins(1, self.remote_tasks(push=[1, 3])[1::2])

    def test_a_host_that_hangs_keeps_nobody_else_waiting(self):
        between = self.proxy(self.server.port)
        between.hang()
        tasks = self.remote_tasks(push=[1], port=between.port)[1:2] + self.remote_tasks(push=[3], pull=[2])[2:4]
        tasks[0][:0] = as_program_options(["ConnectTimeout=300"])
        begun = time.time()
        running = self.start(*self.command(tasks=tasks))
        running.wait_for("the others", lambda: {event["task"] for event in self.events("done")} >= {
            tasks[1][-2], tasks[2][-2]})
        self.assertLess(self.events("sending")[0]["time"] - begun, 0.5 * SNAPSHOT_PATIENCE)
        between.go_on()
        self.assertEqual(0, running.finish().status)
        for number in (1, 2, 3):
            self.assertAllBackedUp(self.sources[number], self.targets[number])

    def test_nothing_is_left_anywhere(self):
        for signal_number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
            tasks = self.remote_tasks(push=[1, 3], pull=[2])[1:4]
            for task in tasks:
                task.insert(0, "-I")
            running = self.start(*self.command(tasks=tasks))
            running.wait_for("transfers", lambda: len(self.events("sending")) >= 3)
            os.kill(running.pid, signal_number)
            result = running.finish()
            self.assertEqual(status, result.status, result.stderr)
            self.assertNotIn("was killed", result.stderr)
            self.wait_until_gone(running)
            self.assertNothingLeft(self.server)
            self.forget_log()
            support.next_second()
        self.run_tasks(tasks=self.remote_tasks(push=[1, 3], pull=[2])[1:4])
        for number in (1, 2, 3):
            self.assertAllBackedUp(self.sources[number], self.targets[number])

    def test_a_host_that_lets_nobody_in(self):
        tasks = self.remote_tasks(push=[1, 3])
        self.server.authorize("root", identity="other")
        result = self.run_tasks(tasks=tasks[:4], status=1)
        self.assertIn("2 of 4 tasks failed", result.stderr)
        for number in (0, 2):
            self.assertAllBackedUp(self.sources[number], self.targets[number])
        for number in (1, 3):
            self.assertEqual(1, len(self.snapshots(self.sources[number])))


class StoppedTestCase(TasksTestCase):

    count, mib = 8, 4

    def converges(self):
        support.next_second()
        self.run_tasks()
        for source, target in zip(self.sources, self.targets):
            self.assertAllBackedUp(source, target)


class Stopped(StoppedTestCase):

    def stop(self, number, status):
        running = self.start(*self.command(), env=support.gate("receive"))
        held = running.met_at_gate("receive", 8)
        os.kill(running.pid, number)
        result = running.finish()
        self.assertEqual(status, result.status, result.stderr)
        self.assertGone(running, held)
        warnings = [line for line in result.stderr.splitlines() if "interrupted" in line]
        self.assertEqual(1, len(warnings), result.stderr)
        self.assertIn(signal.Signals(number).name, warnings[0])
        self.assertNotIn("Traceback", result.stderr)
        self.assertNotIn("error", result.stderr)
        for source in self.sources:
            self.assertEqual(1, len(read_locks(os.path.join(source, ".btrfs-backup-ng", "snapshots"))))
        self.converges()

    def test_by_ctrl_c(self):
        self.stop(signal.SIGINT, 130)

    def test_by_sigterm(self):
        self.stop(signal.SIGTERM, 143)

    def test_by_sighup(self):
        self.stop(signal.SIGHUP, 129)

    def test_ctrl_c_reaches_all_at_once(self):
        """A terminal sends it to the whole process group."""
        running = self.start(*self.command(), env=support.gate("receive"))
        held = running.met_at_gate("receive", 8)
        os.killpg(running.pid, signal.SIGINT)
        result = running.finish()
        self.assertEqual(130, result.status, result.stderr)
        self.assertGone(running, held)
        self.assertEqual(1, result.stderr.count("interrupted by"), result.stderr)
        self.assertNotIn("Traceback", result.stderr)
        self.assertNotIn("OSError", result.stderr)
        self.converges()

    def test_killed_the_children_end_by_themselves(self):
        running = self.start(*self.command(), env=support.gate("receive"))
        running.met_at_gate("receive", 8)  # so that only who is ended ends
        os.kill(running.pid, signal.SIGKILL)
        running.process.wait()
        self.wait_until_gone(running)
        self.converges()


class StoppedAtAnyMoment(StoppedTestCase):

    usual_seconds = 40

    mib = 16  # which takes as long as the moments reach

    def test_at_any_moment(self):
        moments = int(os.environ.get("TORTURE", 0)) or 4
        for moment in range(moments):
            running = self.start(*self.command())
            running.wait_for("its log", lambda: os.path.exists(self.log))
            time.sleep(1.2 * moment / moments)
            number = (signal.SIGTERM, signal.SIGINT)[moment % 2]
            running.process.send_signal(number)
            result = running.finish()
            self.assertIn(result.status, (0, 128 + number, -number), result.stderr)
            self.assertNotIn("Traceback", result.stderr)
            self.assertGone(running)
            self.forget_log()
        self.converges()


class Impatient(TasksTestCase):
    """With the crew's patience of a minute made short."""

    count, mib = 2, 4

    DEAF = """
catch, parent = program.catch_signals, os.getpid()

def catch_but_one():
    catch()
    if os.getpid() != parent:
        signal.signal(signal.SIGTERM, program.pass_over)

program.catch_signals = catch_but_one
"""

    def begin(self, verb, changes="", **patience):
        """A command whose `btrfs VERB` wait at a gate, with constants of the program's of so many seconds.

        changes: of what else the program does.
        """
        line = ("import os, signal, sys; sys.path.insert(0, {!r}); import btrfs_backup_ng as program\n"
                "vars(program).update({!r})\n{}\nsys.exit(program.main(sys.argv[1:]))")
        program = (support.PYTHON, "-c", line.format(os.path.dirname(support.PROGRAM), patience, changes))
        return self.start(*self.command(), program=program, env=support.gate(verb))

    def test_a_stopped_task_is_woken_to_end(self):
        running = self.begin("receive", STOP_GRACE=600.0)
        held = running.met_at_gate("receive", 2)
        for pid in running.children():
            os.kill(pid, signal.SIGSTOP)
        os.kill(running.pid, signal.SIGTERM)
        self.assertEqual(143, running.finish().status)
        self.assertGone(running, held)

    def test_one_that_does_not_end_is_killed(self):
        running = self.begin("receive", self.DEAF, STOP_GRACE=1.0)
        _, other = running.met_at_gate("receive", 2)
        go_on([other])
        running.wait_for("the end of a task", lambda: len(running.children()) == 1)
        os.kill(running.pid, signal.SIGTERM)
        result = running.finish()
        self.assertEqual(143, result.status, result.stderr)
        self.assertEqual(1, result.stderr.count("did not end within 1.0 s, and was killed"), result.stderr)
        self.wait_until_gone(running)

    def test_one_without_a_snapshot_keeps_the_others_only_so_long(self):
        running = self.begin("snapshot", SNAPSHOT_PATIENCE=0.5)
        one, other = running.met_at_gate("snapshot", 2)
        go_on([other])
        running.wait_for("a backup", lambda: any(map(names, self.targets)))
        self.assertTrue(support.is_stopped(one))
        go_on([one])
        result = running.finish()
        self.assertEqual(0, result.status, result.stderr)
        for source, target in zip(self.sources, self.targets):
            self.assertAllBackedUp(source, target)

    def test_one_without_a_snapshot_keeps_the_others(self):
        running = self.begin("snapshot", SNAPSHOT_PATIENCE=600.0)
        one, other = running.met_at_gate("snapshot", 2)
        go_on([other])
        running.wait_for("the other's snapshot", lambda: self.events("snapshot"))
        self.assertEqual([], self.events("sending"))
        go_on([one])
        self.assertEqual(0, running.finish().status)
        self.assertEqual(["snapshot"] * 2 + ["sending"] * 2,
                         [event["event"] for event in self.events("snapshot", "sending")])


SWALLOWING = """
import os, signal, sys, threading, time
import btrfs_backup_ng as program

class Ending:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass

program.SWALLOWED_NAP = float(sys.argv[1])
for _ in range(20):
    program.catch_signals()
    try:
        ending = Ending()
        del ending
        time.sleep(5)
        print("went on")
    except program.Interrupted as interruption:
        print("interrupted", interruption.status)
    for thread in threading.enumerate()[1:]:
        thread.join()
"""


class Swallowed(unittest.TestCase):

    if sys.version_info >= (3, 8):  # older ones do not tell of what a finalizer swallows

        def test_a_signal_in_a_finalizer(self):
            here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            for nap in ("0.01", "0"):  # at once: before what was swallowed has been told of to its end
                done = subprocess.run([sys.executable, "-c", SWALLOWING, nap], stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, cwd=here, timeout=support.HANGS)
                self.assertEqual((b"interrupted 143\n" * 20, b""), (done.stdout, done.stderr))


class EachForItself(TasksTestCase):

    def test_the_same_source_and_prefix_take_turns(self):
        one, two = self.tasks()[:2]
        again = one[:-1] + [self.targets[2]]
        result = self.run_tasks("--limit", "5M", tasks=[one, again, two])
        first, second = self.snapshots(self.sources[0])
        self.assertEqual([[first], [first, second]], sorted([names(self.targets[0]), names(self.targets[2])]))
        self.assertAllBackedUp(self.sources[1], self.targets[1])
        self.assertIn("waiting for another task", result.stderr)
        self.assertEqual({self.sources[0] + " (1)", self.sources[0] + " (2)", self.sources[1]},
                         {event["task"] for event in self.events() if event["event"] != "summary"})

    def test_the_same_source_with_two_prefixes(self):
        one, two = self.tasks()[:2]
        other = ["-p", "other-", self.sources[0], self.targets[0]]
        self.run_tasks(tasks=[one, other, two])
        self.assertEqual(["home-", "other-"], sorted(name[:-15] for name in names(self.targets[0])))
        self.assertAllBackedUp(self.sources[0], self.targets[0])

    def test_one_destination_for_all(self):
        tasks = [task[:-1] + [self.targets[0]] for task in self.tasks()]
        self.run_tasks(tasks=tasks)
        self.assertEqual(sorted(name for source in self.sources for name in self.snapshots(source)),
                         names(self.targets[0]))

    def test_locks_that_cannot_be_read_stop_only_their_task(self):
        folder = os.path.join(self.sources[1], ".btrfs-backup-ng", "snapshots")
        support.write_locks(folder, b"no json")
        result = self.run_tasks(status=1)
        self.assertEqual([], self.snapshots(self.sources[1]))
        self.assertFalse(os.path.exists(self.targets[1]))
        for number in (0, 2, 3):
            self.assertAllBackedUp(self.sources[number], self.targets[number])
        self.assertIn("1 of 4 tasks failed", result.stderr)

    def test_a_missing_source(self):
        os.rename(self.sources[2], self.sources[2] + ".away")
        result = self.run_tasks(status=1)
        for number in (0, 1, 3):
            self.assertAllBackedUp(self.sources[number], self.targets[number])
        self.assertIn("no such source", result.stderr)

    def test_another_command_is_at_work(self):
        running = self.start("-p", "home-", self.sources[0], self.targets[0], env=support.gate("receive"))
        held = running.met_at_gate("receive")
        result = self.run_tasks(status=75)
        self.assertRegex(result.stderr, r"another run is at work in \S+: process [0-9]+ \(\S+\) of \S+, for 0 min")
        for number in (1, 2, 3):
            self.assertAllBackedUp(self.sources[number], self.targets[number])
        tasks = self.tasks()
        tasks[1][-2] += "-missing"
        self.run_tasks(tasks=tasks[:2], status=1)
        # one that waits keeps nobody
        waiting = self.start(*self.command("--wait"))
        waiting.wait_for("the others", lambda: sum(e["event"] == "done" for e in self.events()) >= 6)
        self.assertIsNone(waiting.process.poll())
        go_on(held)
        self.assertEqual(0, waiting.finish().status)
        self.assertEqual(0, running.finish().status)
        self.assertAllBackedUp(self.sources[0], self.targets[0])

    def test_one_is_killed(self):
        running = self.start(*self.command(), env=support.gate("receive"))
        held = running.met_at_gate("receive", 4)
        children = running.children()
        self.assertEqual(4, len(children))
        os.kill(children[0], signal.SIGKILL)
        go_on(held)
        result = running.finish()
        self.assertEqual(1, result.status)
        self.assertIn("killed by SIGKILL", result.stderr)
        self.assertIn("1 of 4 tasks failed", result.stderr)
        self.assertEqual(3, sum(names(target) != [] for target in self.targets))
        support.next_second()
        self.run_tasks()
        for source, target in zip(self.sources, self.targets):
            self.assertAllBackedUp(source, target)

    def test_what_is_said(self):
        result = self.run_tasks()
        self.assertEqual("", result.stdout)
        told, end, block = result.stderr.partition("done: 4 tasks\n")
        self.assertTrue(end, result.stderr)
        for line in told.splitlines():
            self.assertTrue(any(line.startswith(source + ": ") for source in self.sources), line)
        for source in self.sources:
            self.assertIn("  {}  1 snapshot taken\n".format(source), block)
        for event in [event for event in self.events() if event["event"] != "summary"]:
            self.assertIn(event["task"], self.sources)
            self.assertLessEqual({"time", "event", "level", "text", "task"}, set(event))
        support.next_second()
        self.assertEqual("", self.run_tasks("-q").stderr)
        support.next_second()
        self.assertIn(": ran btrfs subvolume snapshot", self.run_tasks("-v", "debug").stderr)

    def test_a_dry_run_shows_what_the_tasks_became(self):
        before = support.listing(*[disk.path for disk in self.disks])
        conf = os.path.join(support.scratch_folder(), "tasks.conf")
        with open(conf, "w") as file:
            file.write("\n:\n".join("-p {}\n{}\n{}".format(*task[1:]) for task in self.tasks()))
        self.addCleanup(os.unlink, conf)
        result = self.run_program("--dry-run", "@" + conf)
        self.assertUnchanged(before, *[disk.path for disk in self.disks])
        heads = [line for line in result.stdout.splitlines() if line.startswith("task ")]
        self.assertEqual(["task {} of 4: btrfs-backup-ng --snapshot-prefix={} {} {}".format(number, *task[1:])
                          for number, task in enumerate(self.tasks(), 1)], heads)
        plans = [line for line in result.stdout.splitlines() if line.startswith("source ")]
        self.assertEqual([source in line for source, line in zip(self.sources, plans)], [True] * 4)
        self.assertEqual("", result.stderr)

    def test_a_dry_run_shows_each_plan_as_soon_as_it_is_made(self):
        tasks = self.tasks()
        tasks[1][-1] = "ssh://held/backups"
        running = self.start(*self.command("--dry-run", tasks=tasks), env=support.fake("ssh", "kill -STOP $$"))
        running.wait_for("the first plan", lambda: "source " + self.sources[0] in running.read_stdout())
        self.assertNotIn("task 2 of", running.read_stdout())

    def test_a_dry_run_says_where_there_is_no_plan(self):
        tasks = self.tasks()[:2]
        tasks[0][-2] += "none"
        shown = self.run_tasks("--dry-run", tasks=tasks, status=1).stdout
        self.assertRegex(shown, "(?s)^task 1 of 2: [^\n]*\n  no plan: see its error\ntask 2 of 2: [^\n]*\nsource ")

    def test_wrong_arguments_start_nothing(self):
        tasks = self.tasks()
        tasks[2][-1] = "ftp://host/path"
        result = self.run_program(*flatten(tasks), status=2)
        self.assertErrorSays(result, "task 3: unknown scheme ftp://")
        self.assertEqual([], self.snapshots(self.sources[0]))

    def test_messages_nobody_reads_stop_nothing(self):
        """As in `btrfs-backup-ng … 2>&1 | head -1`."""
        words = support.PROGRAM_ARGV + flatten(self.tasks())
        read_end, write_end = os.pipe()
        os.close(read_end)
        status = subprocess.call(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=write_end)
        os.close(write_end)
        self.assertEqual(0, status)
        for source, target in zip(self.sources, self.targets):
            self.assertAllBackedUp(source, target)


class Words(unittest.TestCase):

    def test_exit_status(self):
        for statuses, status in (([0, 0], 0), ([0, 1], 1), ([75, 0], 75), ([75, 75], 75), ([75, 1], 1),
                                 ([1, 1], 1), ([0], 0), ([143, 0], 1)):
            self.assertEqual(status, Ending(*statuses).status, statuses)

    def test_a_request_as_a_command_line(self):
        for words in (["-p", "a b", "/home", "/mnt/it's"], ["--", "-x", "/a:b"], ["/a", "shell://cat > x:y"],
                      ["-N3", "/a", "--wait", "5", "host:/b"], ["--", "/a", "@b"]):
            import shlex
            request, = parse_command(words)
            again = shlex.split(format_request(request))
            self.assertEqual("btrfs-backup-ng", again[0])
            self.assertEqual([request.task], [r.task for r in parse_command(again[1:])])

    def test_names(self):
        self.assertEqual(["/a (1)", "/b", "/a (2)"],
                         task_names(parse_command(["/a", ":", "/b", ":", "/a"])))


if __name__ == "__main__":
    unittest.main()
