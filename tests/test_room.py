"""Making room: the fewest go that suffice, never what must stay, and nothing where that would not suffice."""

import itertools
import json
import os
import random
import sys
import time
import unittest
from typing import Any
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import remote
import support
from support import BackupTestCase, bulk, chance, delete, names, snapshot, task_of, write_locks

import btrfs_backup_ng as program
from btrfs_backup_ng import (
    Freed,
    FreedWith,
    Known,
    Listing,
    Pin,
    Policy,
    Room,
    RoomPlan,
    Seen,
    Span,
    Subvolume,
    UsageError,
    Verdict,
    choose_to_delete,
    parse_room,
    plan_destination,
    plan_room,
    plan_run,
    worth_at_destination,
    worth_at_source,
    worth_by_time,
)

ROUNDS = int(os.environ.get("TORTURE") or 1)
MIB = 1 << 20
NOW = 1e10
MORNING = "202401{:02}-000000"


class Sizes(unittest.TestCase):

    def test_sizes_and_shares(self):
        for text, room in (("500M", Room(500 << 20)), ("1.5G", Room(3 << 29)), ("2T", Room(2 << 40)),
                           ("10%", Room(share=0.1)), ("0.5%", Room(share=0.005))):
            self.assertEqual(room, parse_room(text))
        self.assertEqual(15, Room(5, 0.1).of(100))
        for text in ("", "50", "0", "0G", "50K", "50 G", "-5G", "5g", "5GiB", "100%", "0%", "%", "ten", "5G\n", "1e3G"):
            with self.subTest(text=text), self.assertRaises(UsageError) as caught:
                task_of(["--free-backups", text, "/home", "/b"])
            self.assertIn("50G", caught.exception.message)

    def test_what_stays_is_for_where_room_is_made(self):
        for arguments in (["/home", "/b"], ["-n", "3", "/home", "/b"]):
            with self.assertRaisesRegex(UsageError, "--at-least"):
                program.check_task(task_of(["--at-least", "5"] + arguments))
        with self.assertRaisesRegex(UsageError, "--at-least"):
            program.check_prune(task_of(["prune", "-n", "2", "--at-least", "5", "/b"]))
        for verb, check in (([], program.check_task), (["prune"], program.check_prune)):
            check(task_of(verb + ["--free-backups", "1G", "--at-least", "1"] + ["/home"] * (not verb) + ["/b"]))
            for place in ("raw:///b", "shell://cat"):
                with self.assertRaises(UsageError):
                    check(task_of(verb + ["--free-backups", "1G"] + ["/home"] * (not verb) + [place]))
        for zero in ("0", "-1", "x"):
            with self.assertRaises(UsageError):
                task_of(["--free-backups", "1G", "--at-least", zero, "/home", "/b"])
        with self.assertRaisesRegex(UsageError, "in full"):
            task_of(["--free-b", "1G", "/home", "/b"])


def freed_with(freed, gone):
    return sum(one.size for one in freed if set(range(one.first, one.last + 1)) <= set(gone))


def by_search(worth, freed, need):
    """The best of all sets that suffice: by what is worth the most first, as few as can be and then the oldest."""
    may_go = [at for at, value in enumerate(worth) if value is not None]
    found = []
    for count in range(len(may_go) + 1):
        for some in itertools.combinations(may_go, count):
            if freed_with(freed, some) >= need:
                at_worth = [[at for at in some if worth[at] == value]
                            for value in sorted({worth[at] for at in may_go}, reverse=True)]
                found.append(([(len(places), places) for places in at_worth], list(some)))
    return min(found)[1] if found else None


class Chosen(unittest.TestCase):
    """The plan against a search of all there could be."""

    def case(self, random_):
        count = random_.randrange(1, 9)
        freed = []
        for _ in range(random_.randrange(14)):
            first = random_.randrange(count)
            last = min(count - 1, first + random_.choice([0, 0, 0, 1, 1, 2, 5]))
            freed.append(Freed(first, last, random_.choice([0, 1, 2, 3, 5, 10, 20])))
        worth = [random_.choice([None, 0, 0, 1, 1, 1, 2, 5]) for _ in range(count)]
        return worth, freed, random_.randrange(1, sum(one.size for one in freed) + 3)

    def test_the_fewest_and_of_these_the_oldest(self):
        random_ = chance(self)
        for number in range(1500 * ROUNDS):
            worth, freed, need = self.case(random_)
            chosen = choose_to_delete(worth, FreedWith(freed, len(worth)), need)
            self.assertEqual(by_search(worth, freed, need), chosen, (number, worth, freed, need))

    def test_what_goes_anyway_counts(self):
        random_ = chance(self)
        for _ in range(500 * ROUNDS):
            worth, freed, need = self.case(random_)
            count = len(worth)
            doomed = frozenset(at for at in range(count) if random_.random() < 0.3)
            worth = [None if at in doomed else value for at, value in enumerate(worth)]
            chosen = choose_to_delete(worth, FreedWith(freed, count), need, doomed)
            best = None
            for size in range(count + 1):
                for some in itertools.combinations([at for at in range(count) if worth[at] is not None], size):
                    if best is None and freed_with(freed, doomed.union(some)) >= need:
                        best = some
            self.assertEqual(best is None, chosen is None)
            if chosen is not None:
                self.assertGreaterEqual(freed_with(freed, doomed.union(chosen)), need)
                self.assertFalse(doomed & set(chosen))

    def test_of_very_many_the_oldest(self):
        count = program.MOST_WEIGHED * 8
        freed = FreedWith([Freed(at, at, 1) for at in range(count)] + [Freed(0, count - 1, 9)], count)
        self.assertEqual(list(range(100)), choose_to_delete([1] * count, freed, 100))
        self.assertEqual(list(range(count)), choose_to_delete([1] * count, freed, count + 9))
        self.assertIsNone(choose_to_delete([1] * count, freed, count + 10))

    def test_many_that_go_anyway_are_weighed_at_once(self):
        count = 3000
        freed = FreedWith([Freed(at, at, 1) for at in range(count)], count)
        worth = [int(at % 50 == 5) for at in range(count)]
        begun = time.monotonic()
        chosen = choose_to_delete(worth, freed, count - 10)
        self.assertLess(time.monotonic() - begun, 10)
        self.assertEqual(count - 10, len(chosen or ()))

    def test_of_several_lines_the_oldest_and_none_in_vain(self):
        names, by_age = ["a3", "a4", "b1", "b2"], ["b1", "b2", "a3", "a4"]
        worth = dict.fromkeys(names, 1)
        freed = [Freed(at, at, size) for at, size in enumerate((5, 5, 1, 5))]
        self.assertEqual(("b2",), plan_room(5, 0, names, worth, freed, (), by_age).names)
        self.assertEqual(("b1", "b2"), plan_room(6, 0, names, worth, freed, (), by_age).names)
        self.assertEqual(("b2", "a3"), plan_room(10, 0, names, worth, freed, (), by_age).names)
        self.assertEqual(17, plan_room(17, 0, names, worth, freed, (), by_age).wanted)

    def test_nothing_goes_where_all_would_not_suffice(self):
        worth = {"a": 1, "b": 0}
        freed = [Freed(0, 0, 3), Freed(0, 1, 4), Freed(2, 2, 50)]
        plan = plan_room(100, 90, ["a", "b", "c"], worth, freed)
        self.assertEqual(RoomPlan(100, 90, (), 7, 3), plan)
        self.assertIn("deletes nothing", plan.line)
        self.assertEqual(RoomPlan(97, 90, ("a", "b"), 7), plan_room(97, 90, ["a", "b", "c"], worth, freed))
        told = RoomPlan(60 << 30, 1, ("a", "b", "c"), 412 << 30 // 10).line
        self.assertRegex(told, r"^to have 60\.0 GiB free: deletes these 3, frees ")


def subvolume(day, **changes):
    name = "home" + MORNING.format(day)
    return Subvolume(name, "s%d" % day, readonly=True, otime=day * 10 ** 9, generation=day)._replace(**changes)


def backup(day, **changes):
    return subvolume(day, uuid="b%d" % day, received_uuid="s%d" % day)._replace(**changes)


class Worth(support.InZone):
    """What may go, and what is worth more."""

    def test_longer_units_are_worth_more(self):
        hours = {str(hour): hour * 3600.0 for hour in range(0, 24 * 70, 12)}
        policy = Policy(2, (Span(4, "h"), Span(5, "d"), Span(2, "m")))
        worth = worth_by_time(hours, policy, NOW)
        self.assertEqual({0, 1, 2, 4}, set(worth.values()))
        newest = max(hours, key=lambda name: hours[name])
        self.assertEqual(4, worth[newest])
        kept = {v.name for v in program.plan_retention(hours, policy, {}, NOW) if v.keep}
        self.assertEqual(kept, {name for name, value in worth.items() if value})
        self.assertEqual({1}, set(worth_by_time(hours, Policy(), NOW).values()))

    def known(self, *days, **more):
        return Known([subvolume(day) for day in days], "home", now=NOW, **more)

    def worth(self, known, seen, least=1):
        plan = plan_run(known, [seen]).destinations[seen.key]
        return worth_at_destination(known, seen, plan, least)

    def seen(self, *days, **more):
        return Seen(Listing(tuple(backup(day) for day in days)), key="/b", frees=True, **more)

    def names(self, *days):
        return {"home" + MORNING.format(day) for day in days}

    def test_the_newest_and_what_is_in_common_stay(self):
        seen = self.seen(1, 2, 3, 4, 5)
        self.assertEqual(self.names(1, 2), set(self.worth(self.known(5), seen, 3)))
        self.assertEqual(self.names(1, 2, 4), set(self.worth(self.known(3), seen, 1)))
        self.assertEqual(self.names(1, 2, 3), set(self.worth(self.known(3, 4, 9), seen, 1)))
        self.assertEqual(self.names(1, 2, 3, 4), set(self.worth(self.known(), seen, 0)))
        self.assertEqual({}, self.worth(self.known(), self.seen(1), 0))

    def test_what_retention_lets_go_is_worth_nothing(self):
        worth = self.worth(self.known(5), self.seen(1, 2, 3, 4, 5, policy=Policy(3)))
        self.assertEqual(dict.fromkeys(self.names(1, 2), 0), {name: 0 for name, value in worth.items() if not value})
        self.assertEqual(self.names(1, 2, 3, 4), set(worth))

    def test_what_is_locked_noted_or_built_on_stays(self):
        two, = self.names(2)
        seen = self.seen(1, 2, 3, 4)
        notes = seen.notes._replace(locks={two: {"locks": ["/x"]}})
        self.assertEqual(self.names(1, 3), set(self.worth(self.known(4), seen._replace(notes=notes))))
        notes = seen.notes._replace(pins={"/x": (Pin(two, "s2", "", None, ()),)})
        self.assertEqual(self.names(1, 3), set(self.worth(self.known(4), seen._replace(notes=notes))))
        known = self.known(2, 3, 4)._replace(locks={"home" + MORNING.format(3): {"locks": ["/b"]}})
        self.assertEqual(self.names(1), set(self.worth(known, self.seen(1, 2, 4))))  # 3 goes out on top of 2
        partial = Subvolume(".home" + MORNING.format(9) + ".partial", "p", parent_uuid="b2", readonly=False)
        listing = Listing(seen.listing.subvolumes + (partial,))
        self.assertEqual(self.names(1, 3), set(self.worth(self.known(4), seen._replace(listing=listing))))

    def test_what_is_not_provably_ours_stays(self):
        foreign = (subvolume(1, uuid="x"), backup(2, readonly=False), backup(3, name="other" + MORNING.format(3)),
                   backup(4, name="home-" + MORNING.format(4)), backup(5), backup(6))
        seen = self.seen()._replace(listing=Listing(foreign))
        self.assertEqual(self.names(5), set(self.worth(self.known(6), seen)))

    def test_where_nothing_may_be_deleted(self):
        seen = self.seen(1, 2, 3)
        for changed in (seen._replace(failed=True), seen._replace(adopted=True),
                        seen._replace(notes=seen.notes._replace(is_whole=False)),
                        seen._replace(notes=seen.notes._replace(may_delete=False))):
            self.assertEqual({}, self.worth(self.known(3), changed))

    def test_names_from_the_future_stay_and_do_not_count(self):
        known = self.known(3)._replace(now=program.snapshot_time("home", "home" + MORNING.format(5)))
        self.assertEqual(self.names(1, 2, 4), set(self.worth(known, self.seen(1, 2, 3, 4, 5, 20), 1)))

    def test_at_the_source(self):
        known = self.known(1, 2, 3, 4, 5)
        self.assertEqual(self.names(1, 2), set(worth_at_source(known, 3)))
        two, = self.names(2)
        self.assertEqual(self.names(1), set(worth_at_source(known, 3, {two})))
        pins = {"/b": (Pin("home" + MORNING.format(1), "s1", "", None, ()),)}
        self.assertEqual(self.names(2), set(worth_at_source(known._replace(pins=pins), 3)))
        self.assertEqual(self.names(1), set(worth_at_source(known._replace(locks={two: {"locks": ["/b"]}}), 3)))
        for changed in (known._replace(unknown="/away"), known._replace(may_delete=False)):
            self.assertEqual({}, worth_at_source(changed, 3))

    def test_what_was_taken_since_a_clock_that_ran_ahead_is_sent(self):
        """By the time alone all of it would be older than what is there, and perhaps deleted to make room."""
        taken = [subvolume(day, otransid=number) for number, day in enumerate((1, 20, 2, 3))]
        known, seen = self.known()._replace(snapshots=taken), self.seen(1, 20)
        self.assertEqual(["home" + MORNING.format(day) for day in (2, 3)],
                         [t.snapshot.name for t in plan_destination(known, seen).transfers])
        pin = Pin(taken[1].name, taken[1].uuid, "", None, ())
        run: Any = mock.Mock(snapshots=taken, pins={"/b": (pin,)}, destinations=[mock.Mock(key="/b", listing=None)])
        self.assertEqual(self.names(2, 3), program.TaskRun.unsent_to_absent(run))

    def test_what_was_deleted_for_room_is_not_sent_again(self):
        known = self.known(1, 2, 3, 4, 5)
        seen = self.seen(2, 4)
        plan = plan_destination(known, seen)
        self.assertEqual(["s5"], [transfer.snapshot.uuid for transfer in plan.transfers])
        self.assertEqual(self.names(1, 3), {verdict.name for verdict in plan.skipped})
        self.assertEqual(3, len(plan_destination(known, seen._replace(frees=False)).transfers))
        three, = self.names(3)
        locked = known._replace(locks={three: {"locks": ["/b"]}})
        self.assertEqual(["s3", "s5"], [t.snapshot.uuid for t in plan_destination(locked, seen).transfers])
        self.assertEqual(5, len(plan_destination(known, self.seen()).transfers))

    def test_what_a_host_says_that_cannot_be(self):
        good = Freed(0, 1, 1)
        self.assertEqual([good], program.checked_freed([good], 2))
        for bad in (Freed(1, 0, 1), Freed(-1, 0, 1), Freed(0, 2, 1), Freed(0, 0, -1)):
            with self.assertRaises(program.BackupError):
                program.checked_freed([bad], 2)

    def test_a_load_counts_what_is_made_free(self):
        planned = program.PlannedAt("/b", True, send=(program.ToSend("one", None, 100),), free=60)
        self.assertFalse(planned.load.fits)
        self.assertTrue(planned._replace(room=RoomPlan(100, 60, ("a",), 50)).load.fits)
        self.assertIn("50 B of it by deleting", planned._replace(room=RoomPlan(100, 60, ("a",), 50)).load.line)
        self.assertFalse(planned._replace(room=RoomPlan(200, 60, (), 50, 90)).load.fits)
        self.assertFalse(Verdict("a", False, "").keep)


def free_bytes(path):
    support.command("btrfs", "filesystem", "sync", path)
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


class RoomTestCase(BackupTestCase):
    """Days that bring 40 MiB each, on a disk of 512 MiB."""

    source_size = "2G"
    usual_seconds = 8.0

    def setUp(self):
        super().setUp()
        os.makedirs(self.snapshots)
        self.days = 0

    def grow(self, mib=40, count=1):
        """Snapshots of which each has so much of its own; the last ones' names."""
        for _ in range(count):
            self.days += 1
            bulk(os.path.join(self.source, "bulk"), mib, self.days)
            os.sync()
            snapshot(self.source, self.snapshot_path(self.name(self.days)))
        return names(self.snapshots)[-count:]

    def fill(self, left=60):
        """Backs up until less than so many MiB are free."""
        missing = free_bytes(self.target) // MIB - left
        while missing > 0:
            self.grow(count=missing // 40 + 1)
            self.transfer("-q")
            missing = free_bytes(self.target) // MIB - left
        return names(self.target)


class Runs(RoomTestCase):

    def test_a_full_disk_heals_itself(self):
        before = self.fill(20 + 40)
        new, = self.grow(80)
        told = self.transfer("--dry-run", "--free-backups", "30M").stdout
        self.assertEqual(before, names(self.target))
        plan, = json.loads(self.transfer("--dry-run", "--json", "--free-backups", "30M").stdout)["tasks"]
        room = plan["destinations"][0]["room"]
        self.assertIn("deletes these %d, frees" % len(room["names"]), told)
        self.assertEqual(before[:len(room["names"])], room["names"])
        self.assertTrue(plan["destinations"][0]["fits"])
        result = self.transfer("--free-backups", "30M")
        self.assertEqual([name for name in before if name not in room["names"]] + [new], names(self.target))
        self.assertComplete(self.backup_path(new), self.snapshot_path(new))
        self.assertRegex(result.stderr, "deleting {} at .*: to have .* free".format(before[0]))
        self.assertNotIn("will not fit", result.stderr)
        self.assertGreaterEqual(free_bytes(self.target), 30 * MIB)
        self.assertLess(free_bytes(self.target), 30 * MIB + 41 * MIB + 16 * MIB)
        kept = names(self.target)
        again = self.transfer("--free-backups", "30M")
        self.assertEqual(kept, names(self.target))
        self.assertNotIn("deleting", again.stderr)

    def test_without_need_nothing_is_deleted_or_measured(self):
        self.grow(10, 5)
        self.transfer("-q")
        self.grow(10)
        result = self.transfer("--free-backups", "20%", "-v", "debug")
        self.assertEqual(6, len(names(self.target)))
        self.assertNotIn("reading tree", result.stderr)

    def test_two_destinations_on_one_disk(self):
        """What is on its way to the first is not free any more for the second."""
        second = os.path.join(self.target_disk.path, "second")
        os.mkdir(second, 0o700)
        self.grow(30, 4)
        self.transfer("-q", to=[self.target, second])
        self.grow(free_bytes(self.target) // MIB * 13 // 20)
        before, options = names(second), ["--free-backups", "5M", "--at-least", "1"]
        plan, = json.loads(self.transfer("--dry-run", "--json", *options, to=[self.target, second]).stdout)["tasks"]
        self.transfer(*options, to=[self.target, second])
        told = [name for at in plan["destinations"] if at["room"] for name in at["room"]["names"]]
        self.assertEqual([name for name in before if name not in names(second) or name not in names(self.target)], told)
        self.assertEqual(names(self.target)[-1], names(second)[-1])
        self.assertEqual(names(self.snapshots)[-1], names(second)[-1])

    def test_two_tasks_to_one_disk(self):
        """What the one is about to fill is not free for the other."""
        other = support.create(os.path.join(self.source_disk.path, "opt"))
        second = os.path.join(self.target_disk.path, "second")
        os.mkdir(second, 0o700)
        options = ["-S", "--free-backups", "5M", "--at-least", "1", "--limit", "40M"]
        both = options + ["-p", "home", self.source, self.target, ":"] + options + ["-p", "opt", other, second]
        os.makedirs(os.path.join(other, ".btrfs-backup-ng", "snapshots"))
        for mib in (30, 30, 30, (free_bytes(self.target) // MIB - 180) * 14 // 25):
            self.grow(mib)
            bulk(os.path.join(other, "bulk"), mib, 1000 + self.days)
            os.sync()
            snapshot(other, os.path.join(other, ".btrfs-backup-ng", "snapshots", "opt" + self.name(self.days)[4:]))
            self.run_program(*both)
        for path in (self.target, second):
            self.assertEqual(self.name(self.days)[4:], names(path)[-1].replace("opt", "home")[4:])
        self.assertLess(len(names(self.target) + names(second)), 8)

    def test_what_cannot_be_deletes_nothing_and_says_so_before(self):
        before = self.fill()
        self.grow(5)
        for options in (["--free-backups", "99%"], ["--free-backups", "200M", "--at-least", "%d" % len(before)]):
            told = self.transfer("--dry-run", *options).stdout
            self.assertIn("deletes nothing", told)
            result = self.transfer(*options, status=1)
            self.assertErrorSays(result, "deletes nothing", "too little", "--at-least")
            self.assertLessEqual(set(before), set(names(self.target)))
            self.assertNotIn("deleting", result.stderr)
        self.assertEqual(len(before) + 1, len(names(self.target)))  # what fits is sent all the same

    def test_a_source_that_outgrew_the_disk(self):
        before = self.fill()
        self.grow(600)
        result = self.transfer("--free-backups", "10M", status=1)
        self.assertIn("deletes nothing", result.stderr)
        self.assertEqual(before, names(self.target))

    def test_first_what_the_policy_values_least(self):
        """Backups of January the 1st to the nth: by weeks some are worth more, and the newest of the month most."""
        before = self.fill()
        self.grow(80)
        result = self.transfer("--keep-backups", "30d 3w", "--free-backups", "10M", "--at-least", "1")
        gone = [name for name in before if name not in names(self.target)]
        sundays = [self.name(day) for day in (7, 14, 21)]
        self.assertTrue(gone, result.stderr)
        self.assertEqual([name for name in before if name not in sundays][:len(gone)], gone)

    def test_what_locks_name_in_the_folder_stays(self):
        before = self.fill()
        write_locks(self.target, {before[0]: {"locks": ["/elsewhere"]}, before[1]: {"parent_locks": ["/elsewhere"]}})
        self.grow(80)
        self.transfer("--free-backups", "10M")
        self.assertLessEqual({before[0], before[1], before[-1]}, set(names(self.target)))
        self.assertNotIn(before[2], names(self.target))

    def test_what_is_being_cleaned_up_is_waited_for(self):
        before = self.fill()
        self.grow(70)
        os.sync()
        for name in before[:3]:
            delete(self.backup_path(name))
        self.transfer("--free-backups", "10M")
        self.assertEqual(before[3:], names(self.target)[:-1])

    def test_what_is_locked_meanwhile_stays(self):
        before, waits, go = self.fill(), *(os.path.join(support.scratch_folder(), "%s-%d" % (word, id(self)))
                                           for word in ("waits", "go"))
        self.grow(80)
        run = self.start("-S", "-p", "home", "--free-backups", "10M", self.source, self.target, env=support.btrfs_where(
            "touch {}; while [ ! -e {} ]; do sleep 0.05; done".format(waits, go), "subvolume", "sync"))
        run.wait_for("the first wait", lambda: os.path.exists(waits))
        write_locks(self.target, {before[0]: {"locks": ["/elsewhere"]}})
        with open(go, "w"):
            pass
        self.assertIn("must stay by now", run.finish().stderr)
        self.assertLessEqual(set(before), set(names(self.target)))

    def test_what_is_open_is_not_waited_for_in_vain(self):
        self.grow(40, 2)
        self.transfer("-q")
        host = program.LocalHost(program.Events())
        with mock.patch.object(program, "CLEANING_PATIENCE", 1.0):
            with open(os.path.join(self.backup_path(self.name(1)), "bulk")):
                delete(self.backup_path(self.name(1)))
                with self.assertRaisesRegex(program.BackupError, "not cleaned up"):
                    host.wait_for_cleaning(self.target)
        host.wait_for_cleaning(self.target)

    def test_what_goes_over_compressed_takes_less(self):
        support.command("mount", "-o", "remount,compress-force=zstd", self.source_disk.path)
        before = self.fill()
        self.days += 1
        self.write("text", "a line of a log that can be compressed\n" * (6 << 20))
        os.sync()
        snapshot(self.source, self.snapshot_path(self.name(self.days)))
        self.transfer("--free-backups", "10M")
        self.assertEqual(before + [self.name(self.days)], names(self.target))

    def test_what_has_arrived_of_a_broken_transfer_counts(self):
        before = self.fill(100)
        self.grow(60)
        running = self.start("-S", "-p", "home", "--limit", "20M", self.source, self.target)
        running.wait_for("a part of it", lambda: any(
            os.path.exists(os.path.join(self.target, name, "bulk")) for name in os.listdir(self.target)
            if name.endswith(".partial")))
        running.process.kill()
        running.finish()
        self.transfer("--free-backups", "10M")
        self.assertEqual(names(self.snapshots)[-1], names(self.target)[-1])
        self.assertLessEqual(set(before[-3:]), set(names(self.target)))

    def test_at_random(self):
        """Disks that are nearly full: each run succeeds, and never takes the last three or what is in common."""
        random_ = chance(self)
        self.fill()
        for _ in range(3 * ROUNDS):
            self.grow(random_.randrange(1, 90), random_.choice([1, 1, 2]))
            policy = random_.choice([[], ["-n", "4"], ["--keep-backups", "3d 2w"]])
            before = names(self.target)
            self.transfer("-q", "--free-backups", random_.choice(["5M", "5%", "40M"]), *policy)
            after = names(self.target)
            self.assertEqual(names(self.snapshots)[-1], after[-1])
            self.assertIn(before[-1], after if not policy else before)
            for name in after[-2:]:
                self.assertComplete(self.backup_path(name), self.snapshot_path(name))


class AtTheSource(RoomTestCase):

    source_size = target_size = "512M"

    def test_snapshots_that_were_sent(self):
        self.grow(40, 6)
        self.transfer("-q")
        self.grow(40, 2)
        before = names(self.snapshots)
        wanted = "%dM" % (free_bytes(self.source) // MIB + 70)
        told = self.transfer("--dry-run", "--free-snapshots", wanted).stdout
        self.assertIn("deletes these 2", told)
        self.transfer("--free-snapshots", wanted)
        self.assertEqual(before[2:], names(self.snapshots))
        self.assertEqual(before, names(self.target))
        self.assertGreaterEqual(free_bytes(self.source), 70 * MIB)

    def test_without_transfers_what_is_in_common_by_now_stays(self):
        self.grow(40, 2)
        self.transfer("-q")
        self.grow(40, 4)
        for base, day in ((2, 3), (3, 4)):  # another program sends
            support.command("sh", "-c", 'btrfs send -q -p "$1" "$2" | btrfs receive -q "$3"', "sh",
                            self.snapshot_path(self.name(base)), self.snapshot_path(self.name(day)), self.target)
        wanted = "%dM" % (free_bytes(self.source) // MIB + 100)
        self.transfer("-T", "--free-snapshots", wanted, "--at-least", "1")
        self.assertIn(self.name(4), names(self.snapshots))
        self.assertNotIn(self.name(1), names(self.snapshots))

    def test_what_is_not_sent_yet_stays(self):
        sent = self.grow(20, 3)
        self.transfer("-q")
        unsent = self.grow(20, 6)
        wanted = "%dM" % (free_bytes(self.source) // MIB + 30)
        support.command("umount", self.target_disk.path)
        told = self.transfer("--dry-run", "--free-snapshots", wanted, "--at-least", "1", status=1).stdout
        self.transfer("--free-snapshots", wanted, "--at-least", "1", status=1)
        self.assertEqual(sent[2:] + unsent, names(self.snapshots))
        self.assertIn("deletes these 2", told)
        wanted = "%dM" % (free_bytes(self.source) // MIB + 30)
        result = self.transfer("--free-snapshots", wanted, "--at-least", "1", status=1)
        self.assertIn("deletes nothing", result.stderr)

    def test_without_transfers_what_is_still_to_be_sent_stays(self):
        sent = self.grow(20, 3)
        self.transfer("-q")
        unsent = self.grow(20, 6)
        for options in (["-T", "--dry-run"], ["-T"]):
            wanted = "%dM" % (free_bytes(self.source) // MIB + 30)
            result = self.transfer("--free-snapshots", wanted, "--at-least", "1", *options)
            self.assertIn("deletes these 2", result.stdout + result.stderr)
        wanted = "%dM" % (free_bytes(self.source) // MIB + 30)
        for options, status in (["-T", "--dry-run"], 0), (["-T"], 1):
            result = self.transfer("--free-snapshots", wanted, "--at-least", "1", *options, status=status)
            self.assertIn("deletes nothing", result.stdout + result.stderr)
        self.assertEqual(sent[2:] + unsent, names(self.snapshots))


class Prunes(RoomTestCase):

    def test_all_prefixes_together_and_the_newest_of_each_stay(self):
        self.fill()
        os.rename(self.backup_path(self.name(1)), self.backup_path("other20240101-000000"))
        before = names(self.target)
        wanted = "%dM" % (free_bytes(self.target) // MIB + 70)
        told = self.run_program("prune", "--dry-run", "--free-backups", wanted, self.target).stdout
        self.assertIn("deletes these 2", told)
        self.assertEqual(before, names(self.target))
        self.run_program("prune", "--free-backups", wanted, self.target)
        self.assertEqual({self.name(2), self.name(3)}, set(before) - set(names(self.target)))
        result = self.run_program("prune", "--free-backups", "95%", self.target, status=1)
        self.assertErrorSays(result, "deletes nothing")

    def test_what_the_policy_deletes_counts_first(self):
        before = self.fill()
        keep = len(before) - 3
        wanted = "%dM" % (free_bytes(self.target) // MIB + 70)
        told = self.run_program("prune", "--dry-run", "-n", str(keep), "--free-backups", wanted, self.target).stdout
        self.run_program("prune", "-n", str(keep), "--by-names", "--free-backups", wanted, self.target)
        self.assertEqual(before[3:], names(self.target), told)


    def test_of_all_prefixes_the_oldest_go(self):
        before = self.fill()
        for day in range(1, len(before) // 2):
            os.rename(self.backup_path(self.name(day)), self.backup_path("work" + self.name(day)[4:]))
        wanted = "%dM" % (free_bytes(self.target) // MIB + 70)
        self.run_program("prune", "--free-backups", wanted, "--at-least", "1", self.target)
        work = [name for name in names(self.target) if name.startswith("work")]
        self.assertEqual(len(before) // 2 - 1 - 2, len(work))
        self.assertEqual(before[len(before) // 2 - 1:], names(self.target)[:-len(work)])


class PrunesByArrival(BackupTestCase):

    def test_the_newest_that_came_in_order_stay_as_well(self):
        """Names are their sender's choice: those that came late do not take the places of good ones."""
        for days in ((1, 2, 3, 4, 8, 9), (5, 6, 7)):
            self.take(*days)
            self.transfer("-q")
        task, events = program.Task("prune", free_backups=Room(1)), program.Events()
        pruning = program.Pruning(task, program.Hosts(task, events), self.target, events)
        pruning.host, pruning.folder = program.LocalHost(events), self.target
        may_go = pruning.may_go(pruning.host.list(self.target), "home")
        self.assertEqual({self.name(day) for day in (1, 2, 3, 5, 6)}, set(may_go.worth))
        self.assertEqual({self.name(day) for day in range(1, 10)}, set(may_go.lines[0]))


class OverSsh(remote.RemoteTestCase):

    target_size = "512M"

    def test_room_is_made_where_it_lies(self):
        os.makedirs(self.snapshots)
        for day in range(1, 9):
            bulk(os.path.join(self.source, "bulk"), 30, day)
            os.sync()
            snapshot(self.source, self.snapshot_path(self.name(day)))
        self.push("-S")
        os.sync()
        wanted = "%dM" % (free_bytes(self.target) // MIB + 20)
        self.push("-S", "--free-backups", wanted)
        self.assertEqual([self.name(day) for day in range(2, 9)], names(self.target))


class Restricted(remote.RestrictedTestCase):

    def test_a_key_that_may_not_delete(self):
        self.take(1, 2, 3, 4, 5)
        self.push("-S")
        result = self.push("-S", "--free-backups", "99%", status=1)
        self.assertErrorSays(result, "deletes nothing")
        self.assertEqual(5, len(names(self.target)))


if __name__ == "__main__":
    random.seed()
    unittest.main()
