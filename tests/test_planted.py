"""Folders in others' reach: what an ordinary user puts on the way that root takes is never followed."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support
from support import create, names, snapshot

import btrfs_backup_ng as program

USER = 65534
DEFAULT = ".btrfs-backup-ng"


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


# A btrfs that takes its time between the look at the path of what it deletes and its use.
SLOW = """#!/bin/sh
if [ "$1 $2" = "subvolume delete" ]; then
    path=$(readlink -f "$3")
    (cd '{folder}'; {script})
    set -- "$1" "$2" "$path"
fi
exec {btrfs} "$@"
"""


class PlantedTestCase(support.BackupTestCase):
    """The source is a user's home, beside that of another, whose backups are made with the same prefix."""

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
        """The environment where `script` is run in a folder within each `btrfs subvolume delete`."""
        programs = os.path.join(self.source_disk.path, "programs")
        os.mkdir(programs)
        with open(os.path.join(programs, "btrfs"), "w", encoding="utf-8") as file:
            file.write(SLOW.format(btrfs=shutil.which("btrfs"), folder=folder, script=script))
        os.chmod(file.name, 0o755)
        return {"PATH": programs + ":" + os.environ["PATH"]}

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
        result = self.assertRefused("{} belongs to user 65534, so its snapshots could be somebody else's".format(
            os.path.join(self.source, DEFAULT)), "-f {}/.snapshots/home".format(self.source_disk.path))
        option = result.errors[0].rpartition(" ")[2]
        support.next_second()  # its name would be that of the backup which the first run made
        self.backup("-f", option)
        self.assertEqual(1, len(names(option)))
        self.assertEqual([], os.listdir(self.snapshots))

    def test_a_link_to_anothers(self):
        self.as_user("mkdir {0}; ln -s {1} {0}/snapshots".format(DEFAULT, self.other_snapshots))
        self.assertRefused("is a link of another user's")

    def test_a_link_of_roots_below_the_source(self):
        """Whoever may write in the source can move it to where it leads elsewhere."""
        os.makedirs(os.path.join(self.source_disk.path, "a"))
        os.symlink(os.path.join(self.source_disk.path, "a"), os.path.join(self.source, DEFAULT))
        self.assertRefused("is reached over a link")

    def test_folders_that_others_may_write_to(self):
        for mode in (0o777, 0o1777, 0o775):
            with self.subTest(oct(mode)):
                os.makedirs(self.snapshots, exist_ok=True)
                os.chown(self.snapshots, 0, USER)
                os.chmod(self.snapshots, mode)
                self.assertRefused("can be written by others")

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
        self.assertErrorSays(self.backup(status=1), "link of another user's")

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
            with self.assertRaisesRegex(program.BackupError, "has become another folder meanwhile"):
                host.look(self.snapshots)

    def test_locks_that_the_user_made_run_no_command(self):
        self.as_user("mkdir -p {0}/snapshots; echo '{{\"{1}\": {{\"locks\": [\"shell://touch {2}/ran\"]}}}}' > "
                     "{0}/snapshots/.outstanding_transfers".format(DEFAULT, self.name(1), self.target))
        self.assertRefused("belongs to user", options=("--locked-destinations",))
        self.assertEqual([], os.listdir(self.target))


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
                    result = self.transfer(status=None, timeout=20)
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
                run.wait_for("data", lambda: support.partials(self.target) and os.path.exists(os.path.join(
                    self.target, support.partials(self.target)[-1], "bulk")))
                os.kill(run.pid, signal.SIGTERM)
                self.assertEqual(143, run.finish().status)
                os.chown(record, owner, owner)
                self.assertEqual(is_gone_on_from, "taking up" in self.transfer().stderr)
                self.assertComplete(self.backup_path(name), self.snapshot_path(name))
                support.delete(self.backup_path(name))

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
        partials = support.partials(self.target) or [".{}.partial".format(name)]
        swap = 'cd "$0"; [ ! -e "$1" ] || mv "$1" aside; ln -s "$2" "$1"'
        for partial in partials:
            self.assertTrue(as_user("sh", "-ec", swap, self.target, partial, victims))
        os.kill(held, signal.SIGCONT)
        result = run.finish()
        self.assertIn(result.status, (0, 1), result.stderr)
        self.assertTreesEqual(before, victims)

    def test_what_a_name_leads_to_when_it_is_deleted(self):
        """The user changes names between the looks of `btrfs`, which finds the path of what it is given first."""
        other = create(os.path.join(self.target, "other"))
        self.transfer()
        self.take(2)
        self.transfer("-n", "1", env=self.slow_btrfs(self.target, "mv {0} aside; mv other {0}".format(
            self.taken)))
        self.assertEqual(sorted([self.name(2), "other"]), names(self.target))
        self.assertTrue(support.is_subvolume(other))

    def test_a_link_of_the_users_on_the_way(self):
        inner = os.path.join(self.target, "inner")
        self.assertTrue(as_user("ln", "-s", self.other_snapshots, inner))
        result = self.transfer("-n", "1", to=[inner], status=1)
        self.assertErrorSays(result, inner + " is a link of another user's", "name the folder that is meant")
        self.assertOtherUntouched()


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
            seed = "{}-{}".format(os.environ.get("SEED", "0"), number)
            rng = random.Random(seed)
            planted = [(path, self.plant(rng, path)) for path in rng.sample(self.places(), rng.choice((0, 0, 1, 1, 2)))]
            argv = self.arguments(rng)
            with self.subTest(seed, argv=argv, planted=planted), self.restless(rng.random() < 0.5, number):
                result = self.run_program(*argv, status=None, timeout=60)
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
        self.assertErrorSays(result, "is a link or no folder in the backup", "-f with a folder outside")
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
                self.assertErrorSays(result, "cannot write " + log, "it is no plain file")
                self.assertEqual(0, os.path.getsize(victim))
                remove(log)
        self.backup("-T", "--log-json", log)
        self.assertGreater(os.path.getsize(log), 0)


if __name__ == "__main__":
    unittest.main()
