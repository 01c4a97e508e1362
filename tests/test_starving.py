"""Too few descriptors, too little memory, no place for temporary files, a full log: nobody else is hurt.

Each run has a PID namespace to itself, with a process in it that has nothing to do with it.
TORTURE in the environment runs all limits with one task and with eight.
"""

import os
import re
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support
from fakes import beside_a_bystander
from support import TestCase, names, partials, read_locks

from btrfs_backup_ng import SendOptions, call_send_argv

ALL = bool(os.environ.get("TORTURE"))
DESCRIPTORS = (8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60, 64)
MEMORY = (48, 64, 96, 128, 192)  # MiB
NO_TEMP = "for one in /tmp /var/tmp; do mount --bind $one $one; mount -o remount,bind,ro $one; done; cd /proc"


class Starving(TestCase):

    def setUp(self):
        self.source_disk, self.target_disk = self.disk("512M"), self.disk("1G")
        self.sources, self.targets = [], []
        for number in range(8):
            self.sources.append(support.create(os.path.join(self.source_disk.path, "s%d" % number)))
            support.bulk(os.path.join(self.sources[-1], "data"), 1, seed=number)
            self.targets.append(os.path.join(self.target_disk.path, "t%d" % number))

    def command(self, count):
        words = []
        for number in range(count):
            words += [":"] * bool(words) + ["-p", "s%d-" % number, self.sources[number], self.targets[number]]
        return words

    def starve(self, limits, count, *more):
        """A run with these limits; then one without, which converges."""
        running = self.start("--no-elevate", *list(more) + self.command(count), wrapper=beside_a_bystander(limits))
        result = running.finish(90)
        what = (limits, count, result)
        self.assertNotIn("the bystander was killed", result.stderr, what)
        self.assertNotIn("this is a bug", result.stderr, what)
        if not self.has_no_interpreter(result.stderr):
            self.assertNotIn("Traceback", result.stderr, what)
            self.assertIn(result.status, (0, 1), what)
            self.assertEqual(result.status != 0, "error" in result.stderr, what)
        time.sleep(1)  # snapshots are named by the second
        self.assertEqual(0, self.start(*self.command(count)).finish().status, what)
        for source, target in list(zip(self.sources, self.targets))[:count]:
            snapshots = os.path.join(source, ".btrfs-backup-ng", "snapshots")
            self.assertEqual(names(snapshots), names(target), what)
            self.assertEqual(([], {}), (partials(target), read_locks(snapshots)), what)
        return result

    @staticmethod
    def has_no_interpreter(said):
        """Whether Python itself, or what imports the program, had not enough to begin."""
        return "__main__.py" in said or "Fatal Python error" in said or "Failed to import" in said

    def starve_all(self, texts, *more):
        for text in texts:
            for count in (1, 8) if ALL else (8,):
                with self.subTest(limits=text, tasks=count):
                    self.starve(text, count, *more)

    def test_descriptors(self):
        self.starve_all(["ulimit -n %d" % number for number in (DESCRIPTORS if ALL else (24,))],
                        "--log-json", "/dev/full")

    def test_memory(self):
        self.starve_all(["ulimit -v %d" % (number << 10) for number in (MEMORY if ALL else (64,))])

    def test_no_place_for_temporary_files(self):
        self.starve_all([NO_TEMP])

    def test_a_send_without_a_thread(self):
        """That one reads ahead; without it the sender reads for itself, in silence."""
        none_left = "import _thread\ndef start_new_thread(*_):\n    raise RuntimeError(\"can't start new thread\")\n" \
                    "_thread.start_new_thread = start_new_thread\n"
        path = support.snapshot(self.sources[0], os.path.join(self.source_disk.path, "sent"))
        argv = call_send_argv(path, None, SendOptions(False, False, False))
        argv[argv.index("-c") + 1] = none_left + argv[argv.index("-c") + 1]
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((0, b""), (done.returncode, done.stderr))
        self.assertGreater(len(done.stdout), support.MIB)

    if ALL:

        def test_processes(self):
            """The number of processes of a PID namespace can be bounded since Linux 6.14."""
            fill = "echo 301 > /proc/sys/kernel/pid_max; for i in $(seq {}); do sleep 900 & done 2> /dev/null"
            if tuple(map(int, re.findall("[0-9]+", os.uname().release)[:2])) < (6, 14):
                self.skipTest("needs Linux 6.14")
            self.starve_all([fill.format(number) for number in (200, 240, 270, 280, 285, 290, 293, 295)])


if __name__ == "__main__":
    unittest.main()
