"""`doctor`: broken set-ups, each found and named, with a remedy that works."""

import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
import unittest
from typing import Any, Dict, List, Tuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import fakes
import remote
import support
from support import (
    PROGRAM_ARGV,
    BackupTestCase,
    as_nobody,
    bulk,
    command,
    create,
    delete,
    listing,
    partials,
    scratch_folder,
    set_received_uuid,
    snapshot,
    write_locks,
)

import btrfs_backup_ng as program
from btrfs_backup_ng import (
    Checked,
    Doctor,
    Entry,
    Events,
    Finding,
    Health,
    HostFacts,
    Refused,
    Subvolume,
    Task,
    describe_checks,
    find_age,
    find_clock,
    find_devices,
    find_kernel,
    find_privileges,
    find_programs,
    find_quotas,
    find_space,
    format_checks,
    format_status,
    parse_device_stats,
    parse_limits,
)

NOW = 1.8e9
OLD_BTRFS = 'case $1 in --version) echo btrfs-progs {};; *) exec REAL "$@";; esac\n'


class Checks(unittest.TestCase):
    """What cannot be broken here without breaking the machine, in values."""

    FACTS = HostFacts(0, "6.1", "3.11", "btrfs-progs v6.2", True, ("ssh",), NOW)

    def state(self, findings):
        return [finding.state for finding in findings]

    def test_programs(self):
        for progs, state in (("", "problem"), ("btrfs-progs v3.10", "problem"), ("Btrfs v3.12", "ok"),
                             ("btrfs-progs v6.2", "ok")):
            self.assertEqual([state], self.state(find_programs(self.FACTS._replace(progs=progs))), progs)

    def test_kernel_and_user(self):
        self.assertEqual(["problem"], self.state(find_kernel(self.FACTS._replace(has_btrfs=False))))
        for is_remote, words in ((True, "--ssh-sudo"), (False, "run as root")):
            finding, = find_privileges(self.FACTS._replace(user=1000), is_remote)
            self.assertEqual("problem", finding.state)
            self.assertIn(words, finding.remedy)

    def test_clock(self):
        for clock, is_remote, state in ((NOW, True, "ok"), (NOW + 599, True, "ok"), (NOW + 601, True, "problem"),
                                        (NOW - 601, True, "problem"), (NOW - 601, False, "ok"),
                                        (0.0, False, "problem")):
            found = find_clock(self.FACTS._replace(clock=clock), is_remote, NOW)
            self.assertEqual([state], self.state(found), (clock, is_remote))

    def test_space(self):
        gib = 1 << 30
        for size, free, state in ((100, 5, "ok"), (100, 4, "problem"), (10000, 10, "ok"), (10000, 9, "problem"),
                                  (10, 0, "problem")):
            self.assertEqual([state], self.state(find_space(Health(size * gib, free * gib, False, (), ()))))

    def test_quotas_and_devices(self):
        health = Health(1, 1, True, (("0/5", 95, 100), ("0/6", 96, 100)), ("/dev/x corruption_errs 1",))
        found = list(find_quotas(health, "/b"))
        self.assertEqual(["problem"], self.state(found))
        self.assertIn("0/6", found[0].text)
        self.assertEqual(["problem"], self.state(find_devices(health, "/b")))
        unknown = Health(1, 1, None, (), None)
        self.assertEqual(["not checked"], self.state(find_quotas(unknown, "/b")))
        self.assertEqual(["not checked"], self.state(find_devices(unknown, "/b")))

    def test_what_btrfs_prints(self):
        self.assertEqual((("0/256", 3162112, 10485760), ("1/1", 5, 7)), parse_limits(
            "Qgroupid    Referenced    Exclusive  Max referenced  Max exclusive   Path\n"
            "--------    ----------    ---------  --------------  -------------   ----\n"
            "0/5              16384        16384            none           none   <toplevel>\n"
            "0/256          3162112      3162112        10485760           none   a\n"
            "1/1          3162112      5        none           7   <0 member qgroups>\n"))
        self.assertEqual(("/dev/loop15 corruption_errs 12",), parse_device_stats(
            "[/dev/loop15].write_io_errs    0\n[/dev/loop15].corruption_errs  12\n[/dev/loop15].generation_errs  0\n"))

    def test_age(self):
        def entry(moment):
            return Entry(Subvolume("home", "x"), "", "complete", moment)
        hour = 3600.0
        for entries, limit, state in (
            ([entry(NOW - hour)], 2 * hour, "ok"), ([entry(NOW - 3 * hour)], 2 * hour, "problem"),
            ([entry(NOW - 3 * hour), entry(NOW - hour)], 2 * hour, "ok"), ([], 2 * hour, "problem"),
            ([entry(NOW + hour)], 2 * hour, "problem"), ([entry(None)], 2 * hour, "problem"),
            ([], None, "not checked"), ([entry(NOW - 999 * hour)], None, "ok"),
        ):
            self.assertEqual([state], self.state(find_age(entries, limit, NOW)), (entries, limit))


class Reports(unittest.TestCase):

    CHECKS = (Checked("programs", "", Finding("ok", "all there")),
              Checked("space", "/b", Finding("problem", "only 1 B | free", "free some")),
              Checked("age", "/b", Finding("ok", "the newest is 3 h old")),
              Checked("quotas", "/b", Finding("not checked", "see above")))

    def test_text(self):
        self.assertEqual("""\
this machine
  ok           programs    all there

/b
  problem      space       only 1 B | free
                           -> free some
  ok           age         the newest is 3 h old
  not checked  quotas      see above

2 ok, 1 problem, 1 not checked""", format_checks(self.CHECKS))
        self.assertIn("""
  ok           age         the newest is
                           3 h old
""", format_checks(self.CHECKS, 41))

    def test_json(self):
        found = describe_checks(self.CHECKS)
        self.assertEqual(1, found["problems"])
        self.assertEqual({"name": "space", "where": "/b", "state": "problem", "text": "only 1 B | free",
                          "remedy": "free some"}, found["checks"][1])

    def test_for_monitors(self):
        lines = format_status(self.CHECKS).splitlines()
        self.assertEqual("BTRFS-BACKUP PROBLEM - 1 problem: only 1 B / free", lines[0])
        self.assertEqual(["/b: space: only 1 B | free; free some"], lines[1:])
        fine = [checked for checked in self.CHECKS if checked.finding.state == "ok"]
        self.assertEqual("BTRFS-BACKUP OK - the newest is 3 h old", format_status(fine))


class WhatMayNotBeAsked(unittest.TestCase):

    def test_it_is_not_checked(self):
        def refuse():
            raise Refused("this key may not", "see --allow")
        doctor = Doctor(Task(), Events())
        doctor.ask("space", "/b", refuse)
        self.assertEqual([Checked("space", "/b", Finding("not checked", "this key may not", "see --allow"))],
                         doctor.checked)


class DoctorTestCase(BackupTestCase):

    def examine(self, *arguments, status=0, **more):
        """{(name, where): [finding]} as --json tells; the exit status has to fit."""
        result = self.run_program("doctor", "--json", *arguments, status=status, **more)
        found = json.loads(result.stdout)
        problems = [check for check in found["checks"] if check["state"] == "problem"]
        self.assertEqual(len(problems), found["problems"])
        self.assertEqual(status, int(bool(problems)))
        for check in problems[:1]:  # stands at the end as well, for what is above it may have left the screen
            self.assertIn(" found: {} at {}".format(check["name"], check["where"] or "this machine"), result.stderr)
        checks: Dict[Tuple[str, str], List[Any]] = {}
        for check in found["checks"]:
            checks.setdefault((check["name"], check["where"]), []).append(check)
        return checks

    def problem(self, name, *words, arguments=None, **more):
        """The one problem that there is, of check `name`, with these words in it."""
        checks = self.examine(*(arguments or (self.source, self.target)), status=1, **more)
        bad = [check for found in checks.values() for check in found if check["state"] == "problem"]
        self.assertEqual([name], [check["name"] for check in bad], bad)
        said = (bad[0]["text"] + " " + bad[0]["remedy"]).lower()
        for word in words:
            self.assertIn(word.lower(), said)
        return bad[0]

    def fine(self, *arguments):
        self.examine(*(arguments or (self.source, self.target)))


class Healthy(DoctorTestCase):

    def test_a_machine(self):
        checks = self.examine()
        self.assertEqual({("programs", ""), ("kernel", ""), ("privileges", ""), ("clock", "")}, set(checks))

    def test_before_and_after_the_first_backup(self):
        self.fine()
        self.fine(self.source)
        self.take(1, 2)
        self.transfer()
        before = listing(self.source_disk.path, self.target_disk.path)
        checks = self.examine(self.source, self.target)
        self.assertEqual({"ok"}, {check["state"] for found in checks.values() for check in found})
        self.assertUnchanged(before, self.source_disk.path, self.target_disk.path)
        parent, = checks["parent", self.target]
        self.assertIn(self.name(2), parent["text"])

    def test_a_destination_that_the_first_run_makes(self):
        checks = self.examine(self.source, self.target + "/new")
        self.assertIn("first run", checks["folder", self.target + "/new"][0]["text"])
        self.assertFalse(os.path.exists(self.target + "/new"))

    def test_text_for_people(self):
        self.take(1)
        self.transfer()
        result = self.run_program("doctor", self.source, self.target)
        self.assertIn("\n" + self.target + "\n  ok ", result.stdout)
        self.assertRegex(result.stdout, r"\n[0-9]+ ok, 0 problems, 0 not checked\n$")
        self.assertEqual("", result.stderr)

    def test_a_run_at_work_is_no_broken_one(self):
        name, = self.take(1)
        write_locks(self.snapshots, {name: {"locks": [self.target], "parent_locks": []}})
        create(self.backup_path(".{}.partial".format(name)))
        with open(os.path.join(self.snapshots, ".home.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            checks = self.examine(self.source, self.target)
            self.assertIn("at work", checks["locks", self.source][0]["text"])
        self.problem("locks", "broken off")


class Broken(DoctorTestCase):
    """One thing is wrong in each."""

    def test_no_btrfs_program(self):
        result = self.run_program("doctor", "--json", wrapper=self.without_btrfs(), status=1)
        bad = [check for check in json.loads(result.stdout)["checks"] if check["state"] == "problem"]
        self.assertEqual(["programs"], [check["name"] for check in bad])
        self.assertIn("btrfs-progs", bad[0]["remedy"])

    def without_btrfs(self):
        """The words before a command that run it where /usr/bin and so on have no btrfs."""
        hide = "; ".join("mount --bind /dev/null {}".format(shlex.quote(path)) for path in (
            os.path.join(folder, "btrfs") for folder in ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"))
            if os.path.exists(path))
        return ["unshare", "-m", "sh", "-ec", hide + '; exec "$@"', "sh"]

    def test_an_old_btrfs_program(self):
        self.problem("programs", "v3.10", "too old", env=fakes.fake("btrfs", OLD_BTRFS.format("v3.10")))

    def test_not_root(self):
        result = self.run_program("doctor", "--no-elevate", "--json", wrapper=as_nobody(), status=1)
        bad = [check for check in json.loads(result.stdout)["checks"] if check["state"] == "problem"]
        self.assertEqual(["privileges"], [check["name"] for check in bad])

    def test_no_source(self):
        self.problem("source", "no such source", "mounted?", arguments=(self.source + "x", self.target))

    def test_an_ordinary_folder(self):
        os.mkdir(self.source + "/folder")
        self.problem("source", "ordinary folder", "btrfs subvolume create",
                     arguments=(self.source + "/folder", self.target))

    def test_a_source_that_is_not_on_btrfs(self):
        self.problem("source", "not on btrfs", arguments=(scratch_folder(), self.target))

    def test_a_poisoned_source(self):
        set_received_uuid(self.source, b"x" * 16)
        self.problem("identity", "received UUID", "btrfs subvolume snapshot")

    def test_snapshots_with_the_same_identity(self):
        self.take(1)
        for day in (2, 3):
            path = create(self.snapshot_path(self.name(day)))
            set_received_uuid(path, b"y" * 16)
            command("btrfs", "property", "set", "-ts", path, "ro", "true")
        checks = self.examine(self.source, self.target, status=1)
        self.assertIn(self.name(3), checks["identity", self.source][0]["text"])
        delete(self.snapshot_path(self.name(3)))
        self.fine()

    def test_a_name_from_the_future(self):
        os.makedirs(self.snapshots)
        snapshot(self.source, self.snapshot_path("home20990101-000000"))
        self.problem("snapshots", "future", "clock")

    def test_a_stale_lock_and_its_remedy(self):
        name, = self.take(1)
        write_locks(self.snapshots, {name: {"locks": [self.target], "parent_locks": []}})
        create(self.backup_path(".{}.partial".format(name)))
        self.problem("locks", name, self.target, "back up to it again as usual")
        self.transfer()
        self.assertBackedUp([name])
        self.fine()

    def test_a_lock_of_a_snapshot_that_is_gone(self):
        self.take(1)
        write_locks(self.snapshots, {self.name(5): {"locks": [self.target], "parent_locks": []}})
        self.problem("locks", self.name(5))
        self.transfer()
        self.fine()

    def test_damaged_locks(self):
        self.take(1)
        write_locks(self.snapshots, b"{")
        self.problem("locks", ".outstanding_transfers", "repair it")

    def test_damaged_notes(self):
        self.take(1)
        with open(self.snapshots + "/.destinations.json", "w") as notes:
            notes.write("[]")
        self.problem("notes", ".destinations.json")

    def test_a_snapshot_folder_of_somebody_else(self):
        self.take(1)
        self.transfer()
        os.chown(os.path.dirname(self.snapshots), 1000, 1000)
        self.transfer(status=1)
        self.problem("source", "belongs to user 1000", "-f")

    def test_a_folder_of_backups_that_others_may_write_to(self):
        """It may be meant so, and is no problem; but whoever reads of it knows what it means."""
        self.take(1)
        self.transfer()
        for owner, mode, why, typed in (
                (1000, 0o755, "belongs to user 1000, who could exchange backups", "chown root " + self.target),
                (0, 0o777, "can be written by others, who could exchange backups", "chmod go-w " + self.target),
                (0, 0o755, "writable", "")):
            os.chown(self.target, owner, 0)
            os.chmod(self.target, mode)
            found, = self.examine(self.source, self.target)["folder", self.target]
            self.assertTrue(found["text"].endswith(why), found)
            self.assertTrue(found["remedy"].endswith(typed), found)

    def test_a_source_that_is_a_read_only_snapshot(self):
        path = snapshot(self.source, os.path.join(self.source_disk.path, "frozen"))
        self.problem("source", "read-only snapshot", "-f", arguments=(path, self.target))

    def test_whose_the_backups_are(self):
        """What a run stops at, though there is a parent."""
        self.take(1)
        self.transfer()
        note = self.backup_path(".home.source")
        for text, words in (("{", [note, "damaged"]), ("", [note, "damaged"])):
            with open(note, "w") as file:
                file.write(text)
            self.problem("folder", *words)
        with open(note, "w") as file:
            file.write('{"sources": ["00000000-0000-0000-0000-000000000001"]}')
        self.problem("folder", "another source", "--same-source")
        delete(self.snapshot_path(self.name(1)))
        os.unlink(os.path.join(self.snapshots, ".destinations.json"))
        self.take(2)
        self.problem("folder", "another source", "--same-source")

    def test_lost_notes(self):
        self.take(1)
        self.transfer()
        os.unlink(os.path.join(self.snapshots, ".destinations.json"))
        self.assertIn("back up to each destination", self.problem("parent", "remembers no destination")["remedy"])
        self.transfer("-S")
        found = self.problem("notes", "notes of destinations were lost")
        self.assertIn("--forget-destination unnamed://", found["remedy"])
        self.transfer("-S", "-T", "--forget-destination", "unnamed://")
        self.fine()

    def test_backups_that_come_from_another_folder_of_backups_are_no_lost_notes(self):
        self.take(1)
        self.transfer()
        second = os.path.join(self.disk().path, "second")
        self.run_program("-S", "-p", "home", "-f", self.target, self.target_disk.path, second)
        self.fine(self.source, self.target, second)

    def test_an_orphaned_partial_and_its_remedy(self):
        name, = self.take(1)
        create(self.backup_path(".{}.partial".format(name)))
        remedy = self.problem("partials", ".{}.partial".format(name), "no lock")["remedy"]
        subprocess.check_call(remedy[remedy.index("btrfs subvolume"):], shell=True, stdout=subprocess.DEVNULL)
        self.assertEqual([], partials(self.target))
        self.fine()

    def test_a_full_source(self):
        self.fill(self.source)
        self.problem("space", "only", "free some space", arguments=(self.source,))

    def test_a_full_destination(self):
        self.fill(self.target)
        found = self.problem("space", "only")
        self.assertEqual(self.target, found["where"])

    @staticmethod
    def fill(folder):
        with open(folder + "/filler", "wb") as filler:
            try:
                while True:
                    filler.write(bytes(1 << 20))
                    filler.flush()
            except OSError:
                pass

    def test_a_disk_that_is_away(self):
        self.target_disk.unmount()
        self.problem("folder", "destination", arguments=(self.source, self.target_disk.path + "/backups"))

    def test_a_read_only_destination(self):
        self.target_disk.remount("ro")
        self.problem("folder", "read-only")

    def test_a_destination_inside_the_source(self):
        os.mkdir(self.source + "/backups")
        self.problem("folder", "inside the source", arguments=(self.source, self.source + "/backups"))

    def test_a_stranger_of_the_same_name(self):
        name, = self.take(1)
        create(self.backup_path("other"))
        snapshot(self.backup_path("other"), self.backup_path(name))
        self.problem("backups", name, "another subvolume", "move it away")

    def test_a_missing_parent(self):
        self.take(1, 2)
        self.transfer()
        for day in (1, 2):
            delete(self.snapshot_path(self.name(day)))
        self.take(3)
        self.problem("parent", "2 backups", "in full")

    def test_a_quota_that_is_used_up(self):
        self.take(1)
        self.transfer()
        bulk(self.target + "/data", 40)
        # what is written out while the rescan counts may be left out of its figures
        command("btrfs", "filesystem", "sync", self.target_disk.path)
        command("btrfs", "quota", "enable", self.target_disk.path)
        command("btrfs", "quota", "rescan", "-w", self.target_disk.path)
        command("btrfs", "qgroup", "limit", "41M", self.target_disk.path)
        command("btrfs", "filesystem", "sync", self.target_disk.path)
        remedy = self.problem("quotas", "limit")["remedy"]
        subprocess.check_call(shlex.split(remedy))
        self.fine()

    def test_a_disk_that_reads_wrongly(self):
        """A byte of a file is changed on the disk, behind the filesystem's back."""
        content = os.urandom(64 << 10)
        with open(self.target + "/file", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self.target_disk.unmount()
        with open(self.target_disk.image, "r+b") as image:
            at = image.read().index(content[:4096])
            image.seek(at)
            image.write(b"wrong")
        self.target_disk.mount()
        with open(self.target + "/file", "rb") as file, self.assertRaises(OSError):
            file.read()
        self.problem("devices", "corruption_errs", "btrfs scrub start")

    def test_a_missing_device(self):
        """A mirror with one half, mounted all the same."""
        folder = os.path.join(scratch_folder(), "mirror")
        os.makedirs(folder, exist_ok=True)
        loops = []
        for number in (1, 2):
            image = "{}.{}.img".format(folder, number)
            command("truncate", "-s", "256M", image)
            loops.append(command("losetup", "-f", "--show", image).strip())
            self.addCleanup(subprocess.call, ["losetup", "-d", loops[-1]], stderr=subprocess.DEVNULL)
        command("mkfs.btrfs", "-q", "-d", "raid1", "-m", "raid1", *loops)
        command("wipefs", "-qa", loops[1])
        command("btrfs", "device", "scan", "--forget", loops[1])
        command("mount", "-o", "degraded", loops[0], folder)
        self.addCleanup(subprocess.call, ["umount", folder])
        found = self.problem("devices", "device 2 is missing", "btrfs replace start 2",
                             arguments=(self.source, folder))
        self.assertEqual(folder, found["where"])

    def test_one_thing_stands_once(self):
        """Half-received under its final name, as release 0.6.6 left it: no lock names it."""
        name, = self.take(1)
        create(self.backup_path(name))
        self.problem("partials", name)

    def test_a_fresh_source_with_a_prefix_is_no_folder_of_backups(self):
        checks = self.examine("-p", "home", self.source)
        self.assertIn(("locks", self.source), checks)
        os.mkdir(self.source + "/folder")
        self.problem("source", "ordinary folder", arguments=("-p", "home", self.source + "/folder"))

    def test_several_things_at_once(self):
        """None hides another."""
        name, = self.take(1)
        write_locks(self.snapshots, {name: {"locks": [self.target], "parent_locks": []}})
        create(self.backup_path(".home20240109-000000.partial"))
        create(self.backup_path("mine"))
        checks = self.examine(self.source, self.target, self.target + "/../x/y/../../z/missing", self.source + "/in",
                              status=1)
        bad = {key for key, found in checks.items() for check in found if check["state"] == "problem"}
        self.assertEqual({("locks", self.source), ("partials", self.target), ("folder", self.source + "/in")}, bad)


class Remembered(DoctorTestCase):
    """What destinations keep at the source."""

    def test_each_with_its_age(self):
        self.backup()
        found, = self.examine(self.source)["notes", self.source]
        self.assertRegex(found["text"], "home[-0-9]+, 0 min old, is kept for {}".format(self.target))

    def test_one_that_was_not_seen_for_long(self):
        """All backups here are of January 2024. One that is named has its age, and with --max-age all have."""
        self.take(1)
        self.transfer()
        self.problem("notes", self.name(1), "days old", "--forget-destination", arguments=(self.source,))
        self.fine(self.source, self.target)
        self.fine("-p", "other-", self.source)
        self.fine("--max-age", "9999w", self.source)


class Retention(DoctorTestCase):
    """Whether it keeps up with what comes."""

    def found(self, *brought, count=0, free=1000, **task):
        return [(finding.state, finding.text) for finding in program.find_growth(
            brought, count or len(brought), program.Task(**task), free)]

    def test_how_long_there_will_be_room(self):
        self.assertEqual([], self.found(1, 2))
        (state, text), = self.found(90, 100, 110, 5000)
        self.assertEqual("ok", state)
        self.assertIn("full in about 9 runs if nothing is deleted", text)
        self.assertEqual([("ok", "each backup brought about 1 B lately")], self.found(1, 1, 1))
        (state, text), = self.found(90, 100, 110, num_backups=30)
        self.assertEqual("problem", state)
        self.assertIn("full in about 10 runs, before", text)
        for task in ({"num_backups": 13}, {"num_backups": 30, "free_backups": program.Room(1)},
                     {"free_backups": program.Room(1)}, {"keep_backups": program.parse_policy("3d 2w")}):
            (state, text), = self.found(90, 100, 110, **task)
            self.assertEqual("ok", state)
            self.assertNotIn("full", text)
        self.assertEqual("problem", self.found(90, 100, 110, keep_backups=program.parse_policy("30d 2w"))[0][0])

    def test_what_is_left_beyond_the_policy(self):
        self.take(1, 2, 3, 4, 5)
        self.transfer()
        for place in ([self.source, self.target], [self.target]):
            found = self.problem("retention", "3 backups beyond the policy", self.name(1),
                                 arguments=["-n", "2"] + place)
            self.assertIn("old", found["text"])
            self.fine("-n", "5", *place)
            self.fine(*place)

    def test_what_must_stay_is_not_left(self):
        self.take(1, 2, 3)
        self.transfer()
        support.write_locks(self.target, {self.name(1): {"locks": ["/elsewhere"]}})
        self.problem("retention", "1 backup beyond", arguments=("-n", "1", self.target))


class Raw(DoctorTestCase):

    def setUp(self):
        super().setUp()
        self.raw = "raw://" + self.target
        self.take(1)
        self.transfer(to=[self.raw])

    def test_on_a_filesystem_that_is_not_btrfs(self):
        folder = os.path.join(self.target, "other")
        os.mkdir(folder)
        command("mount", "-t", "tmpfs", "none", folder)
        self.addCleanup(subprocess.call, ["umount", folder])
        checks = self.examine("raw://" + folder)
        self.assertEqual({"backups", "partials", "space", "age"}, {name for name, where in checks if where})
        self.problem("age", arguments=("--max-age", "1d", "raw://" + folder))

    def test_on_btrfs(self):
        for arguments in ([self.source, self.raw], [self.raw], ["-p", "home", self.raw]):
            checks = self.examine(*arguments)
            self.assertEqual({"ok"}, {check["state"] for found in checks.values() for check in found}, arguments)
            self.assertIn(("devices", self.raw), checks)


class Ages(DoctorTestCase):

    def test_two_destinations(self):
        second = os.path.join(self.target_disk.path, "second")
        os.mkdir(second)
        self.backup(to=[self.target, second])
        result = self.run_program("doctor", "--max-age", "1h", self.source, self.target, second)
        for place in (self.target, second):
            self.assertRegex(result.stdout, "[-;] {}: the newest backup home[-0-9]+ is 0 min old".format(place))

    def test_none_yet(self):
        checks = self.examine(self.source, self.target)
        self.assertEqual("not checked", checks["age", self.target][0]["state"])

    def test_the_newest_backup(self):
        """All backups here are of January 2024."""
        self.take(1, 2)
        self.transfer()
        found = self.problem("age", self.name(2), "old", arguments=("--max-age", "26h", self.source, self.target))
        self.assertEqual(self.target, found["where"])
        self.examine("--max-age", "9999w", self.source, self.target)
        self.backup()
        self.examine("--max-age", "1h", self.source, self.target)

    def test_for_monitors(self):
        self.backup()
        result = self.run_program("doctor", "--max-age", "1h", self.source, self.target)
        self.assertRegex(result.stdout, r"\ABTRFS-BACKUP OK - the newest backup home[-0-9]+ is [0-9]+ min old\n\Z")
        self.assertEqual("", result.stderr)
        result = self.run_program("doctor", "--max-age", "0s", self.source, self.target, status=1)
        self.assertRegex(result.stdout, r"\ABTRFS-BACKUP PROBLEM - 1 problem: the newest backup .* more than 0 min\n")

    def test_no_backup_at_all(self):
        self.problem("age", "no complete backup", arguments=("--max-age", "1h", self.source, self.target))
        self.problem("age", "no destination", arguments=("--max-age", "1h", self.source))

    def test_destinations_that_are_away(self):
        """The source remembers what they have."""
        self.take(1)
        self.transfer()
        self.target_disk.unmount()
        found = self.problem("age", self.name(1), arguments=("--max-age", "26h", self.source))
        self.assertEqual(self.target, found["where"])
        self.examine("--max-age", "9999w", self.source)

    def test_a_command_that_takes_the_streams(self):
        """It cannot be asked; its age is known to the source, and no age is a problem."""
        self.take(1)
        command = "shell://cat >/dev/null"
        self.problem("age", "no complete backup", arguments=("--max-age", "26h", self.source, command))
        self.transfer(to=[command])
        found = self.problem("age", self.name(1), arguments=("--max-age", "26h", self.source, command))
        self.assertEqual(command, found["where"])
        checks = self.examine("--max-age", "9999w", self.source, command)
        self.assertIn("cannot be asked", checks["folder", command][0]["text"])

    def test_a_folder_of_backups_by_itself(self):
        self.take(1)
        self.transfer()
        snapshot(self.snapshot_path(self.name(1)), self.snapshot_path("root-" + time.strftime("%Y%m%d-%H%M%S")))
        self.run_program("-S", "-p", "root-", self.source, self.target)
        self.fine(self.target)
        self.problem("age", self.name(1), arguments=("--max-age", "26h", self.target))
        self.examine("--max-age", "26h", "-p", "root-", self.target)
        create(self.backup_path(".home20240109-000000.partial"))
        self.fine(self.target)

    def test_usage(self):
        for arguments in (("--max-age", "26h"), ("--max-age", "26", self.source), ("shell://cat",),
                          ("raw:///x", self.target)):
            self.run_program("doctor", *arguments, status=2)


class RawRemotes(DoctorTestCase, remote.RemoteTestCase):

    def test_it_is_examined(self):
        self.take(1)
        raw = "raw+" + self.remote_target
        self.run_program("-S", "-p", "home", *self.program_options() + [self.source, raw])
        for arguments in ([self.source, raw], [raw], ["-p", "home", raw], ["--max-age", "9999w", raw]):
            checks = self.examine(*self.program_options() + arguments)
            self.assertEqual({"ok"}, {check["state"] for found in checks.values() for check in found}, arguments)
            self.assertIn(("backups", raw), checks)


class RestrictedKeys(DoctorTestCase, remote.RemoteTestCase):

    def test_one_for_another_folder(self):
        os.mkdir(self.target_disk.path + "/other")
        self.server.authorize("root", 'restrict,command="{}"'.format(" ".join(map(shlex.quote, PROGRAM_ARGV + [
            "agent", "--under", self.target_there + "/other", "--allow", "receive,list"]))))
        result = self.run_program("doctor", *self.program_options() + [self.remote_target])
        self.assertRegex(result.stdout, "not checked  source .* is not below ")

    def allow(self, groups):
        words = PROGRAM_ARGV + ["agent", "--under", self.target_there + "/backups", "--allow", groups]
        self.server.authorize("root", 'restrict,command="{}"'.format(" ".join(map(shlex.quote, words))))

    def test_one_that_may_look(self):
        self.take(1)
        self.allow("receive,list")
        self.push("-S")
        for arguments in ([self.source, self.remote_target], [self.remote_target], ["-p", "home", self.remote_target]):
            checks = self.examine("--max-age", "9999w", *self.program_options() + arguments)
            self.assertEqual({"ok"}, {check["state"] for found in checks.values() for check in found}, arguments)

    def test_one_that_may_not(self):
        """What was not checked is no problem for a person, and never ok for a monitor."""
        self.take(1)
        self.allow("receive,list")
        self.push("-S")
        self.allow("receive")
        for arguments in ([self.source, self.remote_target], [self.remote_target]):
            arguments = self.program_options() + arguments
            checks = self.examine(*arguments)
            self.assertEqual({"not checked"}, {check["state"] for check in checks["age", self.remote_target]})
            result = self.run_program("doctor", "--max-age", "9999w", *arguments, status=1)
            self.assertIn("BTRFS-BACKUP PROBLEM - ", result.stdout.splitlines()[0])
            self.assertIn("not checked: ", result.stdout)
            self.assertIn("--allow", result.stdout)


class BrokenRemotes(DoctorTestCase, remote.RemoteTestCase):

    def remote(self, *more):
        return self.program_options() + [self.source, self.remote_target] + list(more)

    def test_healthy(self):
        self.take(1)
        self.push("-S")
        checks = self.examine(*self.remote())
        machine = self.remote_target.partition("://")[2].partition("/")[0]
        self.assertIn("reached", checks["connection", machine][0]["text"])
        self.assertEqual({"ok"}, {check["state"] for found in checks.values() for check in found})
        self.examine("--max-age", "9999w", *self.remote())
        self.problem("age", self.name(1), arguments=["--max-age", "1h"] + self.remote())

    def test_an_unreachable_host(self):
        self.server.stop()
        self.problem("connection", "refused", arguments=self.remote())

    def test_a_key_that_is_not_accepted(self):
        os.unlink(os.path.join(self.server.keys, "root"))
        self.problem("connection", "permission denied", arguments=self.remote())

    def test_a_missing_folder_there(self):
        self.set_endpoints()
        checks = self.examine(*self.program_options() + [self.source, self.remote_target + "/new"])
        self.assertIn("first run", checks["folder", self.remote_target + "/new"][0]["text"])

    def test_an_orphaned_partial_there(self):
        name, = self.take(1)
        create(self.backup_path(".{}.partial".format(name)))
        self.problem("partials", self.target_there, arguments=self.remote())


class OldReceiver(DoctorTestCase, remote.RemoteTestCase):

    def setUp(self):
        folder = fakes.folder_with("btrfs", OLD_BTRFS.format("v3.9"))
        self.sshd_options = {"environment": {"PATH": folder + ":/usr/sbin:/usr/bin:/sbin:/bin"}}
        super().setUp()

    def test_an_old_btrfs_program_there(self):
        found = self.problem("programs", "v3.9", "too old",
                             arguments=self.program_options() + [self.source, self.remote_target])
        self.assertIn("127.0.0.1", found["where"])


class NoBtrfsThere(DoctorTestCase, remote.RemoteTestCase):

    sshd_options = {"hide": ["btrfs"]}

    def test_no_btrfs_program_there(self):
        checks = self.examine(*self.program_options() + [self.source, self.remote_target], status=1)
        bad = [key for key, found in checks.items() for check in found if check["state"] == "problem"]
        self.assertIn("programs", [name for name, _ in bad])


class NoPythonThere(DoctorTestCase, remote.RemoteTestCase):

    sshd_options = {"hide": ["python3*", "python"]}

    def test_no_python_there(self):
        self.problem("connection", "python", arguments=self.program_options() + [self.source, self.remote_target])

    def test_a_folder_of_backups_there(self):
        self.take(1)
        self.transfer()
        result = self.run_program("doctor", "--json", *self.program_options() + [self.remote_target], status=1)
        checks = {check["name"]: check for check in json.loads(result.stdout)["checks"] if check["where"]}
        self.assertEqual("1 complete backup", checks["backups"]["text"])
        self.assertIn("Python", checks["partials"]["text"])


if __name__ == "__main__":
    unittest.main()
