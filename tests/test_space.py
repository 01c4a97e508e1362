"""`space`: what is told to be freed is what the filesystem has less in use once it was deleted."""

import json
import os
import random
import re
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import remote
from disks import command, names
from fakes import without_rights
from support import BackupTestCase, chance, create, delete, ext4, scratch_folder, snapshot
from terminal import OnTerminal
from trees import MIB, Churn, bulk

import btrfs_backup_ng as program
from btrfs_backup_ng import BackupError, Events, LocalHost

ROUNDS = int(os.environ.get("TORTURE") or 1)


def data_in_use(disk):
    """Bytes of data in use, once all is written and what was deleted is cleaned up."""
    command("btrfs", "filesystem", "sync", disk)
    command("btrfs", "subvolume", "sync", disk)
    command("btrfs", "filesystem", "sync", disk)
    return int(re.search(r"^Data, .* used=([0-9]+)$", command("btrfs", "filesystem", "df", "-b", disk), re.M).group(1))


class SpaceTestCase(BackupTestCase):

    def space(self, *arguments, **more):
        """{name: (new, alone, with_older)} in the one folder that is told of."""
        result = self.run_program("space", "--json", *(arguments or [self.source]), **more)
        folder, = json.loads(result.stdout)["folders"]
        return {one["name"]: (one["new"], one["alone"], one["with_older"]) for one in folder["snapshots"]}

    def assertFreed(self, expected, paths, disk, message=""):
        """Deletes subvolumes: so many bytes of data fewer are in use."""
        before = data_in_use(disk.path)
        for path in paths:
            delete(path)
        self.assertEqual(expected, before - data_in_use(disk.path), (message, paths))


class Churned:
    """A source that changes at random, and shares with what is beside it."""

    def __init__(self, test, seed):
        self.random, self.test = random.Random(seed), test
        os.mkdir(self.live("files"))
        self.churn = Churn(self.live("files"), self.random.getrandbits(32))
        self.other = create(os.path.join(test.source_disk.path, "other%d" % self.random.getrandbits(60)))
        self.days = 0
        self.churn.fill(60)
        for number in range(3):
            bulk(os.path.join(test.source, "big%d" % number), 3, self.random.getrandbits(32))

    def live(self, name):
        return os.path.join(self.test.source, name)

    def change(self):
        self.churn.change(self.random.choice([0, 2, 20, 60]))
        for _ in range(self.random.randrange(8)):
            self.random.choice([self.overwrite, self.share, self.bring_back, self.compressible, self.come_and_go])()
        if self.random.random() < 0.2:
            self.rearrange()

    def overwrite(self):
        """A part of a large extent, of which the rest stays."""
        with open(self.live("big%d" % self.random.randrange(3)), "r+b") as file:
            file.seek(self.random.randrange(700) << 12)
            file.write(self.churn.data(self.random.randrange(1, 60000)))

    def share(self):
        command("cp", "--reflink=always", self.live("big%d" % self.random.randrange(3)),
                os.path.join(self.other, "shared%d" % self.random.randrange(4)))

    def bring_back(self):
        """What an older snapshot holds and the newer ones may hold no more."""
        taken = names(self.test.snapshots)
        if taken:
            number = self.random.randrange(3)
            old = os.path.join(self.test.snapshots, self.random.choice(taken), "big%d" % number)
            command("cp", "--reflink=always", old, self.live("back%d" % number))

    def compressible(self):
        with open(self.live("text%d" % self.random.randrange(3)), "wb") as file:
            file.write(self.churn.data(2000) * self.random.randrange(1, 400))

    def come_and_go(self):
        path = self.live("once")
        if os.path.lexists(path):
            os.unlink(path)
        else:
            bulk(path, 2, self.random.getrandbits(32))

    def rearrange(self):
        """All trees and data in other places."""
        command("btrfs", "balance", "start", "--full-balance", self.test.source_disk.path)
        command("btrfs", "filesystem", "defragment", "-r", self.test.source)

    def take(self, prefix="home"):
        self.days += 1
        os.sync()
        name = "{}202401{:02d}-000000".format(prefix, self.days)
        snapshot(self.test.source, self.test.snapshot_path(name))
        return name


class Deletions(SpaceTestCase):

    source_size = target_size = "1G"
    usual_seconds = 40.0

    def setUp(self):
        super().setUp()
        os.makedirs(self.snapshots)

    def test_as_much_is_freed_as_was_told(self):
        for number in range(ROUNDS):
            seed = "%s %d" % (chance(self).random(), number)
            random_ = random.Random(seed)
            self.source_disk.remount(random_.choice(["compress=zstd", "compress=no"]))
            churned = Churned(self, seed)
            for _ in range(9):
                churned.change()
                churned.take(random_.choice(["home", "home", "home", "second-"]))
            self.transfer("-q", "-p", program.prefix_of(random_.choice(names(self.snapshots))))
            churned.change()
            for folder, disk in ((self.snapshots, self.source_disk), (self.target, self.target_disk)):
                while names(folder):
                    self.delete_some(random_, folder, disk, "seed {!r}".format(seed))
            for name in set(os.listdir(self.source)) - {".btrfs-backup-ng"}:
                command("rm", "-r", os.path.join(self.source, name))

    def delete_some(self, random_, folder, disk, message):
        os.sync()
        told = self.space(folder)
        name = random_.choice(sorted(told))
        prefix = program.prefix_of(name)
        older = [other for other in sorted(told) if program.prefix_of(other) == prefix and other <= name]
        doomed, expected = random_.choice([([name], told[name][1]), (older, told[name][2])])
        self.assertFreed(expected, [os.path.join(folder, one) for one in doomed], disk, message)


class Sharing(SpaceTestCase):
    """What is shared counts only where the last that holds it goes."""

    def setUp(self):
        super().setUp()
        self.days = [self.name(day) for day in (1, 2, 3)]

    def grow(self):
        """Three days, each with a MiB of its own; the first one's is there no more on the third."""
        for day in (1, 2, 3):
            bulk(self.path("own%d" % day), 1, day)
            if day == 3:
                os.unlink(self.path("own1"))
            self.take(day)
        os.sync()

    def path(self, name):
        return os.path.join(self.source, name)

    def costs(self, *arguments):
        """The costs of the three days in MiB."""
        os.sync()
        told = self.space(*arguments)
        self.assertEqual(self.days, sorted(told))
        return [tuple(size / MIB for size in told[day]) for day in self.days]

    def test_with_the_source_and_without(self):
        self.grow()
        self.assertEqual([(1, 0, 0), (1, 0, 1), (1, 0, 1)], self.costs())
        os.unlink(self.path("own3"))
        self.assertEqual([(1, 0, 0), (1, 0, 1), (1, 1, 2)], self.costs())
        os.unlink(self.path("own2"))
        self.assertEqual([(1, 0, 0), (1, 0, 1), (1, 1, 3)], self.costs())

    def test_held_by_another_subvolume(self):
        self.grow()
        other = create(os.path.join(self.source_disk.path, "other"))
        command("cp", "--reflink=always", self.snapshot_path(self.days[0]) + "/own1", other + "/clone")
        self.assertEqual([(1, 0, 0), (1, 0, 0), (1, 0, 0)], self.costs())
        delete(other)
        self.assertEqual([(1, 0, 0), (1, 0, 1), (1, 0, 1)], self.costs())

    def test_held_by_a_snapshot_elsewhere(self):
        self.grow()
        kept = os.path.join(self.source_disk.path, "kept")
        snapshot(self.snapshot_path(self.days[1]), kept, readonly=False)
        self.assertEqual([(1, 0, 0), (1, 0, 0), (1, 0, 0)], self.costs())
        os.unlink(kept + "/own1")
        self.assertEqual([(1, 0, 0), (1, 0, 1), (1, 0, 1)], self.costs())

    def test_each_prefix_is_a_line(self):
        self.grow()
        snapshot(self.snapshot_path(self.days[1]), self.snapshot_path("opt20240104-000000"))
        told = self.space("-p", "home", self.source)
        self.assertEqual((MIB, 0, 0), told[self.days[2]])
        self.assertEqual(self.days, sorted(told))
        told = self.space()
        self.assertEqual((2 * MIB, 0, 0), told["opt20240104-000000"])

    def test_of_one_that_was_changed_nothing_is_inferred(self):
        for number in range(600):  # so that its leaf is not written again for other files
            self.write("small%d" % number, "small")
            if number == 300:
                bulk(self.path("own1"), 1)
        os.sync()
        self.take(1, 2)
        first = self.snapshot_path(self.days[0])
        command("btrfs", "property", "set", "-ts", first, "ro", "false")
        os.unlink(first + "/own1")
        command("btrfs", "property", "set", "-ts", first, "ro", "true")
        self.take(3)
        os.unlink(self.path("own1"))
        self.assertEqual([(0, 0, 0), (1, 0, 0), (0, 0, 1)], self.costs())

    def test_backups(self):
        self.grow()
        self.transfer()
        self.assertEqual([(1, 0, 0), (1, 0, 1), (1, 1, 3)], self.costs(self.target))
        delete(self.backup_path(self.days[1]))
        self.transfer("-I")
        self.assertEqual([(1, 1, 1), (2, 2, 3), (2, 2, 5)], self.costs(self.target))

    def test_parts_of_extents_and_what_was_only_promised(self):
        with open(self.path("promised"), "wb") as file:
            os.posix_fallocate(file.fileno(), 0, MIB)
        bulk(self.path("part"), 1)
        os.sync()
        self.take(1)
        os.truncate(self.path("promised"), 4096)
        with open(self.path("part"), "r+b") as file:
            file.write(b"n" * (MIB // 2))
        self.take(2)
        os.unlink(self.path("promised"))
        os.unlink(self.path("part"))
        self.take(3)
        self.assertEqual([(2, 0, 0), (0.5, 0.5, 2.5), (0, 0, 2.5)], self.costs())

    def test_more_places_than_the_kernel_tells_at_once(self):
        bulk(self.path("own1"), 1)
        os.sync()
        for number in range(5000):
            os.link(self.path("own1"), self.path("link%d" % number)) if number % 100 else command(
                "cp", "--reflink=always", self.path("own1"), self.path("clone%d" % number))
        self.take(1, 2)
        command("find", self.source, "-xdev", "-maxdepth", "1", "-type", "f", "-delete")
        self.take(3)
        found = program.HOLDERS_SIZE
        program.HOLDERS_SIZE = 16 + 24  # room for one
        self.addCleanup(setattr, program, "HOLDERS_SIZE", found)
        os.sync()
        one, two, three = self.days
        for line in ([one, two, three], [two, one, three]):
            told = LocalHost(Events()).costs(self.snapshots, [line])
            self.assertEqual([(MIB, 0, 0), (0, 0, MIB), (0, 0, MIB)], [cost[1:4] for cost in told], line)


class Shown(SpaceTestCase):

    def test_a_table_that_fits(self):
        bulk(os.path.join(self.source, "file"), 3)
        one, two = self.take(1, 2)
        os.unlink(os.path.join(self.source, "file"))
        os.sync()
        lines = self.run_program("space", self.source).stdout.splitlines()
        self.assertRegex(lines[0], r"^/.*/home: [0-9.]+ MiB used, [0-9.]+ MiB free of 512\.0 MiB$")
        self.assertEqual(["snapshot", "new", "alone", "with", "older", "metadata"], lines[2].split())
        self.assertEqual([one, "3.0", "MiB", "0", "B", "0", "B", "about"], lines[3].split()[:-2])
        self.assertEqual([two, "0", "B", "0", "B", "3.0", "MiB", "about"], lines[4].split()[:-2])
        costs = tuple(program.Cost(name + "-20240105-000000", 0, 1 << 33, 1023 << 30)
                      for name in ("home", "long" * 30, "\u6f22" * 60))
        lines = program.costs_lines(program.FolderCosts("/mnt/" + "long/" * 30, "/x", 1, 2, costs), 80)
        self.assertTrue(all(program.shown_width(line) <= 80 for line in lines), lines)

    def test_json(self):
        one, = self.take(1)
        told = json.loads(self.run_program("space", "--json", self.source, self.target).stdout)
        folder, empty = told["folders"]
        self.assertEqual(["folder", "free", "total", "sample", "snapshots"], list(folder))
        self.assertIsNone(folder["sample"])
        self.assertGreater(folder["snapshots"][0].pop("metadata"), 0)
        self.assertEqual((self.source, 512 * MIB, []), (folder["folder"], folder["total"], empty["snapshots"]))
        self.assertEqual([{"name": one, "path": self.snapshot_path(one), "new": 0, "alone": 0, "with_older": 0}],
                         folder["snapshots"])

    def test_stream_files(self):
        for day in (1, 2):
            bulk(os.path.join(self.source, "file"), day)
            self.take(day)
        folder = os.path.join(self.target_disk.path, "raw")
        os.mkdir(folder)
        self.transfer(to=["raw://" + folder])
        sizes = [os.path.getsize(os.path.join(folder, self.name(day) + ".btrfs")) for day in (1, 2)]
        self.assertEqual({self.name(1): (sizes[0],) * 3, self.name(2): (sizes[1], sizes[1], sum(sizes))},
                         self.space("raw://" + folder))

    def test_the_file_of_a_job_and_the_folder_one_is_in(self):
        self.take(1)
        self.transfer()
        job = os.path.join(scratch_folder(), "job.conf")
        with open(job, "w") as file:
            file.write("-p home\n-n 7\n{}\n{}\n".format(self.source, self.target))
        told = json.loads(self.run_program("space", "--json", "@" + job).stdout)
        self.assertEqual([self.source, self.target], [folder["folder"] for folder in told["folders"]])
        told = json.loads(self.run_program("space", "--json", wrapper=["env", "-C", self.target]).stdout)
        self.assertEqual([1], [len(folder["snapshots"]) for folder in told["folders"]])


class Quick(SpaceTestCase):
    """Samples say about what the exact figures are."""

    def setUp(self):
        super().setUp()
        for day in (1, 2, 3):
            bulk(os.path.join(self.source, "own%d" % day), 20 * day, day)
            if day > 1:
                os.unlink(os.path.join(self.source, "own%d" % (day - 1)))
            self.take(day)
        os.sync()

    def test_an_estimate(self):
        told = self.space("--quick", self.source)
        for name, sizes in self.space().items():
            for exact, about in zip(sizes, told[name]):
                self.assertLess(abs(exact - about), 4 * MIB if exact else MIB, (name, sizes, told[name]))
        lines = self.run_program("space", "--quick", self.source).stdout.splitlines()
        self.assertRegex(lines[0], "; sizes by samples$")
        self.assertRegex(lines[3], r"^home20240101-000000  +[0-9.]+ MiB \u00b1 [0-9.]+ MiB  .* \u00b1 [0-9.]+ .iB$")
        folder, = json.loads(self.run_program("space", "--quick", "--json", self.source).stdout)["folders"]
        self.assertTrue(4096 <= folder["sample"] <= MIB, folder["sample"])

    def test_what_another_subvolume_holds_is_not_freed(self):
        other = create(os.path.join(self.source_disk.path, "other"))
        command("cp", "--reflink=always", self.snapshot_path(self.name(1)) + "/own1", other + "/clone")
        os.sync()
        self.assertEqual(0, self.space("--quick", self.source)[self.name(1)][1])

    def test_on_a_terminal_until_the_exact_figures_are_there(self):
        terminal = OnTerminal("space", self.source, columns=100, lines=24, results=True)
        self.addCleanup(terminal.close)
        self.assertEqual(0, terminal.finish().status)
        erased, shown = "\n".join(terminal.screen.erased), terminal.screen.everything()
        self.assertIn("\u00b1", erased)
        self.assertIn("measuring ...", erased)
        self.assertEqual(self.run_program("space", self.source).stdout.splitlines(), shown)
        small = OnTerminal("space", self.source, columns=100, lines=6, results=True)
        self.addCleanup(small.close)
        self.assertEqual(0, small.finish().status)
        self.assertEqual(shown, small.screen.everything())

    def test_places_are_spread(self):
        areas = [(1 << 20, 10 << 20), (1 << 30, 3 << 20), (1 << 40, 1 << 20)]
        for unit in (1 << 20, 3 << 20, 4096 * 5):
            places = list(program.spread_places(areas, unit))
            self.assertTrue(all(any(at <= place < at + size for at, size in areas) for place in places))
            self.assertLess(abs(len(places) * unit - (14 << 20)), unit + 1)
            self.assertEqual(0, sum(place % 4096 for place in places))


class Largest(SpaceTestCase):
    """Which files hold the most of what would be freed."""

    def test_files_once_each(self):
        one, two, three = map(self.name, (1, 2, 3))
        os.mkdir(os.path.join(self.source, "folder"))
        bulk(os.path.join(self.source, "folder/large"), 5, 1)
        bulk(os.path.join(self.source, "kept"), 9, 2)
        self.take(1)
        bulk(os.path.join(self.source, "small"), 2, 3)
        with open(os.path.join(self.source, "folder/large"), "ab") as file:
            file.write(os.urandom(MIB))
        self.take(2)
        for name in ("folder/large", "small"):
            os.unlink(os.path.join(self.source, name))
        self.take(3)
        os.sync()
        result = self.run_program("space", "--top", "5", "--json", self.source)
        files = json.loads(result.stdout)["folders"][0]["files"]
        self.assertEqual([{"snapshot": one, "path": "folder/large", "size": 6 * MIB},
                          {"snapshot": two, "path": "small", "size": 2 * MIB}], files)
        lines = self.run_program("space", "--top", "1", self.source).stdout.splitlines()
        self.assertEqual(["6.0 MiB  {}  folder/large".format(one)], lines[-1:])
        self.assertEqual(8 * MIB, self.space()[three][2])

    def test_not_of_stream_files(self):
        folder = os.path.join(self.target_disk.path, "raw")
        os.mkdir(folder)
        self.take(1)
        self.transfer(to=["raw://" + folder])
        result = self.run_program("space", "--top", "1", "raw://" + folder, status=1)
        self.assertErrorSays(result, "stream files", "--top")
        self.assertEqual([self.name(1)], list(self.space("--quick", "raw://" + folder)))

    def test_what_a_host_says_that_cannot_be(self):
        good = program.HeldFile("one", "path", 1)
        self.assertEqual((good,), program.checked_files([good], ["one"], 1))
        for files in ([good, good], [good._replace(snapshot="two")], [good._replace(size=-1)]):
            with self.assertRaises(BackupError):
                program.checked_files(files, ["one"], 1)


class BadInput(SpaceTestCase):

    def test_places_that_cannot_be_measured(self):
        one, = self.take(1)
        folder = ext4(self)
        for place, *words in ((folder, "not on btrfs"), (self.source + "/no/such", "no such folder", "mounted")):
            result = self.run_program("space", "--json", place, self.source, status=1)
            self.assertErrorSays(result, *words)
            self.assertEqual([self.source], [one["folder"] for one in json.loads(result.stdout)["folders"]])
        self.assertErrorSays(self.run_program("space", "shell://cat", status=2), "cannot be measured")
        self.assertErrorSays(self.run_program("space", "-p", "opt", self.source, status=1), "'opt'")

    def test_without_rights(self):
        self.take(1)
        for folder in (os.path.dirname(self.snapshots), self.snapshots, scratch_folder()):
            os.chmod(folder, 0o755)
        result = self.run_program("space", "--no-elevate", self.source, status=1, wrapper=without_rights())
        self.assertErrorSays(result, "not permitted", "root")

    def test_a_snapshot_that_goes_meanwhile(self):
        one, two = self.take(1, 2)
        host = LocalHost(Events())
        with self.assertRaisesRegex(BackupError, "not there any more"):
            host.costs(self.snapshots, [[one, two, "home20240103-000000"]])
        os.rename(self.snapshot_path(two), self.snapshot_path(one) + "x")
        real = program.TreesInLines.read

        def read(trees, tell):
            delete(self.snapshot_path(one))
            return real(trees, tell)

        program.TreesInLines.read = read
        self.addCleanup(setattr, program.TreesInLines, "read", real)
        with self.assertRaisesRegex(BackupError, "deleted meanwhile"):
            host.costs(self.snapshots, [[one, one + "x"]])

    def test_what_a_host_says_that_cannot_be(self):
        good = program.Cost("one", 1, 1, 1)
        self.assertEqual((good,), program.checked_costs([good], ["one"]))
        for costs in ([], [good, good], [good._replace(name="two")], [good._replace(alone=-1)]):
            with self.assertRaises(BackupError):
                program.checked_costs(costs, ["one"])

    def test_an_extent_that_cannot_be(self):
        for place, size in ((1, 4096), (4096, 100), (4096, 1 << 37)):
            with self.assertRaisesRegex(BackupError, "damaged"):
                program.HeldExtents([0]).add(0, place, size)


class Pure(unittest.TestCase):

    def test_beginnings(self):
        def beginnings(*trees):
            return [since for _, since in program.with_beginnings([program.Tree(n, *tree) for n, tree in
                                                                   enumerate(trees)])]

        siblings = [("a", "home", 9, 10), ("b", "home", 19, 20), ("c", "home", 25, 30)]
        self.assertEqual([0, 10, 20], beginnings(*siblings))
        self.assertEqual([0, 0, 0], beginnings(*reversed(siblings)))
        received = [("a", None, 12, 10), ("b", "a", 25, 20), ("c", "b", 34, 30), ("d", "b", 34, 30)]
        self.assertEqual([0, 20, 30, 30], beginnings(*received))
        self.assertEqual([0, 0], beginnings(("a", None, 22, 10), ("b", "a", 25, 20)))  # changed since
        self.assertEqual([0, 0, 0], beginnings(("a", None, 1, 1), ("b", None, 2, 2), (None, None, 3, 3)))

    def test_the_first_of_each_group_is_kept(self):
        random_ = random.Random(1)
        groups = [0, 0, 0, 1, 1, 2]
        held, expected = program.HeldExtents(groups), {}
        for _ in range(5000):
            number, place = random_.randrange(6), random_.randrange(300) * (1 << 22) + (1 << 44)
            held.add(number, place, place >> 10 & ~4095)
            first = expected.setdefault(place, {})
            first[groups[number]] = min(number, first.get(groups[number], number))
            if not random_.randrange(1000):
                held.settle()
        self.assertEqual({place: (place >> 10 & ~4095, sorted(first.values())) for place, first in expected.items()},
                         {place: (size, numbers) for place, size, numbers in held.all()})


class OverSsh(remote.RemoteTestCase):

    def test_computed_where_it_lies(self):
        bulk(os.path.join(self.source, "file"), 1)
        one, two = self.take(1, 2)
        self.push("-S")
        folder, = json.loads(self.run_remote("space", "--json", self.remote_target).stdout)["folders"]
        self.assertEqual([(one, MIB, 0, 0), (two, 0, 0, MIB)], [
            (each["name"], each["new"], each["alone"], each["with_older"]) for each in folder["snapshots"]])


class Restricted(remote.RestrictedTestCase):

    def test_list_is_enough(self):
        one, = self.take(1)
        self.push("-S")
        folder, = json.loads(self.run_remote("space", "--json", self.remote_target).stdout)["folders"]
        self.assertEqual([one], [each["name"] for each in folder["snapshots"]])
        told = self.run_remote("space", "--json", "--quick", self.remote_target).stdout
        self.assertEqual([one], [each["name"] for each in json.loads(told)["folders"][0]["snapshots"]])
        self.run_remote("space", "--top", "3", self.remote_target)


if __name__ == "__main__":
    unittest.main()
