"""The page of the tests: what is tested where, how a test is written, which fixtures there are.

Parts and sections of the program, and the files that test them; first the one that is about nothing else:

    I WORDS
        TEXT                test_names test_remedies test_live
        TYPES               test_wire test_state
        COLOUR              test_colour
        ERRORS              test_bad_input test_remedies test_statuses
        NAMES               test_names
        RETENTION           test_retention_time test_planning
        EVENTS              test_crew test_live test_main_job
        ACCOUNT             test_ending
    II THE COMMAND
        VALUES              test_options
        PLACES              test_options test_bad_input
        OPTIONS             test_options test_files
        ARGUMENTS           test_files test_options test_mistakes
        REMEDIES            test_remedies test_doctor
    III THE PLAN
        IDENTITY            test_planning test_changed
        OWNERS              test_two_sources test_planning test_kept
        PLANNING            test_planning test_kept
        ROOM                test_room
    IV THE STREAM
        STREAM              test_stream
        GATE                test_gate test_hostile_streams
        INCOMING            test_stream test_resume
        TRACKING            test_files_back_raw, test_diff
    V THE MACHINE
        PROCESSES           test_crew test_starving
        BTRFS               test_main_job test_faults test_rescue
        SEND CALL           test_stream test_stopped
        MOUNTS              test_bad_input test_planted
        TRUST               test_planted
        FILES               test_state
        STATE               test_state
        LOCKS               test_state test_faults
        SWAP                test_restore
        DIGEST              test_verify
        TRAILS              test_history
        CHANGES             test_diff
        ENTRIES             test_files_back
        TAKING              test_files_back
        PUTTING             test_files_back
        EXTENTS             test_space
        SEEKING             test_browse
        HEALTH              test_doctor
    VI THE TRANSFER
        CONFINEMENT         test_planted test_hostile_streams
        PARTIALS            test_resume test_resume_faults
        ENDS                test_crew test_faults test_stopped
        FILTERS             test_raw
        RELAY               test_fanout test_stream
    VII PLACES
        STREAM FILES        test_raw test_chains
        HOST                test_host test_one_seam
        COMMANDS            test_shell
        CHAINS              test_files_back_raw
        RAW FOLDERS         test_raw test_chains
        CARRIERS            test_channels
        WIRE                test_wire test_channels test_agent_fuzz
        GUARD               test_restricted
        AGENT               test_host test_channels test_agent_fuzz
        ARRIVAL             test_remote
        SSH                 test_remote test_resume_remote
        REMOTE              test_remote test_channels test_host test_hostile_host test_hostile_fuzz
        PLAIN COMMANDS      test_without_python
        HOSTS               test_remote test_one_seam
    VIII THE VERBS
        DELIVERY            test_fanout test_resume test_one_seam
        DESTINATIONS        test_two_sources test_main_job test_kept
        SENDING             test_main_job test_fanout test_one_seam
        DELETING            test_room test_prune
        BACKUP              test_main_job test_ending test_faults test_full
        INDEX               test_list test_sizes
        LIST                test_list
        RESTORE             test_restore test_restore_remote test_chains
        FILES BACK          test_files_back test_files_back_remote test_files_back_raw
        HISTORY             test_history
        DIFF                test_diff
        LINES               test_browse
        SPACE               test_space
        PRUNE               test_prune
        DOCTOR              test_doctor
        VERIFY              test_verify
        TOPICS              test_print test_options
        HELP                test_print test_options
        COMPLETION          test_print
        UNITS               test_print
        PRINT               test_print test_restricted
    IX THE SURFACE
        DISPLAY             test_live
        PAGES               test_browse
        SCREEN              test_browse
        BROWSE              test_browse
        SIGNALS             test_crew
        CHILD               test_tasks test_crew
        CREW                test_tasks test_crew
        COPIES              test_zipapp
        COMMAND LINE        test_options test_zipapp test_crew

    the whole: its shape, README, how it is packed    test_shape test_readme test_zipapp
    these fixtures and tests/run.py                   test_support test_remote_fixtures

A test takes a case that has what it needs, does what a person would do, and looks at the disks:

    class Retention(support.BackupTestCase):         # self.source and self.target, a disk each

        def test_the_newest_stay(self):              # its name says what is true
            taken = self.take(1, 2, 3)               # snapshots of days of January 2024
            self.transfer("-n", "1")                 # the program; it has to exit with status 0
            self.assertBackedUp(taken[-1:])          # read-only, of that very snapshot, equal in content

It has been seen to fail without what it tests. It waits for states (`wait_until`, `run.wait_for`, a `gate`), never for
a time to be over; what it begins ends with it, also on failure (`addCleanup`). Where much is random, TORTURE in the
environment asks for more of it. Nothing of btrfs or ssh is mocked. All is run by tests/run.py.

What several files share stands in a module; no test file is imported. This one offers those of the first four as well:

    disks       scratch folders, filesystems on loop devices (`Disk`), subvolumes, `names`, `partials`, locks
    running     `Running`, the program as a child; `wait_until`
    forked      how most runs begin: off a process that has imported the program, in a few milliseconds
    fakes       scripts in the place of programs (`fake`, `btrfs_where`, `gate`, `killed_at`), and what is kept from one
    trees       `tree` and `listing` to compare, `Churn` and `bulk` to change
    support     chance, time, and the cases: `TestCase`, `BackupTestCase`, `TasksTestCase`, `InZone`
    remote      `Sshd`, `User`, `Proxy`, and the cases `SshdTestCase`, `RemoteTestCase`, `RestrictedTestCase`
    faulty      hosts that fail at their Nth call; dying_agent: one that is killed in calls; hostile_agent,
                hostile_files: hosts that were broken into
    terminal    the program on a terminal, and what is seen there
    scratch     what the demo and the benchmark take instead of a test's cleanups
    examples    what README's examples need to be run

    random choices            `chance(self)`: they follow from SEED and the test's name; `FIRST_CASE` of numbered ones
    another second            `next_second()`
    nothing is left here      `assertNothingRuns(run)`, `hidden(folder)`; on a server: `assertNothingLeft(sshd)`
    all is as it should be    `assertConverged()`; of tasks: `assertAllBackedUp(source, target)`
"""

import calendar
import itertools
import json
import os
import random
import stat
import sys
import time
import unittest
from typing import List

# ruff: noqa: F403, F405
from disks import *
from fakes import *
from running import *
from trees import *

# Chance and time.

SEED = os.environ.get("SEED") or str(random.SystemRandom().getrandbits(32))
FIRST_CASE = int(os.environ.get("FIRST_CASE") or 0)  # of those that a test counts through: a failure names its case


def task_of(arguments):
    """The one task that a command line asks for."""
    from btrfs_backup_ng import parse_command
    (request,) = parse_command(arguments)
    return request.task


def chance(test):
    """A source of random choices for a test: they follow from SEED, in the environment or taken here, and its name."""
    if "SEED" not in os.environ:
        print("SEED=%s %s" % (SEED, test.id()), file=sys.stderr)
    return random.Random("%s %s" % (SEED, test.id()))


def next_second():
    """Wait for the next second of the clock: the name of a snapshot has the second in which it was taken."""
    time.sleep(1.01 - time.time() % 1)


# The zones' rules written out, as not every machine has their files.
BERLIN = "CET-1CEST,M3.5.0,M10.5.0/3"
NEW_YORK = "EST5EDT,M3.2.0,M11.1.0"
LORD_HOWE = "LHST-10:30LHDT-11,M10.1.0,M4.1.0"  # half an hour


def utc(text):
    return float(calendar.timegm(time.strptime(text, "%Y-%m-%d %H:%M:%S")))


class InZone(unittest.TestCase):
    """Tests in a time zone with daylight saving time."""

    zone = BERLIN

    def setUp(self):
        self.addCleanup(self.set_zone, os.environ.get("TZ"))
        self.set_zone(self.zone)

    @staticmethod
    def set_zone(zone):
        os.environ.pop("TZ", None)
        if zone is not None:
            os.environ["TZ"] = zone
        time.tzset()


# Test cases.


class TestCase(unittest.TestCase):
    """A test on real filesystems."""

    usual_seconds = 1.0  # of one test: tests/run.py begins with what takes long

    @classmethod
    def setUpClass(cls):
        require(why_not())

    def disk(self, *args, **options):
        disk = Disk(*args, **options)
        self.addCleanup(disk.close)
        return disk

    def start(self, *arguments, **options):
        """The program, at work in the background; killed at the end of the test."""
        running = Running(*arguments, **options)
        self.addCleanup(running.close)
        return running

    def run_program(self, *arguments, status=0, timeout=HANGS, **options):
        """The program's Result. `status` is what it has to exit with, None for anything."""
        result = self.start(*arguments, **options).finish(timeout)
        self.assertNotIn("Traceback", result.stderr)
        self.assertNotRegex(result.stderr, "unexpected [A-Z][A-Za-z]+: ")
        self.assertNotRegex(result.stderr, "Exception ignored|[A-Z][a-z]+Warning")
        if status is not None:
            self.assertEqual(status, result.status, result.stderr)
        if result.status not in (0, 130, 143):
            self.assertIn("error", (result.stderr + result.stdout).lower(), "failed without saying why")
        return result

    def assertTreesEqual(self, one, other):
        """Trees are given as paths, or as what tree() returned."""
        one, other = (tree(t) if isinstance(t, (str, bytes)) else t for t in (one, other))
        found = list(differences(one, other))
        if found:
            self.fail("%d differences:\n  %s" % (len(found), "\n  ".join(found[:8])))

    def assertComplete(self, backup, original):
        """The backup is read-only, is of that very snapshot, and holds what it holds."""
        made, of = subvolume(backup), subvolume(original)
        self.assertTrue(made.readonly, backup + " is writable")
        self.assertEqual(of.received_uuid or of.uuid, made.received_uuid, backup)
        self.assertTreesEqual(original, backup)

    def assertUnchanged(self, before, *folders):
        after = listing(*folders)
        changed = [path for path in sorted(set(before) | set(after)) if before.get(path) != after.get(path)]
        self.assertEqual([], changed)

    def assertNothingRuns(self, run):
        """No child outlives the program, but for the moment that the kernel needs to end it."""
        self.assertEqual({}, run.left())

    def assertErrorSays(self, result, *words):
        """One error line, and the words in it or in the indented hint under it."""
        self.assertEqual(1, len(result.errors), result.stderr)
        lines = result.stderr.splitlines()
        at = lines.index(result.errors[0])
        hint = itertools.takewhile(lambda line: line[:1].isspace(), lines[at + 1:])
        message = "\n".join([lines[at]] + list(hint)).lower()
        for word in words:
            self.assertIn(word.lower(), message)


class BackupTestCase(TestCase):
    """A source subvolume and a folder for its backups, on a disk each; prefix `home`."""

    source_size = "512M"
    target_size = "512M"
    target_mode = 0o700  # as the program makes it; where others may enter it each backup is a snapshot of what came

    def setUp(self):
        self.source_disk = self.disk(self.source_size)
        self.target_disk = self.disk(self.target_size)
        self.source = create(os.path.join(self.source_disk.path, "home"))
        self.snapshots = os.path.join(self.source, ".btrfs-backup-ng", "snapshots")
        self.target = os.path.join(self.target_disk.path, "backups")
        os.mkdir(self.target, self.target_mode)

    def backup(self, *options, to=None, **more):
        """Runs the program on the source; to the one target unless told which ones."""
        targets = [self.target] if to is None else to
        arguments = ["-p", "home"] + list(options) + [self.source] + list(targets)
        return self.run_program(*arguments, **more)

    def transfer(self, *options, **more):
        """The same without a snapshot: quick, as no two runs have to differ by a second."""
        return self.backup("-S", *options, **more)

    def start_backup(self, *options, **more):
        return self.start("-p", "home", *(list(options) + [self.source, self.target]), **more)

    def write(self, name, content):
        path = os.path.join(self.source, name)
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            os.unlink(path)  # churn has put a link or a fifo in its place
        with open(path, "w") as file:
            file.write(content)

    def take(self, *days):
        """Snapshots taken by hand, named after days of January 2024, each with its own file."""
        os.makedirs(self.snapshots, exist_ok=True)
        taken = []
        for day in days:
            taken.append(self.name(day))
            self.write("day%d" % day, "day %d\n" % day)
            snapshot(self.source, self.snapshot_path(taken[-1]))
        return taken

    @staticmethod
    def name(day):
        return "home202401%02d-000000" % day

    def snapshot_path(self, name):
        return os.path.join(self.snapshots, name)

    def backup_path(self, name):
        return os.path.join(self.target, name)

    def assertBackedUp(self, expected, target=None):
        """The target holds these backups, each complete, and nothing that is partial."""
        target = target or self.target
        self.assertEqual(sorted(expected), names(target))
        self.assertEqual([], partials(target))
        for name in expected:
            self.assertComplete(os.path.join(target, name), self.snapshot_path(name))

    def assertConverged(self, *targets):
        """Everything at the source is at the targets, whole, and no lock and nothing that is partial is left."""
        for target in targets or [self.target]:
            self.assertBackedUp(names(self.snapshots), target)
            self.assertEqual([], hidden(target))
        self.assertEqual({}, read_locks(self.snapshots))


TASKS = ("home", "opt", "srv", "www", "mail", "db", "pics", "music")


def flatten(tasks):
    """Tasks as one command line."""
    words: List[str] = []
    for task in tasks:
        words += ([":"] if words else []) + list(task)
    return words


class TasksTestCase(TestCase):
    """Two disks with sources, two for backups."""

    usual_seconds = 4.0

    count, mib = 4, 8

    def setUp(self):
        self.disks = [self.disk("1G") for _ in range(4)]
        self.sources = []
        for number, name in enumerate(TASKS[:self.count]):
            self.sources.append(create(os.path.join(self.disks[number % 2].path, name)))
            bulk(os.path.join(self.sources[-1], "data"), self.mib, seed=number)
        self.targets = [os.path.join(self.disks[2 + number % 2].path, name)
                        for number, name in enumerate(TASKS[:self.count])]
        self.log = os.path.join(scratch_folder(), "log-%d.json" % id(self))
        self.addCleanup(self.forget_log)

    def forget_log(self):
        if os.path.exists(self.log):
            os.unlink(self.log)

    def tasks(self, *options):
        """One for each source, to its target, with its own prefix."""
        return [list(options) + ["-p", os.path.basename(source) + "-", source, target]
                for source, target in zip(self.sources, self.targets)]

    def command(self, *options, tasks=None):
        return ["--log-json", self.log] + list(options) + flatten(self.tasks() if tasks is None else tasks)

    def run_tasks(self, *options, tasks=None, **more):
        return self.run_program(*self.command(*options, tasks=tasks), **more)

    def events(self, *kinds):
        if not os.path.exists(self.log):
            return []
        with open(self.log) as log:
            found = [json.loads(line) for line in log]
        return [event for event in found if not kinds or event["event"] in kinds]

    def snapshots(self, source):
        return names(os.path.join(source, ".btrfs-backup-ng", "snapshots"))

    def assertAllBackedUp(self, source, target):
        self.assertEqual(self.snapshots(source), names(target))
        self.assertEqual([], partials(target))
        for name in names(target):
            self.assertComplete(os.path.join(target, name),
                                os.path.join(source, ".btrfs-backup-ng", "snapshots", name))
        self.assertEqual({}, read_locks(os.path.join(source, ".btrfs-backup-ng", "snapshots")))

    def assertGone(self, running, held=()):
        """Nothing that the program has started is left, but what we have `held` since, and goes when it may."""
        wait_until(lambda: set(running.processes()) <= set(held))
        self.assertLessEqual(set(running.processes()), set(held))
        self.wait_until_gone(running, held)

    def wait_until_gone(self, running, held=()):
        go_on(held)
        self.assertEqual({}, running.left())
