"""The fixtures themselves: tree() sees every change, Churn can be sent, nothing stays mounted."""

import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import unittest

import support


def overwrite(path):
    with open(path, "r+b") as file:
        file.write(b"X")


def make_fifo(path):
    os.unlink(path)
    os.mkfifo(path)


class TreeSeesEveryChange(support.TestCase):

    CHANGES = {
        "content": overwrite,
        "mode": lambda path: os.chmod(path, 0o600),
        "owner": lambda path: os.chown(path, 5, 6),
        "mtime_ns": lambda path: os.utime(path, ns=(1, 1)),
        "xattrs": lambda path: os.setxattr(path, "user.x", b"1"),
        "size": lambda path: os.truncate(path, 100),
        "links": lambda path: os.link(path, path + "-link"),
        "only in": lambda path: os.rename(path, path + "-renamed"),
        "type": make_fifo,
    }

    def test_each_kind(self):
        top = self.disk("128M").path
        for number, (word, change) in enumerate(self.CHANGES.items()):
            path = os.path.join(top, str(number))
            with open(path, "wb") as file:
                file.write(b"content")
            before = support.tree(top)
            self.assertEqual([], list(support.differences(before, support.tree(top))))
            change(path)
            found = "\n".join(support.differences(before, support.tree(top)))
            self.assertIn(word, found)

    def test_capability_target_and_device(self):
        top = self.disk("128M").path
        for name in ("file", "link", "device"):
            os.mknod(os.path.join(top, name), stat.S_IFREG | 0o644)
        file, link, device = (os.path.join(top, name) for name in ("file", "link", "device"))
        os.setxattr(file, "security.capability", struct.pack("<5I", 0x02000001, 1, 0, 0, 0))
        os.unlink(link)
        os.symlink("one", link)
        os.unlink(device)
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        before = support.tree(top)
        os.setxattr(file, "security.capability", struct.pack("<5I", 0x02000001, 2, 0, 0, 0))
        os.unlink(link)
        os.symlink("two", link)
        os.unlink(device)
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        found = "\n".join(support.differences(before, support.tree(top)))
        for word in ("security.capability", "target", "device"):
            self.assertIn(word, found)


class ChurnCanBeSent(support.BackupTestCase):

    def test_plain_send_and_receive_bring_it_over(self):
        for seed in range(int(os.environ.get("CHURN_SEEDS", 2))):
            with self.subTest(seed=seed):
                self.send_churn(seed)

    def send_churn(self, seed):
        top = support.create(os.path.join(self.source_disk.path, "churn%d" % seed))
        churn = support.Churn(top, seed)
        churn.fill()
        parent = None
        for round_ in range(6):
            taken = support.snapshot(top, "%s-%d" % (top, round_))
            support.send_receive(taken, self.target, parent)
            self.assertTreesEqual(taken, os.path.join(self.target, os.path.basename(taken)))
            self.assertTreesEqual(taken, top)
            parent = taken
            churn.change()


class Gates(support.BackupTestCase):

    def test_who_has_none_is_let_be(self):
        """One that a server runs has the same mark, and may be there before those at a gate."""
        script = ('sleep 600 | %s receive "$0" & until [ -e begin ]; do sleep 0.01; done; exec btrfs receive "$0"'
                  % shutil.which("btrfs"))
        running = support.Running(self.target, program=("sh", "-c", script), env=support.gate("receive"))
        self.addCleanup(running.close)
        elsewhere = running.wait_for("one without a gate", lambda: running.find("receive"))
        begin = os.path.join(support.scratch_folder(), "begin")
        open(begin, "w").close()
        self.addCleanup(os.unlink, begin)
        self.assertEqual({running.pid}, running.met_at_gate("receive"))
        self.assertFalse(support.is_stopped(elsewhere))


class Forked(support.TestCase):
    """A run that is forked is as one that is started."""

    # While a program is being started there are more pipes than the two that it is read through.
    LOOK = r"""until [ "$(ls -l /proc/$PPID/fd | grep -c pipe:)" -le 2 ]; do sleep 0.01; done
(
pwd; umask; readlink /proc/$PPID/fd/0; ls /proc/$PPID/fd; cat /proc/$PPID/limits
env | sort
tr '\0' '\n' < /proc/$PPID/environ | grep ^MARK=
grep -E '^(Sig[PBIC]|Shd|Cap|Uid|Groups|Seccomp:|Threads)' /proc/$PPID/status
ps -o sid= -p $PPID | grep -w $PPID > /dev/null && echo a session of its own
) > {} 2>&1
exec REAL "$@"
"""
    STARTED = ("env",)  # a wrapper that changes nothing

    def both(self, *words, **options):
        """(forked, started), each at work."""
        pair = [self.start(*words, wrapper=wrapper, **options) for wrapper in ((), self.STARTED)]
        kinds = [type(running.process).__name__ for running in pair]
        self.assertEqual(["Child" if support.is_zipapp(support.FAST_PROGRAM) else "Popen", "Popen"], kinds)
        return pair

    def test_what_it_and_its_programs_see(self):
        path = os.path.join(support.scratch_folder(), "looked")
        env = dict(support.fake("btrfs", self.LOOK.format(path).replace("MARK", support.MARK)), TZ="Nowhere-7")
        self.addCleanup(os.umask, os.umask(0o027))
        seen = []
        for wrapper in ((), self.STARTED):
            running = self.start("--version", wrapper=wrapper, env=env)
            self.assertEqual(0, running.finish().status)
            with open(path, "rb") as file:
                seen.append(file.read().replace(running.mark, b"mark").splitlines())
        self.assertEqual(seen[1], seen[0])
        self.assertLessEqual({b"0027", b"mark", b"TZ=Nowhere-7", b"a session of its own"}, set(seen[0]))

    def test_what_it_is_told_and_says(self):
        for words in (["--version"], ["--no-such-" + os.fsdecode(b"\xff")], ["doctor", "--json"], ["help", "restore"]):
            forked, started = (running.finish() for running in self.both(*words))
            # Times tell when each of them began.
            forked, started = (result._replace(stdout=re.sub(r"T[0-9]{2}:[0-9]{2}:[0-9]{2}", "T", result.stdout))
                               for result in (forked, started))
            self.assertEqual(started, forked)

    def test_how_it_ends(self):
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            said = []
            for running in self.both("--version", env=support.fake("btrfs", "exec sleep 600")):
                running.wait_for("its program", lambda: len(running.processes()) == 2)  # noqa: B023
                self.assertIsNone(running.process.poll())
                os.kill(running.pid, number)
                said.append(running.finish().status)
            self.assertEqual(said[1], said[0])

    def test_where_python_begins_differently_it_is_started(self):
        for env in ({"LC_ALL": "C"}, {"PYTHONUTF8": "0"}, {"HOME": "/nowhere"}):
            self.assertIsInstance(self.start("--version", env=env).process, subprocess.Popen)


class NothingStaysBehind(support.TestCase):

    def test_what_a_killed_run_left_is_swept(self):
        script = ("import os, support; print(support.Disk('128M').image, flush=True); os.kill(os.getpid(), 9)")
        child = subprocess.run([sys.executable, "-c", script], cwd=support.HERE, stdout=subprocess.PIPE)
        folder = os.path.dirname(os.fsdecode(child.stdout).strip())
        self.assertTrue(support.mounts_below(folder))
        support.sweep()
        self.assertFalse(support.mounts_below(folder))
        self.assertFalse(list(support.loops_below(folder)))
        self.assertFalse(os.path.exists(folder))

    def test_what_one_that_lives_has_is_not(self):
        """Not even by one in another PID namespace, where our process ids are unknown."""
        disk = self.disk("128M")
        subprocess.check_call(["unshare", "--pid", "--fork", "--mount", "--mount-proc", sys.executable, "-c",
                               "import support; support.sweep()"], cwd=support.HERE)
        self.assertTrue(os.path.ismount(disk.path))
        self.assertTrue(os.path.exists(disk.image))

    def test_a_disk_of_a_process_that_was_killed_is_detached(self):
        script = ("import os, sys; sys.path.insert(0, {!r}); import disks\n"
                  "disks.Disk('128M')\nfolder = disks.scratch_folder()\nos.chdir(folder)\n"
                  "for _ in range(2000):\n    os.mkdir('deep')\n    os.chdir('deep')\n"
                  "print(folder, flush=True)\nos.kill(os.getpid(), 9)").format(support.HERE)
        folder = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE,
                                universal_newlines=True).stdout.strip()
        number = next(iter(support.loops_below(folder)))
        support.sweep()
        attached = "/sys/block/{}/loop".format(os.path.basename(number))
        self.assertTrue(support.wait_until(lambda: not os.path.exists(attached)))  # by and by, where it is still used
        self.assertFalse(os.path.exists(folder))

    def test_a_disk_grows_goes_away_and_comes_back(self):
        disk = self.disk("128M")
        disk.grow("256M")
        self.assertGreater(os.statvfs(disk.path).f_blocks * 4096, 200 * support.MIB)
        open(os.path.join(disk.path, "file"), "w").close()
        disk.unmount()
        self.assertEqual([], os.listdir(disk.path))
        disk.mount()
        self.assertEqual(["file"], os.listdir(disk.path))


class TheRunner(support.TestCase):
    """tests/run.py itself, with its processes, on signals."""

    usual_seconds = 7

    def start(self, *words, wrapper=()):
        argv = (sys.executable, os.path.join(support.HERE, "run.py"))
        running = support.Running(*words, program=argv, wrapper=wrapper)
        self.addCleanup(running.close)
        return running

    def mounts_of(self, pids):
        return [mount for pid in pids for base in support.scratch_bases()
                for mount in support.mounts_below(os.path.join(base, support.SCRATCH_PREFIX + str(pid)))]

    def assertEndsCleanly(self, send):
        # The classes of the first are quick and need no disks: each process has others behind it by then.
        running = self.start("--jobs", "2", "test_files.", "test_host.")

        def with_disks():
            return [pid for pid in running.processes() if self.mounts_of([pid])]

        running.wait_for("disks of both", lambda: len(with_disks()) == 2)
        workers = with_disks()
        send(running.pid)
        result = running.finish()
        self.assertEqual(1, result.status, result.stderr)
        self.assertIn("ended before all tests had run", result.stdout)
        self.assertNotIn("KeyboardInterrupt", result.stdout + result.stderr)
        self.assertEqual([], self.mounts_of(workers))

    def test_ctrl_c(self):
        self.assertEndsCleanly(lambda pid: os.killpg(pid, signal.SIGINT))

    def test_sigterm(self):
        self.assertEndsCleanly(lambda pid: os.kill(pid, signal.SIGTERM))

    def test_sigterm_to_each_process(self):
        self.assertEndsCleanly(lambda pid: os.killpg(pid, signal.SIGTERM))

    def test_what_it_ignores_the_program_does_not(self):
        """Begun by nohup, or by a script's &."""
        wrapper = ("sh", "-c", "trap '' INT HUP QUIT; exec \"$@\"", "sh")
        for test in ("test_faults.Interrupted.test_sigint_to_the_program_alone",
                     "test_live.View.test_the_terminal_is_closed"):
            result = self.start(test, wrapper=wrapper).finish()
            self.assertEqual(0, result.status, result.stdout + result.stderr)


class TheRunnersCount(unittest.TestCase):
    """What tests/run.py says of a suite of few lines: nothing that fails, or was lost, is called a success."""

    HEAD = "import os, signal, subprocess, unittest\nfrom unittest import TestCase\n"
    PASSES = "class Passes{0}(TestCase):\n    def test(self): pass\n"

    def report(self, suite, *words, **env):
        """{"status": status, "": the last line, name of a test: what is said of it} of a suite's text."""
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(os.path.join(support.HERE, "run.py"), folder)
            with open(os.path.join(folder, "test_it.py"), "w") as file:
                file.write(self.HEAD + suite)
            running = support.Running(*words, env=dict({"CI": ""}, **env),
                                      program=(sys.executable, os.path.join(folder, "run.py")))
            self.addCleanup(running.close)
            self.result = running.finish()
        lines = self.result.stdout.splitlines()
        said = {line.split()[3]: line.split()[0] for line in lines if " s  test_it." in line and line[0] != " "}
        return dict(said, **{"status": self.result.status, "": lines[-1]})

    def passing(self, count):
        return "".join(self.PASSES.format(number) for number in range(count))

    def test_what_passes(self):
        for words in ((), ("--jobs", "3")):
            with self.subTest(words=words):
                found = self.report(self.passing(4), *words)
                self.assertEqual((0, "4 passed, 0 failed"), (found["status"], found[""]))

    def test_a_process_that_dies_loses_its_class_alone(self):
        suite = ("class A(TestCase):\n"
                 "    def test_1(self): pass\n"
                 "    def test_2(self): os.kill(os.getpid(), 9)\n"
                 "class B(TestCase):\n"
                 "    def test(self): os.kill(os.getpid(), 9)\n"
                 "class Z(TestCase):\n"
                 "    def test(self): self.fail()\n" + self.passing(4))
        found = self.report(suite, "--jobs", "2")
        self.assertEqual((1, "4 passed, 3 failed"), (found["status"], found[""]))
        self.assertEqual("FAIL", found["test_it.Z.test"])
        self.assertEqual(2, self.result.stdout.count("the process that ran it ended with -9"))

    def test_a_loop_device_that_is_left_behind(self):
        image = os.path.join(support.scratch_folder(), "left-of-")
        suite = ("class A(TestCase):\n    def test(self):\n"
                 "        image = {!r} + os.environ['RUN_OF_TESTS']\n"
                 "        open(image, 'w').truncate(1 << 20)\n"
                 "        subprocess.check_call(['losetup', '-f', image])\n".format(image))
        for words in ((), ("--jobs", "2")):
            with self.subTest(words=words):
                found = self.report(suite, *words, PATIENCE="0.5")
                left = [loop for loop in support.loops_below(support.scratch_folder())
                        if support.command("losetup", "-n", "-O", "BACK-FILE", loop).startswith(image)]
                for loop in left:
                    support.detach(loop, support.scratch_folder())
                self.assertEqual((1, 1), (len(left), found["status"]))
                self.assertIn("a loop device: " + left[0], self.result.stdout)
        self.assertEqual((0, "1 passed, 0 failed"), tuple(map(self.report(self.passing(1)).get, ("status", ""))))

    def test_all_die_and_none_is_forgotten(self):
        suite = "".join("class Dies%d(TestCase):\n    def test(self): os.kill(os.getpid(), 9)\n" % number
                        for number in range(5))
        found = self.report(suite, "--jobs", "2")
        self.assertEqual((1, "0 passed, 5 failed"), (found["status"], found[""]))

    def test_what_a_dead_process_has_begun_holds_nobody_up(self):
        suite = ("class A(TestCase):\n    def test(self):\n"
                 "        subprocess.Popen(['sleep', '600'])\n        os.kill(os.getpid(), 9)\n")
        found = self.report(suite + self.passing(2), "--jobs", "2")
        self.assertEqual((1, "2 passed, 1 failed"), (found["status"], found[""]))

    def test_a_name_that_no_test_has(self):
        """Nobody who asks for several tests is told of a success where one of them is not there any more."""
        for words in (("Passes0", "Passes9"), ("--jobs", "2", "Passes0", "Passes9")):
            with self.subTest(words=words):
                found = self.report(self.passing(3), *words)
                self.assertEqual((1, "1 passed, 1 failed"), (found["status"], found[""]))
                self.assertIn("==== Passes9\nno test is called so", self.result.stdout)

    def test_a_class_of_a_file_that_cannot_be_imported(self):
        found = self.report(self.passing(1) + "import no_such_module\n", "test_it.Passes0")
        self.assertEqual((1, "0 passed, 1 failed"), (found["status"], found[""]))
        self.assertIn("no_such_module", self.result.stdout)

    def test_what_a_test_begins_does_not_eat_the_list(self):
        suite = "class A(TestCase):\n    def test(self): subprocess.check_call(['cat'])\n"
        found = self.report(suite + self.passing(6), "--jobs", "2")
        self.assertEqual((0, "7 passed, 0 failed"), (found["status"], found[""]))

    def test_what_was_not_run_has_failed(self):
        """A process that was told to end, by itself, leaves out the rest of its class."""
        suite = ("class A(TestCase):\n"
                 "    def test_1(self): os.kill(os.getpid(), signal.SIGTERM)\n"
                 "    def test_2(self): pass\n" + self.passing(3))
        found = self.report(suite, "--jobs", "2")
        self.assertEqual(1, found["status"])
        self.assertIn("==== test_it.A.test_2\nit was not run", self.result.stdout)

    def test_what_fails_once_has_failed(self):
        suite = ("class A(TestCase):\n    def test(self):\n        os.mkdir(os.environ['ONCE'])\n"
                 "        self.fail()\n")
        with tempfile.TemporaryDirectory() as folder:
            found = self.report(suite + self.passing(3), "--jobs", "2", ONCE=os.path.join(folder, "once"))
        self.assertEqual((1, "3 passed, 1 failed"), (found["status"], found[""]))
        self.assertNotIn("FileExistsError", self.result.stdout)

    def test_a_class_or_module_that_cannot_begin_counts_as_one(self):
        beginnings = {"raise OSError": (1, "2 passed, 1 failed"),
                      "raise unittest.SkipTest('no')": (0, "2 passed, 0 failed, 1 skipped")}
        for begin, expected in beginnings.items():
            suite = ("class A(TestCase):\n    @classmethod\n    def setUpClass(cls): {}\n"
                     "    def test_1(self): pass\n    def test_2(self): pass\n").format(begin)
            for words in ((), ("--jobs", "2")):
                with self.subTest(begin=begin, words=words):
                    found = self.report(suite + self.passing(2), *words)
                    self.assertEqual(expected, (found["status"], found[""]))
        found = self.report("def setUpModule(): raise OSError\n" + self.passing(1))
        self.assertEqual((1, "0 passed, 1 failed"), (found["status"], found[""]))

    def test_a_file_that_cannot_be_loaded(self):
        found = self.report("import there_is_none\n", "--jobs", "2")
        self.assertEqual((1, "0 passed, 1 failed"), (found["status"], found[""]))

    def test_ci_allows_no_skips(self):
        suite = "class A(TestCase):\n    def test(self): self.skipTest('no')\n"
        self.assertEqual((1, "1 passed, 1 failed"), (self.report(suite + self.passing(1), CI="1")["status"],
                                                    self.report(suite + self.passing(1), CI="1")[""]))

    def test_a_pattern_means_the_same_to_one_process_and_to_more(self):
        suite = "class A(TestCase):\n    def test_one(self): pass\n    def test_two(self): self.fail()\n"
        for jobs in "12":
            found = self.report(suite, "--jobs", jobs, "test_one")
            self.assertEqual((0, "1 passed, 0 failed"), (found["status"], found[""]))

    def test_the_seed_is_said_handed_on_and_taken(self):
        suite = ("class A(TestCase):\n    def test_1(self): print('here', os.environ['SEED'])\n"
                 "    def test_2(self): self.fail()\n")
        for words in ((), ("--jobs", "2")):
            self.report(suite, *words)
            seed = self.result.stdout.splitlines()[0]
            self.assertRegex(seed, "^SEED=[0-9]+$")
            self.assertIn("here " + seed[5:], self.result.stdout + self.result.stderr)
            self.assertIn("the random choices again: " + seed, self.result.stdout)
            self.report(suite, *words, SEED="77")
            self.assertIn("here 77\n", self.result.stdout + self.result.stderr)


if __name__ == "__main__":
    unittest.main()
