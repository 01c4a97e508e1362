"""Restoring chains of stream files: broken off anywhere, the same command goes on, and leaves nothing behind.

TORTURE=N in the environment: broken off at every call of btrfs, by every signal, and at 3 N random moments.
"""

import os
import signal
import time
import unittest

import support
from fakes import killed_at

TORTURE = int(os.environ.get("TORTURE", "0"))


class BrokenOff(support.BackupTestCase):

    def setUp(self):
        super().setUp()
        self.raw = "raw://" + self.target
        churn = support.Churn(self.source, seed=3)
        churn.fill(20)
        self.taken = []
        for day in (1, 2, 3):
            self.taken += self.take(day)
            churn.change(5)

    def fresh(self):
        """A folder on a filesystem that has nothing of the chain."""
        folder = os.path.join(self.disk().path, "into")
        os.mkdir(folder)
        return folder

    def arguments(self, into, options=()):
        return ["restore", "--latest", "-p", "home"] + list(options) + [self.raw, into]

    def restore(self, into, *options, **more):
        return self.run_program(*self.arguments(into, options), **more)

    def broken(self, into, *options, **more):
        return self.start(*self.arguments(into, options), **more)

    def assertRestored(self, into):
        self.assertEqual([self.taken[-1]], os.listdir(into))
        self.assertComplete(os.path.join(into, self.taken[-1]), self.snapshot_path(self.taken[-1]))

    def again(self, into):
        result = self.restore(into)
        self.assertNotIn("-I", result.stderr)
        self.assertRestored(into)
        return result

    def test_at_each_call(self):
        self.transfer(to=[self.raw])
        for sign in (9, 15, 2) if TORTURE else (9,):
            # receive and sync for each stream, then what was only built on is deleted
            for number in range(1, 12) if TORTURE else (2, 5, 7):
                with self.subTest(sign=sign, call=number):
                    into = self.fresh()
                    self.broken(into, env=killed_at(number, sign)).finish()
                    self.again(into)

    def test_in_each_stream(self):
        for day in (1, 2, 3):
            support.bulk(os.path.join(self.source, "large"), 3, day)
            self.taken += self.take(3 + day)
        self.transfer(to=[self.raw])
        chance = support.chance(self)
        for number, sign in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGINT) * (TORTURE or 1)):
            with self.subTest(sign=sign.name):
                into = self.fresh()
                run = self.broken(into, "--limit", "8M")
                link = ".{}.partial".format(self.taken[3 + number % 2])  # behind it another one is still to come
                run.wait_for(link, lambda: any(path.endswith(link) for path in support.partials(into)))  # noqa: B023
                time.sleep(chance.uniform(0.0, 0.1))
                os.kill(run.pid, sign)
                status = run.finish().status
                self.assertEqual(-9 if sign == signal.SIGKILL else 128 + sign, status)
                if sign != signal.SIGKILL:
                    self.assertEqual({}, run.processes())
                self.again(into)

    def test_what_had_arrived_of_a_link_is_not_taken_again(self):
        support.bulk(os.path.join(self.source, "large"), 12)
        self.taken += self.take(4)
        self.write("more", "more")
        self.taken += self.take(5)
        self.transfer(to=[self.raw])
        into = self.fresh()
        run = self.broken(into, "--limit", "8M")
        link = os.path.join(into, ".{0}.partial.begun/.{0}.partial/large".format(self.taken[3]))
        run.wait_for("some of it", lambda: os.path.exists(link) and os.path.getsize(link) > 2e6)
        os.kill(run.pid, signal.SIGTERM)
        self.assertEqual(143, run.finish().status)
        result = self.again(into)
        self.assertIn("resuming {}".format(self.taken[3]), result.stderr)
        self.assertNotIn("sending {}".format(self.taken[0]), result.stderr)  # it was left to build on

    def test_notes_of_former_runs_go(self):
        self.transfer(to=[self.raw])
        into = self.fresh()
        self.restore(into)
        support.write_locks(into, {self.taken[2]: {"locks": [into]}, self.taken[1]: {"parent_locks": [into]}})
        self.again(into)


if __name__ == "__main__":
    unittest.main()
