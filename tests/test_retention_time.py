"""Retention by time: golden tables over a year with both changes of the clock, and on real filesystems."""

import os
import sys
import time
import unittest
from typing import List

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support
from support import BackupTestCase, InZone, names, utc

from btrfs_backup_ng import (
    Arrival,
    Known,
    Listing,
    Policy,
    Seen,
    Span,
    Subvolume,
    UsageError,
    destination_verdicts,
    parse_policy,
    plan_retention,
    plan_transfers,
)

HOUR = 3600.0


def local(year, month, day, hour=12, minute=0):
    """Seconds since the epoch of a local time."""
    return time.mktime((year, month, day, hour, minute, 0, 0, 0, -1))


def shown(moment):
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


def daily(first, last):
    """The noons of the days from the first to the last, each as (year, month, day)."""
    moments, moment = [], local(*first)
    while moment <= local(*last):
        moments.append(moment)
        moment += 24 * HOUR
        moment -= (time.localtime(moment).tm_hour - 12) * HOUR  # at noon, also after a change of the clock
    return moments


def kept(moments, policy, now, protected=()):
    """What of `moments` a policy keeps; each is named after itself."""
    times = {"{:017.3f}".format(moment): moment for moment in moments}
    protected = {"{:017.3f}".format(moment): "protected" for moment in protected}
    verdicts = plan_retention(times, parse_policy(policy) if isinstance(policy, str) else policy, protected, now)
    return [times[v.name] for v in verdicts if v.keep]


def days(moments):
    return " ".join(time.strftime("%y%m%d", time.localtime(moment)) for moment in moments)


def oracle(moments, spans):
    """The same by another way: the newest of each period, of these the last; both by comparing calendars."""
    keys = {"h": lambda t: (t.tm_year, t.tm_yday, t.tm_hour, t.tm_gmtoff), "d": lambda t: (t.tm_year, t.tm_yday),
            "w": lambda t: time.strftime("%G %V", t), "m": lambda t: (t.tm_year, t.tm_mon), "y": lambda t: t.tm_year}
    keep = set()
    for count, unit in spans:
        newest = {}
        for moment in sorted(moments):
            newest[keys[unit](time.localtime(moment))] = moment
        keep |= set(sorted(newest.values())[-count:])
    return sorted(keep)


class Text(unittest.TestCase):

    def test_accepted(self):
        for text, spans in (
            ("24h", (Span(24, "h"),)),
            ("24h 14d 8w 12m 5y", (Span(24, "h"), Span(14, "d"), Span(8, "w"), Span(12, "m"), Span(5, "y"))),
            ("  5y\t1h ", (Span(5, "y"), Span(1, "h"))),
            ("007d", (Span(7, "d"),)),
        ):
            with self.subTest(text=text):
                self.assertEqual(Policy(spans=spans), parse_policy(text))
                self.assertFalse(parse_policy(text).keeps_all)
        self.assertTrue(parse_policy("all").keeps_all)
        self.assertTrue(parse_policy("all").also_newest(3).keeps_all)
        self.assertTrue(Policy().keeps_all)

    def test_refused_before_anything_is_done(self):
        for text in ("", " ", "3", "d", "3x", "-3d", "+3d", "3 d", "3d,4w", "0d", "3d 0w", "3d 4d", "all 3d", "3D",
                     "3.5d", "3d all", "ALL", "\u0663d", "3d\0", "1234567d", "none"):
            for flag in ("--keep-snapshots", "--keep-backups"):
                with self.subTest(text=text), self.assertRaises(UsageError) as caught:
                    support.task_of([flag, text, "/s"])
                self.assertIn(flag, caught.exception.message)

    def test_a_task_has_a_policy_for_each_side(self):
        task = support.task_of(["--keep-snapshots", "2d", "-N", "3", "--keep-backups", "all", "/s"])
        self.assertEqual(parse_policy("2d").also_newest(3), task.snapshot_policy)
        self.assertTrue(task.backup_policy.keeps_all)
        self.assertTrue(support.task_of(["/s"]).snapshot_policy.keeps_all)


class AYear(InZone):
    """A snapshot at each noon from 2025-01-01 to 2026-01-10, but for June, when the machine was off."""

    usual_seconds = 3

    def setUp(self):
        super().setUp()
        self.moments = daily((2025, 1, 1), (2025, 5, 31)) + daily((2025, 7, 1), (2026, 1, 10))
        self.now = local(2026, 1, 10, 13)

    # Saturday 2026-01-10 is in week 2; week 1 runs from Monday 2025-12-29 to Sunday 2026-01-04.
    GOLDEN = (
        ("1d", "260110"),
        ("7d", "260104 260105 260106 260107 260108 260109 260110"),
        ("1h", "260110"),
        ("3h", "260108 260109 260110"),  # hours that have one
        ("1w", "260110"),
        ("4w", "251221 251228 260104 260110"),
        ("1m", "260110"),
        ("3m", "251130 251231 260110"),
        ("9m", "250430 250531 250731 250831 250930 251031 251130 251231 260110"),  # June has none
        ("1y", "260110"),
        ("5y", "251231 260110"),
        ("3d 2w", "260104 260108 260109 260110"),
        ("2d 4w 12m 2y", "250131 250228 250331 250430 250531 250731 250831 250930 251031 251130 251221 251228 "
                         "251231 260104 260109 260110"),
    )

    def test_golden(self):
        self.assertEqual(151 + 194, len(self.moments))
        for policy, expected in self.GOLDEN:
            with self.subTest(policy=policy):
                self.assertEqual(expected, days(kept(self.moments, policy, self.now)))
                self.assertEqual(expected, days(oracle(self.moments, parse_policy(policy).spans)))

    def test_what_is_kept_does_not_depend_on_when_one_looks(self):
        """After months without a snapshot the last ones are still there: nothing expires by itself."""
        for policy, expected in self.GOLDEN:
            self.assertEqual(expected, days(kept(self.moments, policy, self.now + 300 * 24 * HOUR)))

    def test_in_the_middle_of_the_month_when_the_machine_was_off(self):
        until = [m for m in self.moments if m < local(2025, 6, 15)]
        self.assertEqual("250529 250530 250531", days(kept(until, "3d", local(2025, 6, 15))))
        self.assertEqual("250331 250430 250531", days(kept(until, "3m", local(2025, 6, 15))))

    def test_all(self):
        self.assertEqual(self.moments, kept(self.moments, "all", self.now))
        self.assertEqual(self.moments, kept(self.moments, parse_policy("all").also_newest(2), self.now))

    def test_together_with_a_number(self):
        both = parse_policy("3m").also_newest(2)
        self.assertEqual("251130 251231 260109 260110", days(kept(self.moments, both, self.now)))
        self.assertEqual("260109 260110", days(kept(self.moments, Policy(2), self.now)))

    def test_a_name_from_the_future_is_kept_and_takes_no_period(self):
        future = [local(2026, 1, 11), local(2027, 5, 1)]
        self.assertEqual("260109 260110 260111 270501", days(kept(self.moments + future, "2d", self.now)))
        self.assertEqual("260110 260111 270501", days(kept(self.moments + future, "1y", self.now)))

    def test_what_is_protected_counts(self):
        old = self.moments[3]
        self.assertEqual("250104 260109 260110", days(kept(self.moments, "2d", self.now, [old])))
        self.assertEqual("260109 260110", days(kept(self.moments, "2d", self.now, [self.moments[-2]])))

    def test_several_a_day(self):
        moments = [local(2026, 1, day, hour, 30) for day in (8, 9, 10) for hour in (0, 11, 23)]
        found = kept(moments, "2d", local(2026, 1, 11))
        self.assertEqual(["2026-01-09 23:30", "2026-01-10 23:30"], [shown(m) for m in found])

    def test_taken_and_deleted_hour_by_hour(self):
        """Deleting each hour leaves what deleting once at the end leaves: nothing goes that is wanted later."""
        policy = parse_policy("24h 7d 4w 12m 2y")
        taken: List[float] = []
        left: List[float] = []
        moment = local(2025, 1, 1, 0)
        while moment < local(2026, 1, 10):
            if time.localtime(moment).tm_mon != 6:
                taken.append(moment)
                left = kept(left + [moment], policy, moment)
            if len(taken) % 500 == 0:
                self.assertEqual(oracle(taken, policy.spans), left, shown(moment))
            moment += HOUR
        self.assertEqual(oracle(taken, policy.spans), left)
        # 24 hours of two days; 5 more days; of the weeks two, of the months all but this one are not among these
        self.assertEqual(24 + 5 + 2 + 11, len(left))


class TheChangesOfTheClock(InZone):
    """On 2025-10-26 the hour from 2 to 3 comes twice, on 2025-03-30 it does not come."""

    def hourly(self, first, count):
        return [utc(first) + i * HOUR for i in range(count)]

    def test_autumn(self):
        moments = self.hourly("2025-10-25 22:30:00", 6)  # 00:30 to 04:30 with 02:30 twice
        self.assertEqual("00:30 01:30 02:30 02:30 03:30 04:30", " ".join(shown(m)[-5:] for m in moments))
        for count in range(1, 6):
            self.assertEqual(moments[-count:], kept(moments, "{}h".format(count), moments[-1]))

    def test_spring(self):
        moments = self.hourly("2025-03-29 23:30:00", 5)  # 00:30 to 05:30 without 02:30
        self.assertEqual("00:30 01:30 03:30 04:30 05:30", " ".join(shown(m)[-5:] for m in moments))
        for count in range(1, 5):
            self.assertEqual(moments[-count:], kept(moments, "{}h".format(count), moments[-1]))

    def test_days_of_23_and_25_hours(self):
        for first, expected in (("2025-10-23 22:00:00", "251024 251025 251026 251027"),
                                ("2025-03-27 23:00:00", "250328 250329 250330 250331")):
            moments = self.hourly(first, 4 * 24 - 2)
            found = kept(moments, "9d", moments[-1])
            self.assertEqual(expected, days(found))
            self.assertEqual({"23:00"}, {shown(m)[-5:] for m in found[:-1]})

    def test_half_an_hour(self):
        self.set_zone("LHST-10:30LHDT-11,M10.1.0,M4.1.0")  # back at 2:00 on 2025-04-06, by half an hour
        moments = [utc("2025-04-05 14:00:00") + i * HOUR / 2 for i in range(6)]
        self.assertEqual("01:00 01:30 01:30 02:00 02:30 03:00", " ".join(shown(m)[-5:] for m in moments))
        self.assertEqual([moments[1], moments[2], moments[4], moments[5]], kept(moments, "4h", moments[-1]))


class TheWeekOfTheNewYear(InZone):

    def test_it_belongs_to_one_year(self):
        for first, last, expected in (
            ((2025, 12, 26), (2026, 1, 6), "251228 260104 260106"),  # 2025-W52, 2026-W01, 2026-W02
            ((2026, 12, 26), (2027, 1, 6), "261227 270103 270106"),  # 2026-W52, 2026-W53, 2027-W01
            ((2024, 12, 28), (2025, 1, 7), "241229 250105 250107"),
        ):
            self.assertEqual(expected, days(kept(daily(first, last), "3w", local(2030, 1, 1))))

    def test_the_same_week_of_two_years_are_two(self):
        moments = [local(2025, 1, 8), local(2026, 1, 7)]  # week 2 of both
        self.assertEqual(moments, kept(moments, "2w", local(2026, 1, 8)))


class Reasons(InZone):

    def test_each_verdict_says_why(self):
        times = {"a": local(2025, 12, 30), "b": local(2026, 1, 8), "c": local(2026, 1, 9, 9), "d": local(2026, 1, 9),
                 "e": local(2026, 1, 10), "Z": local(2026, 2, 1)}
        verdicts = plan_retention(times, parse_policy("1h 2d 2m").also_newest(1), {"b": "locked for /b"},
                                  local(2026, 1, 11))
        self.assertEqual({
            "a": "newest of month 2025-12",
            "b": "locked for /b",
            "c": "older than the newest 1, and not the newest in any of the last 1 hour, 2 days, 2 months",
            "d": "newest of day 2026-01-09",
            "e": "among the newest 1; newest of hour 2026-01-10 12h, day 2026-01-10, month 2026-01",
            "Z": "its name is from the future",
        }, {v.name: v.reason for v in verdicts})
        self.assertEqual(["c"], [v.name for v in verdicts if not v.keep])

    def test_a_week(self):
        verdict, = plan_retention({"a": local(2025, 12, 30)}, parse_policy("1w"), {}, local(2026, 1, 11))
        self.assertEqual("newest of week 2026-W01", verdict.reason)


class WhatIsNotSent(InZone):
    """What retention would delete at once is not sent."""

    def setUp(self):
        super().setUp()
        self.now = local(2026, 1, 10, 13)
        self.taken = []
        for moment in daily((2025, 12, 1), (2026, 1, 10)):
            name = "home" + time.strftime("%Y%m%d-%H%M%S", time.localtime(moment))
            self.taken.append(Subvolume(name, "uuid " + name, otime=int(moment) * 10 ** 9))

    def known(self):
        return Known(self.taken, "home", now=self.now)

    def test_sent_is_what_stays(self):
        for policy in ("2d", "3w", "1m", "2d 2w 2m", "all"):
            plan = plan_transfers(self.known(), Seen(Listing(), parse_policy(policy)))
            sent = tuple(t.snapshot._replace(uuid="b", received_uuid=t.snapshot.uuid) for t in plan.transfers)
            verdicts = destination_verdicts(self.known(), Seen(Listing(sent), parse_policy(policy)))
            self.assertEqual([], [v for v in verdicts if not v.keep], policy)
            self.assertEqual(len(self.taken), len(sent) + len(plan.skipped))
        plan = plan_transfers(self.known(), Seen(Listing(), parse_policy("2d 3w")))
        self.assertEqual(["home20251228-120000", "home20260104-120000", "home20260109-120000", "home20260110-120000"],
                         [t.snapshot.name for t in plan.transfers])


class OnDisk(BackupTestCase):

    def test_both_sides_by_their_own_policy(self):
        # January 2024 begins with a Monday: weeks end with the 7th, the 14th, the 21st
        self.take(3, 7, 10, 14, 17, 20, 21, 22)
        result = self.transfer("--keep-snapshots", "2d", "--keep-backups", "3w 2d", "-n", "1")
        self.assertEqual([self.name(day) for day in (14, 21, 22)], names(self.target))
        self.assertEqual([self.name(day) for day in (21, 22)], names(self.snapshots))
        self.assertIn("not the newest in any of the last 2 days", result.stderr)

    def test_dry_run_says_what_and_why(self):
        self.take(1, 2, 3)
        self.transfer()
        result = self.transfer("--dry-run", "-v", "debug", "--keep-backups", "1w", "--keep-snapshots", "1m")
        self.assertIn("  delete {}: not the newest in any of the last 1 week".format(self.name(2)), result.stdout)
        self.assertIn("  keep {}: newest in common with the source".format(self.name(3)), result.stdout)
        self.assertIn("  delete {}: not the newest in any of the last 1 month".format(self.name(1)), result.stdout)
        self.assertEqual(3, len(names(self.target)))
        self.transfer("--keep-backups", "1w", "--keep-snapshots", "1m")
        self.assertBackedUp([self.name(3)])
        self.assertEqual([self.name(3)], names(self.snapshots))

    def test_all_keeps_all(self):
        taken = self.take(1, 2, 3)
        self.transfer("--keep-backups", "all", "-n", "1")
        self.assertBackedUp(taken)

    def test_a_bad_policy_deletes_nothing(self):
        taken = self.take(1, 2)
        self.transfer("--keep-snapshots", "1x", status=2)
        self.assertEqual(taken, names(self.snapshots))


class NamesThatAreChosen(unittest.TestCase):
    """Whoever sends backups chooses their names, but neither when they come nor after which."""

    POLICY = "24h 14d 8w 12m"

    def setUp(self):
        self.names, self.arrivals = {}, {}

    def come(self, moment, named=None, mark=""):
        """A backup that comes at a moment, named after another one."""
        named = moment - 600 if named is None else named
        name = "{:017.3f}{}".format(named, mark)
        self.names[name], self.arrivals[name] = named, Arrival(moment, len(self.arrivals))

    def kept(self, now, policy=POLICY, arrivals=True):
        policy = policy if isinstance(policy, Policy) else parse_policy(policy)
        return {v.name for v in plan_retention(self.names, policy, {}, now, self.arrivals if arrivals else None)
                if v.keep}

    def nightly(self, first=(2025, 1, 1), last=(2026, 1, 15)):
        for moment in daily(first, last):
            self.come(moment)
        return max(self.names.values()) + 600

    def test_ordinary_backups_are_kept_as_ever(self):
        for step, policy in ((24 * HOUR, "14d 8w 12m"), (HOUR, self.POLICY), (24 * HOUR, Policy(5))):
            self.setUp()
            for number in range(400):
                self.come(local(2025, 1, 1) + 1200 + number * step, local(2025, 1, 1) + 600 + number * step)
            now = local(2025, 1, 1) + 400 * step
            self.assertEqual(self.kept(now, policy, False), self.kept(now, policy))

    def test_old_names_take_no_place(self):
        """The last second of each past day."""
        for policy in (self.POLICY, Policy(20)):
            self.setUp()
            now = self.nightly()
            before = self.kept(now, policy)
            for moment in daily((2025, 1, 1), (2026, 1, 14)):
                self.come(now + HOUR, moment + 11.9 * HOUR, "fake")
            self.assertLessEqual(before, self.kept(now + 2 * HOUR, policy))
            if policy == self.POLICY:
                self.assertFalse(before <= self.kept(now + 2 * HOUR, policy, False))

    def test_time_that_has_passed_without_backups_is_not_theirs_to_fill(self):
        last = self.nightly()
        before = self.kept(last)
        now = last + 60 * 24 * HOUR
        for number in range(60 * 24):
            self.come(now, last + number * HOUR, "fake")
        lost = before - self.kept(now + 60)
        self.assertLessEqual(len(lost), 4)  # as one backup that is made then: of each unit one period passes
        self.assertLess(max((self.names[name] for name in lost), default=0.0), last - 10 * 24 * HOUR)
        self.assertGreater(len(before - self.kept(now + 60, arrivals=False)), 12)

    def test_a_folder_that_was_copied(self):
        """All came on one day; then names between them."""
        now = local(2026, 1, 20)
        for number, moment in enumerate(daily((2025, 1, 1), (2026, 1, 15))):
            self.come(now + number, moment)
        before = self.kept(now + HOUR)
        self.assertEqual(self.kept(now + HOUR, arrivals=False), before)
        for moment in daily((2025, 1, 1), (2026, 1, 14)):
            self.come(now + 72 * HOUR, moment + 11.9 * HOUR, "fake")
        self.assertLessEqual(before, self.kept(now + 73 * HOUR))

    def test_names_from_the_future_take_no_place(self):
        now = self.nightly()
        before = self.kept(now)
        for number in range(100):
            self.come(now, now + (2 + number) * 24 * HOUR, "fake")
        self.assertLessEqual(before, self.kept(now + 24 * HOUR))

    def test_after_one_from_the_future_the_others_are_in_order(self):
        self.come(local(2024, 12, 31), local(2099, 1, 1))
        self.nightly()
        now = max(arrival.moment for arrival in self.arrivals.values())
        before = self.kept(now)
        for moment in daily((2025, 1, 1), (2026, 1, 14)):
            self.come(now + HOUR, moment + 11.9 * HOUR, "fake")
        self.assertLessEqual(before, self.kept(now + 2 * HOUR))

    def test_nothing_goes_that_names_alone_would_keep(self):
        """Whatever comes when: clocks that were wrong, what was copied, machines that were long away."""
        chance = support.chance(self)
        for _ in range(200):
            self.setUp()
            for number in range(chance.randrange(40)):
                moment = local(2026, 1, 1) + chance.random() * 90 * 24 * HOUR
                self.come(moment, moment + chance.choice([-600, 0, 1]) * chance.random() * 30 * 24 * HOUR, str(number))
            now = local(2026, 1, 1) + chance.random() * 120 * 24 * HOUR
            policy = parse_policy("3h 3d 2w 2m").also_newest(chance.randrange(3))
            by_names, found = self.kept(now, policy, False), self.kept(now, policy)
            self.assertLessEqual(by_names, found)
            self.assertLessEqual(len(found - by_names), 2 * 10 + 2)


if __name__ == "__main__":
    unittest.main()
