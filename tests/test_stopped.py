"""A sender that is stopped and let go on, as by a laptop's sleep: what is called complete is what was sent.

TORTURE in the environment says at how many moments, to each kind of place; SEED which.
"""

import os
import random
import signal
import subprocess
import sys
import time
import unittest

import support
from support import command

MOMENTS = int(os.environ.get("TORTURE", "0")) or 2
SEED = int(os.environ.get("SEED", "0")) or random.randrange(1 << 30)
MIB = 48 if os.environ.get("TORTURE") else 16
RATE = 48 << 20  # bytes a second, so that the pipe is full and the sender can be torn in the midst of a command


class Stopped(support.BackupTestCase):
    """Files of zeros, in which a stream that begins anew falls into step again."""

    def setUp(self):
        super().setUp()
        with open(os.path.join(self.source, "image"), "wb") as file:
            file.write(bytes(MIB << 20))
        command("sync", "-f", self.source)
        self.only, = self.take(1)
        self.chance = random.Random(SEED)
        self.into = self.disk().path
        self.begun_anew = 0

    def send_and_stop(self, to):
        """Whether the run that was stopped at random calls it complete."""
        running = self.start("-p", "home", "-S", "-I", "--retries", "0", "--limit", str(RATE // 1000) + "K",
                             self.source, to)
        sender = running.wait_for("btrfs send", lambda: running.find("send"))
        time.sleep(self.chance.uniform(0.05, 0.7 * (MIB << 20) / RATE))
        try:
            os.kill(sender, signal.SIGSTOP)
            time.sleep(0.03)
            os.kill(sender, signal.SIGCONT)
        except ProcessLookupError:
            pass
        result = running.finish()
        self.assertIn(result.status, (0, 1), result.stderr)
        if result.status:
            self.begun_anew += 1
            self.assertIn("started over in the middle of its stream", result.stderr, "seed {}".format(SEED))
        return result.status == 0

    def check(self, to, where, received):
        """received: what makes a backup of the file `where`, or finds the one that is there."""
        for number in range(MOMENTS):
            with self.subTest(number=number, seed=SEED):
                if self.send_and_stop(to):
                    self.assertComplete(received(), self.snapshot_path(self.only))
                    command("btrfs", "subvolume", "delete", received())
                for name in os.listdir(where):
                    path = os.path.join(where, name)
                    if support.is_subvolume(path):
                        command("btrfs", "subvolume", "delete", path)
                    else:
                        os.unlink(path)
                self.run_program("-p", "home", "-S", "-T", "--forget-destination", to, self.source)
        print("seed {}: {} of {} streams to {} began anew".format(SEED, self.begun_anew, MOMENTS, to.partition(":")[0]),
              file=sys.stderr)

    def receive(self, file):
        path = os.path.join(self.into, self.only)
        if not os.path.exists(path):
            with open(file, "rb") as stream:
                subprocess.run(["btrfs", "receive", "-q", self.into], stdin=stream, check=True)
        return path

    def test_to_a_raw_folder(self):
        self.check("raw://" + self.target, self.target,
                   lambda: self.receive(os.path.join(self.target, self.only + ".btrfs")))

    def test_to_a_command(self):
        file = os.path.join(self.target, "stream")
        self.check("shell://cat > '{}'".format(file), self.target, lambda: self.receive(file))

    def test_to_btrfs(self):
        self.check(self.target, self.target, lambda: self.backup_path(self.only))


if __name__ == "__main__":
    unittest.main()
