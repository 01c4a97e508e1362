"""Folders in others' reach: what an ordinary user puts on the way that root takes is never followed."""

import contextlib
import glob
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import unittest
import uuid

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support
from fakes import btrfs_where, fake, opened_meanwhile, paused_receive
from support import create, names, snapshot, subvolume

import btrfs_backup_ng as program

USER = 65534
DEFAULT = ".btrfs-backup-ng"

UNCONFINED = [support.PYTHON, "-E", "-s", "-c", "import runpy, sys; sys.modules['_ctypes'] = None; "
              "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')", support.PROGRAM]


def as_user(*argv):
    """Runs a command as an ordinary user; whether it went well. Others' folders are closed to it as to anyone."""
    words = ["timeout", "5", "setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups"] + list(argv)
    return subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def remove(path):
    """Whatever it is."""
    if support.is_subvolume(path):
        support.delete(path)
    elif os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
    else:
        for name in os.listdir(path):
            remove(os.path.join(path, name))
        os.rmdir(path)


class PlantedTestCase(support.BackupTestCase):
    """The source is a user's home, beside that of another, whose backups are made with the same prefix."""

    target_mode = 0o755

    def setUp(self):
        super().setUp()
        os.chmod(support.scratch_folder(), 0o755)
        os.chown(self.source, USER, USER)
        self.other = create(os.path.join(self.source_disk.path, "other"))
        self.other_snapshots = os.path.join(self.other, DEFAULT, "snapshots")
        os.makedirs(self.other_snapshots, 0o700)
        with open(os.path.join(self.other, "secret"), "w", encoding="utf-8") as file:
            file.write("secret")
        for day in (1, 2, 3):
            snapshot(self.other, os.path.join(self.other_snapshots, self.name(day)))

    def as_user(self, script):
        self.assertTrue(as_user("sh", "-ec", 'cd "$0"; ' + script, self.source), script)

    def slow_btrfs(self, folder, script):
        """The environment where `script` is run in a folder when `btrfs subvolume delete` has looked at its path."""
        script = "path=$(readlink -f \"$3\"); (cd '{}'; {}); set -- \"$1\" \"$2\" \"$path\"".format(folder, script)
        return btrfs_where(script, " subvolume delete ")

    def assertOtherUntouched(self):
        self.assertEqual([self.name(day) for day in (1, 2, 3)], sorted(os.listdir(self.other_snapshots)))


class SnapshotFolder(PlantedTestCase):

    def assertRefused(self, *words, options=()):
        before = names(self.target)
        result = self.backup(*options, "-N", "1", status=1)
        self.assertErrorSays(result, *words)
        self.assertEqual(before, names(self.target))
        self.assertOtherUntouched()
        return result

    def test_a_folder_that_the_user_made_in_place_of_roots(self):
        self.backup()
        self.as_user("mv {0} gone; mkdir -p {0}/snapshots".format(DEFAULT))
        result = self.assertRefused("{} belongs to user 65534, so its snapshots could be another user's".format(
            os.path.join(self.source, DEFAULT)), "-f {}/.snapshots/home".format(self.source_disk.path))
        option = result.errors[0].rpartition(" ")[2]
        support.next_second()  # its name would be that of the backup which the first run made
        self.backup("-f", option)
        self.assertEqual(1, len(names(option)))
        self.assertEqual([], os.listdir(self.snapshots))

    def test_a_link_to_anothers(self):
        self.as_user("mkdir {0}; ln -s {1} {0}/snapshots".format(DEFAULT, self.other_snapshots))
        self.assertRefused("is a link that belongs to another user")

    def test_a_link_of_roots_below_the_source(self):
        """Whoever may write in the source can move it to where it leads elsewhere."""
        os.makedirs(os.path.join(self.source_disk.path, "a"))
        os.symlink(os.path.join(self.source_disk.path, "a"), os.path.join(self.source, DEFAULT))
        self.assertRefused("is reached through a link")

    def test_folders_that_others_may_write_to(self):
        for mode in (0o777, 0o1777, 0o775):
            with self.subTest(oct(mode)):
                os.makedirs(self.snapshots, exist_ok=True)
                os.chown(self.snapshots, 0, USER)
                os.chmod(self.snapshots, mode)
                error, = self.assertRefused("can be written by others").errors
                remedy = "chmod go-w " + self.snapshots
                self.assertIn("if all that is in it is yours: {}; or use -f".format(remedy), error)
                subprocess.check_call(remedy.split())
                self.backup("-T", "--dry-run")

    @unittest.skipUnless(shutil.which("setfacl"), "no setfacl")
    def test_a_folder_that_an_acl_opens_to_others(self):
        os.makedirs(self.snapshots, 0o755)
        for whom in ("u:65534:r-x", "u:0:rwx"):
            subprocess.check_call(["setfacl", "-m", whom, self.snapshots])
            self.backup("-T")
        for whom in ("u:65534:rwx", "g:65534:rwx"):
            with self.subTest(whom):
                subprocess.check_call(["setfacl", "-b", "-m", whom, self.snapshots])
                self.assertRefused("can be written by others")

    def test_a_folder_elsewhere_in_anothers_reach(self):
        folder = os.path.join(self.source_disk.path, "theirs")
        os.mkdir(folder)
        os.chown(folder, USER, USER)
        self.assertRefused(folder + " belongs to user 65534", options=("-f", folder + "/snapshots"))
        shared = os.path.join(self.source_disk.path, "shared")
        os.mkdir(shared)
        os.chmod(shared, 0o777)
        self.assertRefused(shared + " can be written by others", options=("-f", shared + "/snapshots"))
        os.chmod(shared, 0o1777)
        self.backup("-f", shared + "/snapshots")
        self.backup("-S", "-f", shared + "/snapshots")

    def test_what_root_made_and_what_an_ordinary_user_has_for_himself(self):
        os.makedirs(self.snapshots, 0o755)
        self.backup()
        own = create(os.path.join(self.source_disk.path, "own"))
        os.chown(own, USER, USER)
        self.run_program("--no-elevate", "-T", "-p", "home", own, wrapper=support.as_nobody())
        self.run_program("--no-elevate", "-S", "-T", "-p", "home", own, wrapper=support.as_nobody())
        self.assertEqual(1, len(names(os.path.join(own, DEFAULT, "snapshots"))))

    def test_another_folder_in_place_of_the_one_that_is_held(self):
        """Between the look at it and its use, and at any time of the run."""
        self.take(1)
        self.transfer()
        support.bulk(os.path.join(self.source, "bulk"), 4)
        run = self.start_backup("-N", "1", "--limit", "2M")
        held = run.hold("receive")
        self.as_user("mv {0} gone; mkdir {0}; ln -s {1} {0}/snapshots".format(DEFAULT, self.other_snapshots))
        os.kill(held, signal.SIGCONT)
        result = run.finish()
        self.assertEqual((0, 0), (result.status, len(result.errors)), result.stderr)
        self.assertOtherUntouched()
        self.assertEqual(2, len(names(self.target)))
        self.assertEqual(names(self.target)[1:], names(os.path.join(self.source, "gone", "snapshots")))
        self.assertErrorSays(self.backup(status=1), "link that belongs to another user")

    def test_another_folder_when_a_snapshot_is_deleted(self):
        self.take(1, 2)
        self.transfer()
        swap = "mv {0} gone; mkdir {0}; ln -s {1} {0}/snapshots".format(DEFAULT, self.other_snapshots)
        self.transfer("-N", "1", env=self.slow_btrfs(self.source, swap))
        self.assertOtherUntouched()
        self.assertEqual([self.name(2)], names(self.snapshots))

    def test_a_held_folder_that_became_another_is_told_when_it_is_looked_at(self):
        self.take(1)
        host = program.LocalHost(program.Events())
        with host.hold(self.snapshots, "home", 0):
            host.look(self.snapshots)
            self.as_user("mv {0} gone; mkdir -p {0}/snapshots".format(DEFAULT))
            with self.assertRaisesRegex(program.BackupError, "was replaced meanwhile"):
                host.look(self.snapshots)

    def test_locks_that_the_user_made_run_no_command(self):
        self.as_user("mkdir -p {0}/snapshots; echo '{{\"{1}\": {{\"locks\": [\"shell://touch {2}/ran\"]}}}}' > "
                     "{0}/snapshots/.outstanding_transfers".format(DEFAULT, self.name(1), self.target))
        self.assertRefused("belongs to user", options=("--locked-destinations",))
        self.assertEqual([], os.listdir(self.target))


class OpenMeanwhile(PlantedTestCase):
    """What a user had open of his own files while a backup arrived is nothing of the backup."""

    def setUp(self):
        super().setUp()
        os.chown(self.source, 0, 0)
        os.chmod(self.source, 0o755)
        os.mkdir(os.path.join(self.source, "theirs"))
        self.write("theirs/data", "the user's own words")
        os.chown(os.path.join(self.source, "theirs"), USER, USER)
        os.chown(os.path.join(self.source, "theirs", "data"), USER, USER)
        self.control = os.path.join(self.target_disk.path, "control")

    @contextlib.contextmanager
    def opened(self, folder, times):
        """The environment of a run into `folder` while the user opens what he can; he is asked so many times."""
        with opened_meanwhile(folder, self.control, times) as ask:
            yield fake("btrfs", paused_receive(folder, ask.format(self.control), at_end=True))

    def back_up_watched(self, day):
        name, = self.take(day)
        with self.opened(self.target, 2) as env:
            self.transfer(env=env)
        self.assertComplete(self.backup_path(name), self.snapshot_path(name))
        self.assertEqual([], support.hidden(self.target))
        self.run_program("verify", self.source, self.target)

    def test_in_full_and_on_what_is_there(self):
        self.back_up_watched(1)
        self.write("more", "more")
        self.back_up_watched(2)

    def test_in_a_folder_of_the_users(self):
        os.chown(self.target, USER, USER)
        self.back_up_watched(1)
        self.back_up_watched(2)

    def test_in_pieces(self):
        """He is asked at the beginning and the end of each."""
        self.take(1)
        self.transfer()
        support.bulk(os.path.join(self.source, "bulk"), 48)
        name, = self.take(2)
        with self.opened(self.target, 1):
            run = self.start_backup("-S", "--limit", "8M")
            run.wait_for("data", lambda: glob.glob(os.path.join(self.target, ".*", ".*", "bulk")))
            with open(os.path.join(self.control, "ask"), "w"):
                os.kill(run.pid, signal.SIGTERM)
            self.assertEqual(143, run.finish().status)
        with self.opened(self.target, 2) as env:
            self.assertIn("resuming", self.transfer(env=env).stderr)
        self.assertComplete(self.backup_path(name), self.snapshot_path(name))

    def test_a_restore(self):
        name, = self.take(1)
        self.transfer()
        support.delete(self.snapshot_path(name))
        into = os.path.join(self.source_disk.path, "restored")
        os.mkdir(into)
        with self.opened(into, 2) as env:
            self.run_program("restore", self.backup_path(name), into, env=env)
        self.assertTreesEqual(self.backup_path(name), os.path.join(into, name))
        self.assertEqual([name], os.listdir(into))

    def test_what_it_builds_on_stays(self):
        """Another run sees no partial yet, but the record: it deletes neither the base, nor what has begun."""
        base, name = self.name(1), self.name(2)
        self.take(1)
        self.transfer()
        self.take(2)
        run = self.start_backup("-S", env=support.gate("receive"))
        held = run.met_at_gate("receive")
        snapshot(self.backup_path(base), self.backup_path(self.name(9)))
        for options in ((), ("--partials-older-than", "0s")):
            self.run_program("prune", "-n", "1", *options, self.target)
            self.assertIn(base, names(self.target))
            self.assertIn(program.begun_name(name), support.hidden(self.target))
        support.delete(self.backup_path(self.name(9)))
        support.go_on(held)
        self.assertEqual(0, run.finish().status)
        self.assertBackedUp([base, name])

    def test_it_is_listed_from_its_beginning(self):
        """Nothing of it can be seen but the folder that it is received in."""
        name, = self.take(1)
        run = self.start_backup("-S", env=support.gate("receive"))
        held = run.met_at_gate("receive")
        self.assertIn(program.begun_name(name), support.hidden(self.target))
        for places in ([self.source, self.target], [self.target]):
            found = json.loads(self.run_program("list", "--json", *places).stdout)["locations"][-1]["snapshots"]
            self.assertEqual([(program.partial_name(name), "partial")], [(one["name"], one["state"]) for one in found])
            self.assertIn("1 partial", self.run_program("list", *places).stdout)
        self.assertIn("it is partial", self.run_program("verify", self.source, self.target, status=1).stdout)
        support.go_on(held)
        self.assertEqual(0, run.finish().status)
        self.assertBackedUp([name])

    def test_backups_received_each_way_are_one_chain(self):
        """Where nobody else may enter, as anywhere before, what was received is the backup itself."""
        for day, mode in enumerate((0o700, 0o700, 0o755, 0o700), 1):
            os.chmod(self.target, mode)
            self.write("more", str(day))
            self.take(day)
            self.assertEqual(day > 1, "incrementally" in self.transfer().stderr)
        found = [subvolume(self.backup_path(self.name(day))) for day in (1, 2, 3, 4)]
        self.assertEqual([True, False, True], [
            one.uuid == following.parent_uuid for one, following in zip(found, found[1:])])
        for day in (1, 2, 3, 4):
            self.assertComplete(self.backup_path(self.name(day)), self.snapshot_path(self.name(day)))
        self.run_program("verify", self.source, self.target)
        self.run_program("prune", "-n", "2", self.target)
        self.assertBackedUp([self.name(3), self.name(4)])


# The program, killed at the Nth of those steps of a transfer that change something.
KILLED = [support.PYTHON, "-E", "-s", "-c", """
import os, sys
number, sys.path[:0] = int(sys.argv.pop(1)), [os.path.dirname(sys.argv[1])]
sys.argv.pop(0)
import btrfs_backup_ng as program

def step():
    global number
    number -= 1
    if number == 0:
        os.kill(os.getpid(), 9)

def stepping(act):
    def acted(*arguments, **options):
        step()
        try:
            return act(*arguments, **options)
        finally:
            step()
    return acted

for name in ("take_snapshot", "delete_piece", "replace_file", "remove_record", "sync_filesystem", "make_readonly"):
    setattr(program, name, stepping(getattr(program, name)))
for name in ("mkdir", "rename", "rmdir"):
    setattr(os, name, stepping(getattr(os, name)))
sys.exit(program.main())
"""]


class KilledWhileItArrives(PlantedTestCase):

    usual_seconds = 50

    def subvolumes(self):
        return len(support.command("btrfs", "subvolume", "list", "-o", self.target).splitlines())

    def test_at_each_step(self):
        self.take(1)
        self.transfer()
        self.write("more", "more")
        name, = self.take(2)
        for number in range(1, 200):
            with self.subTest(number):
                result = self.start_backup("-S", program=KILLED + [str(number), support.PROGRAM]).finish()
                if result.status == 0:
                    break
                self.assertEqual(-signal.SIGKILL, result.status, result.stderr)
                if name in names(self.target):
                    self.assertComplete(self.backup_path(name), self.snapshot_path(name))
                self.assertEqual(0, self.run_program("verify", self.source, self.target, status=None).status // 2)
                self.transfer()
                self.assertEqual(([], 2), (support.hidden(self.target), self.subvolumes()))
                self.assertComplete(self.backup_path(name), self.snapshot_path(name))
                support.delete(self.backup_path(name))
        self.assertGreater(number, 25)


class DestinationFolder(PlantedTestCase):
    """One that the user may write to: what is planted there changes nothing else, and makes nothing hang."""

    def setUp(self):
        super().setUp()
        os.chown(self.target, USER, USER)
        self.taken = self.take(1)[0]
        self.victim = os.path.join(self.target_disk.path, "victim")
        with open(self.victim, "w", encoding="utf-8") as file:
            file.write("root's")
        os.chmod(self.victim, 0o600)

    def test_links_and_pipes_at_each_name_that_is_written(self):
        at = [".{}.partial{}".format(self.taken, ending) for ending in (
            "", ".json", ".json.new", ".lock")] + [self.taken]
        for name in at:
            for kind, plant in (("link", "ln -s " + self.victim), ("pipe", "mkfifo")):
                with self.subTest(kind, name=name):
                    path = os.path.join(self.target, name)
                    self.assertTrue(as_user("sh", "-ec", plant + ' "$0"', path))
                    result = self.transfer(status=None)
                    self.assertIn(result.status, (0, 1))
                    self.assertEqual(result.status, len(result.errors), result.stderr)
                    with open(self.victim, encoding="utf-8") as file:
                        self.assertEqual("root's", file.read())
                    if os.path.lexists(path) and not os.path.isdir(path):
                        os.unlink(path)
                    for left in names(self.target):
                        support.delete(os.path.join(self.target, left))

    def test_a_record_that_the_user_made_is_not_gone_on_from(self):
        """It is right in all but its owner, who might have put anything into what it vouches for."""
        support.bulk(os.path.join(self.source, "bulk"), 48)
        name, = self.take(2)
        for owner, is_gone_on_from in ((USER, False), (0, True)):
            with self.subTest(owner):
                run = self.start_backup("-S", "--limit", "8M")
                record = os.path.join(self.target, ".{}.partial.json".format(name))
                run.wait_for("data", lambda: any(os.path.exists(os.path.join(self.target, partial, "bulk"))
                                                 for partial in support.partials(self.target)))
                os.kill(run.pid, signal.SIGTERM)
                self.assertEqual(143, run.finish().status)
                os.chown(record, owner, owner)
                self.assertEqual(is_gone_on_from, "resuming" in self.transfer().stderr)
                self.assertComplete(self.backup_path(name), self.snapshot_path(name))
                support.delete(self.backup_path(name))

    def check_taken_away_meanwhile(self, disk):
        """The mounts of a confined `btrfs receive` are its own, and do not keep in use what is unmounted."""
        uuid, = re.findall("uuid: (.*)", support.command("btrfs", "filesystem", "show", disk.path))
        run = self.start_backup("-S", env=support.gate("receive"))
        held = run.met_at_gate("receive")
        disk.unmount()
        self.assertTrue(support.wait_until(lambda: not os.path.exists("/sys/fs/btrfs/" + uuid)))
        support.go_on(held)
        self.assertEqual(0, run.finish().status)
        self.assertBackedUp([self.taken])

    def test_another_disk_can_be_taken_away_meanwhile(self):
        self.check_taken_away_meanwhile(self.disk("128M"))

    def test_a_disk_below_the_destination_can_be_taken_away_meanwhile(self):
        """What is mounted on the destination's own filesystem."""
        inner = os.path.join(self.target_disk.path, "usb")
        os.mkdir(inner)
        self.check_taken_away_meanwhile(self.disk("128M", at=inner))

    def test_one_that_is_mounted_where_mounts_are_not_shared(self):
        """As without systemd: there nothing tells other namespaces that it was unmounted."""
        private = os.path.join(self.source_disk.path, "private")
        os.makedirs(os.path.join(private, "usb"))
        support.command("mount", "--bind", private, private)
        self.addCleanup(support.command, "umount", "-l", private)
        support.command("mount", "--make-private", private)
        self.check_taken_away_meanwhile(self.disk("128M", at=os.path.join(private, "usb")))

    def test_where_temporary_files_are_on_a_disk_of_their_own(self):
        """What is seen of the destination is mounted there."""
        disk = self.disk("128M")
        run = self.start_backup("-S", env=dict(support.gate("receive"), TMPDIR=disk.path))
        held = run.met_at_gate("receive")
        self.assertTrue(os.listdir(disk.path))
        support.go_on(held)
        self.assertEqual(0, run.finish().status)
        self.assertBackedUp([self.taken])

    def test_what_a_user_mounts_meanwhile_is_not_seen(self):
        """As with FUSE, in what a user owns: links could be followed there."""
        run = self.start_backup("-S", env=support.gate("receive"))
        held, = run.met_at_gate("receive")
        folder = os.path.join(self.target, "theirs")
        os.mkdir(folder)
        support.command("mount", "-t", "tmpfs", "none", folder)
        self.addCleanup(support.unmount, folder)
        seen = support.command("nsenter", "--mount", "--target", str(held), "cat", "/proc/self/mounts")
        self.assertEqual([], re.findall(r"^\S+ (?!{})\S*/theirs ".format(self.target_disk.path), seen, re.MULTILINE))
        support.go_on([held])
        self.assertEqual(0, run.finish().status)

    def test_a_link_in_place_of_what_is_received(self):
        """Before it begins: what comes then is written nowhere else."""
        victims = os.path.join(self.target_disk.path, "victims")
        os.mkdir(victims)
        for folder in (victims, self.source):
            with open(os.path.join(folder, "victim"), "w", encoding="utf-8") as file:
                file.write(folder)
        self.transfer()
        name, = self.take(2)
        before = support.tree(victims)
        run = self.start_backup("-S", env=support.gate("receive"))
        held, = run.met_at_gate("receive")
        swap = 'cd "$0"; [ ! -e "$1" ] || mv "$1" aside; ln -s "$2" "$1"'
        for at in (program.begun_name(name), program.partial_name(name)):
            self.assertTrue(as_user("sh", "-ec", swap, self.target, at, victims))
        os.kill(held, signal.SIGCONT)
        result = run.finish()
        self.assertIn(result.status, (0, 1), result.stderr)
        self.assertTreesEqual(before, victims)

    def check_a_link_meanwhile(self, **how):
        """While an increment begins as a snapshot of what is before it, in which the user has a folder of his own."""
        os.chown(self.target, 0, 0)
        os.chmod(self.target, 0o755)
        os.chown(self.source, 0, 0)
        inner = os.path.join(self.source, "theirs")
        os.mkdir(inner)
        os.chown(inner, USER, USER)
        self.write("theirs/data", "first")
        self.take(2)
        self.transfer()
        self.write("theirs/data", "second")
        name, = self.take(3)
        plant = ("setpriv --reuid {0} --regid {0} --clear-groups sh -c 'for d in .*.partial .*.begun/.*; do (cd "
                 "$d/theirs && mv data aside && ln -s {1} data && echo planted >&2); done'")
        plant = plant.format(USER, self.victim)
        result = self.transfer(env=fake("btrfs", paused_receive(self.target, plant)), **how)
        with open(self.victim, encoding="utf-8") as file:
            self.assertEqual("root's", file.read())
        self.assertNotIn("planted", result.stderr)
        self.assertComplete(self.backup_path(name), self.snapshot_path(name))
        self.assertEqual([], support.hidden(self.target))

    def test_a_link_in_what_others_may_enter_while_it_begins(self):
        self.check_a_link_meanwhile()

    def test_what_others_may_enter_where_the_kernel_cannot_help(self):
        """As in a Python without ctypes."""
        self.check_a_link_meanwhile(program=UNCONFINED)

    def restored_increment(self):
        """A backup to restore, its parent in the user's home, and where to; the user's script that exchanges that."""
        os.chown(self.target, 0, 0)
        os.mkdir(os.path.join(self.source, "theirs"))
        self.write("theirs/data", "first")
        parent, = self.take(2)
        self.write("theirs/data", "the user's")
        name, = self.take(3)
        self.transfer()
        support.delete(self.snapshot_path(name))
        decoy = create(os.path.join(self.source, "decoy"))
        os.mkdir(os.path.join(decoy, "theirs"))
        os.symlink(self.victim, os.path.join(decoy, "theirs", "data"))
        os.chown(decoy, USER, USER)
        into = os.path.join(self.source_disk.path, "restored")
        os.mkdir(into, 0o700)
        return name, parent, into, "mv {0} aside; mkdir -p {0}/snapshots; mv decoy {0}/snapshots/{1}".format(
            DEFAULT, parent)

    def test_a_parent_in_the_users_reach_is_begun_on_as_a_copy(self):
        """For `btrfs receive` goes to it by a path, which it finds before."""
        name, parent, into, exchange = self.restored_increment()
        run = self.start("restore", self.backup_path(name), into, env=support.gate("receive"))
        held = run.met_at_gate("receive")
        with open("/proc/{}/cmdline".format(next(iter(held)))) as words:
            self.assertIn(program.PrivateFolder.PREFIX, words.read())  # links are not followed: it clones by the path
        copy, = glob.glob(os.path.join(into, program.begun_name(name), ".*"))
        self.assertEqual(subvolume(self.snapshot_path(parent)).uuid, subvolume(copy).parent_uuid)
        self.assertEqual((0, 0o700), (os.stat(copy).st_uid, stat.S_IMODE(os.stat(copy).st_mode)))
        self.as_user(exchange)
        support.go_on(held)
        self.assertEqual(0, run.finish().status)
        self.assertTreesEqual(self.backup_path(name), os.path.join(into, name))
        self.assertEqual([name], os.listdir(into))

    def test_another_subvolume_in_the_place_of_the_parent(self):
        """Nothing is begun on it, wherever it came there after the look at it."""
        name, parent, into, exchange = self.restored_increment()
        path = self.snapshot_path(parent)
        expected = program.ExpectedStream(
            name, str(uuid.uuid4()), None, 0, 0, 0o755, subvolume(path).uuid, parent)
        self.as_user(exchange)
        for base in (path, self.other):  # where others decide what is there, and where none but root does
            partial = program.Partial(into, expected)
            with self.assertRaisesRegex(program.BackupError, "was replaced meanwhile"):
                partial.begin_closed(base)
            partial.release()
        self.assertEqual([], os.listdir(into))

    def test_what_a_beginning_left_goes_though_its_snapshot_is_gone(self):
        """Of a run that was killed, also by a power failure, which may take its record: recovery clears it, as do prune
        and, in words, doctor."""
        self.transfer()
        name, = self.take(2)
        for clear in ("recovery", "prune"):
            with self.subTest(clear):
                closed = os.path.join(self.target, program.begun_name(name))
                os.mkdir(closed, 0o700)
                for piece in (0, 1, 2):  # the copy, and what is just being, or has been received
                    path = os.path.join(closed, program.partial_name(name, piece))
                    snapshot(self.backup_path(self.taken), path, readonly=piece == 2)
                if clear == "recovery":
                    support.write_locks(self.snapshots, {name: {"locks": [self.target]}})
                    support.delete(self.snapshot_path(name))
                    self.transfer()
                    self.assertEqual({}, support.read_locks(self.snapshots))
                else:
                    found = self.run_program("doctor", self.source, self.target, status=1)
                    self.assertIn(program.begun_name(name) + " was left by a broken transfer", found.stdout)
                    result = self.run_program("prune", "-n", "9", "--partials-older-than", "1d", self.target)
                    self.assertIn("deleted " + program.begun_name(name), result.stderr)
                self.assertEqual([], [left for left in support.hidden(self.target) if ".partial" in left])

    def test_what_a_beginning_left_goes_where_an_older_release_has_completed_the_backup(self):
        """It knew nothing of it, and took the lock away."""
        self.transfer()
        for day, is_gone in ((2, False), (3, True)):
            with self.subTest(is_gone=is_gone):
                name, = self.take(day)
                self.transfer()
                closed = os.path.join(self.target, program.begun_name(name))
                os.mkdir(closed, 0o700)
                snapshot(self.backup_path(self.taken), os.path.join(closed, program.partial_name(name)), readonly=False)
                if is_gone:
                    support.delete(self.snapshot_path(name))
                self.transfer()
                self.assertEqual([], [left for left in support.hidden(self.target) if ".partial" in left])

    def test_what_stands_where_an_increment_would_begin(self):
        """What a killed run has left of its own goes, what is another's stays, and the run says so."""
        self.transfer()
        name, = self.take(2)
        begun = os.path.join(self.target, program.begun_name(name))
        os.mkdir(begun)
        other = create(os.path.join(begun, "other"))
        left = create(os.path.join(begun, program.partial_name(name, 0)))
        self.assertIn("not empty", self.transfer(status=1).stderr)
        self.assertFalse(os.path.exists(left))
        result = self.run_program("prune", "-n", "9", "--partials-older-than", "1d", self.target, status=1)
        self.assertIn("not empty", result.stderr)
        self.assertNotIn("deleted", result.stderr)
        self.assertNotIn(program.partial_lock_name(name), os.listdir(self.target))
        self.assertTrue(support.is_subvolume(other))
        support.delete(other)
        complete = snapshot(self.backup_path(self.taken), left)  # read-only, as nothing is that has only begun
        self.assertIn("not empty", self.transfer(status=1).stderr)
        support.delete(complete)
        self.transfer()
        self.assertEqual([], [left for left in support.hidden(self.target) if ".partial" in left])

    def test_what_a_name_leads_to_when_it_is_deleted(self):
        """The user changes names between the looks of `btrfs`, which finds the path of what it is given first."""
        other = create(os.path.join(self.target, "other"))
        self.transfer()
        self.take(2)
        self.transfer("-n", "1", env=self.slow_btrfs(self.target, "mv {0} aside; mv other {0}".format(
            self.taken)))
        self.assertEqual(sorted([self.name(2), "other"]), names(self.target))
        self.assertTrue(support.is_subvolume(other))

    def test_a_link_in_place_of_a_folder_that_was_looked_at(self):
        """Nothing is written, renamed or deleted where it leads."""
        host = program.LocalHost(program.Events())
        partial = program.partial_name(self.taken)
        victims = os.path.join(self.target_disk.path, "victims")
        os.mkdir(victims)
        raw = program.RawBackup(self.taken, self.taken + ".btrfs", str(uuid.uuid4()), None, None, 1, 1, "0" * 64, 1,
                                "0" * 64, (), 0, 0, 0o755)
        for name, text in ((raw.file, "x"), (raw.file + ".json", program.format_sidecar(raw)), (partial, "x"),
                           (partial + ".json", "{}")):
            with open(os.path.join(victims, name), "w", encoding="utf-8") as file:
                file.write(text)
        before = support.tree(victims)
        os.rmdir(self.target)
        os.symlink(victims, self.target)
        expected = program.ExpectedStream(self.taken, raw.uuid, None, 0, 0, 0o755)
        other = raw._replace(name=self.name(2), file=self.name(2) + ".btrfs")
        for call in (
                lambda: host.claim(self.target, program.Claim("other", (), ())),
                lambda: host.change_locks(self.target, [program.LockChange(self.taken, "/b")], []),
                lambda: program.Partial(self.target, expected).take_lock(),
                lambda: program.Partial(self.target, expected).give_name(program.Subvolume(partial, raw.uuid)),
                lambda: program.remove_record(self.target, self.taken),
                lambda: host.open_raw_receive(self.target, self.name(3), False).end(),
                lambda: host.open_raw_send(self.target, raw.file).end(),
                lambda: host.publish_raw(self.target, other),
                lambda: host.delete_raw(self.target, [program.raw_subvolume(raw)])):
            with contextlib.suppress(program.BackupError, OSError):
                call()
            self.assertTreesEqual(before, victims)

    def test_a_link_of_the_users_on_the_way(self):
        inner = os.path.join(self.target, "inner")
        self.assertTrue(as_user("ln", "-s", self.other_snapshots, inner))
        result = self.transfer("-n", "1", to=[inner], status=1)
        self.assertErrorSays(result, inner + " is a link that belongs to another user", "name the folder itself")
        self.assertOtherUntouched()
        for path in (inner, os.path.relpath(inner, support.scratch_folder())):  # up from where it leads to
            result = self.run_program("list", path + "/../snapshots", status=1)
            self.assertErrorSays(result, inner + " is a link that belongs to another user")


# What the user's process does while root's run works: it changes names, as fast as it can, on what root will use.
RESTLESS = """
import os, random, sys
source, target, name, victim, other, seed = sys.argv[1:]
random.seed(int(seed))
state = os.path.join(source, ".btrfs-backup-ng")
while True:
    path = random.choice([state, os.path.join(state, "snapshots")] + [os.path.join(target, one) for one in names])
    try:
        if random.random() < 0.5:
            os.rename(path, path + "-gone")
            os.symlink(random.choice([victim, other, os.path.dirname(victim), "nowhere"]), path)
        else:
            os.unlink(path)
            os.rename(path + "-gone", path)
    except OSError:
        pass
"""


class AtRandom(PlantedTestCase):
    """Anything at any name and at every step of the way, before root's run and while it works.

    TORTURE=N in the environment: N runs.
    """

    RUNS = int(os.environ.get("TORTURE") or 5)

    def setUp(self):
        super().setUp()
        for name in ["victim", "new"] + ["file%d" % number for number in range(100)]:
            self.write(name, "the user's")
        self.backup()
        os.chown(self.target, USER, USER)
        self.backup_name, self.state = names(self.target)[0], os.stat(os.path.join(self.source, DEFAULT)).st_ino
        self.victims = os.path.join(self.target_disk.path, "victims")
        os.mkdir(self.victims)
        self.victim = os.path.join(self.victims, "victim")
        for path, owner in ((self.victim, 0), (os.path.join(self.victims, "other"), 1001)):
            with open(path, "w", encoding="utf-8") as file:
                file.write("{}")
            os.chown(path, owner, owner)
            os.chmod(path, 0o666 if owner else 0o600)
        self.others = support.tree(self.other), support.tree(self.victims), self.inodes()

    def inodes(self):
        """What would show that a file was written anew, though with the same content."""
        found = [os.stat(os.path.join(self.victims, name)) for name in sorted(os.listdir(self.victims))]
        return [(status.st_ino, status.st_mtime_ns, status.st_ctime_ns if status.st_nlink == 1 else 0)
                for status in found], sorted(os.listdir(self.other_snapshots))

    def places(self):
        notes = [".outstanding_transfers", ".destinations.json", ".home.lock", ".home.source"]
        partial = [".{}.partial{}".format(self.backup_name, end) for end in ("", ".json", ".lock")]
        ours = [os.path.join(self.target, name + end) for name in notes + partial for end in ("", ".new")]
        state = os.path.join(self.source, DEFAULT)
        return ours + [os.path.join(self.target, self.backup_name)] + [state] * 4 + [self.snapshots] * 4 + [
            os.path.join(self.snapshots, name) for name in notes + [self.backup_name]]

    def plant(self, rng, path):
        aims = [self.victim, self.victims, self.other, self.other_snapshots, self.victims + "/new", "."]
        lock = '{"%s": {"locks": ["shell://touch %s/ran"]}}' % (self.backup_name, self.victims)
        content = rng.choice(["", "{}", "[1]", lock])
        script = rng.choice(["ln -s '{}' \"$0\"".format(rng.choice(aims)), 'mkfifo "$0"', 'mkdir "$0"',
                             "ln '{}' \"$0\"".format(rng.choice(aims)), "printf %s '{}' > \"$0\"".format(content),
                             "printf %s '{}' > \"$0\"; chmod {} \"$0\"".format(content, rng.choice(["0", "777"])),
                             'mkdir "$0" && mkdir "$0/snapshots" && mkfifo "$0/snapshots/.outstanding_transfers"',
                             "python3 -c 'import socket, sys; socket.socket(1).bind(sys.argv[1])' \"$0\""])
        move = 'if [ -e "$0" ]; then mv "$0" "$0-gone"; fi; '
        as_user("sh", "-c", move + script, path)
        return script

    def put_back(self):
        """The folders as they were; what is left of the user's goes."""
        found = {os.lstat(os.path.join(self.source, name)).st_ino: name for name in os.listdir(self.source)}
        for name in os.listdir(self.source):
            if name.startswith(DEFAULT) and name != found[self.state]:
                remove(os.path.join(self.source, name))
        os.rename(os.path.join(self.source, found[self.state]), os.path.join(self.source, DEFAULT))
        for name in os.listdir(self.target):
            remove(os.path.join(self.target, name))

    def arguments(self, rng):
        options = [["-S"], ["-S", "-N", "1"], ["-S", "-N", "1", "-n", "1"], ["-S", "--locked-destinations"]]
        if rng.random() < 0.2:
            return ["prune", "-n", "1", "-p", "home", self.target]
        return rng.choice(options) + ["-p", "home", "--stall-timeout", "10", self.source, self.target]

    def test_nothing_of_others_changes_and_nothing_hangs(self):
        outcomes = {0: 0, 1: 0}
        for number in range(self.RUNS):
            seed = "{}-{}".format(support.SEED, number)
            rng = random.Random(seed)
            planted = [(path, self.plant(rng, path)) for path in rng.sample(self.places(), rng.choice((0, 0, 1, 1, 2)))]
            argv = self.arguments(rng)
            with self.subTest(seed, argv=argv, planted=planted), self.restless(rng.random() < 0.5, number):
                result = self.run_program(*argv, status=None)
                self.assertIn(result.status, (0, 1), result.stderr)
                self.assertEqual(result.status == 1, bool(result.errors), result.stderr)
                outcomes[result.status] += 1
                if sum(outcomes.values()) % 100 == 0:
                    print("{} runs so far".format(sum(outcomes.values())), flush=True)
                self.assertTreesEqual(self.others[0], self.other)
                self.assertTreesEqual(self.others[1], self.victims)
                self.assertEqual(self.others[2], self.inodes())
            self.put_back()
        print("{} runs, {} of which ended in errors".format(self.RUNS, outcomes[1]))

    @contextlib.contextmanager
    def restless(self, at_work, seed):
        """A process of the user's that renames what root works with."""
        argv = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "python3", "-c", RESTLESS,
                self.source, self.target, self.backup_name, self.victim, self.other_snapshots, str(seed)]
        process = subprocess.Popen(argv, stderr=subprocess.DEVNULL) if at_work else None
        try:
            yield
        finally:
            if process is not None:
                process.kill()
                process.wait()


class InPlace(PlantedTestCase):
    """A restore in place, of a backup whose folders a user or another machine has led elsewhere."""

    def assertRestored(self, planted):
        self.as_user(planted)
        name = self.name(7)
        support.snapshot(self.source, os.path.join(self.source_disk.path, name))
        support.send_receive(os.path.join(self.source_disk.path, name), self.target)
        remove(os.path.join(self.source, DEFAULT))
        support.write_locks(self.other_snapshots, {self.name(2): {"locks": ["/absent"], "parent_locks": []}})
        before = support.listing(self.other)
        result = self.run_program("restore", "--name", name, self.target, "--in-place", self.source, status=1)
        self.assertErrorSays(result, "is a link or not a folder in the backup", "-f with a folder outside")
        self.assertUnchanged(before, self.other)

    def test_a_link_to_anothers_snapshots_in_the_backup(self):
        self.assertRestored("mkdir {0}; ln -s {1} {0}/snapshots".format(DEFAULT, self.other_snapshots))

    def test_a_link_to_anothers_folder_in_the_backup(self):
        self.assertRestored("ln -s {1} {0}".format(DEFAULT, os.path.join(self.other, DEFAULT)))

    def test_a_lock_in_the_backup_or_of_the_users(self):
        """It would name a command that root's next run with --locked-destinations runs."""
        owned = os.path.join(support.scratch_folder(), "owned")
        os.makedirs(self.snapshots)
        name = self.name(7)
        for is_gone in (True, False):
            with self.subTest(is_gone=is_gone):
                support.write_locks(self.snapshots, {name: {"locks": ["shell://touch " + owned], "parent_locks": []}})
                if is_gone:
                    support.snapshot(self.source, os.path.join(self.source_disk.path, name))
                    support.send_receive(os.path.join(self.source_disk.path, name), self.target)
                    remove(self.source)
                else:
                    os.chown(os.path.join(self.snapshots, ".outstanding_transfers"), USER, USER)
                self.run_program("restore", "--name", name, self.target, "--in-place", self.source)
                self.assertEqual({}, support.read_locks(self.snapshots))


class Log(PlantedTestCase):

    def test_what_the_user_put_in_the_place_of_the_log(self):
        """A fifo stops no run, and a link leads to no file of root's."""
        victim, log = os.path.join(self.source_disk.path, "victim"), os.path.join(self.source, "log")
        with open(victim, "w", encoding="utf-8"):
            pass
        for planted in ("mkfifo log", "ln -s {} log".format(victim), "mkfifo there; ln -s there log"):
            with self.subTest(planted):
                self.as_user(planted)
                result = self.backup("-T", "--log-json", log, status=1)
                self.assertErrorSays(result, "cannot write " + log, "it is not a regular file")
                self.assertEqual(0, os.path.getsize(victim))
                remove(log)
        self.backup("-T", "--log-json", log)
        self.assertGreater(os.path.getsize(log), 0)


if __name__ == "__main__":
    unittest.main()
