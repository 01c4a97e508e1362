"""Identity, retention and planning: observed state in, a plan out."""

import os
import sys
import time
import unittest
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support
from support import InZone, utc

from btrfs_backup_ng import (
    FREE,
    OF_OTHERS,
    OURS,
    PRIVATE,
    Broken,
    DestinationPlan,
    FolderNotes,
    Known,
    Listing,
    LockChange,
    Mark,
    Owner,
    Pin,
    Policy,
    Problem,
    Record,
    Recovery,
    ResumePoint,
    Seen,
    Subvolume,
    Transfer,
    Verdict,
    abandoned_partials,
    after_transfers,
    ambiguous_ids,
    as_planned,
    backup_moments,
    backups_of,
    base_among,
    by_creation,
    chain_lengths,
    choose_parent,
    claimed,
    copies_by_id,
    corresponds,
    deletions,
    describe_needed,
    destination_verdicts,
    in_common,
    is_as_sent,
    is_provably_partial,
    is_unfinished,
    keep_chains,
    known_protections,
    left_traces,
    lock_reasons,
    locked_names,
    locks_of_prefix,
    locks_on,
    misnamed_backups,
    name_problem,
    new_pins,
    normal_destination,
    parent_of_record,
    parse_policy,
    pin_reasons,
    plan_destination,
    plan_giving_up,
    plan_recoveries,
    plan_recovery,
    plan_retention,
    plan_run,
    plan_transfers,
    private_uuid,
    snapshot_moment,
    snapshot_name,
    snapshot_prefixes,
    snapshots_of,
    source_verdicts,
    usable_records,
    vouched_pieces,
    whose,
    with_pin,
    within_chain,
    without_taking_up,
)

NOW = time.mktime((2026, 2, 1, 0, 0, 0, 0, 0, -1))


def name_of(day):
    return "home202601{:02}-000000".format(day)


def day_of(name):
    return int(name[10:12])


def snapshot(day, **changes):
    """The snapshot of a day of January 2026."""
    return Subvolume(name_of(day), "uuid-{}".format(day), otime=day)._replace(**changes)


def snapshots(*days):
    return [snapshot(day) for day in days]


def backup(day, **changes):
    """The complete backup of a snapshot. It was received later than those of younger snapshots."""
    return Subvolume(name_of(day), "backup-{}".format(day), received_uuid="uuid-{}".format(day),
                     otime=1000 - day)._replace(**changes)


def known(taken, newest=0, locks=None, pins=None):
    """What is known of a source with some snapshots, of which the newest are kept."""
    return Known(taken, "home", Policy(newest), NOW, locks or {}, pins or {})


def partial(day, piece="", **changes):
    """What a broken transfer leaves: writable, without received UUID, under the partial's name."""
    return Subvolume(".{}{}.partial".format(name_of(day), piece), "partial-{}".format(day),
                     readonly=False)._replace(**changes)


def holding(*days, **more):
    """A destination with the backups of some days and, in `also`, other subvolumes."""
    subvolumes = [backup(day) for day in days] + list(more.get("also", ()))
    return Listing(tuple(subvolumes), frozenset(more.get("others", ())))


# What may be found in place of the backup of day 2.
HALF = backup(2, received_uuid=None, readonly=False)  # as release 0.6.6 left it
STAMPED = backup(2, readonly=False)
FOREIGN = backup(2, received_uuid="another")
NEARLY = partial(2, readonly=True, received_uuid="uuid-2")  # complete but for its name


class Correspondence(unittest.TestCase):

    A = Subvolume("one", "a")
    B = Subvolume("two", "b", received_uuid="a")  # received from A
    C = Subvolume("three", "c", received_uuid="a")  # received from B
    OTHER = Subvolume("one", "x", parent_uuid="a", received_uuid="y")

    def test_along_a_chain_and_back(self):
        for one in (self.A, self.B, self.C):
            for other in (self.A, self.B, self.C):
                with self.subTest(one=one, other=other):
                    self.assertTrue(corresponds(one, other))

    def test_neither_name_nor_parent_tell(self):
        for one in (self.A, self.B, self.C):
            self.assertFalse(corresponds(one, self.OTHER))
            self.assertFalse(corresponds(self.OTHER, one))
        self.assertFalse(corresponds(Subvolume("one", "a"), Subvolume("one", "b")))

    def test_a_received_snapshot_goes_by_its_received_id(self):
        """What was received from B's own UUID is no copy of B, for its stream never bore that one."""
        self.assertFalse(corresponds(self.B, Subvolume("four", "d", received_uuid="b")))

    def test_writable_ones_may_have_changed(self):
        for one, other in ((self.A, self.B), (self.B, self.C), (self.C, self.A)):
            self.assertFalse(corresponds(one._replace(readonly=False), other))
            self.assertFalse(corresponds(one, other._replace(readonly=False)))

    def test_no_id_is_no_identity(self):
        nobody = Subvolume("one", None)
        self.assertFalse(corresponds(nobody, nobody))
        self.assertFalse(corresponds(nobody, self.A))
        self.assertFalse(corresponds(self.A, nobody))


class ChangedSnapshots(unittest.TestCase):
    """What transaction ids tell of a snapshot that was made writable, changed and set read-only again."""

    SNAPSHOT = Subvolume("one", "a", otransid=10, ctransid=10)
    CHANGED = SNAPSHOT._replace(ctransid=20)
    BACKUP = Subvolume("one", "b", received_uuid="a", otransid=5, ctransid=7, stransid=10)
    TABLE = (
        ("as it was taken", SNAPSHOT, BACKUP, True),
        ("of a source where nothing had changed", SNAPSHOT._replace(ctransid=3), BACKUP._replace(stransid=3), True),
        ("changed since it was sent", CHANGED, BACKUP, False),
        ("changed before it was sent", CHANGED, BACKUP._replace(stransid=20), True),
        ("changed before and since", CHANGED._replace(ctransid=30), BACKUP._replace(stransid=20), False),
        ("a backup of a backup", SNAPSHOT, BACKUP._replace(stransid=99), True),
        ("a backup of a backup, changed since", CHANGED, BACKUP._replace(stransid=99), False),
        ("a backup that does not tell, as stream files", CHANGED, BACKUP._replace(stransid=0), False),
        ("a host that tells nothing", SNAPSHOT._replace(ctransid=0), BACKUP._replace(stransid=0, ctransid=0), True),
        ("what was received from one place", BACKUP._replace(uuid="c", stransid=7), BACKUP, True),
        ("itself", CHANGED, CHANGED, True),
    )

    def test_whether_it_is_what_its_backup_is(self):
        for why, one, other, expected in self.TABLE:
            with self.subTest(why):
                self.assertEqual((expected, expected), (is_as_sent(one, other), is_as_sent(other, one)))

    def test_a_changed_one_is_there_but_nothing_is_built_on_it(self):
        older = Subvolume("zero", "z", otransid=9, ctransid=9)
        common = in_common([older, self.CHANGED], Listing((self.BACKUP, self.BACKUP._replace(
            name="zero", uuid="y", received_uuid="z", stransid=9))))
        self.assertEqual(({"a", "z"}, ["z"], older, (self.CHANGED,)), (
            common.present, list(common.bases), common.newest, common.changed))

    def test_in_its_place_a_restored_one_has_no_room(self):
        self.assertIn("changed since", name_problem(self.BACKUP, Listing((self.CHANGED,)), set()).text)


class WhatAFolderHolds(InZone):

    EPOCH = "home19700101-010000"  # in the tests' time zone

    def test_what_subvolumes_are_sorted_by(self):
        """By creation; what was received was created by the time that its name states, if that is a snapshot's."""
        name, named = "home20260105-120000", int(utc("2026-01-05 11:00:00")) * 10 ** 9
        table: Any = (({}, 7), ({"received_uuid": "r"}, named), ({"received_uuid": "r", "name": "x"}, 7),
                      ({"received_uuid": "r", "name": self.EPOCH}, 0))
        for changes, moment in table:
            subvolume = Subvolume(name, "u", otime=7, otransid=3)._replace(**changes)
            with self.subTest(changes=changes):
                self.assertEqual((moment, 3, subvolume.name), by_creation(subvolume))

    def test_how_many_snapshots_of_each_prefix(self):
        there = Listing((snapshot(1), snapshot(2), snapshot(3, readonly=False), NEARLY, Subvolume("home", "x"),
                         Subvolume("20260101-000000", "y"), Subvolume("home-20260101-000000", "z")))
        self.assertEqual({"home": 2, "": 1, "home-": 1}, snapshot_prefixes(there))

    def test_the_copies_of_a_snapshot(self):
        """What was received comes before its original, and the older before the younger, wherever they stand."""
        original = Subvolume("original", "a", otime=1)
        old, new = (Subvolume(name, name, received_uuid="a", otime=2, otransid=n) for n, name in enumerate(("o", "n")))
        last = Subvolume("last", "last", received_uuid="o", otime=3)
        others = (new._replace(readonly=False), NEARLY, Subvolume("nobody", None))
        for there in ((original, old, new, last), (last, new, old, original), (new, original, last, old)):
            with self.subTest(there=[s.name for s in there]):
                self.assertEqual({"a": [old, new, original], "o": [last, old], "n": [new], "last": [last]},
                                 copies_by_id(Listing(others + there)))

    def test_what_others_can_build_on(self):
        """A copy that somebody made may have been changed since: of several the one with the snapshot's name."""
        one, other = backup(1), backup(1, name="b", uuid="copy")
        third = other._replace(name="x", uuid="third")
        for copies, base in (((), None), ((one,), one), ((other,), other), ((one, other), one), ((other, one), one),
                             ((other, one, third), one), ((third, other), None), ((third, one), one)):
            with self.subTest(copies=[copy.name for copy in copies]):
                self.assertEqual(base, base_among(snapshot(1), copies))
                there = Listing(copies + (backup(3, received_uuid="same"), backup(4, received_uuid="not here")))
                alike = [snapshot(day, received_uuid="same") for day in (2, 3)]
                self.assertEqual({"uuid-1": base} if base else {}, in_common([snapshot(1)] + alike, there).bases)

    def test_moments(self):
        """A backup's is that of its snapshot while that exists, else what its name says."""
        summer = Subvolume("home20241027-023000", "s", otime=int(utc("2024-10-27 00:30:00")) * 10 ** 9)
        winter = Subvolume("home20241027-023001", "w", otime=int(utc("2024-10-27 01:30:01")) * 10 ** 9)
        kept = [Subvolume(s.name, "b", received_uuid=s.uuid, otime=9) for s in (summer, winter)]
        gone = [Subvolume("home20260105-120000", "b", received_uuid="gone", otime=9),
                Subvolume(self.EPOCH, "b", received_uuid="gone", otime=int(9e18))]
        self.assertEqual({kept[0].name: utc("2024-10-27 00:30:00"), kept[1].name: utc("2024-10-27 01:30:01"),
                          gone[0].name: utc("2026-01-05 11:00:00"), gone[1].name: 0.0},
                         backup_moments("home", kept + gone, [summer, winter, snapshot(1)]))
        self.assertEqual(0.0, snapshot_moment("home", gone[1]))

    def test_snapshots_by_creation(self):
        """Local time repeats: by its name the second one is the older."""
        first = Subvolume("home20241027-025000", "1", otime=1)
        second = Subvolume("home20241027-021000", "2", otime=2)
        third = Subvolume("home20241027-020500", "3", otime=2, otransid=1)
        found = snapshots_of(Listing((third, first, second)), "home")
        self.assertEqual([first, second, third], found)

    def test_only_snapshots_of_the_prefix(self):
        listing = Listing((snapshot(1), snapshot(2, readonly=False), partial(3, readonly=True),
                           Subvolume("home", "x"), Subvolume("home-data20260101-000000", "y"),
                           Subvolume("20260101-000000", "z")))
        self.assertEqual([snapshot(1)], snapshots_of(listing, "home"))
        self.assertEqual(["z"], [s.uuid for s in snapshots_of(listing, "")])

    def test_backups_are_received_complete_and_of_the_prefix(self):
        listing = holding(1, also=[backup(2, readonly=False), backup(3, received_uuid=None), NEARLY,
                                   backup(4, name="other")])
        self.assertEqual([backup(1)], backups_of(listing, "home"))

    def test_common_snapshots(self):
        listing = holding(1, also=[
            backup(2, name="renamed"),
            backup(3, readonly=False),
            backup(4, received_uuid="another"),
            partial(5, readonly=True, received_uuid="uuid-5"),
            Subvolume("the snapshot itself", "uuid-6"),
        ])
        taken = snapshots(1, 2, 3, 4, 5, 6)
        found = [s for s in taken if s.stream_id in in_common(taken, listing).present]
        self.assertEqual(snapshots(1, 2, 6), found)

    def test_the_newest_common_one(self):
        taken = snapshots(1, 2, 3, 4)
        self.assertEqual(snapshot(3), in_common(taken, holding(1, 3)).newest)
        self.assertIsNone(in_common(taken, holding(7)).newest)
        self.assertIsNone(in_common(taken, Listing()).newest)
        alike = [snapshot(1)] + [snapshot(day, received_uuid="same") for day in (2, 3)]
        listing = holding(1, also=[backup(3, received_uuid="same")])
        self.assertEqual(snapshot(1), in_common(alike, listing).newest)

    def test_ambiguous_ids(self):
        self.assertEqual(set(), ambiguous_ids(snapshots(1, 2, 3)))
        self.assertEqual({"same"}, ambiguous_ids([snapshot(1), snapshot(2, received_uuid="same"),
                                                  snapshot(3, received_uuid="same")]))
        self.assertEqual({"uuid-1"}, ambiguous_ids([snapshot(1), snapshot(2, received_uuid="uuid-1")]))
        self.assertEqual(set(), ambiguous_ids([snapshot(1, uuid=None), snapshot(2, uuid=None)]))


# Letters are names, with the times 1, 2, 3 …; it is 100. Capital letters are from the future.
TIMES = {"c": 3.0, "a": 1.0, "e": 5.0, "b": 2.0, "d": 4.0}
FUTURE = {"Y": 102.0, "Z": 1e9}


class Values(unittest.TestCase):

    def test_what_is_meant_where_nothing_is_said(self):
        self.assertEqual(("a", "b", None, None, True) + (0,) * 6, tuple(Subvolume("a", "b")))
        self.assertEqual(("a", "b", None, None, False, 1, 0, "", None, ((), 0, False, None), "", ""),
                         tuple(Record("a", "b")))
        self.assertEqual(((), frozenset(), False, (), ()), tuple(Listing()))
        self.assertFalse(Broken("a", "b").is_lost)

    def test_how_far_a_transfer_has_come(self):
        for offsets, is_sound, offset in (((), True, 0), ((5,), True, 5), ((5, 9, 20), True, 20), ((0,), False, 0),
                                          ((5, 5), False, 5), ((9, 5), False, 5), ((5, 9, 7), False, 7),
                                          ((1,), True, 1)):
            point = ResumePoint(tuple(Mark(number, "x") for number in offsets))
            with self.subTest(offsets=offsets):
                self.assertEqual((is_sound, offset), (point.is_sound, point.offset))

    def test_names_in_a_listing(self):
        records = (Record("a", "1"), Record("b", "2"), Record("c", "3"))
        listing = Listing((Subvolume("a", "1"), Subvolume("b", "2"), Subvolume("c", "3")), records=records)
        for there in (listing, listing._replace(subvolumes=listing.subvolumes[::-1], records=records[::-1])):
            for number, name in enumerate("abc"):
                self.assertEqual(records[number], there.record_of(name))
                self.assertEqual(str(number + 1), there.named(name).uuid)
        self.assertEqual((None, None), (listing.record_of("d"), listing.named("d")))

    def test_what_a_record_vouches_for(self):
        record = Record("b", "stream", piece=".b.partial", private="private", finished=".b.2.partial")
        one = Subvolume(".b.partial", "1", received_uuid="private")
        two = Subvolume(".b.2.partial", "2", received_uuid="stream")
        for others in (one._replace(name=".a.partial"), one._replace(name=".c.partial"), one._replace(readonly=False),
                       one._replace(received_uuid=None), one._replace(received_uuid="stream"),
                       two._replace(received_uuid="private"), one._replace(name="b")):
            with self.subTest(others=others):
                self.assertEqual([one, two], vouched_pieces(record, [one, others, two]))
        for name in (".a.partial", ".c.partial"):
            self.assertEqual([], vouched_pieces(record._replace(piece=name), [one._replace(name=name)]))

    def test_the_moment_of_a_snapshot(self):
        named = time.mktime((2026, 1, 5, 0, 0, 0, 0, 0, -1))
        for shift, is_creation in ((0, True), (7200, True), (-7200, True), (7201, False), (-7201, False), (9e6, False)):
            made = snapshot(5, otime=int((named + shift) * 1e9))
            with self.subTest(shift=shift):
                self.assertEqual(named + shift if is_creation else named, snapshot_moment("home", made))


class Retention(unittest.TestCase):

    def kept(self, times, newest, protected=()):
        verdicts = plan_retention(times, Policy(newest), dict.fromkeys(protected, "protected"), 100)
        oldest_first = sorted(times, key=lambda name: times[name])
        self.assertEqual(oldest_first, [v.name for v in verdicts])
        self.assertEqual([v for v in verdicts if not v.keep], deletions(verdicts))
        return "".join(v.name for v in verdicts if v.keep)

    def test_by_number(self):
        for newest, expected in ((0, "abcde"), (1, "e"), (2, "de"), (4, "bcde"), (5, "abcde"), (9, "abcde")):
            with self.subTest(newest=newest):
                self.assertEqual(expected, self.kept(TIMES, newest))

    def test_protected(self):
        for newest, protected, expected in (
            (1, "a", "ae"), (1, "ace", "ace"), (2, "e", "de"), (2, "b", "bde"), (0, "a", "abcde"),
            (1, "x", "e"),
        ):
            with self.subTest(newest=newest, protected=protected):
                self.assertEqual(expected, self.kept(TIMES, newest, protected))

    def test_the_future_is_kept_and_not_counted(self):
        times = dict(TIMES, **FUTURE)
        self.assertEqual("eYZ", self.kept(times, 1))
        self.assertEqual("deYZ", self.kept(times, 2))
        self.assertEqual("YZ", self.kept(FUTURE, 1))
        self.assertEqual("aYZ", self.kept(dict(FUTURE, a=1), 1))

    def test_this_very_second_is_not_the_future(self):
        self.assertEqual("x", self.kept({"a": 1, "x": 100}, 1))
        self.assertEqual("x", self.kept({"a": 1, "x": 101}, 1))

    def test_the_only_one_left(self):
        self.assertEqual("a", self.kept({"a": 1}, 1))
        self.assertEqual("", self.kept({}, 1))

    def test_equal_times_go_by_name(self):
        verdicts = plan_retention({"b": 1, "a": 1}, Policy(1), {}, 100)
        self.assertEqual([("a", False), ("b", True)], [(v.name, v.keep) for v in verdicts])

    def test_each_verdict_says_why(self):
        verdicts = plan_retention(dict(TIMES, Z=1e9), Policy(2), {"a": "locked for /b"}, 100)
        self.assertEqual({
            "a": "locked for /b",
            "b": "older than the newest 2",
            "c": "older than the newest 2",
            "d": "among the newest 2",
            "e": "among the newest 2",
            "Z": "its name is from the future",
        }, {v.name: v.reason for v in verdicts})
        self.assertEqual("all are kept", plan_retention({"a": 1}, Policy(0), {}, 100)[0].reason)


class RetentionAtTheSource(unittest.TestCase):

    TAKEN = snapshots(1, 2, 3, 4)

    def kept(self, newest=1, locks=None, pins=None):
        verdicts = source_verdicts(known(self.TAKEN, newest, locks, pins))
        return [day_of(v.name) for v in verdicts if v.keep]

    @staticmethod
    def pin(day, **changes):
        return Pin(name_of(day), "uuid-{}".format(day), "")._replace(**changes)

    def test_without_destinations(self):
        self.assertEqual([4], self.kept())
        self.assertEqual([3, 4], self.kept(2))
        self.assertEqual([1, 2, 3, 4], self.kept(0))

    def test_the_newest_in_common_with_each_destination(self):
        self.assertEqual([1, 4], self.kept(pins={"/b": (self.pin(1),)}))
        self.assertEqual([1, 2, 4], self.kept(pins={"/b": (self.pin(1),), "/c": (self.pin(2),)}))
        self.assertEqual([4], self.kept(pins={"/b": (self.pin(4),)}))

    def test_of_each_filesystem_at_one_destination(self):
        one, other = self.pin(1, filesystem="one"), self.pin(3, filesystem="other")
        self.assertEqual([1, 3, 4], self.kept(pins={"/b": (one, other)}))

    def test_a_new_pin_replaces_that_of_its_filesystem(self):
        first, second = ("11111111-2222-3333-4444-55555555555{}".format(digit) for digit in "56")
        one, other = self.pin(1, filesystem=first), self.pin(2, filesystem=second)
        later = self.pin(3, filesystem=first)
        unknown = self.pin(4)
        self.assertEqual((one,), with_pin((), one))
        self.assertEqual((one, other), with_pin((one,), other))
        self.assertEqual((other, later), with_pin((one, other), later))
        self.assertEqual((one, other, unknown), with_pin((one, other), unknown))

    def test_it_replaces_one_that_was_noted_without_the_id_of_its_disk(self):
        old, one, other = (self.pin(day, filesystem="mounted at /mnt/usb" + more)
                           for day, more in ((1, ""), (2, " with id 1"), (3, " with id 2")))
        self.assertEqual((one,), with_pin((old,), one))
        self.assertEqual((one, other), with_pin((one,), other))
        elsewhere = self.pin(4, filesystem="mounted at /mnt/usb2 with id 1")
        self.assertEqual((old, elsewhere), with_pin((old,), elsewhere))

    def test_a_pin_goes_by_identity(self):
        self.assertEqual([4], self.kept(pins={"/b": (self.pin(1, uuid="of an earlier one of that name"),)}))
        self.assertEqual([1, 4], self.kept(pins={"/b": (self.pin(9, uuid="uuid-1"),)}))

    def test_a_pin_of_a_snapshot_that_was_received(self):
        taken = [snapshot(1, received_uuid="original"), snapshot(2)]
        self.assertEqual([], deletions(source_verdicts(
            known(taken, 1, pins={"/b": (self.pin(1, uuid="original"),)}))))

    def test_locks_and_parent_notes(self):
        locks = {name_of(1): {"locks": ["/b"]}, name_of(2): {"parent_locks": ["/b"]},
                 name_of(3): {"locks": [], "parent_locks": []}, "other20260101-000000": {"locks": ["/b"]}}
        self.assertEqual([1, 2, 4], self.kept(locks=locks))

    def test_reasons(self):
        verdicts = source_verdicts(known(self.TAKEN, 1, {name_of(1): {"locks": ["/c"]}},
                                         {"/b": (self.pin(2),), "/d": (self.pin(3),)}))
        for verdict, destination in zip(verdicts, ("/c", "/b", "/d")):
            self.assertIn(destination, verdict.reason)


class TheRepeatedHour(InZone):
    """In autumn the clock goes back from 3 to 2, so that the younger one bears the earlier time."""

    OLDER = Subvolume("home20241027-025000", "older", otime=int(utc("2024-10-27 00:50:00")) * 10 ** 9)
    NEWER = Subvolume("home20241027-021000", "newer", otime=int(utc("2024-10-27 01:10:00")) * 10 ** 9)
    TAKEN = [OLDER, NEWER]

    def kept(self, verdicts):
        return [v.name for v in verdicts if v.keep]

    def test_the_newer_is_sent(self):
        plan = plan_transfers(known(self.TAKEN), Seen(Listing(), Policy(1)))
        self.assertEqual((Transfer(self.NEWER, None),), plan.transfers)
        self.assertEqual([self.OLDER.name], [v.name for v in plan.skipped])

    def test_the_newer_is_sent_from_the_older(self):
        there = self.OLDER._replace(uuid="backup", received_uuid="older", otime=0)
        plan = plan_transfers(known(self.TAKEN), Seen(Listing((there,)), Policy(1)))
        self.assertEqual((Transfer(self.NEWER, self.OLDER),), plan.transfers)

    def test_the_newer_is_kept_at_the_source(self):
        verdicts = source_verdicts(known(self.TAKEN, 1))
        self.assertEqual([self.NEWER.name], self.kept(verdicts))

    def test_the_newer_is_kept_at_the_destination(self):
        backups = tuple(s._replace(uuid="backup " + s.name, received_uuid=s.uuid, otime=0) for s in self.TAKEN)
        verdicts = destination_verdicts(known(self.TAKEN), Seen(Listing(backups), Policy(1)))
        self.assertEqual([self.NEWER.name], self.kept(verdicts))

    def test_a_snapshot_restored_long_after_goes_by_its_name(self):
        restored = self.OLDER._replace(otime=int(NOW) * 10 ** 9)
        verdicts = source_verdicts(known([self.NEWER, restored], 1))
        self.assertEqual([self.NEWER.name], self.kept(verdicts))


class LockReasons(unittest.TestCase):

    def test_which_and_why(self):
        reasons = lock_reasons({
            "a": {"locks": ["/b"], "parent_locks": []},
            "b": {"parent_locks": ["/c"]},
            "c": {"locks": ["/d", "/e"]},
            "d": {"locks": ["/e"], "parent_locks": ["/f"]},
            "e": {"locks": [], "parent_locks": []},
            "f": {},
            "g": {"parent_locks": ["/d", "/c"]},
        })
        self.assertEqual({"a": "locked for /b", "b": "parent of an unfinished transfer to /c",
                          "c": "locked for /d", "d": "locked for /e",
                          "g": "parent of an unfinished transfer to /d"}, reasons)

    def test_on_one_line(self):
        self.assertEqual({"a": "locked for /b\\n\\xff"}, lock_reasons({"a": {"locks": ["/b\n\udcff"]}}))


class RetentionAtADestination(unittest.TestCase):

    def kept(self, listing, newest=1, taken=()):
        verdicts = destination_verdicts(known(taken), Seen(listing, Policy(newest)))
        return [day_of(v.name) for v in verdicts if v.keep]

    def test_by_number(self):
        self.assertEqual([3], self.kept(holding(1, 2, 3)))
        self.assertEqual([2, 3], self.kept(holding(1, 2, 3), 2))
        self.assertEqual([1, 2, 3], self.kept(holding(1, 2, 3), 0))

    def test_the_newest_in_common_with_the_source_stays(self):
        self.assertEqual([2, 4], self.kept(holding(1, 2, 3, 4), 1, snapshots(1, 2, 5)))

    def test_reasons(self):
        verdicts = destination_verdicts(known(snapshots(1, 2, 6)), Seen(
            holding(1, 2, 3, 4), Policy(1), notes=FolderNotes((), {name_of(1): {"locks": ["/x"]}})))
        self.assertEqual(["locked for /x", "newest in common with the source", "older than the newest 1",
                          "among the newest 1"], [v.reason for v in verdicts])

    def test_what_stream_files_need(self):
        files = [backup(day, uuid="uuid-{}".format(day), parent_uuid="uuid-1" if day == 3 else None)
                 for day in (1, 2, 3)]
        self.assertEqual([1, 3], self.kept(Listing(tuple(files), chained=True)))
        self.assertEqual([3], self.kept(Listing(tuple(files))))

    def test_nothing_but_backups_is_judged(self):
        also = [backup(1, received_uuid=None), backup(2, readonly=False), backup(3, name="other"),
                partial(4), Subvolume("home-data20260101-000000", "x", received_uuid="y")]
        verdicts = destination_verdicts(known([]), Seen(holding(5, 6, also=also), Policy(1)))
        self.assertEqual([name_of(5), name_of(6)], [v.name for v in verdicts])

    def test_the_future(self):
        future = backup(1, name="home20991231-235959", uuid="f")
        verdicts = destination_verdicts(known([]), Seen(holding(2, 3, also=[future]), Policy(1)))
        self.assertEqual([False, True, True], [v.keep for v in verdicts])


class ChooseParent(unittest.TestCase):

    TAKEN = snapshots(1, 2, 3, 4, 5)

    def test_the_nearest_older_one_else_the_nearest_newer(self):
        for day, common, expected in (
            (3, (1, 2, 4, 5), 2), (3, (1, 4), 1), (3, (4, 5), 4), (3, (5,), 5), (1, (4, 2), 2),
            (5, (1, 2), 2), (3, (), None), (3, (9,), None), (3, (3,), None),
        ):
            with self.subTest(day=day, common=common):
                ids = {"uuid-{}".format(other) for other in common}
                parent = choose_parent(snapshot(day), self.TAKEN, ids)
                self.assertEqual(expected, parent and day_of(parent.name))

    def test_by_creation_and_not_by_name(self):
        taken = [Subvolume("home20241027-02{}000".format(minute), minute, otime=at)
                 for at, minute in enumerate("3514")]
        self.assertEqual(taken[1], choose_parent(taken[2], taken, {"3", "5", "4"}))

    def test_by_the_id_that_travels(self):
        restored = snapshot(1, received_uuid="original")
        self.assertEqual(restored, choose_parent(snapshot(2), [restored, snapshot(2)], {"original"}))
        self.assertIsNone(choose_parent(snapshot(2), [restored, snapshot(2)], {"uuid-1"}))
        self.assertIsNone(choose_parent(snapshot(2, received_uuid="original"), [restored], {"original"}))


class PlanTransfers(unittest.TestCase):

    def plan(self, taken, listing, newest=0, recoveries=(), **more):
        return plan_transfers(known(taken), Seen(listing, Policy(newest), **more), recoveries)

    @staticmethod
    def sent(plan):
        """[(day, day of its parent)] in order."""
        return [(day_of(t.snapshot.name), t.parent and day_of(t.parent.name)) for t in plan.transfers]

    @staticmethod
    def days(things):
        return [day_of(thing.snapshot) for thing in things]

    def test_order_and_parents(self):
        for there, expected in (
            ((), [(1, None), (2, 1), (3, 2), (4, 3)]),
            ((1,), [(2, 1), (3, 2), (4, 3)]),
            ((1, 2, 3), [(4, 3)]),
            ((1, 2, 3, 4), []),
            ((2,), [(1, 2), (3, 2), (4, 3)]),
            ((4,), [(1, 4), (2, 1), (3, 2)]),
            ((1, 4), [(2, 1), (3, 2)]),
            ((9,), [(1, None), (2, 1), (3, 2), (4, 3)]),
        ):
            with self.subTest(there=there):
                plan = self.plan(snapshots(1, 2, 3, 4), holding(*there))
                self.assertEqual(DestinationPlan((), plan.transfers), plan)
                self.assertEqual(expected, self.sent(plan))

    def test_in_full_when_asked(self):
        plan = self.plan(snapshots(1, 2, 3), holding(1), incremental=False)
        self.assertEqual([(2, None), (3, None)], self.sent(plan))

    def test_a_backup_under_another_name_is_there(self):
        listing = holding(also=[backup(1, name="mine"), backup(2, name=name_of(9))])
        self.assertEqual([(3, 2)], self.sent(self.plan(snapshots(1, 2, 3), listing)))

    def test_what_retention_would_delete_is_not_sent(self):
        for there, newest, expected, skipped in (
            ((), 2, [(3, None), (4, 3)], [1, 2]),
            ((), 1, [(4, None)], [1, 2, 3]),
            ((1,), 1, [(4, 1)], [2, 3]),
            ((4,), 1, [], [1, 2, 3]),
            ((4,), 2, [(3, 4)], [1, 2]),
            ((7, 8), 2, [], [1, 2, 3, 4]),  # newer backups of the same prefix, from elsewhere
            ((7,), 2, [(4, None)], [1, 2, 3]),
        ):
            with self.subTest(there=there, newest=newest):
                plan = self.plan(snapshots(1, 2, 3, 4), holding(*there), newest)
                self.assertEqual(expected, self.sent(plan))
                self.assertEqual(skipped, [day_of(verdict.name) for verdict in plan.skipped])

    def test_the_future_is_sent_and_takes_no_place(self):
        future = snapshot(31, name="home20991231-235959")
        plan = self.plan([snapshot(1), snapshot(2), future], Listing(), 1)
        self.assertEqual([name_of(2), future.name], [t.snapshot.name for t in plan.transfers])

    # What bears the name of snapshot 2 at the destination, and what is said about it.
    CONFLICTS = (
        (Listing((FOREIGN,)), ("another", "uuid-2")),
        (Listing((backup(2, received_uuid=None),)), ("none", "uuid-2")),
        (Listing((HALF,)), ("writable",)),
        (Listing((STAMPED,)), ("writable",)),
        (Listing((), frozenset([name_of(2)])), ("not a subvolume",)),
        (Listing((partial(2),)), ("partial", partial(2).name)),
        (Listing((partial(2, ".3"),)), ("partial", partial(2, ".3").name)),
        (Listing((NEARLY,)), ("partial",)),
    )

    def test_conflicts_are_reported_and_the_others_sent(self):
        for listing, words in self.CONFLICTS:
            with self.subTest(listing=listing):
                plan = self.plan(snapshots(1, 2, 3), listing)
                self.assertEqual([2], self.days(plan.problems))
                self.assertEqual([(1, None), (3, 1)], self.sent(plan))
                self.assertTrue(plan.problems[0].hint)
                for word in words:
                    self.assertIn(word, plan.problems[0].text)

    def test_a_conflict_does_not_matter_where_nothing_is_to_be_sent(self):
        for listing, _ in self.CONFLICTS:
            there = listing._replace(subvolumes=(backup(2, name="elsewhere"),) + listing.subvolumes)
            with self.subTest(listing=listing):
                self.assertEqual(DestinationPlan(), self.plan(snapshots(2), there))

    def test_what_recovery_deletes_is_no_conflict(self):
        for left in ((partial(2),), (partial(2), partial(2, ".2")), (HALF,), (HALF, partial(2)), (NEARLY,)):
            with self.subTest(left=left):
                recovery = Recovery(name_of(2), left)
                plan = self.plan(snapshots(1, 2), holding(1, also=left), recoveries=[recovery])
                self.assertEqual(DestinationPlan((recovery,), plan.transfers), plan)
                self.assertEqual([(2, 1)], self.sent(plan))

    def test_a_recovery_clears_only_what_it_names(self):
        plan = self.plan(snapshots(1, 2), holding(also=[partial(1), partial(2)]),
                         recoveries=[Recovery(name_of(1), (partial(1),))])
        self.assertEqual([(1, None)], self.sent(plan))
        self.assertEqual([2], self.days(plan.problems))

    def test_a_recovery_with_a_problem_blocks_its_snapshot(self):
        """It has been said already, so that it is no further problem."""
        recovery = Recovery(name_of(2), (partial(2),), Problem(name_of(2), "is another subvolume"))
        plan = self.plan(snapshots(1, 2, 3), holding(1, also=[partial(2)]), recoveries=[recovery])
        self.assertEqual(DestinationPlan((recovery,), plan.transfers), plan)
        self.assertEqual([(3, 1)], self.sent(plan))

    def test_no_chain_gets_longer_than_asked(self):
        """--raw-full-every: each so many streams one in full."""
        for there, longest, expected in (
            ((), 0, [(1, None), (2, 1), (3, 2), (4, 3)]),
            ((), 1, [(1, None), (2, None), (3, None), (4, None)]),
            ((), 2, [(1, None), (2, 1), (3, None), (4, 3)]),
            ((), 3, [(1, None), (2, 1), (3, 2), (4, None)]),
            ((1,), 2, [(2, 1), (3, None), (4, 3)]),
            ((1, 2), 2, [(3, None), (4, 3)]),
            ((1, 2), 3, [(3, 2), (4, None)]),
        ):
            with self.subTest(there=there, longest=longest):
                files = [backup(day, uuid="uuid-{}".format(day), parent_uuid="uuid-1" if day == 2 else None)
                         for day in there]
                listing = Listing(tuple(files), chained=True)
                self.assertEqual(expected, self.sent(self.plan(snapshots(1, 2, 3, 4), listing, longest=longest)))

    def test_a_broken_transfer_goes_on_from_the_parent_it_began_with(self):
        piece = partial(3, received_uuid="private", readonly=True)
        later = partial(3, ".2")
        for parent in (None, 1, 2):
            record = Record(name_of(3), "uuid-3", "uuid-{}".format(parent) if parent else None)
            recovery = Recovery(name_of(3), (later,), take_up=record)
            listing = holding(1, 2, also=[piece, later])
            with self.subTest(parent=parent):
                plan = self.plan(snapshots(1, 2, 3, 4), listing, recoveries=[recovery])
                self.assertEqual(DestinationPlan((recovery,), plan.transfers), plan)
                self.assertEqual([(3, parent), (4, 3)], self.sent(plan))

    def test_the_chain_of_what_goes_on_counts(self):
        files = [backup(1, uuid="uuid-1"), partial(2, readonly=True, received_uuid="private")]
        recovery = Recovery(name_of(2), (), take_up=Record(name_of(2), "uuid-2", "uuid-1", "uuid-1"))
        for longest, expected in ((2, [(2, 1), (3, None), (4, 3)]), (3, [(2, 1), (3, 2), (4, None)])):
            plan = self.plan(snapshots(1, 2, 3, 4), Listing(tuple(files), chained=True), recoveries=[recovery],
                             longest=longest)
            self.assertEqual(expected, self.sent(plan))

    def test_what_is_not_sent_after_all_is_not_taken_up(self):
        """The partial of a snapshot that retention would delete goes, all of it."""
        pieces = (partial(1, received_uuid=private_uuid(), readonly=True), partial(1, ".2"))
        recovery = Recovery(name_of(1), pieces[1:], take_up=Record(name_of(1), "uuid-1"))
        plan = self.plan(snapshots(1, 2), holding(2, also=pieces + (partial(2),)), 1, recoveries=[recovery])
        self.assertEqual(([], [1]), (self.sent(plan), [day_of(verdict.name) for verdict in plan.skipped]))
        self.assertEqual((Recovery(name_of(1), (pieces[1], pieces[0])),), plan.recoveries)

    def test_a_problem_of_a_recovery_holds_for_its_snapshot_alone(self):
        recoveries = [Recovery(name_of(1), (), Problem(name_of(1), "is another subvolume")),
                      Recovery(name_of(2), (), take_up=Record(name_of(2), "uuid-2"))]
        plan = self.plan(snapshots(1, 2, 3), holding(also=[partial(2)]), recoveries=recoveries)
        self.assertEqual([(2, None), (3, 2)], self.sent(plan))
        self.assertEqual((), plan.problems)

    def test_snapshots_that_cannot_be_told_apart(self):
        alike = [snapshot(day, received_uuid="same") for day in (2, 3)]
        taken = [snapshot(1)] + alike + [snapshot(4)]
        for listing in (holding(1), holding(1, also=[backup(3, received_uuid="same")])):
            with self.subTest(listing=listing):
                plan = self.plan(taken, listing)
                self.assertEqual([2, 3], self.days(plan.problems))
                self.assertEqual([(4, 1)], self.sent(plan))

    def test_any_subset(self):
        """Each missing one is sent once, from what is there by then; afterwards nothing is left to do."""
        chance = support.chance(self)
        taken = snapshots(*range(1, 13))
        for _ in range(100):
            there = [s for s in taken if chance.random() < 0.5]
            listing = holding(*(day_of(s.name) for s in there))
            newest = chance.choice([0, 0, 1, 3, 8])
            plan = self.plan(taken, listing, newest)
            known = {s.name for s in there}
            for transfer in plan.transfers:
                self.assertNotIn(transfer.snapshot.name, known)
                self.assertTrue(transfer.parent.name in known if known else transfer.parent is None)
                known.add(transfer.snapshot.name)
            missing = {s.name for s in taken} - known
            self.assertEqual(missing, {v.name for v in plan.skipped})
            self.assertEqual((), self.plan(taken, after_transfers(listing, plan), newest).transfers)

    def test_afterwards(self):
        recovery = Recovery(name_of(2), (partial(2),))
        listing = holding(1, also=[partial(2)], others=["file"])
        after = after_transfers(listing, self.plan(snapshots(1, 2), listing, recoveries=[recovery]))
        self.assertEqual([name_of(1), name_of(2)], [s.name for s in after.subvolumes])
        self.assertTrue(corresponds(snapshot(2), after.subvolumes[1]))
        self.assertTrue(after.subvolumes[1].is_received)
        self.assertEqual(frozenset(["file"]), after.others)

    def test_afterwards_each_has_its_parent(self):
        listing = after_transfers(Listing(chained=True), self.plan(snapshots(1, 2), Listing()))
        self.assertEqual([(None, "uuid-1", None), (None, "uuid-2", "uuid-1")],
                         [(s.uuid, s.received_uuid, s.parent_uuid) for s in listing.subvolumes])
        restored = snapshot(1, received_uuid="original")
        after = after_transfers(Listing(), DestinationPlan(transfers=(Transfer(snapshot(2), restored),)))
        self.assertEqual("original", after.subvolumes[0].parent_uuid)


class PlanRun(unittest.TestCase):
    """All of a run as one value: what follows from a step is planned as if that had succeeded."""

    def plan(self, here, *seen, **more):
        return plan_run(here, seen, **more)

    def deleted(self, verdicts):
        return [day_of(verdict.name) for verdict in verdicts if not verdict.keep]

    def test_what_is_sent_lets_older_ones_go_on_both_sides(self):
        here = known(snapshots(1, 2, 3), 1, pins={"/b": (Pin(name_of(1), "uuid-1", ""),)})
        plan = self.plan(here, Seen(holding(1), Policy(1), "/b"))
        self.assertEqual([3], [day_of(t.snapshot.name) for t in plan.destinations["/b"].transfers])
        self.assertEqual([1], self.deleted(plan.destinations["/b"].verdicts))
        self.assertEqual([1, 2], self.deleted(plan.verdicts))

    def test_a_destination_that_gets_nothing_holds_what_it_has_in_common(self):
        here = known(snapshots(1, 2, 3), 1)
        for more in ({"transfers": False}, {}):
            blocked = Listing((backup(1), FOREIGN, backup(3, name="x", received_uuid="y")), frozenset([name_of(3)]))
            plan = self.plan(here, Seen(blocked, Policy(1), "/b"), **more)
            self.assertEqual([2], self.deleted(plan.verdicts))

    def test_where_something_cannot_be_sent_nothing_is_deleted(self):
        here = known(snapshots(1, 2, 3))
        for listing in (holding(1, 3, also=[FOREIGN]), holding(1, 3, also=[STAMPED])):
            there = Seen(listing, Policy(5), "/b")
            self.assertEqual((), self.plan(here, there).destinations["/b"].verdicts)
            locked = here._replace(locks={name_of(2): {"locks": ["/b"]}})
            self.assertEqual((), self.plan(locked, there).destinations["/b"].verdicts)
        self.assertEqual((), self.plan(here, Seen(holding(1, 2, 3), Policy(1), failed=True)).destinations[""].verdicts)
        self.assertEqual((), self.plan(here, Seen(holding(1, 2, 3), has_folder=False)).destinations[""].verdicts)

    def test_a_lock_protects_until_its_transfer_is_done(self):
        locks = {name_of(1): {"parent_locks": ["/b"]}, name_of(2): {"locks": ["/b", "/away"]}}
        here = known(snapshots(1, 2, 3), 1, locks)
        plan = self.plan(here, Seen(holding(1, also=[partial(2)]), key="/b"))
        self.assertEqual((Recovery(name_of(2), (partial(2),)),), plan.destinations["/b"].recoveries)
        self.assertEqual([1], self.deleted(plan.verdicts))

    def test_a_note_that_no_transfer_needs_protects_nothing(self):
        here = known(snapshots(1, 2, 3), 1, {name_of(1): {"parent_locks": ["/b"]}})
        self.assertEqual([1, 2], self.deleted(self.plan(here, Seen(holding(1, 2, 3), key="/b")).verdicts))
        self.assertEqual([2], self.deleted(self.plan(here, Seen(holding(1, 2, 3), key="/c")).verdicts))

    def test_what_another_run_writes_is_left_alone(self):
        here = known(snapshots(1, 2), locks={name_of(2): {"locks": ["/b"]}})
        plan = self.plan(here, Seen(holding(1, also=[partial(2)]), key="/b", busy=frozenset([name_of(2)])))
        recovery, = plan.destinations["/b"].recoveries
        self.assertEqual(((), ()), (recovery.delete, plan.destinations["/b"].transfers))
        self.assertIn("another run", recovery.problem.text)

    def test_when_all_has_succeeded_nothing_is_left_to_send(self):
        chance = support.chance(self)
        for _ in range(50):
            days = [day for day in range(1, 9) if chance.random() < 0.7]
            here = known(snapshots(*days), chance.choice([0, 1, 3]))
            there = holding(*(day for day in days if chance.random() < 0.4))
            seen = Seen(there, Policy(chance.choice([0, 1, 3])), "/b")
            plan = plan_destination(here, seen)
            here, seen = as_planned(here, seen, plan)
            self.assertEqual(DestinationPlan(skipped=plan.skipped), plan_destination(here, seen))
            self.assertEqual({}, new_pins(here, [seen]))

    def test_what_is_given_up(self):
        pins = {"/b": (Pin(name_of(1), "uuid-1", ""),)}
        locks = {name_of(1): {"locks": ["/b", "/c"]}, "other20260101-000000": {"locks": ["/b"]}}
        here = known(snapshots(1), locks=locks, pins=pins)
        for unlock, forget, expected in (
            ((), (), ([], (), ())), (("/b", "/c", "/d"), (), (["/b", "/c"], (), ())),
            ((), ("/b",), (["/b"], ("/b",), ())), ((), ("/c", "/d"), (["/c"], (), ("/d",))),
        ):
            with self.subTest(unlock=unlock, forget=forget):
                found = plan_giving_up(here, set(unlock), set(forget))
                self.assertEqual(expected, (list(found.locks), found.pins, found.unknown))
        self.assertEqual({"/b": [LockChange(name_of(1), "/b")]}, plan_giving_up(here, {"/b"}, set()).locks)


class Growth(unittest.TestCase):
    """Ten years of snapshots are planned in no time: twice as many take about twice the work."""

    @staticmethod
    def work(count):
        """How many functions are called to plan the second half of `count` snapshots."""
        taken = [Subvolume(snapshot_name("home", 3600 * n), "uuid-{}".format(n), otime=3600 * n * 10 ** 9)
                 for n in range(1, count + 1)]
        there = Listing(tuple(s._replace(uuid="backup-" + s.name, received_uuid=s.uuid) for s in taken[:count // 2]))
        calls = []
        sys.setprofile(lambda _frame, event, _what: calls.append(None) if event == "call" else None)
        try:
            plan = plan_run(known(taken), [Seen(there, Policy(), "/b")])
        finally:
            sys.setprofile(None)
        assert len(plan.destinations["/b"].transfers) == count // 2
        return len(calls)

    def test_work_grows_with_the_number_of_snapshots_and_not_with_its_square(self):
        self.assertLess(self.work(800), 2.5 * self.work(400))


class Problems(unittest.TestCase):
    """Why a snapshot cannot be sent, and what to type."""

    # what the destination holds, what recoveries delete, what is said, what is in the way
    TABLE: Any = (
        (Listing(), (), "", ""),
        (holding(1, 3, also=[partial(1), partial(3)], others=[name_of(1)]), (), "", ""),
        (Listing((FOREIGN,)), (), "is another subvolume (received UUID another, expected uuid-2)", ""),
        (Listing((backup(2, received_uuid=None),)), (), "(received UUID none, expected uuid-2)", ""),
        (Listing((FOREIGN,)), (FOREIGN.name,), "", ""),
        (Listing((HALF,)), (), "writable subvolume that no lock names", HALF.name),
        (Listing((HALF,)), (HALF.name,), "", ""),
        (Listing((HALF,)), (partial(2).name,), "writable subvolume that no lock names", HALF.name),
        (Listing((), frozenset([name_of(2)])), (), "is not a subvolume", ""),
        (Listing((), frozenset([name_of(2)])), (name_of(2),), "is not a subvolume", ""),
        (Listing((partial(2, ".3"),)), (), "its {} is a partial backup that no lock names".format(
            partial(2, ".3").name), partial(2, ".3").name),
        (Listing((partial(2),)), (partial(2).name,), "", ""),
        (Listing((partial(2),)), (name_of(2),), "partial backup that no lock names", partial(2).name),
        (Listing(broken=(Broken(name_of(1), "of another"), Broken(name_of(2), "part of it is missing"))), (),
         "its {} cannot be restored: part of it is missing".format(name_of(2)), ""),
        (Listing(broken=(Broken(name_of(2), "it is lost", True),)), (), "", ""),
        (Listing(broken=(Broken(name_of(1), "of another"), Broken(name_of(3), "of another"))), (), "", ""),
    )

    def test_which(self):
        for listing, cleared, words, left in self.TABLE:
            for chained in (False, True):
                with self.subTest(listing=listing, cleared=cleared, chained=chained):
                    problem = name_problem(snapshot(2), listing._replace(chained=chained), set(cleared))
                    self.assertEqual(bool(words), problem is not None)
                    if problem is not None:
                        self.assertEqual((name_of(2), left, bool(left) and chained),
                                         (problem.snapshot, problem.left, problem.is_raw))
                        self.assertIn(words, problem.text)
                        self.assertTrue(problem.text.startswith("its "), problem.text)
                        self.assertTrue(problem.hint)

    def test_what_to_do(self):
        left = Problem("s", "text", "if no other run is writing it", ".s.partial")
        for problem, machine, remedy in (
            (Problem("s", "text", "move it away"), "", "move it away"),
            (Problem("s", "text", "move it away"), "nas", "move it away"),
            (left, "", "if no other run is writing it, delete it: btrfs subvolume delete '/b c/.s.partial'"),
            (left, "nas", "if no other run is writing it, delete it on nas: btrfs subvolume delete '/b c/.s.partial'"),
            (left._replace(is_raw=True), "", "if no other run is writing it, delete it: rm '/b c/.s.partial'"),
        ):
            with self.subTest(problem=problem, machine=machine):
                self.assertEqual(remedy, problem.remedy("/b c", machine))
        self.assertEqual(left.remedy("/b c", ""), left.remedy("/b c"))


class Provable(unittest.TestCase):
    """What bears a partial's name goes only where it is a piece of a transfer for certain."""

    RENAMED = backup(1, name=partial(2, ".7").name)

    def test_which(self):
        record = Record(name_of(2), "uuid-2", piece=partial(2).name, private="private", finished=partial(2, ".3").name)
        for piece, known_id, expected in (
            (partial(2), None, True), (partial(2, received_uuid="uuid-2"), None, True),
            (partial(2, readonly=True, received_uuid=private_uuid()), None, True),
            (partial(2, readonly=True, received_uuid="private"), None, True),
            (partial(2, ".2", readonly=True, received_uuid="private"), None, False),
            (partial(2, ".3", readonly=True, received_uuid="uuid-2"), None, False),
            (partial(2, ".3", readonly=True, received_uuid="uuid-2"), "uuid-2", True),
            (partial(2, readonly=True), "uuid-2", False), (partial(2, readonly=True), None, False),
            (self.RENAMED, None, False), (self.RENAMED, "uuid-2", False),
        ):
            with self.subTest(piece=piece, known_id=known_id):
                self.assertEqual(expected, is_provably_partial(piece, record, known_id))
        self.assertFalse(is_provably_partial(partial(2, readonly=True, received_uuid="private"), None))

    def test_a_private_uuid_is_none_of_a_subvolume(self):
        """Those are random, and bear the version 4 in their 7th byte, or as a GUID in their 8th."""
        self.assertRegex(private_uuid(), "^" + PRIVATE + "[0-9a-f]{4}-[0-9a-f]{12}$")
        self.assertNotEqual(private_uuid(), private_uuid())
        self.assertNotIn("4", (PRIVATE[14], PRIVATE[16]))

    def test_the_lock_stays_and_the_name_comes_back(self):
        for listing, taken, remedy in (
            (holding(also=[self.RENAMED]), snapshots(1, 2), "rename it back: mv -nT {} {}"),
            (holding(1, also=[self.RENAMED]), snapshots(1, 2), "rename it back: mv -nT {} {}.again"),
            (holding(also=[self.RENAMED]), snapshots(2), "rename it back, if it was renamed; when it was made: "
                                                         "btrfs subvolume show {}"),
        ):
            recovery, = plan_recoveries({name_of(2): {"locks": ["/b"]}}, "/b", taken, listing)
            self.assertEqual(((), None), (recovery.delete, recovery.take_up))
            self.assertIn("received UUID uuid-1", recovery.problem.text)
            self.assertEqual(remedy.format("/b/" + self.RENAMED.name, "/b/" + name_of(1)),
                             recovery.problem.remedy("/b"))

    def test_its_transfer_waits_and_no_remedy_deletes_it(self):
        for left, words in ((self.RENAMED, name_of(1)), (NEARLY, name_of(2)),
                            (partial(2, readonly=True), "subvolume show")):
            problem = name_problem(snapshot(2), holding(also=[left]), set(), snapshots(1, 2))
            self.assertIn(words, problem.remedy("/b"))
            self.assertNotIn("delete", problem.text + problem.remedy("/b"))
        self.assertIsNotNone(name_problem(snapshot(2), holding(also=[partial(2), self.RENAMED]), {partial(2).name}))

    def test_what_never_had_its_name_does_not_get_it_from_a_person(self):
        """All of its stream has come, but it may not have been on disk when power failed."""
        record = Record(name_of(2), "uuid-2", finished=NEARLY.name, boot="an earlier one")
        listing = holding(also=[NEARLY])._replace(records=(record,))
        for problem in (name_problem(snapshot(2), listing, set(), snapshots(1, 2)),
                        *misnamed_backups(listing, "home", {NEARLY.name: 1.0}, snapshots(1, 2)),
                        *misnamed_backups(listing, "home", {NEARLY.name: 1.0})):
            self.assertIn("perhaps not complete", problem.text)
            self.assertIn("{} is still at the source, delete it".format(name_of(2)), problem.remedy("/b"))
        self.assertEqual((), tuple(abandoned_partials(listing, "home", {NEARLY.name: 1.0}, 0.0)))


class Records(unittest.TestCase):
    """What vouches for a partial, and whether its transfer can go on."""

    RECORD = Record(name_of(2), "uuid-2", "uuid-1", "backup-1", piece=partial(2).name, private="private")
    FULL = RECORD._replace(parent_id=None, base=None)
    PIECE = partial(2, readonly=True, received_uuid="private")

    def usable(self, record, taken=None, listing=None, incremental=True):
        there = holding(1) if listing is None else listing
        others = (self.RECORD._replace(name=name_of(8)), self.RECORD._replace(name=name_of(9)))
        found = usable_records(snapshots(1, 2, 3) if taken is None else taken,
                               there._replace(records=(others[0], record, others[1])), incremental)
        self.assertIn(found, ([record], []))
        return bool(found)

    def test_snapshot_and_parent_are_what_they_were_on_both_sides(self):
        self.assertTrue(self.usable(self.RECORD))
        self.assertFalse(self.usable(self.RECORD, taken=snapshots(1, 3)))
        self.assertFalse(self.usable(self.RECORD, taken=snapshots(2, 3)))
        for other in ("another", "zzz"):
            self.assertFalse(self.usable(self.RECORD, taken=[snapshot(1), snapshot(2, uuid=other)]))
        self.assertTrue(self.usable(self.RECORD, taken=[snapshot(1), snapshot(2, uuid="x", received_uuid="uuid-2")]))
        self.assertFalse(self.usable(self.RECORD, listing=Listing()))
        self.assertFalse(self.usable(self.RECORD, listing=holding(2, 3)))
        self.assertFalse(self.usable(self.RECORD._replace(base="backup-3"), listing=holding(1, 3)))
        self.assertFalse(self.usable(self.RECORD._replace(base=None)))

    def test_a_full_one_needs_no_parent(self):
        for incremental in (True, False):
            self.assertTrue(self.usable(self.FULL, listing=Listing(), incremental=incremental))
            self.assertFalse(self.usable(self.FULL, taken=snapshots(1, 3), incremental=incremental))
        self.assertFalse(self.usable(self.RECORD, incremental=False))

    def test_the_parent_that_a_record_names(self):
        restored = snapshot(1, received_uuid="original")
        for record, taken, expected in (
            (self.RECORD, snapshots(1, 2), snapshot(1)), (self.RECORD, snapshots(3, 1), snapshot(1)),
            (self.RECORD, snapshots(2, 3), None), (self.FULL, snapshots(1, 2), None), (self.RECORD, [], None),
            (self.FULL, [snapshot(1, uuid=None)], None), (self.RECORD, [restored], None),
            (self.RECORD._replace(parent_id="original"), [snapshot(2), restored], restored),
        ):
            with self.subTest(record=record, taken=taken):
                self.assertEqual(expected, parent_of_record(record, taken))

    def test_what_is_vouched_for_is_taken_up(self):
        later = partial(2, ".2")
        for there, usable, deleted, is_taken_up in (
            ([self.PIECE], True, [], True),
            ([self.PIECE, later], True, [later], True),
            ([self.PIECE, later], False, [self.PIECE, later], False),
            ([later], True, [later], False),
            ([partial(2)], True, [partial(2)], False),
            ([], True, [], False),
            ([self.PIECE, backup(2)], True, [self.PIECE], False),
            ([partial(1), self.PIECE, partial(3)], True, [], True),
        ):
            listing = Listing(tuple(there), records=(self.FULL._replace(name=name_of(3)), self.RECORD))
            with self.subTest(there=there, usable=usable):
                self.assertEqual(Recovery(name_of(2), tuple(deleted), None, self.RECORD if is_taken_up else None),
                                 plan_recovery(name_of(2), snapshot(2), listing, [self.RECORD] if usable else []))

    def test_a_problem_takes_nothing_up(self):
        for final in (STAMPED, FOREIGN):
            listing = Listing((final, self.PIECE), records=(self.RECORD,))
            recovery = plan_recovery(name_of(2), snapshot(2), listing, [self.RECORD])
            self.assertEqual(((self.PIECE,), None), (recovery.delete, recovery.take_up))
            self.assertTrue(recovery.problem)
        listing = Listing((HALF, self.PIECE), records=(self.RECORD,))
        self.assertEqual(Recovery(name_of(2), (self.PIECE, HALF)),
                         plan_recovery(name_of(2), snapshot(2), listing, [self.RECORD]))

    def test_each_lock_knows_the_usable_records(self):
        listing = Listing((self.PIECE,), records=(self.RECORD,))
        for usable, take_up in (([self.RECORD], self.RECORD), ([], None)):
            recovery, = plan_recoveries({name_of(2): {"locks": ["/b"]}}, "/b", snapshots(1, 2), listing, usable)
            self.assertEqual(take_up, recovery.take_up)
        recovery, = plan_recoveries({name_of(2): {"locks": ["/b"]}}, "/b", snapshots(1, 2), holding(also=[FOREIGN]))
        self.assertTrue(recovery.problem)

    def test_all_of_a_partial_goes(self):
        later, other = partial(2, ".2"), partial(3)
        recovery = Recovery(name_of(2), (later,), take_up=self.RECORD)
        listing = holding(1, 2, also=[other, self.PIECE, later])._replace(records=(self.RECORD,))
        self.assertEqual(Recovery(name_of(2), (later, self.PIECE)), without_taking_up(recovery, listing))

    def test_what_a_power_failure_leaves_beside_a_complete_backup(self):
        record, lock = ".{}.partial.json".format(name_of(2)), ".{}.partial.lock".format(name_of(2))
        for listing, expected in (
            (holding(1, 2, others=[record]), [name_of(2)]),
            (holding(1, 2, others=[lock]), [name_of(2)]),
            (holding(1, 2, others=[record, lock, "file"]), [name_of(2)]),
            (holding(1, 2), []),
            (holding(1, 3, others=[record]), []),
            (holding(also=[FOREIGN], others=[record]), []),
            (holding(also=[HALF], others=[record]), []),
            (holding(also=[backup(2, name="renamed")], others=[record]), []),
        ):
            with self.subTest(listing=listing):
                self.assertEqual(expected, left_traces(snapshots(1, 2), listing, "home"))


class Protections(unittest.TestCase):
    """Why backups stay that no policy keeps, as far as their folder tells."""

    def test_what_is_unfinished(self):
        for subvolume, expected in (
            (partial(2), True), (partial(2, ".2"), True), (NEARLY, True), (HALF, True), (STAMPED, True),
            (backup(2), False), (snapshot(2), False), (Subvolume("work", "w", readonly=False), False),
            (Subvolume(".work.partial", "w", readonly=False), False), (Subvolume(".work.partial", "w"), False),
        ):
            with self.subTest(subvolume=subvolume):
                self.assertEqual(expected, is_unfinished(subvolume))

    def test_the_reason_of_each(self):
        unfinished = partial(9, parent_uuid="backup-1")
        record = Record(name_of(8), "uuid-8", "uuid-2", "backup-2")
        notes = FolderNotes((), {name_of(3): {"locks": ["/x"]}, name_of(4): {"parent_locks": ["/x"]},
                                 "other20260105-000000": {"locks": ["/x"]}},
                            {"/y": (Pin("any", "uuid-5", ""), Pin("any", "uuid-99", ""))})
        listing = holding(1, 2, 3, 4, 5, 6, also=[unfinished, backup(7, name="other20260105-000000", uuid="o")])
        listing = listing._replace(records=(record,))
        self.assertEqual({
            name_of(1): "the unfinished {} builds on it".format(unfinished.name),
            name_of(2): "the unfinished {} builds on it".format(partial(8).name),
            name_of(3): "locked for /x",
            name_of(4): "parent of an unfinished transfer to /x",
            name_of(5): "newest in common with /y",
        }, known_protections(listing, "home", notes))

    def test_who_builds_on_a_backup_comes_before_who_has_it_in_common(self):
        notes = FolderNotes(pins={"/y": (Pin("any", "uuid-1", ""),)})
        reasons = known_protections(holding(1, also=[partial(9, parent_uuid="backup-1")]), "home", notes)
        self.assertIn("builds on it", reasons[name_of(1)])

    def test_what_pins_name(self):
        there = [snapshot(1), snapshot(2, received_uuid="original"), snapshot(3)]
        pins = {"/b\n": (Pin("any", "uuid-1", ""), Pin("any", "uuid-2", "")), "/c": (Pin("any", "original", ""),)}
        self.assertEqual({name_of(1): "newest in common with /b\\n", name_of(2): "newest in common with /c"},
                         pin_reasons(pins, there))
        self.assertEqual({}, pin_reasons({}, there))

    def test_how_destinations_are_compared(self):
        for text, expected in (("/b", "/b"), ("/b/", "/b"), ("/b//", "/b"), ("/", "/"), ("//", "/"),
                               ("ssh://h/b/", "ssh://h/b"), ("shell://cat > /b/", "shell://cat > /b/"),
                               ("shell://", "shell://"), ("/shell://x/", "/shell://x")):
            with self.subTest(text=text):
                self.assertEqual(expected, normal_destination(text))


MINE = [Subvolume("home20260101-000000", "s1"), Subvolume("home20260102-000000", "s2")]

OWN = [Subvolume("home20260101-000000", "s1", parent_uuid="me")]


def received(*ids):
    return tuple(Subvolume(f"home202602{n:02}-000000", "b" + key, received_uuid=key)
                 for n, key in enumerate(ids, 1))


def pin_of(uuid, filesystem="f"):
    return Pin("home20260101-000000", uuid, "", filesystem)


PARTIAL = Subvolume(".home20260301-000000.partial", "p", received_uuid="private")

# snapshots, pins, listing, noted -> whose; the source is called "me", the filesystem "f"
WHOSE = (
    # nothing there
    (MINE, (), Listing(), (), FREE),
    (MINE, (), Listing(), ("other",), FREE),
    (MINE, (), Listing((), frozenset(["file"])), (), FREE),
    (MINE, (), Listing((Subvolume("data20260101-000000", "x", received_uuid="y"),)), (), FREE),
    (MINE, (), Listing((Subvolume("home20260101-000000", "x", readonly=False),)), (), FREE),
    # a snapshot in common
    (MINE, (), Listing(received("s1")), (), OURS),
    (MINE, (), Listing(received("x", "s2", "y")), ("other",), OURS),
    ([Subvolume("home20260101-000000", "here", received_uuid="x")], (), Listing(received("x")), ("other",), OURS),
    ([Subvolume("home20260101-000000", "here", received_uuid="bx")], (), Listing(received("x")), (), OURS),
    # taken of this very subvolume, which is in each note since there are some
    (OWN, (), Listing(received("x", "s1")), ("other",), OF_OTHERS),
    (OWN, (pin_of("s1"),), Listing(received("s1")), ("other",), OF_OTHERS),
    (OWN, (), Listing(received("x", "s1")), ("other", "me"), OURS),
    (OWN, (), Listing(received("x", "s1")), (), OURS),
    (OWN, (), Listing(received("x")), (), OF_OTHERS),
    (OWN, (), Listing(), ("other",), FREE),
    (OWN, (), Listing(received("s1")), ("other",) * 255, OF_OTHERS),
    (OWN, (), Listing(received("s1")), ("other",) * 256, OURS),
    (OWN, (), Listing(received("s1")), ("other",) * 300, OURS),
    ([OWN[0]._replace(parent_uuid="before")], (), Listing(received("s1")), ("other",), OURS),
    ([OWN[0]._replace(received_uuid="x")], (), Listing(received("x")), ("other",), OURS),
    # what was in common once
    ([], (pin_of("x"),), Listing(received("x")), ("other",), OURS),
    (MINE, (pin_of("x", "g"),), Listing(received("x")), (), OURS),
    # the note
    (MINE, (), Listing(received("x")), ("me",), OURS),
    (MINE, (), Listing(received("x")), ("other", "me", "third"), OURS),
    (MINE, (), Listing(received("x")), ("other",), OF_OTHERS),
    (MINE, (pin_of("s1"),), Listing(received("x")), ("other",), OF_OTHERS),
    (MINE, (), Listing((PARTIAL,)), ("other",), OF_OTHERS),
    (MINE, (), Listing((PARTIAL,)), ("me",), OURS),
    # no note
    (MINE, (), Listing(received("x")), (), OF_OTHERS),
    ([], (), Listing(received("x")), (), OF_OTHERS),
    (MINE, (pin_of("s1"),), Listing(received("x")), (), OURS),
    (MINE, (pin_of("s1", None),), Listing(received("x")), (), OURS),
    (MINE, (pin_of("s1", "g"),), Listing(received("x")), (), OF_OTHERS),
    (MINE, (), Listing((PARTIAL,)), (), FREE),
    (MINE, (), Listing((PARTIAL,), records=(Record("home20260301-000000", "s2"),)), ("other",), OURS),
)


class Whose(unittest.TestCase):

    def test_table(self):
        for number, (snapshots, pins, listing, noted, expected) in enumerate(WHOSE):
            with self.subTest(number=number):
                owner = Owner(snapshots, ("me",), pins)
                self.assertEqual(expected, whose(owner, listing, "home", noted, "f"))

    def test_what_is_noted(self):
        owner = Owner((), ("me",))
        for noted, found, expected in (
            ((), FREE, ("me",)), (("other",), FREE, ("me",)), (("other",), OURS, ("other", "me")),
            (("me",), OURS, ("me",)), (("me", "other"), OURS, ("other", "me")),
        ):
            self.assertEqual(expected, claimed(owner, noted, found))

    def test_nobody_goes_from_a_full_note(self):
        owner, full = Owner((), ("me",)), tuple(map(str, range(256)))
        self.assertEqual(full[1:] + ("me",), claimed(owner, full[1:], OURS))
        for found in (OURS, OF_OTHERS):
            self.assertEqual(full, claimed(owner, full, found))
        self.assertEqual(("me",), claimed(owner, full, FREE))
        self.assertEqual(full[1:] + ("me",), claimed(owner, ("me",) + full[1:], OURS))


class Chains(unittest.TestCase):
    """Of stream files, which need each other."""

    @staticmethod
    def listing(**parents):
        return Listing(tuple(Subvolume(name, name, parent, name) for name, parent in parents.items()),
                               chained=True)

    def test_lengths_of_chains(self):
        listing = self.listing(a=None, b="a", c="b", d=None, e="d", f="a", x="y", y="x", z="gone")
        lengths = chain_lengths(listing)
        self.assertEqual({"a": 1, "b": 2, "c": 3, "d": 1, "e": 2, "f": 2}, {k: lengths[k] for k in "abcdef"})
        self.assertEqual({}, chain_lengths(listing._replace(chained=False)))

    def test_what_a_kept_one_needs_is_kept(self):
        listing = self.listing(a=None, b="a", c="b", d="a", e=None)
        for kept, stay in (("c", "abc"), ("d", "ad"), ("e", "e"), ("a", "a"), ("ce", "abce"), ("", "")):
            verdicts = [Verdict(name, name in kept, "") for name in "abcde"]
            self.assertEqual(list(stay), [v.name for v in keep_chains(verdicts, listing) if v.keep])
            plain = keep_chains(verdicts, listing._replace(chained=False))
            self.assertEqual(verdicts, plain)

    def test_why_it_is_kept(self):
        """Named is the one that needs it at once; what the policy keeps has its own reason."""
        listing = self.listing(a=None, b="a", c="b", x="y", y="x")
        verdicts = [Verdict(name, name in "bcx", "own") for name in "abcxyz"]
        self.assertEqual([Verdict("a", True, "b cannot be restored without it"), Verdict("b", True, "own"),
                          Verdict("c", True, "own"), Verdict("x", True, "own"),
                          Verdict("y", True, "x cannot be restored without it"), Verdict("z", False, "own")],
                         keep_chains(verdicts, listing))
        self.assertEqual(["c cannot be restored without it"], [v.reason for v in keep_chains(
            [Verdict("b", False, "own"), Verdict("c", True, "own")], listing) if v.name == "b"])

    def test_a_child_that_would_make_it_too_long(self):
        one = Subvolume("one", "a")
        table: Any = (
            (None, {}, 1, False), (one, {}, 0, True), (one, {"a": 9}, 0, True), (one, {"a": 2}, 3, True),
            (one, {"a": 3}, 3, False), (one, {"a": 4}, 3, False), (one, {}, 1, True), (one, {"a": 1}, 1, False))
        for parent, lengths, longest, is_kept in table:
            with self.subTest(lengths=lengths, longest=longest):
                self.assertEqual(parent if is_kept else None, within_chain(parent, lengths, longest))

    def test_what_is_said_of_those_that_are_needed(self):
        kept, needed, gone = (Verdict("k", True, "among the newest"),
                              Verdict("n", True, "k cannot be restored without it"),
                              Verdict("g", False, "g cannot be restored without it"))
        for verdicts, policy, said in (
            ([kept, gone], Policy(1), ""),
            ([], Policy(1), ""),
            ([kept, kept, needed], Policy(2), "1 backup at /b is older than the newest 2 but needed to restore what is "
                                              "kept; --raw-full-every 2 would let it go"),
            ([kept, needed, needed, gone], Policy(1), "2 backups at /b are older than the newest 1 but needed to "
                                                      "restore what is kept; --raw-full-every 1 would let them go"),
            ([needed, needed], parse_policy("7d"), "2 backups at /b are not to be kept but needed to restore what is "
                                                   "kept; --raw-full-every 1 would let them go"),
            ([kept] * 3 + [needed], Policy(3)._replace(spans=parse_policy("7d").spans),
             "1 backup at /b is not to be kept but needed to restore what is kept; --raw-full-every 3 would let it go"),
        ):
            with self.subTest(said=said):
                self.assertEqual(said, describe_needed(verdicts, "/b", policy))


LOCKS = {
    name_of(3): {"locks": ["/b", "/c"], "parent_locks": []},
    name_of(1): {"locks": ["/b"]},
    name_of(2): {"parent_locks": ["/b"]},
    name_of(4): {"locks": ["/bb", "/b/c"]},
    name_of(9): {"locks": ["/b/"]},  # as others wrote it
}


class PlanRecovery(unittest.TestCase):

    # Beside the lock of snapshot 2: what the destination holds, what is deleted, what is said.
    TABLE: Any = (
        ("nothing", [], [], ""),
        ("the complete backup", [backup(2)], [], ""),
        ("the complete backup and a partial", [backup(2), partial(2)], [partial(2)], ""),
        ("a partial", [partial(2)], [partial(2)], ""),
        ("a partial that is complete but for its name", [NEARLY], [NEARLY], ""),
        ("pieces", [partial(2, ".2"), partial(2, ".11")], [partial(2, ".2"), partial(2, ".11")], ""),
        ("what 0.6.6 left", [HALF], [HALF], ""),
        ("what 0.6.6 left, and a partial", [HALF, partial(2)], [partial(2), HALF], ""),
        ("writable with a received UUID", [STAMPED], [], "received UUID"),
        ("writable with a received UUID, and a partial", [STAMPED, partial(2)], [partial(2)], "received"),
        ("another subvolume", [FOREIGN], [], "another"),
        ("another subvolume, not received", [backup(2, received_uuid=None)], [], "another"),
        ("another subvolume and a partial", [FOREIGN, partial(2)], [partial(2)], "another"),
        ("other snapshots' ones", [partial(1), partial(3), backup(1), backup(3, readonly=False)], [], ""),
    )

    def test_with_the_snapshot(self):
        for what, there, deleted, words in self.TABLE:
            with self.subTest(what):
                recovery = plan_recovery(name_of(2), snapshot(2), Listing(tuple(there)))
                self.assertEqual(name_of(2), recovery.snapshot)
                self.assertEqual(deleted, list(recovery.delete))
                self.assertEqual(bool(words), bool(recovery.problem))
                self.assertIn(words, recovery.problem.text if recovery.problem else "")

    def test_when_the_snapshot_is_gone(self):
        """Nothing can be compared then, so that what is read-only stays and the lock goes."""
        for what, there, deleted, _ in self.TABLE:
            with self.subTest(what):
                recovery = plan_recovery(name_of(2), None, Listing(tuple(there)))
                self.assertEqual([s for s in deleted if s != NEARLY], list(recovery.delete))
                self.assertEqual("writable" in what or NEARLY in there, bool(recovery.problem))

    def test_the_problem_names_both_ids(self):
        problem = plan_recovery(name_of(2), snapshot(2), Listing((FOREIGN,))).problem.text
        self.assertIn("another", problem)
        self.assertIn("uuid-2", problem)

    def test_each_lock_of_the_destination(self):
        listing = holding(also=[partial(1), partial(9)])
        self.assertEqual([Recovery(name_of(1), (partial(1),)), Recovery(name_of(3)),
                          Recovery(name_of(9), (partial(9),))],
                         plan_recoveries(LOCKS, "/b", snapshots(1, 2, 3, 4), listing))
        self.assertEqual([], plan_recoveries(LOCKS, "/d", snapshots(1), listing))

    def test_names_by_kind(self):
        self.assertEqual([name_of(3), name_of(1), name_of(9)], locked_names(LOCKS, "/b"))
        self.assertEqual([name_of(2)], locked_names(LOCKS, "/b", "parent_locks"))
        self.assertEqual([], locked_names({}, "/b"))
        self.assertEqual(["a"], locked_names({"a": {"locks": ["/"]}, "b": {"locks": ["/b"]}}, "/"))

    def test_where_a_filesystem_is_mounted(self):
        """What is bound to others does not hold there; what is bound to none holds everywhere."""
        a, b = ("{}0000000-0000-0000-0000-000000000000".format(letter) for letter in "ab")
        c = "mounted at /b"
        plain, both = {"locks": ["/b"], "parent_locks": []}, {"locks": ["/b"], "parent_locks": ["/c"]}
        at_a, at_b = name_of(1) + " on " + a, name_of(1) + " on " + b
        for locks, there in (
            ({name_of(1): plain}, {a: ["/b"], b: ["/b"], None: ["/b"]}),
            ({name_of(1): plain, at_a: plain}, {a: ["/b"], b: [], c: ["/b"], None: ["/b"]}),
            ({at_a: plain}, {a: ["/b"], b: [], c: [], None: ["/b"]}),
            ({name_of(1): plain, at_a: plain, at_b: plain}, {a: ["/b"], b: ["/b"], None: ["/b"]}),
            ({name_of(1): {"locks": ["/b/", "/c"]}, at_a: plain}, {a: ["/b", "/c"], b: ["/c"]}),
            ({name_of(1): plain, at_a: {"parent_locks": ["/b"]}}, {a: ["/b"], b: ["/b"]}),
        ):
            for filesystem, names in there.items():
                with self.subTest(locks=locks, filesystem=filesystem):
                    self.assertEqual(names, locks_on(locks, filesystem).get(name_of(1), {}).get("locks", []))
        self.assertEqual({name_of(1): both}, locks_on({name_of(1): both}, a))
        for name in ("home on A", "on A", " on A", name_of(1) + " on", name_of(1) + "on A"):
            self.assertEqual({name: plain}, locks_on({name: plain}, b))

    def test_a_snapshot_is_kept_for_a_disk_that_is_away(self):
        verdicts = source_verdicts(known(snapshots(1, 2), 1, {name_of(1) + " on A": {"locks": ["/b"]}}))
        self.assertEqual([], deletions(verdicts))
        self.assertIn((name_of(1), "locked for /b"), [(v.name, v.reason) for v in verdicts])

    def test_own_locks(self):
        entry = {"locks": ["/b"]}
        names = (name_of(1), "home-data20260101-000000", "20260101-000000", "home")
        locks = dict.fromkeys(names, entry)
        self.assertEqual({name_of(1): entry}, locks_of_prefix(locks, "home"))
        bound = {name_of(1) + " on A": entry}
        self.assertEqual(bound, locks_of_prefix(dict(bound, **{"home-data20260101-000000 on A": entry}), "home"))
        self.assertEqual({"20260101-000000": entry}, locks_of_prefix(locks, ""))


if __name__ == "__main__":
    unittest.main()
