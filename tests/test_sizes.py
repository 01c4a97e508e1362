"""The bytes of the transfer that brought each backup, as `list` knows them, wherever the backups are."""

import json
import os
import signal
import subprocess
import sys
import unittest

import remote
import support
from support import bulk, command, create, names

sys.path.insert(0, os.path.dirname(support.HERE))
from btrfs_backup_ng import (
    LARGEST_SIZES,
    SIZES_NOTE,
    Events,
    LocalHost,
    SendOptions,
    format_size_note,
    note_size,
    parse_sizes,
    send_argv,
    source_note_name,
)

UUID = "01234567-89ab-cdef-0123-456789abcdef"


def stream_size(snapshot, parent=None, raw=False):
    """Bytes of what btrfs send writes."""
    able = LocalHost(Events()).capabilities()
    argv = send_argv(snapshot, parent, SendOptions(able.sends_compressed and able.receives_compressed and not raw))
    return len(subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout)


class Note(support.TestCase):

    def setUp(self):
        self.folder = create(os.path.join(self.disk().path, "backups"))
        self.name = "home20260131-093000"

    def claim(self, prefix="home"):
        with open(os.path.join(self.folder, source_note_name(prefix)), "w") as file:
            file.write("{}")

    def note(self, size, uuid=UUID):
        note_size(self.folder, self.name, format_size_note(uuid, size))

    def read(self):
        with open(os.path.join(self.folder, SIZES_NOTE)) as file:
            return file.read()

    def test_the_last_counts_and_what_is_torn_does_not(self):
        self.claim()
        self.note(7)
        self.note(8)
        self.assertEqual({UUID: 8}, parse_sizes(self.read()))
        other = UUID.replace("0", "f")
        self.assertEqual({UUID: 8}, parse_sizes(self.read() + "\0\0\n" + format_size_note(other, 123)[:-1]))
        self.assertEqual({}, parse_sizes(UUID + " -1\n" + UUID + " 1e9\n" + UUID + " " + "9" * 30 + "\n"))

    def test_only_where_backups_are_kept(self):
        self.note(7)
        self.claim("")
        self.note(7)
        self.assertEqual([source_note_name("")], os.listdir(self.folder))

    def test_the_older_half_goes(self):
        self.claim()
        with open(os.path.join(self.folder, SIZES_NOTE), "w") as file:
            file.write("".join(format_size_note(UUID, n) for n in range(LARGEST_SIZES // len(UUID))))
        self.note(99, UUID.replace("0", "f"))
        self.assertLess(len(self.read()), 0.6 * LARGEST_SIZES)
        self.assertEqual([LARGEST_SIZES // len(UUID) - 1, 99], list(parse_sizes(self.read()).values()))

    def test_what_others_put_there_is_left_alone(self):
        self.claim()
        victim = os.path.join(self.folder, "victim")
        with open(victim, "w"):
            pass
        note = os.path.join(self.folder, SIZES_NOTE)
        for plant in (os.symlink, os.link, lambda victim, note: os.mkfifo(note), lambda victim, note: os.mkdir(note)):
            plant(victim, note)
            self.note(7)
            self.assertEqual(0, os.path.getsize(victim))
            command("rm", "-r", note)


class SizesTestCase(support.BackupTestCase):

    def sizes(self, *words):
        """What `list` says of the last of some locations."""
        location = json.loads(self.run_program("list", "--json", *words).stdout)["locations"][-1]
        self.assertIsNone(location["error"])
        return {entry["name"]: entry["size"] for entry in location["snapshots"]}

    def grow(self, day):
        bulk(os.path.join(self.source, "bulk%d" % day), 1 + day)
        return self.take(day)[0]


class OnDisk(SizesTestCase):

    def test_full_and_incremental(self):
        one, two = self.grow(1), self.grow(2)
        self.transfer()
        paths = [self.snapshot_path(name) for name in (one, two)]
        expected = {one: stream_size(paths[0]), two: stream_size(paths[1], paths[0])}
        self.assertEqual(expected, self.sizes(self.target))
        self.assertEqual(expected, self.sizes(self.source, self.target))
        second = os.path.join(self.target_disk.path, "second")
        self.transfer("-I", to=[second])
        self.assertEqual({one: expected[one], two: stream_size(paths[1])}, self.sizes(self.source, second))

    def test_one_that_was_taken_up(self):
        """It is the size of the whole, not of what came last."""
        bulk(os.path.join(self.source, "large"), 96)
        one, = self.take(1)
        run = self.start_backup("-S", "--limit", "40M")
        run.wait_for("data", lambda: any(
            os.path.getsize(os.path.join(top, file)) > 40 << 20 for piece in support.partials(self.target)
            for top, _, files in os.walk(os.path.join(self.target, piece)) for file in files))
        os.kill(run.pid, signal.SIGTERM)
        self.assertEqual(128 + signal.SIGTERM, run.finish().status)
        self.assertIn(one, self.transfer().stderr)
        self.assertEqual({one: stream_size(self.snapshot_path(one))}, self.sizes(self.target))

    def test_backups_from_before_sizes_were_noted(self):
        one, = self.take(1)
        self.transfer()
        os.unlink(os.path.join(self.target, SIZES_NOTE))
        self.assertEqual({one: None}, self.sizes(self.target))
        two, = self.take(2)
        self.transfer()
        self.assertEqual([None, True], [size and size > 0 for size in self.sizes(self.target).values()])

    def test_backups_of_backups(self):
        one = self.grow(1)
        self.transfer()
        second = os.path.join(self.disk().path, "second")
        self.run_program("-S", "-p", "home", "-f", self.target, self.target_disk.path, second)
        self.assertEqual({one: stream_size(self.backup_path(one))}, self.sizes(second))

    def test_a_restore_leaves_none(self):
        self.take(1)
        self.transfer()
        into = os.path.join(self.source_disk.path, "into")
        os.mkdir(into)
        self.run_program("restore", "--latest", self.target, into)
        self.assertEqual([], [name for name in os.listdir(into) if name.endswith(SIZES_NOTE)])

    def test_a_note_that_cannot_be_written_stops_nothing(self):
        one, = self.take(1)
        os.mkdir(os.path.join(self.target, SIZES_NOTE))
        self.transfer()
        self.assertEqual({one: None}, self.sizes(self.target))

    def test_stream_files(self):
        one, two = self.grow(1), self.grow(2)
        raw = "raw://" + os.path.join(self.target_disk.path, "raw")
        self.transfer("--raw-compress", "gzip", to=[raw])
        paths = [self.snapshot_path(name) for name in (one, two)]
        self.assertEqual({one: stream_size(paths[0], raw=True), two: stream_size(paths[1], paths[0], raw=True)},
                         self.sizes(self.source, raw))


class RemoteSizes(SizesTestCase, remote.RemoteTestCase):

    def check(self):
        one, two = self.grow(1), self.grow(2)
        self.push("-S")
        paths = [self.snapshot_path(name) for name in (one, two)]
        expected = {one: stream_size(paths[0]), two: stream_size(paths[1], paths[0])}
        for words in ([self.remote_target], [self.source, self.remote_target]):
            self.assertEqual(expected, self.sizes(*self.program_options() + words))
        self.assertEqual(expected, self.sizes(self.target))


class OverSsh(RemoteSizes):

    def test_push(self):
        self.check()

    def test_pull(self):
        one = self.grow(1)
        self.pull("-S")
        self.assertEqual({one: stream_size(self.snapshot_path(one))}, self.sizes(self.target))


class Restricted(RemoteSizes, remote.RestrictedTestCase):
    """A key that may only add backups."""

    def test_push(self):
        self.check()


class WithoutPython(RemoteSizes):

    sshd_options = {"hide": ("python*",)}

    def test_push(self):
        self.check()

    def test_the_older_half_goes(self):
        note = os.path.join(self.target, SIZES_NOTE)
        with open(note, "w") as file:
            file.write("".join(format_size_note(UUID, n) for n in range(LARGEST_SIZES // len(UUID))))
        one = self.grow(1)
        self.push("-S")
        self.assertLess(os.path.getsize(note), 0.6 * LARGEST_SIZES)
        self.assertEqual({one: stream_size(self.snapshot_path(one))}, self.sizes(self.target))

    def test_a_restore_leaves_none(self):
        one = self.grow(1)
        self.transfer()
        into = os.path.join(self.target_disk.path, "into")
        os.mkdir(into)
        self.run_program(*["restore"] + self.program_options() + [
            "--latest", self.target, self.server.endpoint(self.target_there + "/into")])
        self.assertEqual([one], names(into))
        self.assertFalse(os.path.exists(os.path.join(into, SIZES_NOTE)))


class FarMoreThanUsual(support.BackupTestCase):
    """The dry run names what makes a transfer far larger than those before it."""

    def plan(self, *options):
        document = json.loads(self.backup("--dry-run", "--json", *options).stdout)
        return document["tasks"][0]["destinations"][0]["send"]

    def test_the_largest_files_are_named(self):
        self.take(1, 2, 3, 4)
        self.transfer()
        bulk(os.path.join(self.source, "large file"), 12)
        bulk(os.path.join(self.source, "larger\tfile"), 14)
        self.write("small", "x" * 5000)
        named = [("larger\tfile", 14 << 20), ("large file", 12 << 20)]
        subprocess.run(["sync"], check=True)
        for options in ((), ("-S",)):  # the source as it is, then a snapshot that is there
            sent, = self.plan(*options)
            self.assertEqual(named, [(one["path"], one["bytes"]) for one in sent["largest"][:2]])
            self.assertIn("far more than usual; the largest files: larger\\tfile (14.0 MiB), large file (12.0 MiB)",
                          self.backup("--dry-run", *options).stdout)
            if not options:
                self.take(5)

    def test_what_was_restored_beside_the_source_shares_nothing_with_it(self):
        bulk(os.path.join(self.source, "large file"), 12)
        name, = self.take(1)
        self.transfer()
        support.delete(self.snapshot_path(name))
        self.run_program("restore", "--latest", self.target, self.snapshots)
        sent, = self.plan()
        self.assertEqual(name, sent["parent"])
        self.assertGreater(sent["bytes"], 12 << 20)
        after, = json.loads(self.backup("--json").stdout)["tasks"][0]["destinations"][0]["sent"]
        self.assertEqual(name, after["parent"])
        self.assertGreater(after["bytes"], 12 << 20)

    def test_what_is_usual_or_not_known_is_not(self):
        self.take(1, 2)
        self.transfer()
        bulk(os.path.join(self.source, "large file"), 12)
        self.take(3)
        self.assertEqual([[]], [one["largest"] for one in self.plan("-S")], "two are too few to tell")
        self.transfer()
        for day in (4, 5):
            bulk(os.path.join(self.source, "large file"), 12, seed=day)
            self.take(day)
            self.transfer()
        bulk(os.path.join(self.source, "large file"), 12, seed=6)
        self.take(6)
        self.assertEqual([[]], [one["largest"] for one in self.plan("-S")])


if __name__ == "__main__":
    unittest.main()
