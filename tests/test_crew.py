"""The crew hurts nobody: no process that is not its own, no task for another's sake."""

import ast
import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support
from support import TestCase

# A process that has nothing to do with the run, alone with it in a PID namespace: where all that may be killed is.
BESIDE_A_BYSTANDER = """
sleep 1000 &
bystander=$!
{limits}
"$@"
status=$?
kill -0 $bystander || echo the bystander was killed >&2
kill $bystander
exit $status
"""


def beside_a_bystander(limits):
    """A wrapper that runs a program so; `limits` are words of the shell, such as `ulimit -n 40`."""
    return ["unshare", "-m", "-p", "-f", "--mount-proc", "sh", "-c", BESIDE_A_BYSTANDER.format(limits=limits), "sh"]


class WhoIsSignalled(unittest.TestCase):
    """kill(2) with a number of 0, 1 or less is meant for many, and a number that is not held may be another's."""

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
        import btrfs_backup_ng as program
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
        import btrfs_backup_ng as program
        request, = program.parse_command(["/a", "/b"])
        process = program.TaskProcess("a", request)
        self.assertIsNone(process.pid)
        process.start([], lambda events, terminal: 3)
        self.assertGreater(process.pid or 0, 1)
        os.waitid(os.P_PID, process.pid or 0, os.WEXITED | os.WNOWAIT)
        self.assertEqual(3, process.look())
        self.assertIsNone(process.pid)
        process.close()
        process.tell(b"go  \n")  # is not heard


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


if __name__ == "__main__":
    unittest.main()
