"""The crew hurts nobody: no process that is not its own, no task for another's sake."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import unittest
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support
from fakes import beside_a_bystander
from support import BackupTestCase, TestCase, names

import btrfs_backup_ng as program


class WhoIsSignalled(unittest.TestCase):
    """kill(2) with a number of 0, 1 or less is meant for many, and a number that is not held may be another's."""

    usual_seconds = 10

    SIGNALLING = "signal_process"

    def functions(self):
        """(name, node) of each function of the program, inner ones by themselves."""
        with open(support.PROGRAM, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield node.name, node

    @staticmethod
    def is_named(node, *names):
        return isinstance(node, ast.Attribute) and node.attr in names and getattr(node.value, "id", "") == "os"

    def test_one_function_signals(self):
        seen = set()
        for name, function in self.functions():
            to_itself = {id(call.func) for call in ast.walk(function) if isinstance(call, ast.Call)
                         and self.is_named(call.func, "kill") and isinstance(call.args[0], ast.Call)
                         and self.is_named(call.args[0].func, "getpid")}
            if any(self.is_named(node, "kill", "killpg", "pidfd_send_signal") and id(node) not in to_itself
                   for node in ast.walk(function)):
                seen.add(name)
        self.assertEqual({self.SIGNALLING}, seen)

    def test_no_number_that_is_meant_for_many(self):
        asked = []
        for name in ("kill", "killpg"):
            self.addCleanup(setattr, os, name, getattr(os, name))
            setattr(os, name, lambda *words: asked.append(words))
        for pid in (None, 1, 0, -1, -os.getpid()):
            for with_group in (False, True):
                program.signal_process(pid, 9, with_group)
        self.assertEqual([], asked)
        program.signal_process(12345, 9)
        self.assertEqual([(12345, 9)], asked)

    def test_a_task_that_was_not_started_or_has_ended(self):
        request, = program.parse_command(["/a", "/b"])
        process = program.TaskProcess("a", request)
        self.assertIsNone(process.pid)
        process.start([], lambda events, terminal: 3)
        self.assertGreater(process.pid or 0, 1)
        os.waitid(os.P_PID, process.pid or 0, os.WEXITED | os.WNOWAIT)
        self.assertEqual(3, process.reap())
        self.assertIsNone(process.pid)
        process.close()
        process.tell(b"go  \n")  # is not heard


class NobodysChildren(unittest.TestCase):
    """What an interruption in the midst of starting leaves to nobody."""

    usual_seconds = 3

    LEFT = """
import os, signal, subprocess, threading, time
import btrfs_backup_ng as program
os.setsid()
def sleeps():
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/cmdline" % name, "rb") as words, open("/proc/%s/stat" % name, "rb") as stat:
                if words.read().startswith(b"sleep") and stat.read().split()[5] == b"%d" % os.getpid():
                    yield int(name)
        except OSError:
            pass
{start}
program.end_children()
left = list(sleeps())
for pid in left:
    os.kill(pid, 9)
print(len(left))
"""

    RUNS = """
process = program.start_program(["sh", "-c", "(trap '' TERM; exec sleep 600) & exec sleep 600"])
while sum(words[2] == str(process.pid) for words in program.read_stats().values()) < 2 or len(list(sleeps())) < 2:
    time.sleep(0.01)
"""
    BEGINS = """
def prepare():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    os.write(write_end, b".")
    signal.sigwait([signal.SIGTERM])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.setpgrp()
read_end, write_end = os.pipe()
threading.Thread(target=subprocess.Popen, args=(["sh", "-c", "sleep 600 & wait"],),
                 kwargs={"preexec_fn": prepare}, daemon=True).start()
os.read(read_end, 1)
"""
    OF_ANOTHER = """
roots, own = subprocess.Popen(["sleep", "600"]), subprocess.Popen(["setpriv", "--reuid", "65534", "sleep", "600"])
while len(list(sleeps())) < 2:
    time.sleep(0.01)
program.read_stats()
program.ENDING_GRACE = 0.5
os.setresuid(65534, 65534, 0)
try:
    program.end_children()
finally:
    os.setresuid(0, 0, 0)
    roots.kill()
    roots.wait()
"""

    def check(self, start):
        done = subprocess.run([sys.executable, "-c", self.LEFT.replace("{start}", start)], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, cwd=os.path.dirname(program.__file__), timeout=support.HANGS,
                              env=support.with_bytecode())
        self.assertEqual((b"0\n", b""), (done.stdout, done.stderr))

    def test_those_of_its_group_that_take_no_notice_end_as_well(self):
        self.check(self.RUNS)

    def test_one_that_is_about_to_lead_a_group_ends_with_it(self):
        """Its first signal is lost where it comes before the program."""
        self.check(self.BEGINS)

    @unittest.skipIf(os.geteuid(), "needs root")
    def test_one_that_may_not_be_signalled_keeps_no_other(self):
        self.check(self.OF_ANOTHER)


@unittest.skipUnless(shutil.which("strace"), "needs the program strace")
class AtTheEnd(unittest.TestCase):
    """A signal at each of the last steps at which a process sets what signals do."""

    usual_seconds = 6

    STEPS = 8
    CHILD = "import btrfs_backup_ng as program; program.live_as_child(lambda: 0); print('went on')"

    def trace(self, argv, *options):
        done = subprocess.run(["strace", "-qq", "-e", "trace=rt_sigaction", *options, *argv], universal_newlines=True,
                              cwd=os.path.dirname(program.__file__), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=support.with_bytecode())
        lines = done.stderr.splitlines()
        return done, [line for line in lines if line.startswith("rt_sigaction(")], [
            line for line in lines if not line.startswith(("rt_sigaction(", "--- SIG", "+++ killed by"))]

    def assert_each_ends_well(self, argv):
        count = len(self.trace(argv)[1])
        for behind in range(self.STEPS):
            done, _, said = self.trace(argv, "-e", "inject=rt_sigaction:signal=TERM:when={}".format(count - behind))
            with self.subTest(behind=behind):
                self.assertEqual([], said)
                self.assertIn(done.returncode, (0, 143, -signal.SIGTERM))
                self.assertNotIn("went on", done.stdout)

    def test_of_the_program(self):
        self.assert_each_ends_well(support.PROGRAM_ARGV + ["print", "completion", "fish"])

    def test_of_a_task(self):
        self.assert_each_ends_well([sys.executable, "-c", self.CHILD])


class Started(TestCase):
    """Where tasks cannot be started, with a log that cannot be written besides."""

    def test_a_bystander_lives(self):
        tasks = []
        for number in range(12):
            tasks += [":"] * bool(tasks) + ["-p", "s%d-" % number, "/no/such/source%d" % number]
        result = self.run_program("--no-elevate", "--log-json", "/dev/full", *tasks, status=1,
                                  wrapper=beside_a_bystander("ulimit -n 40"))
        self.assertNotIn("the bystander was killed", result.stderr)
        self.assertIn("cannot start the task: too many open files", result.stderr)


class Torn(unittest.TestCase):
    """A signal in the midst of writing an event costs that event, and neither the next one nor the crew."""

    def crew(self):
        said = []
        requests = program.parse_command(["/a", "/b", ":", "/c", "/d"])
        crew = program.Crew(requests, program.Events(said.append), lambda: None)
        return crew, crew.processes[0], said

    def test_what_is_no_event_is_passed_over(self):
        crew, process, said = self.crew()
        for line in (b"", b'["sending", "in', b"[1", b"\xff\xfe", b'["sent", "info", "all of it", {}]'):
            crew.take(process, line)
        self.assertEqual(["all of it"], [event.text for event in said])

    def test_the_event_after_a_torn_one_begins_a_line(self):
        read_end, write_end = os.pipe()
        self.addCleanup(os.close, read_end)
        self.addCleanup(os.close, write_end)
        told, write = program.ChildEvents(write_end, False), os.write

        def torn(fd, data):
            os.write = write
            write(fd, data[:10])
            raise program.Interrupted(signal.SIGTERM)

        self.addCleanup(setattr, os, "write", write)
        os.write = torn
        with self.assertRaises(program.Interrupted):
            told(program.Event("sending", "info", "one", {}))
        for text in ("two", "three"):
            told(program.Event("sending", "info", text, {}))
        lines = os.read(read_end, 9999).splitlines()
        self.assertEqual(["two", "three"], [json.loads(line.decode())[2] for line in lines[1:]])


class Waiting(unittest.TestCase):
    """Tasks that wait for a connection that others share."""

    def test_one_that_has_ended_meanwhile_is_told_nothing(self):
        requests = program.parse_command(["/a", "/b", ":", "/c", "/d"])
        gone, waiting = (program.TaskProcess("a", request) for request in requests)
        for process in (gone, waiting):
            process.start([], lambda events, terminal: len(os.read(0, 5)))
        gone.tell(b"go  \n")
        os.waitid(os.P_PID, gone.pid or 0, os.WEXITED | os.WNOWAIT)
        master = object.__new__(program.Master)
        master.number, master.path, master.waiting = 0, "/", [gone, waiting]
        master.stage = program.Stage(["sleep", "60"], subprocess.DEVNULL, subprocess.DEVNULL)
        self.addCleanup(master.stage.end)
        self.assertTrue(master.answer())
        os.waitid(os.P_PID, waiting.pid or 0, os.WEXITED | os.WNOWAIT)
        for process in (gone, waiting):
            self.assertEqual(5, process.reap())
            process.close()

    def test_a_connection_that_never_comes_about_is_not_waited_for(self):
        told = []
        process = program.TaskProcess("a", program.parse_command(["/a", "/b"])[0])
        setattr(process, "tell", told.append)  # noqa: B010
        before = program.GREETING_TIMEOUT
        self.addCleanup(setattr, program, "GREETING_TIMEOUT", before)
        program.GREETING_TIMEOUT = -1.0
        master = program.Master("/nonexistent", 0, ["sleep", "-o", "60"])
        master.stage.end()
        master.stage = program.Stage(["sleep", "60"], subprocess.DEVNULL, subprocess.DEVNULL)
        self.addCleanup(master.end)
        master.waiting.append(process)
        self.assertFalse(master.answer())
        self.assertEqual([program.UNSHARED], told)

    def test_sessions_that_can_be_spared(self):
        """Of ten the connection has one itself, and each task may need three."""
        request, = program.parse_command(["/a", "/b"])
        master: Any = object.__new__(program.Master)
        master.most, master.stage = None, types.SimpleNamespace(has_ended=lambda: False)
        for others, most in ((0, 8), (1, 5), (2, 1), (7, 1)):
            one = program.TaskProcess("a", request)
            master.users = [one] + [program.TaskProcess("b", request) for _ in range(others)]
            for _ in range(9):
                if master.can_spare(one):
                    master.users.append(one)
            self.assertEqual(most, master.users.count(one), others)

    def test_a_connection_that_cannot_be_made_is_not_shared(self):
        crew = program.Crew(program.parse_command(["/a", "/b", ":", "/c", "/d"]), program.Events(), lambda: None)
        told = []
        setattr(crew.processes[0], "tell", told.append)  # noqa: B010
        pipe = os.pipe
        self.addCleanup(setattr, os, "pipe", pipe)

        def no_pipe():
            raise OSError(24, "Too many open files")

        os.pipe = no_pipe
        setattr(crew.masters, "argv", lambda *_: ["ssh", "x"])  # noqa: B010
        crew.masters.ask(crew.processes[0], "x", {})
        self.assertEqual(([program.UNSHARED], []), (told, crew.masters.all))


class Logs(BackupTestCase):
    """A log that cannot be written stops nothing; it is said once, and the status tells."""

    def check_log(self, log, words):
        name, = self.take(1)
        result = self.transfer("--log-json", log, status=1)
        self.assertErrorSays(result, "cannot write " + log, words, "the run goes on without this log")
        self.assertBackedUp([name])

    def test_on_a_full_disk(self):
        self.check_log("/dev/full", "no space left on device")

    def test_in_a_folder_that_is_not_there(self):
        self.check_log(os.path.join(self.source_disk.path, "no", "log"), "no such file or directory")

    def test_of_several_tasks(self):
        self.take(1)
        other = support.create(os.path.join(self.source_disk.path, "srv"))
        result = self.run_program("--log-json", "/dev/full", "-p", "home", self.source, self.target, ":",
                                  "-p", "srv", other, self.target, status=1)
        self.assertErrorSays(result, "cannot write /dev/full: no space left on device")
        self.assertEqual(3, len(names(self.target)), result.stderr)

    def test_an_argument_that_ends_in_debug_asks_for_no_traceback(self):
        for words, asks in ((["/home", "/mnt/debug"], False), (["-v", "debug", "/a", "/b"], True),
                            (["-p", "debug", "/a"], False), (["--nonsense"], False)):
            self.assertEqual(asks, program.wants_debug(words), words)


class Programs(unittest.TestCase):
    """The programs of a transfer."""

    def pipeline(self, *scripts):
        pipeline = program.Pipeline([["sh", "-c", script] for script in scripts])
        self.addCleanup(pipeline.end)
        return pipeline

    def test_the_one_that_failed_is_named_and_the_healthy_is_not_waited_for(self):
        pipeline = self.pipeline("exec cat", "echo no key in the ring >&2; exit 2")
        pipeline.stages[1].process.wait()
        begun = time.monotonic()
        with self.assertRaises(program.BackupError) as caught:
            pipeline.check_alive()
        self.assertLess(time.monotonic() - begun, support.HANGS)
        self.assertIn("no key in the ring", caught.exception.message)

    def test_what_dies_of_anothers_failure_is_not_the_cause(self):
        pipeline = self.pipeline("while echo x; do :; done", "sleep 0.2; echo the disk is full >&2; exit 2")
        pipeline.stages[0].process.wait()
        with self.assertRaises(program.BackupError) as caught:
            pipeline.check_alive()
        self.assertIn("the disk is full", caught.exception.message)

    def test_its_output_ends_with_it_whoever_else_holds_the_pipe(self):
        pipeline = self.pipeline("echo all; sleep 600 &")
        self.addCleanup(self.end_group, pipeline.stages[0].process.pid)
        pipeline.feed.close()
        buffer, said, deadline = bytearray(100), b"", time.monotonic() + support.HANGS
        got = None
        while got != 0 and time.monotonic() < deadline:
            pipeline.wait_readable(0.1)
            got = pipeline.read(buffer)
            said += bytes(buffer[:got or 0])
        self.assertEqual((b"all\n", 0), (said, got))

    def end_group(self, group):
        """What was left behind there."""
        os.killpg(group, signal.SIGKILL)

    def test_what_a_program_says_ends_with_it(self):
        begun = time.monotonic()
        outcome = program.run(["sh", "-c", "echo out; echo err >&2; sleep 600 & echo $$"])
        self.assertLess(time.monotonic() - begun, support.HANGS)
        out, group = outcome.out.split()
        self.end_group(int(group))
        self.assertEqual((0, "out", "err"), (outcome.status, out, outcome.error))
        self.assertEqual("x" * 200000, program.run(["sh", "-c", "printf %0200000d 0 | tr 0 x"]).out)

    def test_what_a_program_is_told(self):
        for size in (0, 10, 300000):
            process = program.start_program(["cat"], subprocess.PIPE)
            self.assertEqual((b"y" * size, b""), program.Conversation(process, b"y" * size).run())
            process = program.start_program(["true"], subprocess.PIPE)
            self.assertEqual((b"", b""), program.Conversation(process, b"y" * size).run())

    def test_whether_one_that_waits_for_a_program_still_works(self):
        """Looking whether the program has ended is no work."""
        for script, works in (("sleep 60", False), ("while :; do sleep 0.05; done", True), ("exit", True)):
            process = program.start_program(["sh", "-c", "exec " * (script[:5] == "sleep") + script])
            self.addCleanup(program.end_group, process)
            time.sleep(0.3)
            before = program.work_of(os.getpid())
            seen = support.wait_until(lambda: program.work_of(os.getpid()) != before,  # noqa: B023
                                      timeout=support.HANGS if works else 0.5)
            self.assertEqual(works, seen, script)
            program.end_group(process)

    def test_what_it_may_say_and_how_long_it_may_be_silent(self):
        for script, error in (("while :; do echo x; done", program.BackupError), ("sleep 60", program.Stalled),
                              ("sleep 60 >&2", program.Stalled)):
            process = program.start_program(["sh", "-c", "exec " * ("while" not in script) + script])
            with self.assertRaises(error):
                program.Conversation(process, b"", 100000, 0.5).run()
            self.assertIsNotNone(process.poll())
        process = program.start_program(["sh", "-c", "for i in 1 2 3 4 5; do echo $i; sleep 0.5; done"])
        self.assertEqual(b"1\n2\n3\n4\n5\n", program.Conversation(process, b"", 10, 2.2).run()[0])

    def test_a_send_of_which_nothing_comes_is_not_waited_for_while_it_is_skipped(self):
        before, program.SKIP_PATIENCE = program.SKIP_PATIENCE, 0.2
        self.addCleanup(setattr, program, "SKIP_PATIENCE", before)
        sender = program.LocalSender(["sleep", "60"], program.make_pipe())
        self.addCleanup(sender.end)
        with self.assertRaises(program.Stalled) as caught:
            sender.skip(program.ResumePoint((program.Mark(100, 64 * "0"),)), lambda at: None)
        self.assertIn("btrfs send stalled: no data arrived for 0.2 s", caught.exception.message)

    def test_a_measuring_whose_stream_is_damaged_ends_its_send(self):
        script = r"printf 'btrfs-stream\0\1\0\0\0'; while printf '%0100d' 7; do :; done"
        measuring = program.LocalMeasuring(["sh", "-c", script])
        with self.assertRaises(program.StreamDamaged):
            measuring.wait()
        measuring.stage.process.wait(support.HANGS)
        measuring.end()

    def test_a_thread_that_cannot_be_started_is_done_without(self):
        def refuse(_):
            raise RuntimeError("can't start new thread")

        before = program.threading.Thread.start
        self.addCleanup(setattr, program.threading.Thread, "start", before)
        program.threading.Thread.start = refuse
        self.assertEqual(7, program.Background(lambda: 7).result())
        with self.assertRaises(program.BackupError) as caught:
            program.Stage(["sleep", "60"], subprocess.DEVNULL, subprocess.DEVNULL)
        self.assertIn("cannot run sleep: can't start new thread", caught.exception.message)
        self.assertEqual([], [pid for pid in program.find_children() if self.is_sleep(pid)])

    @staticmethod
    def is_sleep(pid):
        with open("/proc/{}/cmdline".format(pid), "rb") as words:
            return words.read().startswith(b"sleep\x0060")

    def test_clipping_takes_no_longer_for_longer_text(self):
        begun = time.process_time()
        self.assertEqual(50, program.shown_width(program.clip("ü" * 20000, 50)))
        self.assertLess(time.process_time() - begun, 1)


if __name__ == "__main__":
    unittest.main()
