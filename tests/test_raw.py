"""raw:// destinations: stream files with sidecars, on any filesystem, compressed and encrypted."""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from typing import Any, Dict, List, Optional
from unittest import mock

import fakes
import remote
import support
from disks import ext4, tmpfs
from support import command, names, read_locks

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import btrfs_backup_ng as program

TORTURE = int(os.environ.get("TORTURE", 0))
COMPRESSORS = {"zstd": ".zst", "lz4": ".lz4", "gzip": ".gz", "xz": ".xz"}
NONE_AND_EACH: List[Optional[str]] = [None, *sorted(COMPRESSORS)]
PARTS = {".zst": ["zstd", "-dcq"], ".lz4": ["lz4", "-dcq"], ".gz": ["gzip", "-dc"], ".xz": ["xz", "-dcq"]}


class Keys:
    """A key pair for gpg in a home of its own, and one for age."""

    def __init__(self):
        self.home = tempfile.mkdtemp(prefix="gpg", dir="/tmp")  # a short path: sockets have little room for theirs
        os.chmod(self.home, 0o700)
        self.env = {"GNUPGHOME": self.home}
        self.identity = os.path.join(self.home, "age.txt")
        command("age-keygen", "-o", self.identity)
        self.age = command("age-keygen", "-y", self.identity).strip()
        self.gpg = "backup@example.org"
        # On elliptic curves: an RSA key takes a second of the processor's time.
        self.run_gpg("--batch", "--passphrase", "", "--quick-generate-key", self.gpg, "future-default", "default",
                     "never")

    def run_gpg(self, *arguments):
        subprocess.run(["gpg", "--quiet"] + list(arguments), env=dict(os.environ, **self.env), check=True,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def close(self):
        subprocess.call(["gpgconf", "--kill", "gpg-agent"], env=dict(os.environ, **self.env),
                        stderr=subprocess.DEVNULL)
        shutil.rmtree(self.home, ignore_errors=True)


class RawTestCase(support.BackupTestCase):

    keys: Any

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.keys = Keys()

    @classmethod
    def tearDownClass(cls):
        cls.keys.close()
        super().tearDownClass()

    def setUp(self):
        super().setUp()
        self.folder = os.path.join(self.target_disk.path, "raw")
        os.mkdir(self.folder)

    @property
    def raw(self):
        return "raw://" + self.folder

    def send(self, *options, **more):
        return self.transfer(*options, to=[self.raw], **dict({"env": self.keys.env}, **more))

    def files(self):
        """All in the folder, but the note that says whose the backups are."""
        return sorted(name for name in os.listdir(self.folder) if not name.endswith(".source"))

    def streams(self):
        return [name for name in self.files() if not name.endswith(".json")]

    def sidecars(self):
        """{name: sidecar} of all there are."""
        found = {}
        for name in self.files():
            if name.endswith(".json") and not name.startswith("."):
                with open(os.path.join(self.folder, name)) as file:
                    sidecar = json.load(file)
                found[sidecar["name"]] = sidecar
        return found

    def plain(self, sidecar):
        """The stream inside of a file, by the ordinary programs."""
        with open(os.path.join(self.folder, sidecar["file"]), "rb") as file:
            data = file.read()
        stem, suffix = os.path.splitext(sidecar["file"])
        while suffix != ".btrfs":
            argv = {".gpg": ["gpg", "--batch", "-qd"], ".age": ["age", "-d", "-i", self.keys.identity]}.get(
                suffix) or PARTS[suffix]
            data = subprocess.run(argv, input=data, stdout=subprocess.PIPE, check=True, stderr=subprocess.DEVNULL,
                                  env=dict(os.environ, **self.keys.env)).stdout
            stem, suffix = os.path.splitext(stem)
        return data

    def receive(self, name, into):
        """A backup by hand: its chain, the full one first."""
        sidecars, chain = self.sidecars(), [name]
        while sidecars[chain[0]]["parent"]:
            chain.insert(0, sidecars[chain[0]]["parent"])
        for link in chain:
            if not os.path.exists(os.path.join(into, link)):
                subprocess.run(["btrfs", "receive", "-q", into], input=self.plain(sidecars[link]), check=True)

    def lengths(self):
        """How many streams each backup takes."""
        sidecars = self.sidecars()
        lengths: Dict[str, int] = {}
        for name in sorted(sidecars):
            lengths[name] = 1 + lengths.get(sidecars[name]["parent"], 0)
        return list(lengths.values())

    def assertSound(self, expected):
        """Each file under a final name is whole and has its sidecar; nothing else is there."""
        sidecars = self.sidecars()
        self.assertEqual(sorted(expected), sorted(sidecars))
        wanted = [s["file"] for s in sidecars.values()]
        self.assertEqual(sorted(wanted + [file + ".json" for file in wanted]), self.files())
        for sidecar in sidecars.values():
            self.assertFileIs(sidecar)
            self.assertIn(sidecar["parent"], [None] + sorted(expected))

    def assertFileIs(self, sidecar):
        with open(os.path.join(self.folder, sidecar["file"]), "rb") as file:
            data = file.read()
        self.assertEqual((sidecar["file_size"], sidecar["file_sha256"]),
                         (len(data), hashlib.sha256(data).hexdigest()))

    def assertRestorable(self, *expected):
        into = self.disk().path
        for name in expected:
            self.receive(name, into)
            self.assertComplete(os.path.join(into, name), self.snapshot_path(name))


class Files(RawTestCase):

    def test_full_and_increments(self):
        churn = support.Churn(self.source, seed=11)
        churn.fill()
        taken = []
        for day in (1, 2, 3):
            taken += self.take(day)
            self.send()
            churn.change()
        self.assertSound(taken)
        self.assertEqual([1, 2, 3], self.lengths())
        self.assertEqual({}, read_locks(self.snapshots))
        self.assertRestorable(*taken)

    def test_the_sidecar_tells_all(self):
        first, second = self.take(1, 2)
        os.chmod(self.source, 0o2751)
        third, = self.take(3)
        self.send("--raw-compress", "zstd")
        for name, parent in ((first, None), (second, first), (third, second)):
            sidecar, of = self.sidecars()[name], support.subvolume(self.snapshot_path(name))
            more = ["-p", self.snapshot_path(parent)] if parent else []
            stream = subprocess.run(["btrfs", "send", "-q"] + more + [self.snapshot_path(name)],
                                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
            self.assertEqual(stream, self.plain(sidecar))
            expected = {
                "name": name, "uuid": of.uuid, "parent": parent,
                "parent_uuid": support.subvolume(self.snapshot_path(parent)).uuid if parent else None,
                "pipeline": ["zstd"], "file": name + ".btrfs.zst", "stream_size": len(stream),
                "stream_sha256": hashlib.sha256(stream).hexdigest(), "source": self.source, "uid": 0, "gid": 0,
                "mode": "0o2751" if name == third else "0o755", "version": 1, "protocol": 1}
            self.assertEqual(expected, {key: sidecar[key] for key in expected})
            self.assertRegex(sidecar["time"], r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
            self.assertLess(abs(sidecar["otime"] / 1e9 - time.time()), 60)
            self.assertFileIs(sidecar)

    def test_again_there_is_nothing_to_do(self):
        taken = self.take(1, 2)
        self.send()
        before = support.listing(self.folder)
        self.assertIn("nothing to do", self.send().stderr)
        self.assertUnchanged(before, self.folder)
        self.assertSound(taken)

    def test_beside_a_folder_on_btrfs_and_a_command_one_send_serves_all(self):
        first, = self.take(1)
        result = self.transfer("-v", "debug", to=[self.target, self.raw, "shell://cat > /dev/null"])
        self.assertEqual(1, result.stderr.count("starting btrfs send"))
        self.assertBackedUp([first])
        self.assertSound([first])

    def test_in_full_with_no_incremental(self):
        self.take(1, 2)
        self.send("-I")
        self.assertEqual([1, 1], self.lengths())

    def test_a_dry_run_writes_nothing(self):
        self.take(1, 2)
        before = support.listing(self.folder, self.source)
        out = self.send("--dry-run", "--raw-compress", "xz").stdout
        self.assertUnchanged(before, self.folder, self.source)
        self.assertIn("send {} in full".format(self.name(1)), out)
        self.assertIn("send {}, incrementally from {}".format(self.name(2), self.name(1)), out)

    def test_one_compression_after_another_in_one_chain(self):
        taken = []
        for day, compressor in enumerate(sorted(COMPRESSORS) + [None], 1):
            taken += self.take(day)
            self.send(*(["--raw-compress", compressor] if compressor else []))
        self.assertEqual([1, 2, 3, 4, 5], self.lengths())
        self.assertRestorable(taken[-1])

    def test_names_of_any_bytes(self):
        self.folder = os.fsdecode(os.path.join(os.fsencode(self.target_disk.path), b"it's a \xff $HOME"))
        os.mkdir(self.folder)
        prefix = os.fsdecode(b"caf\xe9 ")
        for _ in range(2):
            self.run_program("-p", prefix, self.source, self.raw)
            support.next_second()
        self.assertEqual(4, len(self.files()))
        self.assertTrue(all(name.startswith(prefix) for name in self.files()))


class Filters(RawTestCase):
    """Each compressor with each way to encrypt, on ext4 or on tmpfs (TORTURE: on both); restored by hand."""

    usual_seconds = 40

    def check(self, folder, compressor, encryption):
        self.folder = os.path.join(folder, "made")
        os.mkdir(self.folder)
        options, suffix = [], ".btrfs"
        if compressor:
            options += ["--raw-compress", compressor]
            suffix += COMPRESSORS[compressor]
        if encryption:
            options += ["--raw-encrypt", "{}:{}".format(encryption, getattr(self.keys, encryption))]
            suffix += "." + encryption
        names_ = names(self.snapshots)
        self.send(*options)
        self.assertSound(names_)
        self.assertEqual([name + suffix for name in names_], self.streams())
        for file in self.streams():
            with open(os.path.join(self.folder, file), "rb") as content:
                data = content.read()
            if compressor or encryption:
                self.assertFalse(data.startswith(b"btrfs-stream"))
            if encryption:
                self.assertFalse(b".btrfs-backup-ng" in data)
        self.assertRestorable(*names_)

    def test_all(self):
        support.bulk(os.path.join(self.source, "large"), 3)
        self.take(1, 2, 3)
        for number, (compressor, encryption) in enumerate(itertools.product(NONE_AND_EACH, (None, "gpg", "age"))):
            for place in (ext4, tmpfs) if TORTURE else ((ext4, tmpfs)[number % 2],):
                with self.subTest(place=place.__name__, compressor=compressor, encryption=encryption):
                    self.check(place(self), compressor, encryption)


class FailClosed(RawTestCase):
    """Encryption that is asked for and not possible: no byte is written, and the snapshot is there."""

    def refused(self, encryption, *words, **more):
        self.take(1)
        result = self.send("--raw-encrypt", encryption, status=1, **more)
        self.assertErrorSays(result, *words)
        self.assertEqual([], self.files())
        self.assertEqual([self.name(1)], names(self.snapshots))
        return result

    def test_no_such_key(self):
        self.refused("gpg:nobody@example.org", "gpg", "no public key")

    def test_no_keys_at_all(self):
        self.refused("gpg:backup@example.org", "gpg", env={"GNUPGHOME": "/nonexistent"})

    def test_a_recipient_that_is_none(self):
        result = self.refused("age:age1nonsense", "age", "malformed recipient")
        self.assertNotIn("age: age", result.stderr)
        self.assertNotIn("report unexpected", result.stderr)

    def test_a_file_of_recipients_that_is_not_there(self):
        self.refused("age:/nonexistent", "age", "no such file")

    def fake(self, name, script):
        return dict(self.keys.env, **fakes.fake(name, script))

    def test_a_program_that_passes_its_input_on(self):
        self.refused("age:" + self.keys.age, "does not encrypt", env=self.fake("age", "exec cat"))

    def test_a_program_that_writes_nothing(self):
        self.refused("gpg:" + self.keys.gpg, "does not encrypt", env=self.fake("gpg", "exec cat > /dev/null"))

    def test_a_program_that_is_missing(self):
        folder = os.path.join(support.scratch_folder(), "few-{}".format(next(support.Disk.numbers)))
        os.mkdir(folder)
        for name in ("btrfs", "zstd"):
            os.symlink(shutil.which(name) or "", os.path.join(folder, name))
        for name in ("age", "gpg"):
            if any(os.path.exists(os.path.join(place, name)) for place in ("/usr/sbin", "/sbin", "/usr/local/sbin")):
                self.skipTest(name + " is among the system's programs")
        self.refused("age:" + self.keys.age, "program age is not installed", env={"PATH": folder})

    def test_a_compressor_that_does_not(self):
        self.take(1)
        result = self.send("--raw-compress", "xz", status=1, env=self.fake("xz", "cat > /dev/null; echo nonsense"))
        self.assertErrorSays(result, "xz does not decompress")
        self.assertEqual([], self.files())

    def test_a_program_that_fails_in_the_middle(self):
        support.bulk(os.path.join(self.source, "large"), 8)
        self.take(1)
        env = self.fake("gzip", 'case "$*" in *-d*) exec /bin/gzip "$@";; esac\n'
                                'head -c 1000000 > "$0.in"\n'
                                'test $(stat -c %s "$0.in") -lt 1000000 || { echo the disk melted >&2; exit 3; }\n'
                                'exec /bin/gzip -c < "$0.in"\n')
        result = self.send("--raw-compress", "gzip", status=1, env=env)
        self.assertErrorSays(result, "the disk melted")
        self.assertEqual([], self.files())
        self.assertEqual([self.raw], read_locks(self.snapshots)[self.name(1)]["locks"])
        self.send("--raw-compress", "gzip")
        self.assertSound([self.name(1)])

    def test_usage(self):
        for options in (["--raw-compress", "bzip2"], ["--raw-encrypt", "rot13:x"], ["--raw-encrypt", "gpg:"],
                        ["--raw-encrypt", "gpg:--yes"], ["--raw-full-every", "-1"]):
            with self.subTest(options=options):
                self.send(*options, status=2)
        for options in (["--raw-compress", "xz"], ["--raw-encrypt", "gpg:x"], ["--raw-full-every", "3"]):
            with self.subTest(options=options):
                self.assertErrorSays(self.transfer(*options, status=2), "raw://")


class NeverWeaker(RawTestCase):
    """Nothing is written unencrypted where streams of the prefix are encrypted."""

    def encryption(self, method):
        return ["--raw-encrypt", "{}:{}".format(method, getattr(self.keys, method))] if method else []

    def test_each_after_each(self):
        self.take(1)
        every = itertools.product((None, "gpg", "age"), repeat=2)
        for before, after in every if TORTURE else [(None, "gpg"), ("gpg", None), ("age", None), ("age", "gpg")]:
            with self.subTest(before=before, after=after):
                self.folder = os.path.join(self.target_disk.path, "{}-{}".format(before, after))
                os.mkdir(self.folder)
                self.send(*self.encryption(before))
                self.take(2)
                files = self.files()
                is_weaker = before and not after
                result = self.send(*self.encryption(after), status=1 if is_weaker else 0)
                if is_weaker:
                    self.assertErrorSays(result, self.raw, "encrypted", " ".join(self.encryption(before)))
                    self.assertEqual(files, self.files())
                    self.send("--dry-run", status=1)
                    self.send("-T")
                else:
                    self.assertSound([self.name(1), self.name(2)])
                support.delete(self.snapshot_path(self.name(2)))

    def test_after_one_that_was_broken_off(self):
        self.take(1, 2)
        self.send(*self.encryption("age"))
        support.write_locks(self.snapshots, {self.name(2): {"locks": [self.raw]}})
        first, second = (self.sidecars()[self.name(day)]["file"] for day in (1, 2))
        for lost in (second, first + ".json", second + ".json"):  # in the end the first one's name alone tells
            os.unlink(os.path.join(self.folder, lost))
            result = self.backup("-S", "--locked-destinations", to=[], status=1)
            self.assertIn("--raw-encrypt age:", result.stderr)
            self.assertFalse([name for name in self.files() if not name.endswith((".age", ".json"))])

    def test_the_first_of_all_that_was_broken_off(self):
        self.take(1)
        support.write_locks(self.snapshots, {self.name(1): {"locks": [self.raw]}})
        result = self.backup("-S", "--locked-destinations", to=[], status=1)
        self.assertErrorSays(result, self.raw, "encrypted", "as usual")
        self.assertEqual([], self.files())
        self.send(*self.encryption("gpg"))
        self.assertSound([self.name(1)])

    def test_another_prefix_is_another_matter(self):
        self.take(1)
        self.send(*self.encryption("age"))
        self.run_program("-p", "home-plain-", self.source, self.raw)


class Places(RawTestCase):

    def test_it_is_made_on_another_filesystem(self):
        folder = ext4(self)
        self.folder = os.path.join(folder, "a", "b")
        taken = self.take(1)
        self.assertErrorSays(self.send(status=1), "no such destination", "nor is there {}/a".format(folder))
        self.assertNotIn("a", os.listdir(folder))
        os.mkdir(os.path.dirname(self.folder))
        self.send()
        self.assertSound(taken)
        self.assertEqual(0o700, os.stat(self.folder).st_mode & 0o777)

    def test_it_is_not_made_on_the_sources_filesystem(self):
        self.take(1)
        self.folder = os.path.join(self.source_disk.path, "raw")
        self.assertErrorSays(self.send(status=1), "no such destination")
        self.assertFalse(os.path.exists(self.folder))

    def test_it_is_not_made_on_the_root_filesystem(self):
        """Where nothing is mounted, what lies below a mount point is the root's."""
        self.take(1)
        self.folder = "/btrfs-backup-ng-test-{}/raw".format(os.getpid())
        self.addCleanup(shutil.rmtree, os.path.dirname(self.folder), ignore_errors=True)
        self.assertErrorSays(self.send(status=1), "no such destination", "mounted")
        self.assertFalse(os.path.exists(os.path.dirname(self.folder)))

    def test_it_is_not_made_in_memory(self):
        """As /run is, where desktops mount disks."""
        folder = tmpfs(self)
        self.folder = os.path.join(folder, "disk")
        taken = self.take(1)
        for more in ([], ["--dry-run"]):
            self.assertErrorSays(self.send(*more, status=1), "no such destination", folder + " is in memory")
            self.assertEqual([], os.listdir(folder))
        os.mkdir(self.folder)
        self.send()
        self.assertSound(taken)

    def test_a_disk_that_is_not_mounted_any_more_is_noticed(self):
        folder = os.path.join(support.scratch_folder(), "away-{}".format(next(support.Disk.numbers)))
        os.mkdir(folder)
        command("mount", "-t", "tmpfs", "tmpfs", folder)
        try:
            self.folder = os.path.join(folder, "raw")
            os.mkdir(self.folder)
            self.take(1)
            self.send()
        finally:
            support.unmount(folder)
        self.take(2)
        self.assertErrorSays(self.send(status=1), "was on another filesystem before")
        self.assertFalse(os.path.exists(self.folder))

    def test_a_file_is_no_folder(self):
        self.take(1)
        self.folder = os.path.join(self.target_disk.path, "file")
        open(self.folder, "w").close()
        self.assertErrorSays(self.send(status=1), "not a folder")

    def test_a_full_disk(self):
        self.folder = ext4(self, "8M")
        support.bulk(os.path.join(self.source, "large"), 16)
        self.take(1)
        self.assertErrorSays(self.send(status=1), "no space left")
        self.assertEqual(["lost+found"], self.files())
        self.assertEqual([self.raw], read_locks(self.snapshots)[self.name(1)]["locks"])
        self.send("--raw-compress", "zstd")
        self.assertEqual([self.name(1) + ".btrfs.zst"], [n for n in self.streams() if n != "lost+found"])
        self.assertEqual({}, read_locks(self.snapshots))


class Retention(RawTestCase):

    def test_a_chain_stays_while_one_of_it_is_kept(self):
        taken = self.take(1, 2, 3)
        result = self.send("-n", "1", "-v", "debug")
        self.assertEqual([taken[-1]], sorted(self.sidecars()))
        taken += self.take(4, 5)
        result = self.send("-n", "1", "-v", "debug")
        self.assertEqual([taken[2], taken[4]], sorted(self.sidecars()), "4 was never sent")
        self.assertIn("{} cannot be restored without it".format(taken[4]), result.stderr)
        needed = "1 backup at {} is older than the newest 1 but needed to restore what is kept; --raw-full-every 1 " \
                 "would let it go".format(self.raw)
        self.assertIn(needed, self.send("-n", "1").stderr)
        self.assertIn(needed, self.send("-n", "1", "--dry-run").stdout)
        self.assertIn(needed, self.run_program("prune", "-n", "1", self.raw).stderr)
        self.assertIn(needed, self.run_program("prune", "--dry-run", "-n", "1", self.raw).stdout)
        self.assertNotIn("needed to restore", self.send("-n", "2", "--raw-full-every", "2").stderr)

    def test_three_chains(self):
        taken = []
        for day in range(1, 9):
            taken += self.take(day)
            self.send("--raw-full-every", "3")
        self.assertEqual([1, 2, 3, 1, 2, 3, 1, 2], self.lengths())
        self.assertRestorable(*taken)
        shown = self.send("--raw-full-every", "3", "-n", "4", "--dry-run").stdout
        self.assertEqual([taken[0], taken[1], taken[2]],
                         [line.split()[1].rstrip(":") for line in shown.splitlines() if line.startswith("  delete")])
        self.send("--raw-full-every", "3", "-n", "4")
        self.assertSound(taken[3:])
        self.send("--raw-full-every", "3", "-n", "2")
        self.assertSound(taken[6:])
        self.assertRestorable(*taken[6:])

    def test_all_in_one_run_and_shown_before(self):
        taken = self.take(*range(1, 8))
        shown = self.send("--raw-full-every", "3", "--dry-run").stdout
        sent = [line for line in shown.splitlines() if line.startswith("  send")]
        self.assertEqual([True, False, False, True, False, False, True], ["in full" in line for line in sent])
        self.send("--raw-full-every", "3")
        self.assertEqual([1, 2, 3, 1, 2, 3, 1], self.lengths())
        self.assertSound(taken)

    def test_the_source_keeps_the_newest_in_common(self):
        self.take(1)
        self.send()
        self.take(2, 3)
        self.transfer("-N", "1", to=[self.target])
        self.assertEqual([self.name(1), self.name(3)], names(self.snapshots))
        self.send()
        self.assertEqual([1, 2], self.lengths())

    def test_what_another_one_builds_on_by_then_stays(self):
        """Whoever sends to a folder is not waited for where it is pruned."""
        taken = self.take(1, 2, 3)
        self.send()
        planned = program.listing_of(program.read_raw_folder(self.folder)).subvolumes
        errors = program.delete_stream_files(self.folder, [s for s in planned if s.name != taken[2]])
        self.assertSound(taken)
        for name, error in zip(taken[:0:-1], errors):
            self.assertIn("{} builds on it".format(name), str(error))

    def test_what_builds_on_it_and_does_not_go(self):
        taken = self.take(1, 2, 3, 4)
        self.send("--raw-full-every", "3")
        path = os.path.join(self.folder, taken[2] + ".btrfs")
        support.command("chattr", "+i", path)
        self.addCleanup(support.command, "chattr", "-i", path)
        self.assertIn("cannot delete " + path, self.run_program("prune", "-n", "1", self.raw, status=1).stderr)
        self.assertEqual([name + ".btrfs" for name in taken], [n for n in self.streams() if n.endswith(".btrfs")])

    def test_only_what_its_sidecar_vouches_for_goes(self):
        taken = self.take(1, 2, 3)
        self.send("-I")
        strangers = ["notes.txt", "other20240101-000000.btrfs", "home20230101-000000.btrfs",
                     "home20230102-000000.btrfs.json"]
        for name in strangers:
            with open(os.path.join(self.folder, name), "w") as file:
                file.write("{}")
        self.send("-I", "-n", "1")
        self.assertEqual(sorted(strangers + [taken[2] + ".btrfs", taken[2] + ".btrfs.json"]), self.files())


class Circles(unittest.TestCase):
    """Sidecars of somebody who can write them: their parents lead in a circle."""

    @staticmethod
    def backup(name, parent):
        return program.RawBackup(name, name + ".btrfs", "u" + name, "u" + parent if parent else None, parent,
                                 0, 1, "", 1, "", (), 0, 0, 0)

    def test_none_can_be_restored(self):
        backups = [self.backup(*pair) for pair in ("aa", "bc", "cb", "dc", "ex", ("f", None), "gf", "hg")]
        folder = program.RawFolder(tuple(backups), {backup.file: 1 for backup in backups})
        self.assertEqual({"a": "its parent a is broken", "b": "its parent c is broken", "c": "its parent b is broken",
                          "d": "its parent c is broken", "e": "its parent x is missing"},
                         program.broken_backups(folder))
        self.assertEqual(["f", "g", "h"], [s.name for s in program.listing_of(folder).subvolumes])


class Restore(RawTestCase):
    """restore: from the files alone, into a btrfs that has nothing of it."""

    def setUp(self):
        super().setUp()
        churn = support.Churn(self.source, seed=21)
        churn.fill()
        self.taken = []
        for day in range(1, 5):
            self.taken += self.take(day)
            churn.change()

    def into(self):
        folder = os.path.join(self.disk().path, "restored")
        os.mkdir(folder)
        return folder

    def restore(self, backup, folder, *options, **more):
        arguments = list(options) + ["--raw-identity", self.keys.identity, backup, folder]
        return self.run_program("restore", *arguments, **dict({"env": self.keys.env}, **more))

    def path(self, name):
        return self.raw + "/" + name

    def assertRestored(self, folder, *expected):
        self.assertEqual(sorted(expected), names(folder))
        self.assertEqual([], support.partials(folder))
        self.assertEqual({}, read_locks(folder))
        for name in expected:
            self.assertComplete(os.path.join(folder, name), self.snapshot_path(name))

    def test_what_is_named_without_raw(self):
        self.send()
        for arguments in (["--latest", self.folder], [os.path.join(self.folder, self.taken[0] + ".btrfs")]):
            self.assertErrorSays(self.run_program("restore", *arguments + [self.into()], status=1), "raw://")

    def test_none_can_be_restored(self):
        self.send()
        for name in self.streams():
            os.unlink(os.path.join(self.folder, name))
        self.assertErrorSays(self.run_program("restore", "--latest", self.raw, self.into(), status=1),
                             "no backup in", "can be restored; verify says")

    def test_from_a_copy_of_the_folder_that_shares_its_files(self):
        """As cp -al and rsync --link-dest make them."""
        self.send()
        copy = self.folder.rstrip("/") + "/copy"
        os.mkdir(copy)
        for name in os.listdir(self.folder):
            if ".btrfs" in name:
                os.link(os.path.join(self.folder, name), os.path.join(copy, name))
        into = self.into()
        self.restore(self.raw + "/copy/" + self.taken[-1], into)
        self.assertRestored(into, self.taken[-1])

    def test_each_point_with_each_compressor_and_encryptor(self):
        for number, compressor in enumerate(NONE_AND_EACH):
            place, encryption = [ext4, tmpfs][number % 2], [None, "gpg", "age"][number % 3]
            with self.subTest(place=place.__name__, compressor=compressor, encryption=encryption):
                self.folder = place(self)
                options = ["--raw-compress", compressor] if compressor else []
                if encryption:
                    options += ["--raw-encrypt", "{}:{}".format(encryption, getattr(self.keys, encryption))]
                self.send(*options)
                into = self.into()
                for name in self.taken[-2:]:
                    self.restore(self.path(name), into)
                    self.assertComplete(os.path.join(into, name), self.snapshot_path(name))
                self.assertRestored(into, *self.taken[-2:])

    def test_each_point_of_three_chains(self):
        self.send("--raw-full-every", "2")
        for name in self.taken:
            into = self.into()
            self.restore(self.path(name), into)
            self.assertRestored(into, name)

    def test_by_the_files_name_by_time_and_the_latest(self):
        self.send("--raw-compress", "zstd")
        into = self.into()
        self.restore(self.path(self.taken[1] + ".btrfs.zst"), into)
        self.restore(self.raw, into, "--before", "2024-01-03")
        self.assertRestored(into, self.taken[1])
        self.restore(self.raw, into, "--latest")
        self.assertRestored(into, self.taken[1], self.taken[3])

    def test_it_goes_on_from_what_is_there(self):
        self.send()
        into = self.into()
        self.restore(self.path(self.taken[1]), into)
        result = self.restore(self.path(self.taken[3]), into)
        self.assertNotIn(self.taken[0], result.stderr)
        self.assertRestored(into, self.taken[1], self.taken[3])
        into = self.into()
        self.restore(self.path(self.taken[0]), into)
        self.restore(self.path(self.taken[2]), into, "-I")
        self.assertRestored(into, self.taken[0], self.taken[2])

    def test_a_dry_run_names_the_chain(self):
        self.send()
        into = self.into()
        before = support.listing(into)
        out = self.restore(self.path(self.taken[2]), into, "--dry-run").stdout
        self.assertUnchanged(before, into)
        for name in self.taken[:3]:
            self.assertIn("restore " + name, out)
            (self.assertNotIn if name == self.taken[2] else self.assertIn)("delete {} again".format(name), out)

    def test_in_place(self):
        self.send("--raw-compress", "lz4")
        place = os.path.join(self.source_disk.path, "home")
        result = self.run_program("restore", "--latest", "--in-place", place, self.raw)
        self.assertIn("is now as in " + self.taken[3], result.stderr)
        self.assertTreesEqual(os.path.join(place, ".btrfs-backup-ng/snapshots", self.taken[3]), place)
        support.next_second()
        result = self.backup(to=[self.raw])
        self.assertIn("incrementally from " + self.taken[3], result.stderr)

    def damaged(self, *words, name=None, status=1, **more):
        into = self.into()
        result = self.restore(self.path(name or self.taken[3]), into, status=status, **more)
        for word in words:
            self.assertIn(word, result.stderr)
        self.assertRestored(into)

    def file(self, name):
        return os.path.join(self.folder, self.sidecars()[name]["file"])

    def flip(self, path, at):
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 0x10]))

    def test_flipped_bits_are_named_and_nothing_is_left(self):
        choose = support.chance(self)
        for options in ([], ["--raw-compress", "zstd"], ["--raw-encrypt", "gpg:" + self.keys.gpg]):
            self.folder = tmpfs(self)
            self.send(*options)
            path = self.file(self.taken[1])
            size = os.path.getsize(path)
            for at in [0, size - 1, choose.randrange(size)]:
                with self.subTest(options=options[:2], at=at, of=size):
                    self.flip(path, at)
                    self.damaged("{} is damaged".format(os.path.basename(path)))
                    self.flip(path, at)

    def test_a_key_file_that_is_not_there_is_noticed_first(self):
        self.send("--raw-encrypt", "age:" + self.keys.age)
        into = self.into()
        for verb in (["restore", "--latest", self.raw, into], ["verify", self.raw]):
            result = self.run_program(verb[0], "--raw-identity", "/no/key.txt", *verb[1:], status=1)
            self.assertErrorSays(result, "no such file: /no/key.txt", "age's key")
        self.assertEqual([], os.listdir(into))

    def test_a_cut_file(self):
        self.send()
        os.truncate(self.file(self.taken[1]), 100)
        self.damaged("cannot be restored", self.taken[1])

    def test_a_missing_file(self):
        self.send()
        os.unlink(self.file(self.taken[1]))
        self.damaged("its parent {} is missing".format(self.taken[1]), name=self.taken[2])
        self.damaged("is missing", name=self.taken[1])

    def test_a_missing_key(self):
        other = Keys()
        self.addCleanup(other.close)
        self.send("--raw-encrypt", "gpg:" + self.keys.gpg)
        self.damaged("could not be decrypted", "secret key in gpg's key ring", env=other.env)
        self.assertNotIn("checking whether", self.restore(self.path(self.taken[3]), self.into(), status=1,
                                                         env=other.env).stderr)
        self.folder = tmpfs(self)
        self.send("--raw-encrypt", "age:" + self.keys.age)
        into = self.into()
        result = self.run_program("restore", "--raw-identity", other.identity, self.path(self.taken[0]), into, status=1)
        self.assertIn("could not be decrypted", result.stderr)
        self.assertIn("hold the right key", result.stderr)
        self.assertRestored(into)
        result = self.run_program("restore", self.path(self.taken[0]), into, status=1)
        self.assertIn("--raw-identity", result.stderr)
        self.assertRestored(into)
        result = self.run_program("verify", self.raw, status=1)
        self.assertEqual(4, len(re.findall("not checked: .* give the file that holds the key", result.stdout)))
        self.assertErrorSays(result, "give the file that holds the key with --raw-identity")

    def test_killed_at_random_the_next_one_converges(self):
        support.bulk(os.path.join(self.source, "large"), 4)
        self.taken += self.take(5)
        self.send()
        into = self.into()
        choose = support.chance(self)
        for _ in range(8):
            run = self.start("restore", self.path(self.taken[4]), into)
            time.sleep(choose.uniform(0.1, 0.7))
            run.kill()
        self.restore(self.path(self.taken[4]), into)
        self.assertRestored(into, self.taken[4])


class Damage(RawTestCase):
    """What can be seen without reading the files is seen by every run."""

    def setUp(self):
        super().setUp()
        self.taken = self.take(1, 2, 3)
        self.send()

    def path(self, name, suffix=""):
        return os.path.join(self.folder, name + ".btrfs" + suffix)

    def test_a_lost_file_is_sent_again(self):
        os.unlink(self.path(self.taken[0]))
        self.send(status=1)
        self.send()
        self.assertSound(self.taken)
        self.assertRestorable(*self.taken)

    def test_a_lost_file_is_sent_again_in_another_way(self):
        os.unlink(self.path(self.taken[0]))
        self.send("--raw-compress", "zstd", status=1)
        new, = self.take(4)
        self.send("--raw-compress", "gzip")
        self.send("--raw-compress", "gzip")
        self.assertEqual([self.taken[0] + ".btrfs.zst", new + ".btrfs.gz"],
                         [f for f in self.streams() if f[-1] != "s"])
        self.run_program("verify", self.raw)
        self.assertRestorable(new)
        self.run_program("prune", "-n", "1", "--", self.raw)

    def test_nothing_builds_on_a_chain_with_a_hole(self):
        os.unlink(self.path(self.taken[0]))
        support.delete(self.snapshot_path(self.taken[0]))
        new, = self.take(4)
        result = self.send(status=1)
        self.assertIn("its parent {} is missing".format(self.taken[0]), result.stderr)
        self.assertIn("its parent {} is broken".format(self.taken[1]), result.stderr)
        self.assertIsNone(self.sidecars()[new]["parent"])
        self.assertRestorable(new)

    def test_nothing_builds_on_a_cut_file(self):
        os.truncate(self.path(self.taken[2]), 100)
        new, = self.take(4)
        result = self.send(status=1)
        self.assertIn("has 100 bytes instead of", result.stderr)
        self.assertEqual(self.taken[1], self.sidecars()[new]["parent"])
        self.assertRestorable(new)

    def test_a_sidecar_that_was_changed(self):
        with open(self.path(self.taken[2], ".json"), "r+") as file:
            text = file.read()
            file.seek(0)
            file.write(text.replace('"uid": 0', '"uid": 1'))
        new, = self.take(4)
        result = self.send(status=1)
        self.assertIn("changed or damaged", result.stderr)
        self.assertEqual(self.taken[1], self.sidecars()[new]["parent"])

    def test_a_sidecar_that_is_lost(self):
        os.unlink(self.path(self.taken[2], ".json"))
        self.assertErrorSays(self.send(status=1), self.taken[2], "has no sidecar")
        self.assertIn(self.taken[2] + ".btrfs", self.files())

    def test_moved_away_it_is_sent_again(self):
        os.truncate(self.path(self.taken[2]), 100)
        for suffix in ("", ".json"):
            os.rename(self.path(self.taken[2], suffix), self.path("old-" + self.taken[2], suffix))
        result = self.send()
        self.assertIn("sending " + self.taken[2], result.stderr)
        self.assertRestorable(self.taken[2])


class Verbs(RawTestCase):
    """list, prune and doctor on stream files."""

    def setUp(self):
        super().setUp()
        self.taken = self.take(*range(1, 7))

    def verb(self, *arguments, **more):
        return self.run_program(*arguments, **dict({"env": self.keys.env}, **more))

    def test_list(self):
        self.send("--raw-full-every", "3")
        self.take(7)
        os.unlink(os.path.join(self.folder, self.taken[1] + ".btrfs"))
        support.delete(self.snapshot_path(self.taken[0]))
        result = self.verb("list", "-p", "home", "--json", self.source, self.raw)
        source, raw = json.loads(result.stdout)["locations"]
        self.assertEqual((self.raw, None), (raw["endpoint"], raw["error"]))
        states = {snapshot["name"]: snapshot["state"] for snapshot in raw["snapshots"]}
        self.assertEqual(dict(zip(self.taken, ["complete", None, "partial", "complete", "complete", "complete"])),
                         dict({self.taken[1]: None}, **states))
        ids = {s["name"]: s["uuid"] for s in source["snapshots"]}
        self.assertEqual(ids[self.taken[3]], raw["snapshots"][-3]["received_uuid"])
        self.assertIn("its parent {} is missing".format(self.taken[1]), result.stderr)
        table = self.verb("list", self.source, self.raw).stdout
        self.assertRegex(table, r"{} .* B +\*\n".format(self.taken[0]))
        self.assertRegex(table, r"{} .* \* +!\n".format(self.taken[1]))
        self.assertRegex(table, r"{} .* B +\* +\*p\n".format(self.taken[5]))
        self.assertRegex(self.verb("list", self.raw).stdout, r"{} .* B +\*\n".format(self.taken[5]))

    def test_prune_keeps_what_a_kept_one_needs(self):
        self.send("--raw-full-every", "3")
        shown = self.verb("prune", "--dry-run", "-n", "2", self.raw).stdout
        self.assertEqual(self.taken[:3], [line.split()[1].rstrip(":") for line in shown.splitlines()
                                          if line.startswith("  delete")])
        self.verb("prune", "-n", "2", self.raw)
        self.assertEqual([name + ".btrfs" for name in self.taken[3:]], [n for n in self.streams() if n[0] != "."])
        self.assertRestorable(*self.taken[3:])

    def test_prune_deletes_partials_that_nobody_writes(self):
        self.send()
        partial = os.path.join(self.folder, ".home20230101-000000.partial")
        with open(partial, "w") as file:
            file.write("cut")
        self.verb("prune", "--partials-older-than", "1h", self.raw)
        self.assertTrue(os.path.exists(partial))
        os.utime(partial, (time.time() - 7200,) * 2)
        with open(partial) as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            self.verb("prune", "--partials-older-than", "1h", self.raw)
            self.assertTrue(os.path.exists(partial))
        self.verb("prune", "--partials-older-than", "1h", self.raw)
        self.assertFalse(os.path.exists(partial))
        self.assertRestorable(self.taken[-1])

    def test_doctor(self):
        self.send()
        self.verb("doctor", "-p", "home", self.source, self.raw)
        os.truncate(os.path.join(self.folder, self.taken[4] + ".btrfs"), 10)
        for arguments in (["-p", "home", self.source, self.raw], [self.raw]):
            result = self.verb("doctor", *arguments, status=1)
            self.assertIn("its parent {} is broken".format(self.taken[4]), result.stdout)

    def test_doctor_on_ext4_and_on_a_command(self):
        self.folder = ext4(self)
        self.send()
        self.transfer(to=["shell://cat >/dev/null"])
        self.verb("doctor", "-p", "home", self.source, self.raw, "shell://cat >/dev/null")


class Verify(RawTestCase):
    """verify: by the sidecars alone, with or without the source."""

    def setUp(self):
        super().setUp()
        self.taken = self.take(1, 2, 3)

    def verify(self, *arguments, status=0, **more):
        result = self.run_program("verify", *arguments, status=status, **dict({"env": self.keys.env}, **more))
        return [line.split("  ") for line in result.stdout.splitlines()]

    def results(self, *arguments, **more):
        return {line[0]: line[2].split(":")[0] for line in self.verify(*arguments, **more)}

    def texts(self, *arguments, **more):
        return {line[0]: line[2] for line in self.verify(*arguments, **more)}

    def flip(self, name, at):
        path = os.path.join(self.folder, self.sidecars()[name]["file"])
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))

    def test_all_is_well(self):
        for options in ([], ["--raw-compress", "zstd"], ["--raw-encrypt", "age:" + self.keys.age],
                        ["--raw-compress", "xz", "--raw-encrypt", "gpg:" + self.keys.gpg]):
            with self.subTest(options=options):
                self.folder = tmpfs(self)
                self.send(*options)
                key = ["--raw-identity", self.keys.identity] if "age" in str(options) else []
                self.assertEqual(dict.fromkeys(self.taken, "equal"), self.results(*key + [self.raw]))
                self.assertEqual(dict.fromkeys(self.taken, "equal"), self.results("--raw-files", self.raw))
        self.assertEqual(dict.fromkeys(self.taken, "equal"), self.results(self.source, self.raw))
        self.assertEqual(dict.fromkeys(self.taken, "same identity"), self.results("--quick", self.raw))
        self.assertEqual({self.taken[2]: "equal"}, self.results("--latest", self.raw))
        self.assertEqual({self.taken[0]: "equal"}, self.results("--name", self.taken[0], self.raw))

    def test_beside_a_folder_on_btrfs(self):
        self.send()
        self.transfer()
        lines = self.verify(self.source, self.target, self.raw)
        self.assertEqual(sorted((name, to, "equal") for name in self.taken for to in (self.target, self.raw)),
                         sorted((line[0], line[1], line[2].split(":")[0]) for line in lines))

    def test_a_flipped_bit_anywhere(self):
        self.send("--raw-compress", "gzip")
        size = self.sidecars()[self.taken[1]]["file_size"]
        choose = support.chance(self)
        for at in [0, 9, size - 1] + [choose.randrange(size) for _ in range(4)]:
            with self.subTest(at=at, of=size):
                self.flip(self.taken[1], at)
                texts = self.texts(self.raw, status=1)
                self.assertEqual(["equal", "different", "different"], [texts[n].split(":")[0] for n in self.taken])
                self.assertIn(self.taken[1] + ".btrfs.gz is damaged", texts[self.taken[1]])
                self.assertIn("builds on", texts[self.taken[2]])
                self.flip(self.taken[1], at)

    def test_a_stream_that_is_another_inside(self):
        """A file that is whole by its digest, and yet not what was sent."""
        self.send("--raw-compress", "gzip")
        path = os.path.join(self.folder, self.taken[0] + ".btrfs.gz")
        held = program.read_sidecar(self.folder, os.path.basename(path) + ".json")
        with open(path, "wb") as file:
            file.write(subprocess.run(["gzip"], input=b"another", stdout=subprocess.PIPE, check=True).stdout)
        made = program.digest_file(self.folder, os.path.basename(path))
        program.replace_file(self.folder, os.path.basename(path) + ".json", program.format_sidecar(
            held._replace(file_size=made.size, file_sha256=made.sha256)))
        self.assertIn("the stream inside is not the one", self.texts(self.raw, status=1)[self.taken[0]])
        self.assertEqual("equal", self.results("--raw-files", self.raw)[self.taken[0]])

    def put(self, name, data):
        """Other bytes in a file, and a sidecar that is right for them."""
        held = program.read_sidecar(self.folder, name + ".btrfs.json")
        with open(os.path.join(self.folder, held.file), "wb") as file:
            file.write(data)
        digest = hashlib.sha256(data).hexdigest()
        program.replace_file(self.folder, held.file + ".json", program.format_sidecar(held._replace(
            file_size=len(data), file_sha256=digest, stream_size=len(data), stream_sha256=digest)))

    def test_streams_that_cannot_be_restored_though_the_sidecar_is_right(self):
        with open(os.path.join(self.source, "zeros"), "wb") as file:
            file.write(bytes(300000))
        self.taken += self.take(4)
        self.send()
        first, second, _, fourth = [self.read(name) for name in self.taken]
        end, no_data = fourth[-10:], program.make_command(
            22, ((15, b"x"), (program.A_CTRANSID, bytes(8)), (4, bytes(8))))
        other = bytearray(fourth)
        other[other.index(bytes(200)) + 100] ^= 1
        in_zeros = fourth.index(bytes(20000))
        cases = {
            "cut": fourth[:-10], "cut in a command": fourth[:-300], "nothing": b"", "text": b"text" * 20,
            "a flipped bit": bytes(other), "a flipped bit in the end": fourth[:-1] + b"x",
            "of another snapshot": second, "on another parent": second.replace(self.raw_uuid(0), self.raw_uuid(2)),
            "in full": first, "two of them": fourth + fourth, "more after its end": fourth + b"\0",
            "an end in its midst": fourth[:-10] + end + end, "begun anew": fourth[:in_zeros + 5000] + fourth,
            "no data": fourth[:-10] + no_data + end, "another protocol": fourth[:13] + b"\2" + fourth[14:]}
        for what, data in cases.items():
            with self.subTest(what=what):
                self.put(self.taken[3], data)
                texts = self.texts(self.raw, status=1)
                self.assertEqual(["equal"] * 3 + ["different"], [texts[n].split(":")[0] for n in self.taken])
        self.put(self.taken[3], fourth)
        self.results(self.raw)

    def test_two_that_were_swapped_and_what_builds_on_them(self):
        self.send()
        first, second = self.read(self.taken[0]), self.read(self.taken[1])
        self.put(self.taken[0], second)
        self.put(self.taken[1], first)
        self.assertEqual(dict.fromkeys(self.taken, "different"), self.results(self.raw, status=1))
        texts = self.texts("--latest", self.raw, status=1)
        self.assertEqual([self.taken[2]], list(texts))
        self.assertIn("it is intact, but {}, which it builds on, is not".format(self.taken[1]), texts[self.taken[2]])

    def test_what_builds_on_one_without_a_key_is_not_called_different(self):
        self.transfer("-n", "1", "--raw-encrypt", "age:" + self.keys.age, to=[self.raw], env=self.keys.env)
        self.take(4)
        self.send("--raw-encrypt", "gpg:" + self.keys.gpg)
        texts = self.texts(self.raw, status=1)
        self.assertEqual({"not checked"}, {text.split(":")[0] for text in texts.values()})
        self.assertIn("which it builds on, could not be checked", " ".join(texts.values()))

    def test_without_btrfs_it_says_what_was_not_seen(self):
        self.send()
        texts = self.texts(self.raw, wrapper=support.without_programs("btrfs"))
        self.assertIn("but not its checksums", texts[self.taken[0]])

    def read(self, name):
        with open(os.path.join(self.folder, name + ".btrfs"), "rb") as file:
            return file.read()

    def raw_uuid(self, number):
        return program.parse_uuid(self.sidecars()[self.taken[number]]["uuid"])

    def test_what_is_missing_or_cut(self):
        self.send()
        os.unlink(os.path.join(self.folder, self.taken[0] + ".btrfs"))
        os.truncate(os.path.join(self.folder, self.taken[2] + ".btrfs"), 50)
        texts = self.texts(self.raw, status=1)
        self.assertIn("is missing", texts[self.taken[0]])
        self.assertIn("its parent {} is missing".format(self.taken[0]), texts[self.taken[1]])
        self.assertIn("has 50 bytes instead of", texts[self.taken[2]])
        self.assertEqual({"different"}, {text.split(":")[0] for text in texts.values()})

    def test_a_missing_key_is_no_proof(self):
        other = Keys()
        self.addCleanup(other.close)
        self.send("--raw-encrypt", "gpg:" + self.keys.gpg)
        texts = self.texts(self.raw, status=1, env=other.env)
        self.assertEqual({"not checked"}, {text.split(":")[0] for text in texts.values()})
        self.assertIn("could not be decrypted: gpg", texts[self.taken[0]])
        self.results("--raw-files", self.raw, env=other.env)
        self.flip(self.taken[0], 700)
        texts = self.texts(self.raw, status=1, env=other.env)
        self.assertIn("is damaged", texts[self.taken[0]])

    def test_nothing_is_no_success(self):
        self.assertEqual({"-": "not checked"}, self.results(self.raw, status=1))
        self.verify(self.raw, self.target, status=2)


def allow_only(test: remote.RemoteTestCase, groups):
    """The key of root may do no more than this on the server, below its disk for backups."""
    test.server.authorize("root", 'command="{} {} agent --under {} --allow {}"'.format(
        support.PYTHON, support.FAST_PROGRAM, test.target_there.replace(" ", "\\ "), groups))


class Restricted(remote.RemoteTestCase, RawTestCase):
    """A key that may only add stream files."""

    def setUp(self):
        super().setUp()
        self.allow("receive,list")

    def allow(self, groups):
        allow_only(self, groups)

    @property
    def raw(self):
        return self.server.endpoint(self.target_there + "/raw").replace("ssh://", "raw+ssh://")

    def send(self, *options, **more):
        return super().send(*self.program_options() + list(options), **more)

    def test_it_may_add_but_not_delete(self):
        taken = self.take(1, 2, 3)
        self.send("-I")
        self.assertSound(taken)
        self.assertIn("as this key may not: {}".format(", ".join(taken[:2])), self.send("-I", "-n", "1").stderr)
        self.assertSound(taken)

    def test_what_was_broken_off_is_cleared(self):
        taken = self.take(1)
        with open(os.path.join(self.folder, ".{}.partial".format(taken[0])), "w") as file:
            file.write("cut")
        support.write_locks(self.snapshots, {taken[0]: {"locks": [self.raw], "parent_locks": []}})
        self.send()
        self.assertSound(taken)

    def test_nothing_outside_can_be_read_or_written(self):
        secret = os.path.join(self.target_disk.path, "secret")
        with open(secret, "w") as file:
            file.write("secret")
        guard = program.Guard(program.Restriction(self.target_disk.path, ("receive", "send", "list", "verify")))
        for call, arguments in (("open_raw_send", {"folder": self.folder, "file": "../secret"}),
                                ("digest_raw", {"folder": self.folder, "file": "../secret"}),
                                ("open_raw_send", {"folder": "/etc", "file": "passwd"}),
                                ("open_raw_receive", {"folder": "/etc", "name": "x", "packed": True}),
                                ("open_raw_receive", {"folder": self.folder, "name": "../x", "packed": True})):
            with self.subTest(call=call, arguments=arguments), self.assertRaises(program.BackupError):
                guard.checked(call, dict(arguments))
        host = program.LocalHost(program.Events())
        for name in ("secret", "x/y.btrfs", "..", "passwd"):
            with self.subTest(file=name), self.assertRaises(program.BackupError):
                host.open_raw_send(self.target_disk.path, name)
        backup = Pure.BACKUP._replace(parent_uuid=None)
        for bad in (backup._replace(file="../x.btrfs"), backup._replace(name="../x", file="../x.btrfs"),
                    backup._replace(file="other.btrfs")):
            with self.subTest(bad=bad.file), self.assertRaises(program.BackupError):
                host.publish_raw(self.folder, bad)
        good, evil = self.name(1), "evil20240102-000000"
        for name in (good + ".btrfs", ".{}.partial".format(evil)):
            remote.write_file(os.path.join(self.folder, name), "")
        before = sorted(os.listdir(self.folder))
        for name, stream in ((good, good + ".btrfs.zz"), (evil, "{}.btrfs.{}.btrfs".format(good, evil)),
                             ("none20240102-000000", "none20240102-000000.btrfs")):
            with self.subTest("which speaks of another's", file=stream), self.assertRaises(program.BackupError):
                host.publish_raw(self.folder, backup._replace(name=name, file=stream))
        self.assertEqual(before, sorted(os.listdir(self.folder)))
        errors = host.delete_raw(self.folder, [program.Subvolume(".x/../../secret.partial", None, readonly=False)])
        self.assertEqual(1, len(errors))
        self.assertTrue(os.path.exists(secret))


class Killed(RawTestCase):

    def assertNothingHalf(self):
        """No file under its final name is incomplete or lacks its sidecar, at this moment."""
        for file in self.streams():
            if not file.startswith("."):
                with open(os.path.join(self.folder, file + ".json")) as sidecar:
                    self.assertFileIs(json.load(sidecar))

    def check(self, moments, *options):
        support.bulk(os.path.join(self.source, "large"), 6)
        taken = self.take(1, 2, 3)
        choose = support.chance(self)
        for moment in range(moments):
            if moment % 4 == 0:
                self.send("-n", "0", *options)
                for file in self.files():
                    os.unlink(os.path.join(self.folder, file))
            run = self.start("-S", "-p", "home", *(list(options) + [self.source, self.raw]), env=self.keys.env)
            time.sleep(choose.uniform(0.05, 0.45))
            run.kill()
            self.assertNothingHalf()
        self.send(*options)
        self.assertSound(taken)
        self.assertEqual({}, read_locks(self.snapshots))
        self.assertRestorable(*taken)

    def test_plain(self):
        self.check(15)

    def test_compressed_and_encrypted(self):
        self.check(15, "--raw-compress", "lz4", "--raw-encrypt", "age:" + self.keys.age)

    def test_at_each_step_of_naming(self):
        """Every state between the renames, made by hand: the next run converges."""
        taken = self.take(1, 2)
        self.send()
        last = taken[-1] + ".btrfs"
        held = {name: self.read(name) for name in (last, last + ".json")}
        partial, aside = ".{}.partial".format(taken[-1]), ".{}.json.partial".format(taken[-1])
        states = [{partial: b"cut"}, {partial: held[last]}, {partial: held[last], aside: b"{"},
                  {partial: held[last], aside: held[last + ".json"]},
                  {partial: held[last], last + ".json": held[last + ".json"]}, held]
        for state in states:
            with self.subTest(state=sorted(state)):
                for name in self.files():
                    if taken[-1] in name:
                        os.unlink(os.path.join(self.folder, name))
                for name, data in state.items():
                    with open(os.path.join(self.folder, name), "wb") as file:
                        file.write(data)
                support.write_locks(self.snapshots, {taken[-1]: {"locks": [self.raw], "parent_locks": []}})
                self.send()
                self.assertSound(taken)
                self.assertEqual({}, read_locks(self.snapshots))

    def test_at_each_step_of_deleting(self):
        taken = self.take(1, 2, 3)
        self.send("-I")
        os.unlink(os.path.join(self.folder, taken[0] + ".btrfs"))
        self.send("-I", "-n", "1")
        self.assertSound(taken[2:])

    def test_a_partial_that_no_lock_names_is_left_alone(self):
        taken = self.take(1)
        with open(os.path.join(self.folder, ".{}.partial".format(taken[0])), "w") as file:
            file.write("another run's")
        self.assertErrorSays(self.send(status=1), "partial", "no lock names")
        self.assertEqual([".{}.partial".format(taken[0])], self.files())

    def test_interrupted_it_leaves_no_process_and_no_partial(self):
        support.bulk(os.path.join(self.source, "large"), 32)
        self.take(1)
        run = self.start("-S", "-p", "home", "--raw-compress", "xz", self.source, self.raw)
        run.wait_for("xz", lambda: self.name(1) in read_locks(self.snapshots)  # it has been tried out before
                     and any(b"-T0" in argv for argv in run.processes().values()) and self.files())
        os.kill(run.pid, signal.SIGTERM)
        self.assertEqual(143, run.finish().status)
        self.assertEqual({}, run.processes())
        self.assertEqual([], self.files())
        self.assertIn(self.name(1), read_locks(self.snapshots))

    def read(self, name):
        with open(os.path.join(self.folder, name), "rb") as file:
            return file.read()


class OverSsh(remote.RemoteTestCase, RawTestCase):
    """raw+ssh://: filters here, files there."""

    @property
    def raw(self):
        return self.server.endpoint(self.target_there + "/raw").replace("ssh://", "raw+ssh://")

    def send(self, *options, **more):
        return super().send(*self.program_options() + list(options), **more)

    def test_each_compressor_and_encryptor(self):
        support.bulk(os.path.join(self.source, "large"), 2)
        taken = []
        for day, compressor in enumerate(NONE_AND_EACH, 1):
            taken += self.take(day)
            encryption = ["gpg", "age"][day % 2] if day > 1 else None
            options = ["--raw-compress", compressor] if compressor else []
            if encryption:
                options += ["--raw-encrypt", "{}:{}".format(encryption, getattr(self.keys, encryption))]
            self.send(*options)
        self.assertSound(taken)
        self.assertEqual([1, 2, 3, 4, 5], self.lengths())
        self.assertEqual({}, read_locks(self.snapshots))
        self.assertRestorable(*taken)
        self.assertNothingLeft(self.server)

    def test_plain_with_compression_on_the_way(self):
        taken = self.take(1, 2)
        self.send("--compress", "gzip")
        self.assertSound(taken)
        self.assertRestorable(*taken)

    def test_verify_and_restore_from_there(self):
        taken = self.take(1, 2, 3)
        self.send("--raw-compress", "zstd", "--raw-encrypt", "age:" + self.keys.age)
        options = self.program_options() + ["--raw-identity", self.keys.identity]
        for more in ([], ["--raw-files"]):
            out = self.run_program("verify", *options + more + [self.raw]).stdout
            self.assertEqual(3, out.count("  equal: "), out)
        into = os.path.join(self.target_disk.path, "restored")
        self.run_program("restore", *options + [self.raw + "/" + taken[2], into])
        self.assertComplete(os.path.join(into, taken[2]), self.snapshot_path(taken[2]))
        self.assertEqual([taken[2]], names(into))
        self.assertNothingLeft(self.server)

    def test_retention_there(self):
        taken = self.take(*range(1, 8))
        self.send("--raw-full-every", "3")
        self.send("--raw-full-every", "3", "-n", "2")
        self.assertSound(taken[3:])

    def test_it_is_made_there(self):
        os.rmdir(self.folder)
        taken = self.take(1)
        self.send()
        self.assertSound(taken)

    def test_a_full_disk_there(self):
        support.bulk(os.path.join(self.source, "large"), 64)
        command("fallocate", "-l", "400M", os.path.join(self.target_disk.path, "ballast"))
        self.take(1)
        self.assertErrorSays(self.send(status=1), "no space left")
        self.assertEqual([], self.files())
        os.unlink(os.path.join(self.target_disk.path, "ballast"))
        self.send()
        self.assertSound([self.name(1)])
        self.assertNothingLeft(self.server)

    def test_killed_here_nothing_half_is_there(self):
        support.bulk(os.path.join(self.source, "large"), 24)
        taken = self.take(1, 2)
        for delay in (0.5, 0.7, 0.9, 1.1):
            run = self.start("-S", "-p", "home", *self.program_options() + [self.source, self.raw])
            time.sleep(delay)
            run.kill()
            for file in self.streams():
                if not file.startswith("."):
                    with open(os.path.join(self.folder, file + ".json")) as sidecar:
                        self.assertFileIs(json.load(sidecar))
        self.send()
        self.assertSound(taken)
        self.assertEqual({}, read_locks(self.snapshots))
        self.assertNothingLeft(self.server)

    def test_an_agent_that_was_killed_is_followed_by_another(self):
        self.check_that_another_follows()

    def check_that_another_follows(self):
        support.bulk(os.path.join(self.source, "large"), 12)
        taken = self.take(1)
        run = self.start("-S", "-p", "home", *self.program_options() + ["--limit", "4M", self.source, self.raw])
        partial = os.path.join(self.folder, ".{}.partial".format(taken[0]))
        run.wait_for("some of it", lambda: os.path.exists(partial) and os.path.getsize(partial) > 1 << 20)
        for pid in self.server.find("python"):
            os.kill(pid, signal.SIGKILL)
        result = run.finish()
        self.assertEqual(0, result.status, result.stderr)
        self.assertIn("(1 of 5)", result.stderr)
        self.assertSound(taken)
        self.assertEqual({}, read_locks(self.snapshots))

    def test_so_it_is_with_a_key_that_may_only_add(self):
        allow_only(self, "receive,list")
        self.check_that_another_follows()

    def test_pulled_from_there_into_files_here(self):
        taken = self.take(1, 2)
        self.pull("-S", to=["raw://" + self.folder])
        self.assertSound(taken)
        self.assertEqual(self.remote_source, self.sidecars()[taken[0]]["source"])
        self.assertRestorable(taken[1])


class Steps(unittest.TestCase):
    """Naming and deleting, broken off at each of their steps: a file under a final name has its sidecar."""

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.backup = Pure.BACKUP._replace(parent_uuid=None, parent=None, file_size=4)

    def broken_off(self, name, act):
        """Does it again and again, each time breaking off one call of os.NAME later, until it comes to its end."""
        real, step = getattr(os, name), 0
        while True:
            step += 1
            calls = iter(range(step))

            def breaking(*arguments, calls=calls, **more):
                if next(calls, None) is None:
                    raise InterruptedError("broken off")
                return real(*arguments, **more)
            setattr(program.os, name, breaking)
            try:
                act()
                return
            except (InterruptedError, program.BackupError):
                pass
            finally:
                setattr(program.os, name, real)
            self.assertSidecars()

    def assertSidecars(self):
        for file in os.listdir(self.folder):
            if not file.startswith(".") and not file.endswith(".json"):
                self.assertEqual(self.backup, program.read_sidecar(self.folder, file + ".json"))

    def write(self, name):
        with open(os.path.join(self.folder, name), "w") as file:
            file.write("data")

    def publish(self):
        self.write(".{}.partial".format(self.backup.name))
        program.publish_stream_file(self.folder, self.backup)

    def test_what_stopped_it_is_told_whatever_that_was(self):
        sink = program.FileSink(self.folder, "home20240101-000000")
        with mock.patch.object(program.FileSink, "write", side_effect=MemoryError):
            sink.offer(memoryview(b"data"))
            with self.assertRaises(MemoryError):
                sink.finish(10)
        sink.end()
        self.assertEqual([], os.listdir(self.folder))

    def test_naming(self):
        for call in ("rename", "fsync"):
            self.broken_off(call, self.publish)
            self.assertEqual([self.backup.file, self.backup.file + ".json"], sorted(os.listdir(self.folder)))

    def test_deleting(self):
        doomed = [program.raw_subvolume(self.backup)]

        def delete():
            self.publish()
            errors = program.delete_stream_files(self.folder, doomed)
            if errors:
                raise errors[0]
        for call in ("unlink", "fsync"):
            self.broken_off(call, delete)
            self.assertEqual([], os.listdir(self.folder))


class Programs(unittest.TestCase):
    """What is read, and how it is told, where a filter or a filesystem does not do its part."""

    BACKUP = program.RawBackup("a20240101-000000", "a20240101-000000.btrfs.gpg", "u", None, None, 0, 1, "", 1 << 40, "",
                               ("gpg:KEY",), 0, 0, 0o755)

    class Endless:
        """A host with a stream file that has no end, which itself it gives."""

        size = 0

        def open_raw_send(self, *_):
            return self

        def read(self, buffer):
            self.size += len(buffer)
            return len(buffer)

        def end(self):
            pass

    def fail_with(self, words):
        """The error of a gpg that says so, and the bytes that were read of the file."""
        folder = fakes.folder_with("gpg", "head -c 100 > /dev/null; printf '%s\\n' {} >&2; exit 2\n".format(words))
        path, host = os.environ["PATH"], self.Endless()  # type: str, Any
        os.environ.update(fakes.first_on_path(folder))
        try:
            sender = program.RawSender(host, folder, self.BACKUP, "")
            with self.assertRaises(program.BackupError) as caught:
                while True:
                    sender.read(bytearray(100000))
                    sender.wait_readable(0.01)
        finally:
            os.environ["PATH"] = path
            sender.end()
        return caught.exception, sender, host.size

    def test_what_cannot_be_read_is_told_at_once(self):
        for words, lacks_key, hint in (
                ("'gpg: decryption failed: No secret key'", True, "key ring"),
                ("'gpg: public key decryption failed: Bad passphrase' 'gpg: decryption failed: No secret key'", True,
                 "passphrase"), ("'gpg: packet(3) with unknown version 3'", False, "")):
            error, sender, size = self.fail_with(words)
            what = "could not be decrypted" if lacks_key else "cannot be read"
            self.assertTrue(error.message.startswith("{} {}: gpg: ".format(self.BACKUP.file, what)), error.message)
            self.assertNotIn("gpg: gpg", error.message)
            self.assertEqual((lacks_key, True), (sender.lacks_key, hint in error.hint))
            self.assertLess(size, 8 << 20)

    def test_of_several_lines_the_one_that_helps_is_told(self):
        for doing, words, told in (
                ("gpg", "gpg: nobody@nowhere: skipped: No public key\ngpg: [stdin]: encryption failed: No public key",
                 "gpg: nobody@nowhere: skipped: No public key"),
                ("gpg", "gpg: public key decryption failed: Bad passphrase\ngpg: decryption failed: No secret key",
                 "gpg: public key decryption failed: Bad passphrase"),
                ("age", "age: error: unknown recipient type: \"key.txt\"\n"
                 "age: report unexpected or unhelpful errors at https://filippo.io/age/report",
                 "age: unknown recipient type: \"key.txt\"")):
            self.assertEqual(told, program.program_error(doing, words, 1).message)

    def test_a_filesystem_without_locks(self):
        def no_locks(*_):
            raise OSError(errno.ENOLCK, "no locks available")
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        real, program.fcntl.flock = program.fcntl.flock, no_locks
        try:
            sink = program.FileSink(folder, "name")
        finally:
            program.fcntl.flock = real
        sink.offer(b"data")
        self.assertEqual(4, sink.finish(10).size)
        sink.end()

    def test_what_an_rclone_mount_needs(self):
        self.assertIn("--vfs-cache-mode writes", program.hint_for(os.strerror(errno.EBADF)))


class Pure(unittest.TestCase):

    BACKUP = program.RawBackup("home20240102-000000", "home20240102-000000.btrfs.zst.age", "u2", "u1",
                               "home20240101-000000", 1704153600 * 10 ** 9 + 5, 1000, "aa", 500, "bb",
                               ("zstd", "age:age1xyz"), 1000, 100, 0o2750, "/home \udcff")

    def test_a_sidecar_comes_back_as_it_was(self):
        self.assertEqual(self.BACKUP, program.parse_sidecar(program.format_sidecar(self.BACKUP)))

    def test_any_change_of_a_sidecar_is_noticed(self):
        text = program.format_sidecar(self.BACKUP)
        for at, character in enumerate(text):
            if not character.isspace():
                with self.subTest(at=at), self.assertRaises(ValueError):
                    program.parse_sidecar(text[:at] + chr(ord(character) ^ 1) + text[at + 1:])

    def test_what_is_no_sidecar(self):
        for text in ("", "{", "[]", "{}", "null", '{"sidecar_sha256": 1}', "[" * 100000):
            with self.subTest(text=text[:20]), self.assertRaises(ValueError):
                program.parse_sidecar(text)

    def test_what_is_broken(self):
        names_ = {name: program.RawBackup(name, name + ".btrfs", name, parent, parent, 0, 1, "", 1, "", (), 0, 0, 0)
                  for name, parent in (("a", None), ("b", "a"), ("c", "b"), ("d", None))}
        sizes = {name + ".btrfs": 1 for name in names_}

        def broken(**more):
            return sorted(program.broken_backups(program.RawFolder(tuple(names_.values()), dict(sizes, **more))))
        self.assertEqual([], broken())
        self.assertEqual(["a", "b", "c"], broken(**{"a.btrfs": 0}))
        self.assertEqual(["c"], broken(**{"c.btrfs": 2}))
        del sizes["b.btrfs"]
        self.assertEqual(["b", "c"], broken())


if __name__ == "__main__":
    unittest.main()
