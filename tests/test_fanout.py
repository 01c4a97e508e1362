"""One read for several destinations: they share a send, and none has to wait for another without bound."""

import os
import signal
import unittest

import support
from support import bulk, names


class FanOut(support.BackupTestCase):

    usual_seconds = 4
    source_size = "1G"
    target_size = "1G"

    def setUp(self):
        super().setUp()
        self.targets = [self.target]

    def more_targets(self, *sizes):
        for size in sizes:
            self.targets.append(os.path.join(self.disk(size).path, "backups"))
            os.mkdir(self.targets[-1])

    def send_all(self, *options, **more):
        return self.transfer(*options, to=self.targets, **more)

    def start_all(self, *options):
        return self.start("-S", "-p", "home", *(list(options) + [self.source] + self.targets))

    def sends(self, result):
        """How many times `btrfs send` was started, as a run with -v debug tells."""
        return sum("starting btrfs send " in line for line in result.stderr.splitlines())

    def hold_receive_into(self, run, target):
        """Stop the `btrfs receive` that works in one target; its pid."""

        def found():
            for pid, argv in run.processes().items():
                if argv[1:2] == [b"receive"] and os.fsencode(target) in argv:
                    return pid
            return None

        pid = run.wait_for("btrfs receive", found)
        os.kill(pid, signal.SIGSTOP)
        return pid

    def test_one_send_serves_all(self):
        self.more_targets("1G", "1G")
        churn = support.Churn(self.source)
        churn.fill()
        self.take(1, 2)
        self.assertEqual(2, self.sends(self.send_all("-v", "debug")))
        self.assertConverged(*self.targets)
        churn.change()
        self.take(3)
        self.assertEqual(1, self.sends(self.send_all("-v", "debug")))
        self.assertConverged(*self.targets)

    def test_a_new_one_gets_what_it_lacks(self):
        """What the others have is sent to it alone, what all lack to all at once."""
        self.take(1)
        self.send_all()
        self.more_targets("1G")
        self.take(2)
        self.assertEqual(2, self.sends(self.send_all("-v", "debug")))
        self.assertConverged(*self.targets)

    def test_after_an_interruption_they_go_on_together(self):
        self.more_targets("1G")
        bulk(os.path.join(self.source, "large"), 96)
        self.take(1)
        run = self.start_all("--limit", "30M")
        run.wait_for("some data", lambda: self.target_disk.used() > 25 << 20)
        os.kill(run.pid, signal.SIGTERM)
        self.assertEqual(143, run.finish().status)
        result = self.send_all("-v", "debug")
        self.assertEqual(2, result.stderr.count("resuming"))
        self.assertEqual(1, self.sends(result))
        self.assertConverged(*self.targets)

    def test_a_slow_one_is_served_by_itself(self):
        """It crawls: the other ends in its own time, and then the slow one goes on where it was."""
        self.more_targets("1G")
        bulk(os.path.join(self.source, "large"), 192)
        self.take(1)
        run = self.start_all()
        slow = self.hold_receive_into(run, self.target)
        run.wait_for("the other backup", lambda: names(self.targets[1]), timeout=300)
        self.assertEqual([], names(self.target))
        with_its_own = run.wait_for("its own send", lambda: run.find("receive") not in (None, slow), timeout=300)
        self.assertTrue(with_its_own)
        result = run.finish(300)
        self.assertEqual(0, result.status, result.stderr)
        self.assertIn("separately", result.stderr)
        self.assertConverged(*self.targets)

    def test_a_full_one_does_not_stop_the_other(self):
        self.target_disk.unmount()
        self.more_targets("160M")
        self.targets.remove(self.target)
        self.more_targets("1G")
        bulk(os.path.join(self.source, "large"), 200)
        self.take(1)
        result = self.send_all(status=1)
        self.assertErrorSays(result, "No space left", self.targets[0])
        self.assertEqual([], names(self.targets[0]))
        self.assertBackedUp(names(self.snapshots), self.targets[1])

    def test_one_that_is_killed_comes_again(self):
        self.more_targets("1G")
        bulk(os.path.join(self.source, "large"), 48)
        self.take(1)
        run = self.start_all("--limit", "96M")
        os.kill(self.hold_receive_into(run, self.target), signal.SIGKILL)
        result = run.finish()
        self.assertEqual(0, result.status, result.stderr)
        self.assertEqual(1, result.stderr.count("trying again"))
        self.assertConverged(*self.targets)


if __name__ == "__main__":
    unittest.main()
