"""README's commands, run as they stand there, with its very paths.

Each section gets a machine of its own: a chroot on a scratch btrfs in a mount namespace, called `laptop`,
where /home is a subvolume, disks are mounted at /mnt/backup and /mnt/second, and two backups of /home have
been made (but in the Quick start). What begins with `btrfs-backup-ng`, with or without a prompt, is run,
and what README shows below a prompt is compared with what comes out; sizes, times and the like may differ,
and names of snapshots as long as they do it in the same way everywhere.

What else an example needs stands in tests/examples.py.
"""

import difflib
import operator
import os
import re
import shlex
import subprocess
import sys
import time
import unittest
import uuid
from typing import List, NamedTuple, Tuple

import support
from examples import EXAMPLES, Needs

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import btrfs_backup_ng
from btrfs_backup_ng import VERBS, flags_of

MOST_WORDS = 6500
README = os.path.join(os.path.dirname(support.HERE), "README.md")

COMMAND = re.compile(r"(# )?(/usr/local/bin/)?btrfs-backup-ng( \S|$)")
PLACEHOLDER = re.compile(r"\b(SOURCE|DEST|DESTINATION|VERB|COMMAND|TIME|FILE)\b|\[options\]")


class Block(NamedTuple):
    """One example: the line it begins at, its lines without indentation, what it needs."""

    line: int
    lines: Tuple[str, ...]
    needs: Needs

    @property
    def is_run(self):
        if self.needs.not_run or self.needs.file:
            return False
        return bool(self.needs.run or (COMMAND.match(self.lines[0]) and not PLACEHOLDER.search(self.lines[0])))

    def commands(self):
        """(command, the lines shown below it) of each command behind a prompt; else all of it as one script."""
        if not self.lines[0].startswith("# "):
            return [("\n".join(self.lines), None)]
        found = []
        for line in self.lines:
            if line.startswith("# "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
        return found


class Section(NamedTuple):
    title: str
    blocks: List[Block]


def parse(text, examples):
    """The sections of README; all but indented and fenced examples is left out.

    examples: {section: {first line: Needs}}
    """
    sections = [Section("", [])]
    lines = text.split("\n")
    at = 0

    def add_block(first, found):
        needs = examples.get(sections[-1].title, {}).get(found[0], Needs())
        sections[-1].blocks.append(Block(first + 1, tuple(found), needs))

    while at < len(lines):
        line = lines[at]
        if line.startswith("#"):
            sections.append(Section(line.lstrip("# "), []))
        elif line.startswith("```"):
            end = lines.index("```", at + 1)
            add_block(at + 1, lines[at + 1:end])
            at = end
        elif re.match(r" {4,}\S", line) and is_apart(lines, at):
            end = end_of_block(lines, at)
            add_block(at, dedented(lines[at:end]))
            at = end - 1
        at += 1
    return sections


def is_apart(lines, at):
    """Whether an example may begin here: behind an empty line, and not as a list's text."""
    return at == 0 or not lines[at - 1].strip()


def end_of_block(lines, at):
    indent = re.match(" *", lines[at]).group()
    end = at
    while end < len(lines) and (lines[end].startswith(indent) or not lines[end].strip()):
        end += 1
    while not lines[end - 1].strip():
        end -= 1
    return end


def dedented(lines):
    width = len(lines[0]) - len(lines[0].lstrip())
    return tuple(line[width:] for line in lines)


NAME_TIME = re.compile(r"\b[0-9]{8}-[0-9]{6}\b")


def labelled(text):
    """`text` with TIME1, TIME2, ... for the times in names, as they come; and these times."""
    found: List[str] = []
    for moment in NAME_TIME.findall(text):
        if moment not in found:
            found.append(moment)
    return NAME_TIME.sub(lambda match: "TIME{}".format(found.index(match.group()) + 1), text), found


# What differs from machine to machine and from run to run.
VARYING = (
    (r"[0-9.]+ (B|KiB|MiB|GiB|TiB)/s", "RATE"),
    (r"[0-9.]+ (B|KiB|MiB|GiB|TiB)\b", "SIZE"),
    (r"\b[0-9]+ (s|min|h|days|weeks|months|years)( ago| old)", r"AGE\2"),
    (r"\b[0-9]+(\.[0-9] s|(:[0-9]{2})+)\b(?!\.)", "DURATION"),
    (r"[0-9]{4}-[0-9]{2}-[0-9]{2}T\S+", "NOW"),
    (r"(btrfs-progs v|Linux |Python )[0-9][-.\w]*", r"\1VERSION"),
    (r"(VERSION), (ssh|zstd|lz4|gzip|xz|gpg|age)\b.*", r"\1, PROGRAMS"),
    (r" {2,}", "  "),
    (r"-{4,}", "----"),
)


def normal(text):
    for pattern, replacement in VARYING:
        text = re.sub(pattern, replacement, text)
    return text.rstrip()


# README's days and how long ago they are here in minutes: two in a row two days ago, yesterday, an hour ago.
DAYS = (("20260131-092900", 2881), ("20260131-093000", 2880), ("20260201-093000", 1440), ("20260202-093000", 60))
HOSTS = ("nas", "server", "laptop", "anna", "ben")
NEW_DISK = "/tmp/new-disk"
SSHD = "/usr/sbin/sshd"
LO_UP = ("import fcntl, socket, struct\n"
         "with socket.socket() as any_socket: fcntl.ioctl(any_socket, 0x8914, struct.pack('16sh', b'lo', 0x41))\n")


class Machine:
    """A chroot that looks like the machine that README is about; `run` runs a command there.

    It has its own mounts, processes, name and network, in which the hosts of README are itself.
    """

    FSTAB = "{laptop} /home btrfs subvol=home 0 0\n{laptop} /mnt/top btrfs subvolid=5,noauto 0 0\n" \
            "{backup} /mnt/backup btrfs noauto 0 0\n{second} /mnt/second btrfs noauto 0 0\n"

    def __init__(self, disk, is_fresh, has_hosts):
        """disk: makes a scratch disk."""
        self.disks = {name: disk("1G") for name in ("laptop", "backup", "second", "restore", "backups")}
        self.root = os.path.join(support.scratch_folder(), "machine")
        self.places = {
            "NAME": "laptop-20260201-093000", "OLD-UUID": str(uuid.uuid4()), "/dev/sda2": self.disks["laptop"].loop,
            "/dev/sdc1": self.disks["backup"].loop, "/dev/sdb1": NEW_DISK, "/dev/nvme0n1p2": NEW_DISK,
            "LABEL=backup": NEW_DISK}
        os.mkdir(self.root)
        self.holder = subprocess.Popen(["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child",
                                        "--propagation", "slave", "sh", "-c", "echo $$ in; exec sleep 3600"],
                                       stdout=subprocess.PIPE)
        top = self.disks["laptop"].path
        for name in ("root", "home"):
            support.create(os.path.join(top, name))
        now = time.time() + (120 if time.time() % 86400 < 120 else 0)  # none on the eve of the others
        self.names = {moment: time.strftime("%Y%m%d-%H%M%S", time.gmtime(now - 60 * minutes))
                      for moment, minutes in DAYS}
        try:
            self.enter = ["nsenter", "-t", self.first_process(), "--mount", "--uts", "--net", "--pid"]
            support.command(*self.enter + ["sh", "-euc", self.script()])
            support.command(*self.enter + [sys.executable, "-c", LO_UP])
            self.fill(is_fresh)
            if has_hosts:
                self.start_sshd()
        except BaseException:
            self.close()
            raise

    def first_process(self):
        """The pid, out here, of the first process of the namespaces: once it has spoken they are there."""
        self.holder.stdout.readline()
        with open("/proc/{0}/task/{0}/children".format(self.holder.pid)) as children:
            return children.read().split()[0]

    def script(self):
        """What makes the chroot: mounts, links, a few files of /etc."""
        loops = {name: disk.loop for name, disk in self.disks.items()}
        lines = ["hostname laptop", "cd {}".format(shlex.quote(self.root)),
                 "mount -o subvol=root {} .".format(loops["laptop"]), "cd {}".format(shlex.quote(self.root)),
                 "mkdir -p dev proc sys run tmp root etc var mnt home usr",
                 "for at in dev sys usr; do mount --rbind /$at $at; done", "mount -t proc none proc",
                 "for at in run tmp var mnt; do mount -t tmpfs none $at; done",
                 "mkdir -p mnt/top mnt/nas/home mnt/restore run/sshd var/cache var/tmp var/empty",
                 "mount -t tmpfs none usr/local/bin"]
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            if os.path.islink("/" + name):
                lines.append("ln -s {} {}".format(os.readlink("/" + name), name))
            elif os.path.isdir("/" + name):
                lines.append("mkdir {0}; mount --rbind /{0} {0}".format(name))
        for path in sorted({os.path.realpath(os.path.join(os.path.dirname(support.PYTHON), os.pardir)),
                            os.path.dirname(support.PROGRAM)}):
            if not path.startswith("/usr"):
                lines.append("mkdir -p .{0}; mount --bind {0} .{0}".format(path))
        lines += ["cd etc", "for at in passwd group shadow nsswitch.conf ld.so.cache ld.so.conf ld.so.conf.d "
                  "alternatives manpath.config man_db.conf; do [ ! -e /etc/$at ] || cp -a /etc/$at .; done",
                  "echo 127.0.0.1 localhost laptop {} >hosts".format(" ".join(HOSTS)),
                  "printf %s {} >fstab".format(shlex.quote(self.FSTAB.format(**loops))), "cd ..",
                  "mount -o subvol=home {} home".format(loops["laptop"])]
        for name in ("backup", "second", "restore", "backups"):
            lines.append("mkdir -p mnt/{1}; mount {0} mnt/{1}".format(loops[name], name))
        begin = "exec " + " ".join(support.PROGRAM_ARGV)
        for name, line in (("btrfs-backup-ng", begin + ' "$@"'), ("python3", 'exec {} "$@"'.format(support.PYTHON)),
                           ("rclone", '[ "$1" = rcat ] && cat >"/tmp/$(echo "$2" | tr / _)"')):
            lines += ["printf '#!/bin/sh\n%s\n' {} >usr/local/bin/{}".format(shlex.quote(line), name),
                      "chmod 755 usr/local/bin/" + name]
        return "\n".join(lines)

    def fill(self, is_fresh):
        self.check("mkdir -p /home/anna/letters && echo thanks >/home/anna/letters/thanks.txt && "
                   "head -c 4000000 /dev/urandom >/home/anna/photos && truncate -s 1G {} && cp {} /root".format(
                       NEW_DISK, os.path.join(support.HERE, os.pardir, "btrfs_backup_ng.py")))
        if is_fresh:
            return
        self.check("mkdir -p -m 700 /home/.btrfs-backup-ng/snapshots")
        for moment, _ in DAYS[1:3]:
            self.check("btrfs subvolume snapshot -r /home /home/.btrfs-backup-ng/snapshots/laptop-{0} && "
                       "head -c 500000 /dev/urandom >/home/anna/of-{0}".format(moment))
        self.check("btrfs-backup-ng -q -S /home /mnt/backup/home")

    def start_sshd(self):
        config = "HostKey /etc/ssh/key\nAuthorizedKeysFile /root/.ssh/authorized_keys\nStrictModes no\n" \
                 "PermitRootLogin yes\nUsePAM no\nPort 22\nPort 2222\nSubsystem sftp internal-sftp\n"
        known = HOSTS + tuple("[{}]:2222".format(host) for host in HOSTS)
        self.check("mkdir -p -m 700 /etc/ssh /root/.ssh && cd /etc/ssh && ssh-keygen -q -t ed25519 -N '' -f key && "
                   "ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519 && "
                   "cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys && "
                   "echo '{}' $(cut -d ' ' -f 1,2 key.pub) >/root/.ssh/known_hosts && "
                   "printf %s {} >sshd_config && {} -f sshd_config".format(",".join(known), shlex.quote(config), SSHD))

    def here(self, text):
        """`text` of README with the names and devices that are meant here."""
        for there, here in self.places.items():
            text = text.replace(there, here)
        return NAME_TIME.sub(lambda match: self.names.get(match.group(), match.group()), text)

    def run(self, command):
        """The status of a command of README, and all that it wrote."""
        environment = ["env", "-i", "HOME=/root", "TERM=dumb", "LANG=C.UTF-8", "USER=root", "SHELL=/bin/sh", "TZ=UTC",
                       "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONDONTWRITEBYTECODE=1"]
        argv = self.enter + ["chroot", self.root] + environment + ["sh", "-ec", "cd /root\n" + self.here(command)]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout.decode("utf-8", "replace")

    def check(self, command):
        status, output = self.run(command)
        if status:
            raise AssertionError("{}: status {}\n{}".format(self.here(command), status, output))

    def close(self):
        """Ends the namespaces, and with them all processes and mounts in them."""
        self.holder.kill()
        self.holder.wait()
        self.holder.stdout.close()
        for _ in range(50):
            try:
                os.rmdir(self.root)
                return
            except OSError:
                time.sleep(0.1)


with open(README, encoding="utf-8") as file:
    TEXT = file.read()
SECTIONS = parse(TEXT, EXAMPLES)


class Examples(support.TestCase):

    usual_seconds = 4

    def check_section(self, section):
        has_hosts = any(re.search(r"\b(ssh|nas)\b", line) for block in section.blocks if block.is_run
                        for line in block.lines)
        machine = Machine(self.disk, section.title == "Quick start", has_hosts)
        self.addCleanup(machine.close)
        for block in section.blocks:
            if block.needs.file:
                machine.check("mkdir -p {} && printf %s {} >{}".format(
                    os.path.dirname(block.needs.file), shlex.quote("\n".join(block.lines) + "\n"), block.needs.file))
        for block in section.blocks:
            if block.is_run:
                with self.subTest(line=block.line):
                    self.check_block(machine, block)

    def check_block(self, machine, block):
        for command in block.needs.first:
            machine.check(command)
        commands = block.commands()
        statuses = [0] * (len(commands) - 1) + [block.needs.status]
        for (command, shown), status in zip(commands, statuses):
            done, output = machine.run(command)
            self.assertNotIn("Traceback", output)
            self.assertEqual(status, done, "README.md:{}: {}\n{}".format(block.line, machine.here(command), output))
            if shown:
                self.compare(machine, block, command, "\n".join(shown), output)

    def compare(self, machine, block, command, shown, output):
        expected, of_readme = labelled(shown)
        found, of_here = labelled(output)
        expected_lines, found_lines = (list(map(normal, text.rstrip().splitlines())) for text in (expected, found))
        if expected_lines != found_lines:
            self.fail("README.md:{}: {}\n{}\n\nit says:\n{}".format(block.line, command, "\n".join(
                difflib.unified_diff(expected_lines, found_lines, "README", "here", lineterm="", n=9)), output))
        machine.names.update(zip(of_readme, of_here))


def add_tests():
    for section in SECTIONS:
        if any(block.is_run for block in section.blocks):
            name = "test_" + re.sub("[^a-z0-9]+", "_", section.title.lower()).strip("_")
            if hasattr(Examples, name):
                raise ValueError("two sections called {}".format(section.title))
            setattr(Examples, name, lambda self, section=section: self.check_section(section))


add_tests()


class Readme(unittest.TestCase):

    def test_it_can_be_read_in_half_an_hour(self):
        self.assertLessEqual(len(TEXT.split()), MOST_WORDS)

    def test_each_example_is_run_or_a_file_or_it_is_said_why_not(self):
        for section in SECTIONS:
            for block in section.blocks:
                if not block.is_run and not PLACEHOLDER.search(block.lines[0]):
                    self.assertTrue(block.needs.not_run or block.needs.file, block)

    def test_what_examples_need_is_said_of_one_each(self):
        there = {section.title: [block.lines[0] for block in section.blocks] for section in SECTIONS}
        for title, needs in EXAMPLES.items():
            for line in needs:
                self.assertEqual(1, there.get(title, []).count(line), "{}: {}".format(title, line))

    def test_a_reader_sees_all_that_stands_there(self):
        self.assertNotIn("<!--", TEXT)

    def test_the_options_that_it_names_are_there(self):
        known = {flag for verb in VERBS.values() for flag in flags_of(verb.groups)}
        named = set(re.findall(r"`(--?[A-Za-z][-a-z]*)[^`]*`", TEXT))
        self.assertGreater(len(named), 20)
        self.assertEqual([], sorted(named - known))

    def test_the_topics_of_help_that_it_names_are_there(self):
        named = set(re.findall(r"`(?:btrfs-backup-ng )?help\s+([a-z-]+)`", TEXT))
        self.assertGreater(len(named), 5)
        self.assertEqual([], sorted(named - set(btrfs_backup_ng.HELP_TOPICS)))

    def test_what_it_says_to_look_at_is_there(self):
        rows = re.search(r"(?ms)^\| to change .*?^$", TEXT).group().splitlines()[2:]
        named = [name for row in rows for name in re.findall(r"`([A-Za-z_.]+)`", row.split("|")[2])]
        self.assertGreater(len(named), 10)
        for name in named:
            operator.attrgetter(name)(btrfs_backup_ng)

    def test_the_format_for_samba_is_that_of_names(self):
        form, = re.findall(r"shadow:format = (\S+)", TEXT)
        self.assertEqual("laptop-20260131-093000", time.strftime(form, (2026, 1, 31, 9, 30, 0, 5, 31, 0)))

    def test_links_lead_somewhere(self):
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
                   for title in re.findall(r"(?m)^#+ (.*)$", TEXT)}
        for target in re.findall(r"\]\(([^)]+)\)", TEXT):
            if target.startswith("#"):
                self.assertIn(target[1:], anchors)
            elif "://" not in target:
                self.assertTrue(os.path.exists(os.path.join(os.path.dirname(README), target)), target)


class Parsing(unittest.TestCase):

    def blocks(self, text, **needs):
        return [block for section in parse(text, {"A": {"btrfs-backup-ng /a": Needs(**needs), "ls": Needs(**needs)}})
                for block in section.blocks]

    def test_examples(self):
        block, = self.blocks("# A\n\ntext:\n\n    # btrfs-backup-ng /a\n    out\n\n      more\n    # ls\n    x\n\ntext")
        self.assertEqual([("btrfs-backup-ng /a", ["out", "", "  more"]), ("ls", ["x"])], block.commands())
        self.assertEqual(5, block.line)
        self.assertTrue(block.is_run)
        block, = self.blocks("    btrfs-backup-ng /a \\\n        /b\n    btrfs-backup-ng /c\n")
        self.assertEqual([("btrfs-backup-ng /a \\\n    /b\nbtrfs-backup-ng /c", None)], block.commands())
        for text in ("    btrfs-backup-ng [options] SOURCE\n", "    btrfs receive /x\n", "    # comment\n"):
            block, = self.blocks(text)
            self.assertFalse(block.is_run, text)

    def test_what_they_need(self):
        block, = self.blocks("# A\n\n```sh\nls\n```\n", run=True, first=["a", "b"])
        self.assertTrue(block.is_run)
        self.assertEqual(["a", "b"], block.needs.first)
        self.assertEqual(("ls",), block.lines)
        for needs in ({"not_run": "why"}, {"file": "/x"}):
            block, = self.blocks("# A\n\n    btrfs-backup-ng /a\n", **needs)
            self.assertFalse(block.is_run)
        block, = self.blocks("# B\n\n    ls\n", run=True)
        self.assertFalse(block.is_run)

    def test_names_and_what_varies(self):
        self.assertEqual(("a TIME1 b TIME2 c TIME1", ["20260102-000000", "20260101-000000"]),
                         labelled("a 20260102-000000 b 20260101-000000 c 20260102-000000"))
        self.assertEqual(normal("sent: 40.0 MiB in 0.1 s, 373.3 MiB/s"), normal("sent: 3 B in 1:02, 1.2 KiB/s"))
        self.assertNotEqual(normal("sent: 40.0 MiB in 0.1 s"), normal("sent: 40.0 MiB"))
        self.assertNotEqual(normal("2 backups sent"), normal("3 backups sent"))


if __name__ == "__main__":
    unittest.main()
