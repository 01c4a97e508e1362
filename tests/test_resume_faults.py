"""Random faults in local, pushed, pulled and shared transfers: every clean next run converges.

TORTURE in the environment is the number of faults, 100 for all that was promised; else a few.
"""

import os
import signal
import time
import unittest

import remote
import support
from support import bulk, names, subvolume, wait_until

FAULTS = int(os.environ.get("TORTURE", 3))


class RandomFaults(remote.RemoteTestCase):

    usual_seconds = 30

    source_size = "2G"
    target_size = "2G"

    def setUp(self):
        super().setUp()
        self.random = support.chance(self)
        self.seed = self.random.getrandbits(32)
        self.between = self.proxy(self.server.port)
        self.set_endpoints(port=self.between.port)
        self.churn = support.Churn(self.source, self.seed)
        self.churn.fill()
        self.near = os.path.join(self.disk("2G").path, "near")
        os.mkdir(self.near)
        self.options = self.program_options() + ["-p", "home", "-S", "-N", "3", "-n", "3", "--retries", "2",
                                                 "--ssh-opt", "ServerAliveInterval=1",
                                                 "--ssh-opt", "ServerAliveCountMax=2"]
        self.ways = {"local": ([self.source, self.near], [self.near]),
                     "push": ([self.source, self.remote_target], [self.target]),
                     "pull": ([self.remote_source, self.near], [self.near]),
                     "fan-out": ([self.source, self.near, self.remote_target], [self.near, self.target])}
        self.day = 0

    def new_snapshot(self):
        self.day += 1
        self.churn.change(20)
        bulk(os.path.join(self.source, "large"), 64, seed=self.random.random())
        os.makedirs(self.snapshots, exist_ok=True)
        name = "home2024%02d%02d-000000" % (1 + self.day // 28, 1 + self.day % 28)
        support.snapshot(self.source, self.snapshot_path(name))

    def kill_one(self, run):
        """kill -9 of any process of it, on either side."""
        everyone = list(run.processes()) + list(self.server.processes())
        if everyone:
            os.kill(self.random.choice(everyone), signal.SIGKILL)

    def fill_disk(self, _run):
        path = os.path.join(os.path.dirname(self.near), "filler")
        try:
            with open(path, "wb") as filler:
                while True:
                    filler.write(bytes(16 << 20))
        except OSError:
            pass

    def fault(self, run):
        """One fault; its name."""
        kind = self.random.choice(["cut", "silence", "kill", "kill", "kill everything", "full", "signal"])
        act = {"cut": lambda run: self.between.cut(), "silence": lambda run: self.between.forget(),
               "kill": self.kill_one, "kill everything": lambda run: run.kill(), "full": self.fill_disk,
               "signal": lambda run: os.kill(run.pid, signal.SIGTERM)}[kind]
        try:
            act(run)
        except ProcessLookupError:
            pass
        return kind

    def look(self, target):
        """Nothing incomplete bears a final name."""
        for name in names(target):
            found = subvolume(os.path.join(target, name))
            self.assertTrue(found.readonly, name)
            if os.path.exists(self.snapshot_path(name)):
                self.assertEqual(subvolume(self.snapshot_path(name)).uuid, found.received_uuid, name)

    def test_every_clean_run_converges(self):
        for number in range(FAULTS):
            way = self.random.choice(sorted(self.ways))
            endpoints, targets = self.ways[way]
            with self.subTest(seed=self.seed, number=number, way=way):
                self.new_snapshot()
                run = self.start(*self.options + endpoints)
                time.sleep(self.random.uniform(0, 3))
                kind = self.fault(run)
                try:
                    run.process.wait(2 * support.HANGS)
                except Exception:
                    self.fail("{}: still running after {}".format(run.kill().stderr, kind))
                for target in targets:
                    self.look(target)
                self.between.cut()
                filler = os.path.join(os.path.dirname(self.near), "filler")
                if os.path.exists(filler):
                    os.unlink(filler)
                support.command("btrfs", "filesystem", "sync", self.near)
                run.kill()
                self.assertTrue(wait_until(lambda: not self.server.processes()), kind)
                self.run_program(*self.options + endpoints, timeout=2 * support.HANGS)
                self.check(targets, kind)

    def check(self, targets, kind):
        newest = names(self.snapshots)[-1]
        for target in targets:
            self.assertEqual(newest, names(target)[-1], kind)
            self.assertComplete(os.path.join(target, newest), self.snapshot_path(newest))
            self.assertEqual([], support.hidden(target), kind)
        self.assertTrue(wait_until(lambda: not self.server.processes()), "left over after " + kind)


if __name__ == "__main__":
    unittest.main()
