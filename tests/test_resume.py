"""Transfers that break go on where they stopped: cuts at any command, kills, restarts.

TORTURE in the environment is the number of random cuts and kills.
"""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import unittest

import support
from support import bulk, names, partials, subvolume

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from btrfs_backup_ng import (
    ANEW,
    CHECKPOINT_DISTANCE,
    TAKE_UP,
    BackupError,
    Events,
    LocalHost,
    SendOptions,
    boot_id,
    read_subvolume,
    send_argv,
)

TORTURE = int(os.environ.get("TORTURE", 0))
HEADER_SIZE = 17


def boundaries(stream):
    """Where commands end in a whole stream, its header included, the END command not."""
    at, found = HEADER_SIZE, []
    while at < len(stream):
        at += 10 + struct.unpack_from("<I", stream, at)[0]
        found.append(at)
    return found[:-1]


class Pieces(support.TestCase):
    """Real streams, given to receivers of the program in pieces that are cut at random."""

    usual_seconds = 10

    def setUp(self):
        self.chance = support.chance(self)
        self.seed = self.chance.getrandbits(32)
        self.source_disk = self.disk("1G")
        self.source, self.target = self.source_disk.path, os.path.join(self.disk("1G").path, "backups")
        os.mkdir(self.target)
        self.top = support.create(os.path.join(self.source, "home"))
        self.host = LocalHost(Events())

    def snapshots(self, count):
        """Snapshots of a folder that changes."""
        churn = support.Churn(self.top, self.seed)
        churn.fill(80)
        bulk(os.path.join(self.top, "large"), 2, self.seed)
        for number in range(count):
            os.chown(self.top, 1000 + number, 2000)
            os.chmod(self.top, 0o755 if number % 2 else 0o3771)
            yield support.snapshot(self.top, os.path.join(self.source, "home-{}".format(number)))
            churn.change(60)

    def expected(self, path, parent, compressed):
        snapshot = read_subvolume(path, os.path.basename(path)) or self.fail("no snapshot")
        of = parent and read_subvolume(parent, os.path.basename(parent))
        expected = self.host.expected_stream(self.source, snapshot, of)
        base = of and read_subvolume(os.path.join(self.target, of.name), of.name).uuid
        return expected._replace(base=base, compressed=compressed)

    def send_pieces(self, path, parent, cuts, compressed):
        """Sends with that many cuts; each receiver says where to go on from."""
        expected = self.expected(path, parent, compressed)
        stream = subprocess.run(send_argv(path, parent, SendOptions(compressed=compressed)), stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, check=True).stdout
        places = boundaries(stream)
        at = 0
        for cut in sorted(self.chance.sample(places, min(cuts, len(places)))) + [len(stream)]:
            receiver = self.host.open_receive(self.target, expected, False, TAKE_UP)
            offset = receiver.resume.offset if receiver.resume else 0
            self.assertLessEqual(offset, at)
            if at in places:
                self.assertGreater(offset, 0)
            try:
                self.feed(receiver, stream[offset:cut])
                if cut == len(stream):
                    receiver.finish(60)
            finally:
                receiver.end()
            at = cut

    def feed(self, receiver, data):
        """Gives a receiver data in chunks of any size."""
        at = 0
        while at < len(data) or receiver.pending:
            if at < len(data) and receiver.pending < 3:
                size = self.chance.choice([1, 100, 10000, 300000])
                receiver.offer(memoryview(data)[at:at + size])
                at += size
            receiver.pump()
            receiver.check_alive()

    def check(self, cuts, compressed=False):
        parent = None
        for path in self.snapshots(3):
            with self.subTest(seed=self.seed, path=path):
                self.send_pieces(path, parent, cuts, compressed)
                backup = os.path.join(self.target, os.path.basename(path))
                self.assertComplete(backup, path)
                self.assertEqual([], support.hidden(self.target))
            parent = path
        # what follows in the ordinary way builds on it
        last = support.snapshot(self.top, os.path.join(self.source, "home-last"))
        support.send_receive(last, self.target, parent)
        self.assertComplete(os.path.join(self.target, "home-last"), last)

    def test_cuts_in_protocol_1(self):
        self.check(cuts=TORTURE or 6)

    def test_cuts_in_compressed_data(self):
        able = self.host.capabilities()
        if able.sends_compressed and able.receives_compressed:
            self.source_disk.remount("compress-force=zstd")
            with open(os.path.join(self.top, "compressible"), "wb") as file:
                file.write(b"compresses well " * (5 << 16))
            self.check(cuts=TORTURE or 6, compressed=True)

    def test_another_stream_is_not_taken_for_the_same(self):
        """The record of one snapshot says nothing of another, or of one on another parent."""
        one, other = self.snapshots(2)
        stream = subprocess.run(send_argv(one, None, SendOptions()), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                check=True).stdout
        expected = self.expected(one, None, False)
        receiver = self.host.open_receive(self.target, expected, False, ANEW)
        self.feed(receiver, stream[:boundaries(stream)[50]])
        receiver.end()
        kept = support.hidden(self.target)
        self.assertEqual(2, len(kept), kept)
        for changed in (expected._replace(uuid=subvolume(other).uuid), expected._replace(compressed=True),
                        expected._replace(parent_uuid=subvolume(other).uuid)):
            copy = dict(support.listing(self.target))
            receiver = self.host.open_receive(self.target, changed, False, TAKE_UP)
            self.assertIsNone(receiver.resume)
            receiver.end()
            self.assertEqual([], support.hidden(self.target))
            self.assertNotEqual(copy, support.listing(self.target))
            receiver = self.host.open_receive(self.target, expected, False, ANEW)
            self.feed(receiver, stream[:boundaries(stream)[50]])
            receiver.end()
            self.assertEqual(kept, support.hidden(self.target))

    def test_two_writers_of_one_partial(self):
        one, = self.snapshots(1)
        expected = self.expected(one, None, False)
        stream = subprocess.run(send_argv(one, None, SendOptions()), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                check=True).stdout
        receiver = self.host.open_receive(self.target, expected, False, ANEW)
        self.addCleanup(receiver.end)
        self.feed(receiver, stream[:boundaries(stream)[5]])
        with self.assertRaises(BackupError) as caught:
            self.host.open_receive(self.target, expected._replace(uuid=subvolume(self.top).uuid), False, TAKE_UP)
        self.assertIn("another run", str(caught.exception))


class ResumeTestCase(support.BackupTestCase):

    source_size = "2G"
    target_size = "2G"

    def large(self, mib, day=9):
        """A snapshot that is worth taking up, its name."""
        bulk(os.path.join(self.source, "large"), mib)
        return self.take(day)[0]

    def record(self, name):
        with open(os.path.join(self.target, ".{}.partial.json".format(name))) as file:
            return json.load(file)

    def received(self, name):
        """About how many bytes of file contents the partials of a snapshot hold."""
        most = 0
        for piece in partials(self.target):
            for folder, _, files in os.walk(os.path.join(self.target, piece)):
                sizes = []
                for file in files:
                    with contextlib.suppress(FileNotFoundError):  # receive has renamed it meanwhile
                        sizes.append(os.lstat(os.path.join(folder, file)).st_size)
                most = max(most, sum(sizes))
        return most

    def wait_for_data(self, run, name, more):
        """Until so many MiB more have been received than when it began."""
        before = self.received(name)
        run.wait_for("data", lambda: self.received(name) > before + (more << 20))

    def stop_half_way(self, run, name, mib=40):
        """Stop `btrfs receive` when it has written a part."""
        self.wait_for_data(run, name, mib)
        return run.hold("receive")


class Local(ResumeTestCase):

    usual_seconds = 6

    def interrupt(self, number, mib=96, arrived=25):
        name = self.large(mib)
        run = self.start_backup("-S", "--limit", "30M")
        self.wait_for_data(run, name, arrived)
        os.kill(run.pid, number)
        result = run.finish()
        self.assertEqual(128 + number, result.status)
        self.assertEqual([".{}.partial".format(name)], partials(self.target))
        self.assertEqual([".{}.partial".format(name), ".{}.partial.json".format(name)], support.hidden(self.target))
        left = subvolume(os.path.join(self.target, ".{}.partial".format(name)))
        self.assertTrue(left.readonly)
        self.assertNotEqual(subvolume(self.snapshot_path(name)).uuid, left.received_uuid)
        return name, sum(mark[0] for mark in self.record(name)["point"]["marks"][-1:])

    def test_a_signal_leaves_what_the_next_run_takes_up(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number=number):
                name, offset = self.interrupt(number)
                plan = self.transfer("--dry-run").stdout
                self.assertIn("resuming at", plan)
                result = self.transfer()
                self.assertIn("resuming " + name, result.stderr)
                self.assertRegex(result.stderr, "sent {} to .*; resumed once".format(name))
                self.assertGreater(offset, 20 << 20)
                self.assertConverged()
                support.delete(self.snapshot_path(name))
                support.delete(self.backup_path(name))

    def test_several_times(self):
        bulk(os.path.join(self.source, "other"), 5)
        self.take(1)
        self.transfer()
        name = self.large(200)
        offsets = []
        for _ in range(4):
            run = self.start_backup("-S", "--limit", "75M")
            self.wait_for_data(run, name, 10)
            run.process.terminate()
            result = run.finish()
            self.assertEqual(143, result.status)
            offsets.append(self.record(name)["point"]["marks"][-1][0])
            self.assertEqual(len(offsets), len(self.record(name)["point"]["marks"]), result.stderr)
        self.assertEqual(sorted(set(offsets)), offsets)
        self.transfer()
        self.assertConverged()
        self.take(10)
        self.assertIn("incrementally from " + name, self.transfer().stderr)
        self.assertConverged()

    def test_no_resume_starts_over(self):
        name, _ = self.interrupt(signal.SIGTERM)
        result = self.transfer("--no-resume")
        self.assertNotIn("resuming", result.stderr)
        self.assertIn("deleted .{}.partial".format(name), result.stderr)
        self.assertConverged()

    def test_a_damaged_record_is_none(self):
        for damage in (b"", b"{}", b"[]", b"\xff", b'{"name": 5}'):
            with self.subTest(damage=damage):
                name, _ = self.interrupt(signal.SIGTERM, mib=48, arrived=10)
                with open(os.path.join(self.target, ".{}.partial.json".format(name)), "wb") as file:
                    file.write(damage)
                self.assertNotIn("resuming", self.transfer().stderr)
                self.assertConverged()
                support.delete(self.snapshot_path(name))
                support.delete(self.backup_path(name))

    def test_a_record_of_another_place_in_the_stream(self):
        """The hash tells that what the record says has arrived is not what is sent."""
        name, _ = self.interrupt(signal.SIGTERM)
        record = self.record(name)
        record["point"]["marks"][-1][1] = 64 * "0"
        with open(os.path.join(self.target, ".{}.partial.json".format(name)), "w") as file:
            json.dump(record, file)
        result = self.transfer()
        self.assertIn("starts over: the stream is no longer the same", result.stderr)
        self.assertConverged()

    def test_a_partial_that_was_changed(self):
        name, _ = self.interrupt(signal.SIGTERM)
        path = os.path.join(self.target, ".{}.partial".format(name))
        support.make_writable(path)
        self.assertNotIn("resuming", self.transfer().stderr)
        self.assertConverged()

    def test_the_snapshot_is_gone(self):
        name, _ = self.interrupt(signal.SIGTERM)
        support.delete(self.snapshot_path(name))
        self.take(10)
        self.transfer()
        self.assertConverged()

    def test_the_destination_is_given_up(self):
        self.interrupt(signal.SIGTERM)
        self.transfer("-T", "--forget-destination", self.target, to=[])
        self.assertEqual([], support.hidden(self.target))
        self.assertEqual({}, support.read_locks(self.snapshots))

    def test_what_retention_no_longer_wants_is_not_kept(self):
        name, _ = self.interrupt(signal.SIGTERM)
        os.remove(os.path.join(self.source, "large"))
        self.take(10, 11)
        self.transfer("-n", "1")
        self.assertEqual([self.name(11)], names(self.target))
        self.assertEqual([], support.hidden(self.target))
        self.assertEqual({}, support.read_locks(self.snapshots))


class InOthersReach(Local):
    """There each piece is received in a closed folder, and comes out of it."""

    usual_seconds = 6

    target_mode = 0o755


class Killed(ResumeTestCase):

    usual_seconds = 16

    def test_a_process_is_killed_and_the_run_goes_on(self):
        for verb in ("send", "receive"):
            with self.subTest(verb=verb):
                name = self.large(192)
                run = self.start_backup("-S")
                receiver = self.stop_half_way(run, name)
                os.kill(run.find(verb), signal.SIGKILL)
                if verb == "send":
                    os.kill(receiver, signal.SIGCONT)
                result = run.finish()
                self.assertEqual(0, result.status, result.stderr)
                self.assertIn("broke off: btrfs {}: killed by SIGKILL; trying again".format(verb), result.stderr)
                self.assertEqual(verb == "send", "resuming " + name in result.stderr)
                self.assertConverged()
                support.delete(self.snapshot_path(name))
                support.delete(self.backup_path(name))

    def test_a_send_that_was_frozen(self):
        """Linux begins its stream anew, in the midst of what it had sent."""
        name = self.large(192)
        run = self.start_backup("-S")
        receiver = self.stop_half_way(run, name)
        sender = run.hold("send")  # which waits, as nothing is read any more
        os.kill(sender, signal.SIGCONT)
        os.kill(receiver, signal.SIGCONT)
        result = run.finish()
        self.assertEqual(0, result.status, result.stderr)
        self.assertIn("broke off: btrfs send was stopped, and started over in the middle of its stream", result.stderr)
        self.assertConverged()

    def test_retries_are_counted(self):
        self.large(192)
        run = self.start_backup("-S", "--retries", "1")
        first = run.hold("receive")
        os.kill(first, signal.SIGKILL)
        run.wait_for("another one", lambda: run.find("receive") not in (None, first))
        os.kill(run.hold("receive"), signal.SIGKILL)
        result = run.finish()
        self.assertEqual(1, result.status)
        self.assertEqual(1, result.stderr.count("trying again"))
        self.transfer()
        self.assertConverged()

    def test_what_was_checkpointed_survives_everything(self):
        """kill -9 of all: what the last checkpoint has is not sent again."""
        mib = CHECKPOINT_DISTANCE // support.MIB
        name = self.large(2 * mib + 100)
        run = self.start_backup("-S", "--limit", "48M")
        second = os.path.join(self.target, ".{}.3.partial".format(name))
        run.wait_for("the third piece", lambda: os.path.exists(second))
        run.kill()
        offset = self.record(name)["point"]["marks"][-1][0]
        self.assertGreaterEqual(offset, 2 * CHECKPOINT_DISTANCE)
        result = self.transfer()
        self.assertIn("resuming " + name, result.stderr)
        self.assertConverged()

    def killed_at_its_sync(self, script="", day=9):
        """The name of a snapshot that was received to its end, and the UUID of the piece, which lacks its name."""
        name = self.large(40, day)
        env = support.btrfs_where('REAL "$@"; ' + script, " sync ") if script else support.gate("sync")
        run = self.start_backup("-S", env=env)
        if script:
            run.finish()
        else:
            run.met_at_gate("sync")
            run.kill()
        self.assertEqual(".{}.partial".format(name), self.record(name)["finished"])
        return name, subvolume(os.path.join(self.target, self.record(name)["finished"])).uuid

    def test_a_complete_one_only_lacks_its_name(self):
        """Killed when it was synced."""
        name, uuid = self.killed_at_its_sync()
        with open(os.path.join(self.target, "." + name + ".partial.json"), "r+", encoding="utf-8") as file:
            record = json.load(file)
            record["boot"] = boot_id()
            file.seek(0)
            file.truncate()
            json.dump(record, file)
        self.transfer()
        self.assertEqual(uuid, subvolume(self.backup_path(name)).uuid)
        self.assertConverged()

    def test_of_one_that_its_writer_has_not_synced_nobody_knows_whether_it_is_whole(self):
        """What a disk did not take is told once: perhaps to him as he was killed, or to others."""
        for day, script in ((9, ""), (10, "kill -9 $PPID")):
            with self.subTest(script=script):
                name, uuid = self.killed_at_its_sync(script, day)
                self.transfer()
                self.assertNotEqual(uuid, subvolume(self.backup_path(name)).uuid)
                self.assertConverged()


class Deduplicated(ResumeTestCase):

    def test_a_stream_that_is_no_longer_the_same_starts_over(self):
        """What deduplication of the snapshot does to its stream."""
        for copy in range(2):
            bulk(os.path.join(self.source, "copy{}".format(copy)), 60)
        name = self.take(9)[0]
        run = self.start_backup("-S", "--limit", "60M")
        self.wait_for_data(run, name, 75)
        run.process.terminate()
        self.assertEqual(143, run.finish().status)
        path = self.snapshot_path(name)
        self.deduplicate(os.path.join(path, "copy0"), os.path.join(path, "copy1"))
        result = self.transfer()
        self.assertIn("starts over", result.stderr)
        self.assertConverged()

    @staticmethod
    def deduplicate(one, other):
        """FIDEDUPERANGE: lets `other` share the extents of `one`."""
        import fcntl
        with open(one, "rb") as source, open(other, "rb") as target:
            for at in range(0, os.path.getsize(one), 16 << 20):
                size = min(16 << 20, os.path.getsize(one) - at)
                argument = bytearray(struct.pack("=QQHHIqQQiI", at, size, 1, 0, 0, target.fileno(), at, 0, 0, 0))
                fcntl.ioctl(source, 0xC0189436, argument)


if __name__ == "__main__":
    unittest.main()
