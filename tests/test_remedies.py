"""Remedies, typed as they are printed: each helps where it was given, and does no harm."""

import json
import os
import re
import shlex
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from fakes import fake
from support import (
    PROGRAM_ARGV,
    BackupTestCase,
    bulk,
    command,
    create,
    names,
    partials,
    read_locks,
    scratch_folder,
    write_locks,
)

from btrfs_backup_ng import Task, forget_command, quoted, source_command

# what begins a command that stands at the end of a remedy or of a hint
COMMAND = re.compile(r"(?:^|: |then )((?:btrfs|btrfs-backup-ng|rm|modprobe) \S.*)$", re.MULTILINE)


def program_on_path():
    """A PATH on which btrfs-backup-ng is the program under test."""
    words = " ".join(map(shlex.quote, PROGRAM_ARGV))
    return fake("btrfs-backup-ng", "exec " + words + ' "$@"\n')["PATH"]


class Quoting(unittest.TestCase):

    def test_a_shell_takes_it_for_the_same_word(self):
        words = ["plain", "my disk", "it's", "$HOME", "a\\b", "tab\there", "caf\u00e9", os.fsdecode(b"\xff\xfe%s"),
                 "-n", "", "*", "\x1b[31m", "%s\x01\\n'\""]
        line = "printf '%s\\0' " + " ".join(map(quoted, words))
        self.assertTrue(line.isprintable())
        said = subprocess.check_output(["sh", "-c", os.fsencode(line)])
        self.assertEqual([os.fsencode(word) for word in words], said.split(b"\0")[:-1])

    def test_a_command_on_a_source_says_which(self):
        task = Task(source="/my home", snapshot_folder="/snap shots", ssh_options=("Port=22",), ssh_sudo=True)
        self.assertEqual("btrfs-backup-ng -S -x -p 'a b' -f '/snap shots' --ssh-opt=Port=22 --ssh-sudo '/my home'",
                         source_command(task, "a b", ["-x"]))
        self.assertEqual("btrfs-backup-ng -S -T --forget-destination /b -p '' -- -odd",
                         forget_command(Task(source="-odd"), "", "/b"))


class RemedyTestCase(BackupTestCase):

    def doctor(self, *arguments, status=1):
        """{check: [finding]} of what is a problem."""
        result = self.run_program("doctor", "--json", *arguments, status=status)
        found = {}
        for check in json.loads(result.stdout)["checks"]:
            if check["state"] == "problem":
                found.setdefault(check["name"], []).append(check)
        return found

    def remedy(self, name, *arguments):
        """The command in the remedy of the one problem, which is of check `name`."""
        found = self.doctor(*(arguments or (self.source, self.target)))
        self.assertEqual([name], list(found), found)
        check, = found[name]
        return self.command_in(check["remedy"])

    def command_in(self, text):
        match = COMMAND.search(text)
        self.assertIsNotNone(match, "no command in: " + text)
        return match.group(1)

    def type(self, line, status=0):
        """Types a command as it was printed."""
        done = subprocess.run(["sh", "-c", os.fsencode(line)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, env=dict(os.environ, PATH=program_on_path()))
        self.assertEqual(status, done.returncode, line + "\n" + os.fsdecode(done.stdout))

    def hint(self, result):
        """The command in the hint of the one error."""
        self.assertErrorSays(result)
        return self.command_in(result.errors[0])


class Doctor(RemedyTestCase):

    def test_a_destination_that_will_not_come_back(self):
        """A mistyped one leaves a lock, which no run clears: giving it up sends and deletes nothing."""
        self.take(1, 2, 3)
        self.transfer()
        wrong = os.path.join(self.target_disk.path, "mis typed")
        write_locks(self.snapshots, {self.name(3): {"locks": [wrong], "parent_locks": []}})
        self.type(self.remedy("locks"))
        self.assertEqual({}, read_locks(self.snapshots))
        self.assertBackedUp([self.name(day) for day in (1, 2, 3)])
        self.assertEqual(3, len(names(self.snapshots)))
        self.assertFalse(os.path.exists(wrong))
        self.assertEqual({}, self.doctor(self.source, self.target, status=0))

    def test_a_broken_transfer_is_never_sent_by_the_remedy(self):
        """Neither what the policy excludes, nor what the run encrypts: the ordinary run goes on with it."""
        self.take(*range(1, 7))
        self.transfer("-n", "2")
        self.take(7)
        write_locks(self.snapshots, {self.name(7): {"locks": [self.target], "parent_locks": []}})
        found, = self.doctor(self.source, self.target)["locks"]
        self.assertIn("again as usual", found["remedy"])
        self.assertNotIn("--locked-destinations", found["remedy"])
        self.type(self.command_in(found["remedy"]))
        self.assertBackedUp([self.name(5), self.name(6)])

    def test_a_lock_that_names_no_place(self):
        self.take(1)
        self.transfer()
        write_locks(self.snapshots, {self.name(1): {"locks": ["what: ever", "ssh://"], "parent_locks": []}})
        for found in self.doctor(self.source, self.target)["locks"]:
            self.type(self.command_in(found["remedy"]))
        self.assertEqual({}, read_locks(self.snapshots))

    def test_a_destination_that_was_not_seen_for_long(self):
        """It keeps a snapshot at the source, until it is given up."""
        self.take(1, 2)
        self.transfer()
        self.target_disk.unmount()
        self.take(3)
        self.run_program("-S", "-T", "-N", "1", "-p", "home", self.source)
        self.assertIn(self.name(2), names(self.snapshots))
        line = self.remedy("notes", self.source)
        self.type(line)
        self.assertEqual({}, self.doctor(self.source, status=0))
        self.run_program("-S", "-T", "-N", "1", "-p", "home", self.source)
        self.assertEqual([self.name(3)], names(self.snapshots))

    def test_partials_with_blanks_in_their_path(self):
        folder = os.path.join(self.target, "my $disk")
        os.mkdir(folder)
        name, = self.take(1)
        self.transfer(to=[folder])
        create(os.path.join(folder, ".home20240109-000000.partial"))
        self.type(self.remedy("partials", self.source, folder))
        self.assertEqual([], partials(folder))
        self.assertEqual([name], names(folder))

    def test_partials_of_stream_files(self):
        folder = os.path.join(self.target, "my raw's")
        os.mkdir(folder)
        self.take(1)
        self.transfer(to=["raw://" + folder])
        path = os.path.join(folder, ".home20240109-000000.partial")
        with open(path, "w"):
            pass
        self.type(self.remedy("partials", self.source, "raw://" + folder))
        self.assertFalse(os.path.exists(path))

    def test_old_partials_in_a_folder_of_backups(self):
        folder = os.path.join(self.target, "raw folder")
        os.mkdir(folder)
        name, = self.take(1)
        self.transfer(to=["raw://" + folder])
        path = os.path.join(folder, ".home20240109-000000.partial")
        with open(path, "w"):
            pass
        os.utime(path, (1e9, 1e9))
        self.type(self.remedy("partials", "raw://" + folder))
        self.assertFalse(os.path.exists(path))
        self.assertIn(name + ".btrfs", os.listdir(folder))

    def test_a_quota_that_is_used_up(self):
        disk = self.disk("512M", at=os.path.join(scratch_folder(), "disk with blanks"))
        bulk(os.path.join(disk.path, "data"), 40)
        for words in ("quota enable", "quota rescan -w", "qgroup limit 41M", "filesystem sync"):
            command("btrfs", *(words.split() + [disk.path]))
        self.type(self.remedy("quotas", self.source, disk.path))
        self.assertEqual({}, self.doctor(self.source, disk.path, status=0))

    def test_errors_of_a_device(self):
        disk = self.disk("256M", at=os.path.join(scratch_folder(), "disk's errors"))
        content = os.urandom(64 << 10)
        with open(disk.path + "/file", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        disk.unmount()
        with open(disk.image, "r+b") as image:
            image.seek(image.read().index(content[:4096]))
            image.write(b"wrong")
        disk.mount()
        with open(disk.path + "/file", "rb") as file, self.assertRaises(OSError):
            file.read()
        line = self.remedy("devices", self.source, disk.path)
        self.type(line, status=3)  # scrub says that there is an error left, and the counters stay
        os.unlink(disk.path + "/file")
        command("btrfs", "filesystem", "sync", disk.path)
        self.type(line)
        self.assertEqual({}, self.doctor(self.source, disk.path, status=0))


class Runs(RemedyTestCase):

    def test_a_destination_that_has_moved(self):
        """Its disk is away, and the folder below is on the source's own filesystem."""
        self.take(1)
        place = os.path.join(self.source_disk.path, "mount point")
        os.mkdir(place)
        command("mount", "--bind", self.target, place)
        self.addCleanup(subprocess.call, ["umount", place], stderr=subprocess.DEVNULL)
        self.transfer(to=[place])
        command("umount", place)
        self.take(2)
        result = self.transfer(to=[place], status=1)
        self.type(self.hint(result))
        self.assertEqual([], os.listdir(place))
        self.transfer(to=[place])
        self.assertEqual([self.name(1), self.name(2)], names(place))

    def test_a_subvolume_that_no_lock_names(self):
        """Both kinds: half-received under the final name, and a partial."""
        for day, form in ((1, "{}"), (2, ".{}.partial")):
            name, = self.take(day)
            path = create(self.backup_path(form.format(name)))
            self.type(self.hint(self.transfer(status=1)))
            self.assertFalse(os.path.exists(path))
            self.transfer()
        self.assertBackedUp([self.name(1), self.name(2)])


if __name__ == "__main__":
    unittest.main()
