"""Two sources and one folder: the second is recognised and refused, and a source that is the same goes on."""

import json
import os
import shutil
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import remote
import support
from fakes import btrfs_where, killed_at
from support import create, names, snapshot, subvolume

from btrfs_backup_ng import (
    MOST_SOURCE_IDS,
    NO_NOTES,
    BackupError,
    Claim,
    Events,
    FolderNotes,
    LocalHost,
)

ONE, OTHER = "00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"


class Claims(support.TestCase):
    """The note itself."""

    def setUp(self):
        self.folder = self.disk("128M").path
        self.host = LocalHost(Events())

    def noted(self, prefix="home"):
        return self.host.read_notes(self.folder, prefix).sources

    def test_each_prefix_has_its_own(self):
        self.host.claim(self.folder, Claim("home", (), (ONE,)))
        self.host.claim(self.folder, Claim("", (), (OTHER,)))
        self.assertEqual([(ONE,), (OTHER,), ()], [self.noted(prefix) for prefix in ("home", "", "h")])
        self.assertEqual([".home.source", ".source"], sorted(os.listdir(self.folder)))

    def test_the_second_of_two_at_once_is_refused(self):
        self.host.claim(self.folder, Claim("home", (), (ONE,)))
        with self.assertRaisesRegex(Exception, "another source"):
            self.host.claim(self.folder, Claim("home", (), (OTHER,)))
        self.assertEqual((ONE,), self.noted())

    def test_one_that_has_nothing_there_gives_way(self):
        self.host.claim(self.folder, Claim("home", (), (ONE,)))
        self.host.claim(self.folder, Claim("home", (ONE,), (OTHER,)))
        create(os.path.join(self.folder, ".home20240101-000000.partial"))
        with self.assertRaisesRegex(Exception, "another source"):
            self.host.claim(self.folder, Claim("home", (OTHER,), (ONE,)))
        self.host.claim(self.folder, Claim("home", (OTHER,), (OTHER, ONE)))

    def test_damage_is_said_and_nothing_done(self):
        for text in ("", "{", "[]", '{"sources": "x"}', '{"sources": [1]}', '{"sources": ["x"]}', '{"sources": {}}'):
            with open(os.path.join(self.folder, ".home.source"), "w") as file:
                file.write(text)
            for act in (self.noted, lambda: self.host.claim(self.folder, Claim("home", (), (ONE,)))):
                with self.assertRaisesRegex(Exception, "damaged"):
                    act()

    def test_nothing_is_noted_where_nothing_is(self):
        self.assertEqual(FolderNotes(), NO_NOTES)
        self.assertEqual(NO_NOTES, self.host.read_notes(self.folder, "home"))
        self.assertEqual([], os.listdir(self.folder))


class TwoSourcesTestCase(support.BackupTestCase):
    """Whose snapshots are named after a second source as those of the first are."""

    target_size = "256M"
    prefix = "home"

    def setUp(self):
        super().setUp()
        self.other = create(os.path.join(self.source_disk.path, "srv"))
        self.other_snapshots = os.path.join(self.other, ".btrfs-backup-ng", "snapshots")
        os.makedirs(self.other_snapshots)

    def put_elsewhere(self):
        """The second source lies on another disk, so that nobody can know that it is not the first."""
        self.other = create(os.path.join(self.disk("256M").path, "srv"))
        self.other_snapshots = os.path.join(self.other, ".btrfs-backup-ng", "snapshots")
        os.makedirs(self.other_snapshots)

    def take_other(self, day):
        return snapshot(self.other, os.path.join(self.other_snapshots, self.name(day)))

    def run_other(self, *options, to=None, **more):
        return self.run_program("-p", "home", *list(options) + [self.other, to or self.target], **more)

    def assertRefused(self, *options, to=None):
        """Without anything taken, sent, deleted or noted."""
        before = support.listing(self.target), names(self.other_snapshots)
        for more in ((), ("--dry-run",)):
            result = self.run_other(*list(options) + list(more), to=to, status=1)
            self.assertErrorSays(result, "another source", "-p")
            self.assertEqual(before, (support.listing(self.target), names(self.other_snapshots)))


class TwoSources(TwoSourcesTestCase):

    def test_the_second_is_refused(self):
        self.take(1)
        self.transfer()
        self.assertRefused()
        self.take_other(2)
        self.assertRefused("-S", "-n", "1")
        self.run_other("-p", "srv-")  # as it was told
        self.run_other("-S", to=self.disk("128M").path)
        self.transfer("-n", "1")

    def test_and_in_the_other_order(self):
        self.take_other(1)
        self.run_other("-S")
        self.take(2)
        before = support.listing(self.target)
        self.transfer("-n", "1", status=1)
        self.backup(status=1)
        self.assertEqual(before, support.listing(self.target))
        self.assertEqual([self.name(2)], names(self.snapshots))

    def test_one_of_two_destinations_refuses_both_before_anything_is_taken(self):
        self.take(1)
        self.transfer()
        free = self.disk("128M").path
        self.run_other(self.target, to=free, status=1)
        self.assertEqual(([], []), (names(free), names(self.other_snapshots)))

    def test_backups_of_a_release_without_notes(self):
        self.take(1)
        self.transfer()
        os.unlink(os.path.join(self.target, ".home.source"))
        self.assertRefused()
        self.take(2)
        self.transfer("-n", "1")  # for it has one in common
        self.assertEqual([self.name(2)], names(self.target))
        self.assertTrue(os.path.exists(os.path.join(self.target, ".home.source")))
        os.unlink(os.path.join(self.target, ".home.source"))
        os.unlink(os.path.join(self.snapshots, ".destinations.json"))
        self.transfer("-n", "1")  # nor did 0.6.6 have pins

    def test_of_two_that_shared_a_folder_before_there_were_notes_the_second_is_refused(self):
        note = os.path.join(self.target, ".home.source")
        self.put_elsewhere()
        self.take(1)
        self.transfer()
        os.unlink(note)
        self.take_other(2)
        self.run_other("-S", "--same-source")
        os.unlink(note)
        self.take(3)
        self.transfer()
        self.take_other(4)
        before = support.listing(self.target)
        self.assertErrorSays(self.run_other("-S", "-n", "1", status=1), "another source", "--same-source")
        self.assertEqual(before, support.listing(self.target))
        self.run_other("-S", "--same-source", "-n", "9")
        self.assertEqual([self.name(day) for day in (1, 2, 3, 4)], names(self.target))
        self.run_other("-S")

    def test_a_source_that_lost_its_snapshots_goes_on(self):
        self.take(1)
        self.transfer()
        support.delete(self.snapshot_path(self.name(1)))
        self.take(2)
        self.transfer("-n", "1")
        self.assertEqual([self.name(2)], names(self.target))

    def test_also_without_its_notes(self):
        self.take(1)
        self.transfer()
        support.delete(self.snapshot_path(self.name(1)))
        os.unlink(os.path.join(self.snapshots, ".destinations.json"))
        self.take(2)
        self.transfer("-n", "1")
        self.assertEqual([self.name(2)], names(self.target))

    def test_a_source_replaced_by_its_state_goes_on(self):
        """A writable snapshot holds the notes there were; the snapshots are beside it."""
        self.take(1)
        self.transfer()
        self.take(2)
        os.rename(self.source, self.source + ".old")
        snapshot(os.path.join(self.source + ".old", ".btrfs-backup-ng", "snapshots", self.name(2)), self.source,
                 readonly=False)
        for name in names(self.snapshots):
            os.rmdir(self.snapshot_path(name))  # where the snapshots were
        self.take(3)
        self.transfer("-n", "1")
        self.assertEqual([self.name(3)], names(self.target))

    def test_a_source_restored_in_place_goes_on(self):
        self.take(1, 2)
        self.transfer()
        self.run_program("restore", "--name", self.name(1), self.target, "--in-place", self.source)
        self.take(3)
        self.transfer("-n", "1")
        self.assertIsNotNone(subvolume(self.backup_path(self.name(3))).parent_uuid)

    def test_so_does_one_that_was_replaced_more_often_than_a_note_holds(self):
        self.take(1)
        self.transfer()
        full = [f"00000000-0000-0000-0000-{number:012}" for number in range(MOST_SOURCE_IDS)]
        with open(os.path.join(self.target, ".home.source"), "w") as file:
            json.dump({"sources": full}, file)
        for day in (2, 3):
            self.take(day)
            self.transfer("-n", "1")
            self.assertEqual([self.name(day)], names(self.target))
        with open(os.path.join(self.target, ".home.source")) as file:
            self.assertEqual(full, json.load(file)["sources"])
        self.take_other(4)
        self.assertRefused("-S")

    def test_a_rebuilt_machine_says_that_it_is_the_same(self):
        self.put_elsewhere()
        self.take(1)
        self.transfer()
        self.take_other(2)
        self.assertErrorSays(self.run_other("-S", status=1), "another source", "--same-source")
        for more in (("--dry-run",), ()):
            result = self.run_other("-S", "--same-source", "-n", "1", *more)
            self.assertIn("taken over, so nothing is deleted there in this run", result.stderr)
            self.assertNotIn("delete", result.stdout)
        self.assertEqual([self.name(1), self.name(2)], names(self.target))
        self.take_other(3)
        self.run_other("-S", "-n", "1")  # from then on it is known
        self.assertEqual([self.name(3)], names(self.target))

    def test_one_that_lies_beside_the_first_is_not_the_same(self):
        self.take(1)
        self.transfer()
        self.assertRefused("--same-source", "-n", "1")
        result = self.run_other("-S", status=1)
        self.assertErrorSays(result, "to another source, which is on this source's filesystem: home", "-p")
        self.assertNotIn("--same-source", result.stderr)
        support.delete(self.snapshot_path(self.name(1)))
        support.delete(self.source)
        self.take_other(2)
        self.run_other("-S", "--same-source")
        self.assertEqual([self.name(1), self.name(2)], names(self.target))

    def test_a_snapshot_that_has_taken_the_place_of_the_first_may_be_the_same(self):
        self.take(1)
        self.transfer()
        snapshot(self.source, os.path.join(self.source_disk.path, "rolled"), readonly=False)
        self.other = os.path.join(self.source_disk.path, "rolled")
        shutil.rmtree(os.path.join(self.other, ".btrfs-backup-ng"))
        self.assertErrorSays(self.run_other(status=1), "another source", "--same-source")
        self.run_other("--same-source", "-n", "1")
        self.assertIn(self.name(1), names(self.target))

    def test_a_broken_first_transfer_is_no_other(self):
        self.write("large", "x" * (8 << 20))
        self.take(1)
        run = self.start("-p", "home", "-S", "--limit", "1M", self.source, self.target)
        run.wait_for("a partial", lambda: support.partials(self.target))
        run.kill()
        self.take_other(2)
        self.assertRefused("-S")
        self.transfer()
        self.assertBackedUp([self.name(1)])

    def test_the_other_takes_the_folder_where_nothing_arrived(self):
        self.take_other(1)
        with open(os.path.join(self.target, ".home.source"), "w") as file:
            json.dump({"sources": [ONE]}, file)
        self.run_other("-S")

    def test_raw_folders(self):
        raw = "raw://" + self.target
        self.take(1)
        self.transfer(to=[raw])
        self.take_other(2)
        self.assertRefused("-S", to=raw)
        self.take(3)
        self.transfer("-n", "1", to=[raw])

    def test_a_damaged_note_stops_what_is_sent_there(self):
        self.take(1)
        self.transfer()
        self.take(2)
        path = os.path.join(self.target, ".home.source")
        with open(path, "w") as file:
            file.write("{")
        self.assertErrorSays(self.transfer("-n", "1", status=1), path, "damaged")
        self.assertEqual([self.name(1)], names(self.target))


class Copies(support.BackupTestCase):
    """Two machines with copies of one filesystem, or one that is set back to a copy of it; `turn` takes the other's."""

    usual_seconds = 3
    source_size = "256M"
    target_size = "256M"
    scheme = ""

    def part(self):
        """From now on there are two."""
        self.here, self.there = self.source_disk, self.source_disk.copied()
        self.addCleanup(self.there.close)
        self.here.mount()

    def turn(self):
        self.here.unmount()
        self.here, self.there = self.there, self.here
        self.here.mount()

    def send(self, *options, to=(), **more):
        return self.transfer(*options, to=[*to, self.scheme + self.target], **more)

    def backups(self):
        return sorted({name.partition(".btrfs")[0] for name in os.listdir(self.target) if name.startswith("home")})

    def assertBackups(self, *days):
        self.assertEqual([self.name(day) for day in days], self.backups())

    def assertRefused(self, *days):
        """For the backups of those days, without anything sent or deleted there."""
        before = support.listing(self.target)
        for more in (("-S",), ("-S", "-T"), ("-S", "--dry-run")):
            result = self.backup("-n", "1", *more, to=[self.scheme + self.target], status=1)
            self.assertErrorSays(result, "another machine with a copy", "-p", "--same-source", *map(self.name, days))
        self.assertIn("nothing can be done there now", result.stdout)
        self.assertEqual(before, support.listing(self.target))

    def test_each_is_told_of_the_other(self):
        self.take(1)
        self.send()
        self.part()
        self.take(2, 3)
        self.send("-n", "1", "-N", "1")
        self.turn()
        self.take(4)
        self.assertRefused(3)
        self.send("--same-source", "-n", "1")  # which it is not
        self.assertEqual([self.name(3), self.name(4)], self.backups()[-2:])
        self.turn()
        self.assertRefused(4)

    def test_one_that_is_set_back_says_once_that_it_is_the_same(self):
        self.take(1)
        self.send()
        self.part()
        self.take(2, 3)
        self.send("-N", "1")
        self.turn()
        result = self.send("--same-source", "-n", "1")  # with nothing to send
        self.assertIn("taken over, so nothing is deleted there in this run", result.stderr)
        self.assertBackups(1, 2, 3)
        self.take(4)
        self.send("-n", "1", "-N", "1")
        self.assertIn(self.name(4), self.backups())
        self.take(5)
        self.send()

    def test_machines_made_from_one_template(self):
        self.part()
        self.take(1)
        self.send("-n", "1")
        self.turn()
        before = support.listing(self.target)
        for more in ((), ("--dry-run",), ()):
            result = self.backup("-n", "1", *more, to=[self.scheme + self.target], status=1)
            self.assertErrorSays(result, "another machine with a copy", self.name(1), "-p", "--same-source")
        self.assertEqual((before, []), (support.listing(self.target), names(self.snapshots)))
        self.backup("--same-source", "-n", "1", to=[self.scheme + self.target])
        self.assertEqual(2, len(self.backups()))
        self.send()

    def test_one_with_a_prefix_of_its_own(self):
        self.take(1)
        self.send()
        self.part()
        self.take(2)
        self.send()
        self.turn()
        self.backup("-p", "other-", "-n", "1", to=[self.scheme + self.target])
        self.assertBackups(1, 2)

    def test_what_was_sent_to_another_disk_meanwhile_tells_nothing_of_this(self):
        other = self.disk("128M").path
        self.take(1)
        self.send(to=[other])
        self.part()
        self.take(2)
        self.send("-N", "1")
        self.turn()
        self.take(3, 4)
        self.transfer(to=[other])
        self.assertRefused(2)
        self.send(to=[other], status=1)
        self.assertRefused(2)


class CopiesOfStreamFiles(Copies):
    scheme = "raw://"


class NoCopies(support.BackupTestCase):
    """What could look like the backups of a copy, but is this source's own."""

    source_size = "256M"
    target_size = "256M"

    def drop(self, *days):
        for day in days:
            support.delete(self.snapshot_path(self.name(day)))

    def assertGoesOn(self, day, *options, to=None):
        """Also where nothing is to be sent, as where the run before was broken off before it sent anything."""
        for more in (("--dry-run",), ()) if names(self.snapshots) else ():
            self.transfer(*more, to=to)
        self.take(day)
        self.assertNotIn("taken over", self.transfer("-n", "1", *options, to=to).stderr)
        self.assertIn(self.name(day), names(self.target))
        self.transfer(to=to)

    def replace(self, name):
        """By hand, with what the source was: the snapshots since then stay in the old one."""
        old = self.source + ".old"
        os.rename(self.source, old)
        snapshot(os.path.join(old, ".btrfs-backup-ng", "snapshots", name), self.source, readonly=False)
        for left in os.listdir(self.snapshots):
            if not left.startswith("."):
                os.rmdir(self.snapshot_path(left))
        return old

    def test_a_run_that_is_killed_at_any_call(self):
        """What it has sent is noted before a run to another destination may delete it."""
        other, day = self.disk("256M").path, 1
        self.take(1)
        self.transfer()
        for call in range(1, 15):
            self.take(day + 1, day + 2)
            day += 2
            killed = self.start_backup("-S", "-I", env=killed_at(call)).finish()  # so that no lock names what it sent
            self.transfer("-N", "1", to=[other])
            self.transfer("-n", "1")
            self.assertIn(self.name(day), names(self.target))
            if not killed.status:
                break
        self.assertGreater(call, 5)
        self.assertEqual(0, killed.status)

    def test_snapshots_that_were_deleted_by_hand(self):
        self.take(1, 2)
        self.transfer()
        self.take(3, 4)
        self.transfer()
        self.drop(3, 4)
        self.assertGoesOn(5)

    def test_all_of_them_and_nothing_is_sent(self):
        self.take(1, 2)
        self.transfer()
        self.drop(1, 2)
        self.assertGoesOn(3)

    def test_older_ones_that_were_sent_later(self):
        self.take(1, 2, 3, 4)
        self.transfer("-n", "1")
        self.transfer()
        self.drop(1, 2, 3)
        self.assertGoesOn(5)

    def test_names_of_another_time_zone(self):
        self.take(1, 9)
        self.transfer()
        self.take(2)
        self.transfer()
        self.drop(9)
        self.drop(1)
        self.transfer("-n", "9")

    def test_two_names_of_one_folder(self):
        bound = os.path.join(support.scratch_folder(), "bound")
        os.mkdir(bound)
        support.command("mount", "--bind", self.target_disk.path, bound)
        self.addCleanup(os.rmdir, bound)
        self.addCleanup(support.unmount, bound)
        for day in range(1, 7):
            self.take(day)
            self.transfer("-N", "1", to=[[self.target, os.path.join(bound, "backups")][day // 2 % 2]])

    def test_a_destination_that_was_forgotten(self):
        other = os.path.join(self.target_disk.path, "other")
        os.mkdir(other)
        self.take(1)
        self.transfer(to=[self.target, other])
        self.take(2, 3)
        self.transfer()
        self.transfer("-T", "--forget-destination", self.target, to=[other])
        self.drop(2, 3)
        self.assertGoesOn(4)

    def test_lost_notes(self):
        self.take(1, 2)
        self.transfer()
        os.unlink(os.path.join(self.snapshots, ".destinations.json"))
        self.drop(1, 2)
        self.take(3)
        self.assertGoesOn(4)

    def test_notes_of_an_earlier_day(self):
        """As release 0.7.0 leaves them where it is killed."""
        path = os.path.join(self.snapshots, ".destinations.json")
        self.take(1)
        self.transfer()
        before = open_text(path)
        self.take(2, 3)
        self.transfer()
        with open(path, "w") as file:
            file.write(before)
        self.drop(2)
        self.assertGoesOn(4)

    def test_a_source_that_was_replaced_by_hand(self):
        self.take(1)
        self.transfer()
        self.take(2, 3, 4)
        self.transfer()
        old = self.replace(self.name(2))
        self.assertGoesOn(5)
        os.rename(self.source, self.source + ".tried")  # and then it is undone
        os.rename(old, self.source)
        self.assertGoesOn(6)

    def test_one_whose_first_run_since_was_broken_off(self):
        self.take(1)
        self.transfer()
        self.take(2, 3, 4)
        self.transfer()
        self.replace(self.name(2))
        self.take(5)
        self.transfer(status=None, env=btrfs_where("exit 1", "receive"))
        self.assertGoesOn(6)

    def test_one_that_was_restored_in_place(self):
        self.take(1, 2, 3)
        self.transfer()
        self.run_program("restore", "--name", self.name(2), self.target, "--in-place", self.source)
        self.take(4)
        self.transfer(status=None, env=btrfs_where("exit 1", "receive"))
        self.assertGoesOn(5)

    def test_backups_that_are_sent_on(self):
        """Also by a source that sends some of them there itself, and no longer has those that came the other way."""
        last = self.disk("256M").path
        relay = ["-S", "-p", "home", "-f", self.target, self.target_disk.path, last]
        self.take(1)
        self.transfer(to=[self.target, last])
        for day in (2, 3, 4):
            self.take(day)
            self.transfer("-N", "1")
            self.run_program(*relay)
        self.take(5)
        self.transfer("-N", "1")
        self.transfer(to=[last, self.target])
        self.take(6)
        self.transfer(to=[last])
        self.run_program("-n", "2", *relay)


class Chains(support.BackupTestCase):
    """What is sent on from a folder of backups is the first source's."""

    target_size = "256M"

    def setUp(self):
        super().setUp()
        self.last = self.disk("256M")
        os.mkdir(os.path.join(self.last.path, "out"))
        self.out = os.path.join(self.last.path, "out")

    def send_on(self, *options, **more):
        return self.run_program("-S", "-p", "home", "-f", self.target, *list(options) + [
            self.target_disk.path, self.out], **more)

    def test_the_note_goes_with_them(self):
        self.take(1)
        self.transfer()
        self.send_on()
        notes = [os.path.join(folder, ".home.source") for folder in (self.target, self.out)]
        self.assertEqual(*[open_text(path) for path in notes])
        self.take(2)
        self.transfer("-n", "1", to=[self.out, self.target])  # also directly
        self.send_on()

    def test_what_they_need_stays(self):
        """The newest in common with the last in the chain, which is away."""
        self.take(1)
        self.transfer("-N", "1", "-n", "1")
        self.send_on()
        self.last.unmount()
        self.take(2, 3)
        plan = self.transfer("-N", "1", "-n", "1", "--dry-run").stdout
        self.assertNotIn("delete " + self.name(1) + ": older than the newest 1\n", plan.partition("destination")[2])
        self.transfer("-N", "1", "-n", "1")
        self.assertEqual([self.name(1), self.name(3)], names(self.target))
        self.last.mount()
        self.send_on()
        self.assertIsNotNone(subvolume(os.path.join(self.out, self.name(3))).parent_uuid)

    def test_what_is_locked_there_stays(self):
        self.take(1, 2)
        self.transfer()
        support.write_locks(self.target, {self.name(1): {"locks": ["/somewhere"], "parent_locks": []}})
        self.take(3)
        self.transfer("-n", "1")
        self.assertEqual([self.name(1), self.name(3)], names(self.target))

    def test_damaged_locks_there_stop_the_deleting(self):
        self.take(1)
        self.transfer()
        support.write_locks(self.target, b"{")
        self.take(2)
        self.assertErrorSays(self.transfer("-n", "1", status=1), self.target, "damaged")
        self.assertEqual([self.name(1)], names(self.target))


def open_text(path):
    with open(path) as file:
        return file.read()


class InOthersReach(TwoSourcesTestCase):
    """Where others may enter the folder, a first piece is seen by its record alone."""

    target_mode = 0o755

    test_a_broken_first_transfer_is_no_other = TwoSources.test_a_broken_first_transfer_is_no_other


class OverSsh(remote.RemoteTestCase):
    """The folder, or the sources, are on another host."""

    def setUp(self):
        super().setUp()
        self.other = create(os.path.join(self.source_disk.path, "srv"))

    def check(self):
        self.take(1)
        self.push("-S")
        before = support.listing(self.target)
        for more in ((), ("--dry-run",)):
            result = self.run_remote("-p", "home", "-n", "1", *list(more) + [self.other, self.remote_target], status=1)
            self.assertErrorSays(result, "another source", "-p")
        self.assertEqual(before, support.listing(self.target))
        self.assertEqual([], names(os.path.join(self.other, ".btrfs-backup-ng", "snapshots")))
        self.take(2)
        self.push("-S")
        self.assertBackedUp([self.name(1), self.name(2)])

    def test_pushed(self):
        self.check()

    def test_stream_files(self):
        self.take(1)
        self.push("-S", to=["raw+" + self.remote_target])
        result = self.run_remote("-p", "home", "-n", "1", self.other, "raw+" + self.remote_target, status=1)
        self.assertErrorSays(result, "another source", "-p")
        self.take(2)
        self.push("-S", to=["raw+" + self.remote_target])

    def test_pulled(self):
        self.take(1)
        self.pull("-S")
        result = self.run_remote("-p", "home", self.server.endpoint(self.source_there + "/srv"), self.target, status=1)
        self.assertErrorSays(result, "another source", "-p")
        self.take(2)
        self.pull("-S", "-n", "1")
        self.assertEqual([self.name(2)], names(self.target))


class WithoutPython(remote.RemoteTestCase):

    sshd_options = {"hide": ("python*",)}

    def test_pushed(self):
        other = create(os.path.join(self.source_disk.path, "srv"))
        self.take(1)
        self.push("-S")
        result = self.run_remote("-p", "home", "-n", "1", other, self.remote_target, status=1)
        self.assertErrorSays(result, "another source", "-p")
        self.take(2)
        self.push("-S")
        self.assertBackedUp([self.name(1), self.name(2)])


class Restricted(remote.RestrictedTestCase):
    """A key that may only receive and list."""

    def setUp(self):
        super().setUp()
        self.other = create(os.path.join(self.source_disk.path, "srv"))

    test_refused_and_gone_on = OverSsh.check

    def test_another_is_not_driven_out(self):
        self.take(1)
        self.push("-S")
        path = os.path.join(self.target, ".home.source")
        before = open_text(path)
        noted = tuple(json.loads(before)["sources"])
        host, folder = self.connect(), self.under
        for claim in (Claim("home", noted, (ONE,)), Claim("home", (), (ONE,)), Claim("../home", (), (ONE,)),
                      Claim("data", (), ("no UUID",)), Claim("data", (), (ONE,) * (MOST_SOURCE_IDS + 1))):
            with self.assertRaises(BackupError):
                host.claim(folder, claim)
        self.assertEqual(before, open_text(path))
        self.assertEqual([".home.source"], [name for name in os.listdir(self.target) if name.endswith("source")])


if __name__ == "__main__":
    unittest.main()
