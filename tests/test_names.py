"""Names: which are snapshots of ours, and of when."""

import os
import sys
import unittest
from typing import Dict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from support import BERLIN, LORD_HOWE, NEW_YORK, InZone, utc

from btrfs_backup_ng import (
    parse_time,
    partial_lock_name,
    partial_name,
    partial_of,
    piece_of,
    prefix_of,
    record_name,
    snapshot_name,
    snapshot_of_record,
    snapshot_time,
)


class ParseTime(InZone):

    TIMES = (
        ("20260131-093000", (2026, 1, 31, 9, 30, 0)),
        ("20240229-235959", (2024, 2, 29, 23, 59, 59)),
        ("20000229-000000", (2000, 2, 29, 0, 0, 0)),
        ("19691231-235959", (1969, 12, 31, 23, 59, 59)),
        ("99991231-000000", (9999, 12, 31, 0, 0, 0)),
        ("260131-093000", (2026, 1, 31, 9, 30, 0)),
        ("680101-000000", (2068, 1, 1, 0, 0, 0)),
        ("690101-000000", (1969, 1, 1, 0, 0, 0)),
        ("700101-000000", (1970, 1, 1, 0, 0, 0)),
        ("991231-000000", (1999, 12, 31, 0, 0, 0)),
        ("000229-000000", (2000, 2, 29, 0, 0, 0)),
        ("00010101-000000", (1, 1, 1, 0, 0, 0)),
    )

    LAST_DAYS = {2023: (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31),
                 2024: (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)}

    NO_TIMES = (
        "", "-", "x",
        "2025111-1111", "2025111-111111", "202511-1111", "20250111-1111",  # strptime takes the first
        "20250230-000000", "20230229-000000", "19000229-000000", "250230-000000",
        "20250001-000000", "20251301-000000", "20250100-000000", "20250132-000000", "20250431-000000",
        "20250199-000000", "20259901-000000", "20250101-250000", "20250101-990000", "20250101-006100",
        "20250101-009900", "20250101-000099", "21000229-000000",
        "20250101-240000", "20250101-006000", "20250101-000060", "20250101-000061", "20250101-000062",
        "00000101-000000", "00000000-000000",
        "202501310930", "20250131093000", "250131093000", "20250131-0930", "20250131-09300",
        "2025131-093000", "120250131-093000", "5131-093000", "20250131-0930000",
        "20250131-093000x", "20250131-093000 ", "20250131-093000\n", "20250131-093000.1", "20250131-093000-1",
        " 20250131-093000", "x20250131-093000", "\n20250131-093000", "20250131-093000/",
        "20250131_093000", "20250131T093000", "20250131--93000", "2025-01-31-093000", "20250131 093000",
        "+0250131-093000", "-0250131-093000", "2025 131-093000", "20250131- 93000", "20250131-9 3000",
        "\u0662\u0660\u0662\u0665\u0660\u0661\u0663\u0661-\u0660\u0669\u0663\u0660\u0660\u0660",
        "2025013\u00b9-093000",
    )

    def test_times(self):
        for text, parts in self.TIMES:
            with self.subTest(text=text):
                self.assertEqual(parts, tuple(parse_time(text) or ())[:6])

    def test_each_month_has_its_days(self):
        for year, lasts in self.LAST_DAYS.items():
            for month, last in enumerate(lasts, 1):
                with self.subTest(year=year, month=month):
                    text = "{}{:02}{:02}-000000"
                    self.assertEqual((year, month, last, 0, 0, 0), parse_time(text.format(year, month, last)))
                    self.assertIsNone(parse_time(text.format(year, month, last + 1)))

    def test_everything_else(self):
        for text in self.NO_TIMES:
            with self.subTest(text=text):
                self.assertIsNone(parse_time(text))
                self.assertIsNone(snapshot_time("home", "home" + text))
                self.assertIsNone(snapshot_time("", text))

    def test_no_other_text_means_the_same_moment(self):
        text = "20260131-093000"
        moment = snapshot_time("", text)
        for at in range(len(text)):
            for other in "0123456789- x":
                changed = text[:at] + other + text[at + 1:]
                if changed != text:
                    self.assertNotEqual(moment, snapshot_time("", changed), changed)


class Prefix(InZone):

    SNAPSHOTS = (
        ("home", "home20260131-093000"),
        ("home", "home260131-093000"),
        ("home-", "home-20260131-093000"),
        ("home-data", "home-data20260131-093000"),
        ("", "20260131-093000"),
        ("", "260131-093000"),
        ("@home", "@home20260131-093000"),
        ("-x", "-x20260131-093000"),
        (".", ".20260131-093000"),
        ("two words ", "two words 20260131-093000"),
        ("h\udcff", "h\udcff20260131-093000"),
        ("home20", "home2020260131-093000"),
        ("2026", "202620260131-093000"),
        ("disk99", "disk9920260131-093000"),
        ("20260131-093000", "20260131-09300020260131-093000"),
        (".*", ".*20260131-093000"),
        ("a\nb", "a\nb20260131-093000"),
    )

    OTHERS = (
        ("home", "home"),
        ("home", "home-data20260131-093000"),
        ("home-data", "home20260131-093000"),
        ("home", "home-20260131-093000"),
        ("home-", "home20260131-093000"),
        ("home", "Home20260131-093000"),
        ("home", "20260131-093000"),
        ("home", "xhome20260131-093000"),
        ("home", "homehome20260131-093000"),
        ("home", " home20260131-093000"),
        ("home", "home 20260131-093000"),
        ("home", "home20260131-093000.partial"),
        ("home", ".home20260131-093000.partial"),
        (".home", ".home20260131-093000.partial"),
        ("home", "home20260131-093000-copy"),
        ("home", "home20260131-093000\n"),
        ("home", "home\n20260131-093000"),
        ("home", "x\nhome20260131-093000"),
        ("", "home20260131-093000"),
        ("", ""),
        (".*", "xx20260131-093000"),
        # What is left after these prefixes looks like a short time, but the name is another prefix's.
        ("home20", "home20260131-093000"),
        ("home19", "home19700101-000000"),
        ("20", "20260131-093000"),
    )

    def test_snapshots(self):
        for prefix, name in self.SNAPSHOTS:
            with self.subTest(prefix=prefix, name=name):
                self.assertEqual(utc("2026-01-31 08:30:00"), snapshot_time(prefix, name))

    def test_the_prefix_of_any_name(self):
        for name, prefix in (("home20260131-093000", "home"), ("home260131-093000", "home"), ("20260131-093000", ""),
                             ("260131-093000", ""), ("home2020260131-093000", "home20"), ("a-20260131-093000", "a-"),
                             ("home", None), ("", None), ("0131-093000", None), ("20260231-093000", None),
                             ("home20260131-093000.partial", None), ("home20260131-09300", None)):
            with self.subTest(name=name):
                self.assertEqual(prefix, prefix_of(name))

    def test_others(self):
        for prefix, name in self.OTHERS:
            with self.subTest(prefix=prefix, name=name):
                self.assertIsNone(snapshot_time(prefix, name))


class Moments(InZone):

    def test_both_formats_give_the_same_moment(self):
        self.assertEqual(utc("2026-07-31 07:30:00"), snapshot_time("home", "home20260731-093000"))
        self.assertEqual(utc("2026-07-31 07:30:00"), snapshot_time("home", "home260731-093000"))

    def test_the_local_time_is_written(self):
        self.assertEqual("home20260131-093000", snapshot_name("home", utc("2026-01-31 08:30:00")))
        self.assertEqual("home20260731-093000", snapshot_name("home", utc("2026-07-31 07:30:00") + 0.9))
        self.assertEqual("20260731-093000", snapshot_name("", utc("2026-07-31 07:30:00")))

    # The clock went from 02:00 to 03:00 on 31 March, from 03:00 to 02:00 on 27 October.
    AROUND_CHANGES = (
        ("20240331-015959", "2024-03-31 00:59:59"),
        ("20240331-030000", "2024-03-31 01:00:00"),
        ("20241027-015959", "2024-10-26 23:59:59"),
        ("20241027-020000", "2024-10-27 00:00:00"),  # the first time
        ("20241027-025959", "2024-10-27 00:59:59"),
        ("20241027-030000", "2024-10-27 02:00:00"),
    )

    def test_around_the_changes(self):
        for name, moment in self.AROUND_CHANGES:
            with self.subTest(name=name):
                self.assertEqual(utc(moment), snapshot_time("", name))

    def test_a_time_that_the_clock_skipped(self):
        """Nothing was named so here, but it may come from elsewhere; it is near where it belongs."""
        moment = snapshot_time("", "20240331-023000")
        self.assertGreaterEqual(moment, utc("2024-03-31 00:30:00"))
        self.assertLessEqual(moment, utc("2024-03-31 01:30:00"))

    def test_the_answer_does_not_depend_on_the_one_before(self):
        """mktime remembers which offset it used last."""
        for before in ("20240701-120000", "20241201-120000"):
            with self.subTest(before=before):
                snapshot_time("", before)
                self.assertEqual(utc("2024-10-27 00:30:00"), snapshot_time("", "20241027-023000"))

    def test_where_the_clock_is_put_back_by_half_an_hour(self):
        self.set_zone(LORD_HOWE)
        for before in ("20240701-120000", "20241201-120000"):
            with self.subTest(before=before):
                snapshot_time("", before)
                self.assertEqual(utc("2024-04-06 14:45:00"), snapshot_time("", "20240407-014500"))

    def test_every_name_says_when_it_was_made(self):
        """For the first time, where the clock showed the same twice."""
        for zone, day in ((BERLIN, "2024-03-31"), (BERLIN, "2024-10-27"), (LORD_HOWE, "2024-04-06"),
                          (LORD_HOWE, "2024-10-05"), (NEW_YORK, "2024-11-03"), ("UTC0", "2025-12-31")):
            with self.subTest(zone=zone, day=day):
                self.set_zone(zone)
                midnight = utc(day + " 00:00:00")
                first: Dict[str, float] = {}
                for moment in (midnight + 900 * quarter for quarter in range(-96, 192)):
                    name = snapshot_name("p", moment)
                    self.assertEqual(first.setdefault(name, moment), snapshot_time("p", name))


class Partial(unittest.TestCase):

    PARTIALS = (
        (".home20260131-093000.partial", "home20260131-093000"),
        (".home20260131-093000.2.partial", "home20260131-093000"),
        (".home20260131-093000.17.partial", "home20260131-093000"),
        (".home.20260131-093000.2.partial", "home.20260131-093000"),
        (".20260131-093000.partial", "20260131-093000"),
        ("..hidden20260131-093000.partial", ".hidden20260131-093000"),
        (".a.partial.partial", "a.partial"),
        (".a.2.3.partial", "a.2"),
        (".a\nb.partial", "a\nb"),
        (".\udcff.partial", "\udcff"),
    )

    OTHERS = (
        "", ".partial", "..partial", "home20260131-093000", "home20260131-093000.partial",
        ".home20260131-093000", ".home20260131-093000.partia", ".home20260131-093000.partial.old",
        ".home20260131-093000.partial\n", "x.home20260131-093000.partial", ".homepartial", "\n.home.partial",
        ".home20260131-093000.Partial",
    )

    def test_partials(self):
        for name, whole in self.PARTIALS:
            with self.subTest(name=name):
                self.assertEqual(whole, partial_of(name))

    def test_others(self):
        for name in self.OTHERS:
            with self.subTest(name=name):
                self.assertIsNone(partial_of(name))

    def test_pieces(self):
        for name, piece in ((".a.partial", 1), (".a.2.partial", 2), (".a.17.partial", 17), (".a.2.3.partial", 3),
                            ("a", 1)):
            with self.subTest(name=name):
                self.assertEqual(piece, piece_of(name))
        self.assertEqual([".a.partial", ".a.2.partial", ".a.3.partial"], [partial_name("a", n) for n in (1, 2, 3)])

    def test_what_belongs_to_a_partial(self):
        self.assertEqual((".a.partial.json", ".a.partial.lock"), (record_name("a"), partial_lock_name("a")))
        self.assertEqual("a", snapshot_of_record(".a.partial.json"))
        for name in ("a.partial.json", ".a.partial", ".a.json", ".a.partial.lock", ".a.partial.json.new", ""):
            with self.subTest(name=name):
                self.assertIsNone(snapshot_of_record(name))

    def test_there_and_back(self):
        self.assertEqual(".home20260131-093000.partial", partial_name("home20260131-093000"))
        for prefix in ("", "home", "nas.", "1.2.", ".", "x.partial.", "a b", "\udcff"):
            with self.subTest(prefix=prefix):
                name = prefix + "20260131-093000"
                self.assertEqual(name, partial_of(partial_name(name)))
                self.assertIsNone(snapshot_time(prefix, partial_name(name)))


if __name__ == "__main__":
    unittest.main()
