"""Options: arguments to a task, and one line for every mistake."""

import os
import re
import shlex
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support

from btrfs_backup_ng import (
    FLAGS,
    HELP_TOPICS,
    OPTION_TABLE,
    RUNS,
    SUBVOLUMES,
    TOPICS,
    VERBS,
    Task,
    UsageError,
    check_task,
    check_together,
    destination_key,
    flags_of,
    forget_command,
    format_error,
    format_help,
    options_of,
    parse_command,
    parse_endpoint,
    source_command,
)

OPTIONS = [option for group in OPTION_TABLE for option in group.options]
ALL_OPTIONS = [(name, option) for name, verb in VERBS.items() for group in verb.groups for option in group.options]

# A good value for what the help calls so.
SAMPLES = {
    "LIST": "receive,list",
    "OPT": "Port=22",
    "PROGRAM": "zstd",
    "LEVEL": "error",
    "FILE": "/log",
    "N": "3",
    "RATE": "20M",
    "DEST": "/b",
    "DIR": "/folder",
    "P": "home",
    "PATTERN": "docker/*",
    "PATH": "etc/fstab",
    "POLICY": "7d",
    "SIZE": "5G",
    "AGE": "26h",
    "SECONDS": "7",
    "[SECONDS]": "7",
    "WHEN": "daily",
    "NAME": "name",
    "METHOD": "gpg:KEY",
    "TIME": "2026-01-31 09:30",
    "SUBVOLUME": "/s",
}


class Accepted(unittest.TestCase):

    def check(self, table):
        for arguments, fields in table:
            with self.subTest(arguments=arguments):
                self.assertEqual(Task(**fields), support.task_of(arguments))

    def test_nothing(self):
        self.check([([], {})])

    def test_paths(self):
        self.check([
            (["/s"], {"source": "/s"}),
            (["/s", "/b"], {"source": "/s", "destinations": ("/b",)}),
            (["/s", "/b", "/c"], {"source": "/s", "destinations": ("/b", "/c")}),
            (["s", "two words"], {"source": "s", "destinations": ("two words",)}),
            (["-"], {"source": "-"}),
            (["--", "@s", "\udcff"], {"source": "@s", "destinations": ("\udcff",)}),
        ])

    def test_any_order(self):
        task = {"source": "/s", "destinations": ("/b", "/c"), "num_snapshots": 3, "no_snapshot": True,
                "prefix": "p"}
        self.check([
            (["-S", "-N", "3", "-p", "p", "/s", "/b", "/c"], task),
            (["/s", "/b", "/c", "-S", "-N", "3", "-p", "p"], task),
            (["-N", "3", "/s", "-S", "/b", "-p", "p", "/c"], task),
            (["/s", "-p", "p", "/b", "-N", "3", "/c", "-S"], task),
        ])

    def test_short_options(self):
        self.check([
            (["-N", "3"], {"num_snapshots": 3}),
            (["-N3"], {"num_snapshots": 3}),
            (["-SN3"], {"no_snapshot": True, "num_snapshots": 3}),
            (["-SN", "3"], {"no_snapshot": True, "num_snapshots": 3}),
            (["-STI"], {"no_snapshot": True, "no_transfer": True, "no_incremental": True}),
            (["-ph"], {"prefix": "h"}),
            (["-p-"], {"prefix": "-"}),
            (["-Sp@home"], {"no_snapshot": True, "prefix": "@home"}),
            (["-fN3"], {"snapshot_folder": "N3"}),
            (["-qvdebug"], {"verbosity": "debug"}),
        ])

    def test_long_options(self):
        self.check([
            (["--num-snapshots", "3"], {"num_snapshots": 3}),
            (["--num-snapshots=3"], {"num_snapshots": 3}),
            (["--snapshot-folder=a=b"], {"snapshot_folder": "a=b"}),
            (["--log-json=/a b"], {"log_json": "/a b"}),
            (["--stall-timeout=0.5"], {"stall_timeout": 0.5}),
        ])

    def test_a_folder_of_a_key_may_hold_any_byte(self):
        for path in ("/mnt/b\udce4ckup", "/a\u00a0b", "/a\tb"):
            request, = parse_command(["agent", "--under", path, "--allow", "receive"])
            self.assertEqual(path, request.task.under)
        for path in ("/a\nb", "a", ""):
            self.assertRaises(UsageError, parse_command, ["agent", "--under", path, "--allow", "send"])

    def test_a_value_is_taken_as_it_stands(self):
        self.check([
            (["-p", "@home"], {"prefix": "@home"}),
            (["--snapshot-prefix=@home"], {"prefix": "@home"}),
            (["--snapshot-prefix=-x"], {"prefix": "-x"}),
            (["-p", "-x"], {"prefix": "-x"}),
            (["--snapshot-prefix=--help"], {"prefix": "--help"}),
            (["-p", "--"], {"prefix": "--"}),
            (["-p", ""], {"prefix": ""}),
            (["--snapshot-prefix="], {"prefix": ""}),
            (["-p", " "], {"prefix": " "}),
            (["-p", "\udcff"], {"prefix": "\udcff"}),
            (["-f-S"], {"snapshot_folder": "-S"}),
            (["-f", "/absolute"], {"snapshot_folder": "/absolute"}),
        ])

    def test_numbers(self):
        self.check([
            (["-N", "0"], {}),
            (["-N", "007"], {"num_snapshots": 7}),
            (["-n", "999999999"], {"num_backups": 999999999}),
        ])

    def test_shortened(self):
        self.check([
            (["--snapshot-p", "x"], {"prefix": "x"}),
            (["--stall=3"], {"stall_timeout": 3.0}),
            (["--dry"], {"dry_run": True}),
            (["--locked"], {"locked_destinations": True}),  # two spellings of one option
            (["--locked-dests"], {"locked_destinations": True}),
            (["--verb", "debug"], {"verbosity": "debug"}),
        ])

    def test_wait_with_and_without_a_number(self):
        forever = float("inf")
        self.check([
            (["--wait"], {"wait": forever}),
            (["--wait", "/s"], {"wait": forever, "source": "/s"}),
            (["--wait", "-S", "/s"], {"wait": forever, "source": "/s", "no_snapshot": True}),
            (["--wait", "60", "/s"], {"wait": 60.0, "source": "/s"}),
            (["--wait", "0", "/s"], {"wait": 0.0, "source": "/s"}),
            (["--wait", "1.5", "/s"], {"wait": 1.5, "source": "/s"}),
            (["--wait=1.5", "/s"], {"wait": 1.5, "source": "/s"}),
            (["--wait=60", "5"], {"wait": 60.0, "source": "5"}),
            (["/s", "60", "--wait"], {"wait": forever, "source": "/s", "destinations": ("60",)}),
            (["--wait", "./60"], {"wait": forever, "source": "./60"}),
            (["--wait", "./60d"], {"wait": forever, "source": "./60d"}),
            (["--wait", "."], {"wait": forever, "source": "."}),
            (["--wait", "..", "1.2.3"], {"wait": forever, "source": "..", "destinations": ("1.2.3",)}),
        ])

    def test_after_two_dashes_all_are_paths(self):
        self.check([
            (["--", "-S"], {"source": "-S"}),
            (["-S", "--", "--no-transfer", "--"], {"no_snapshot": True, "source": "--no-transfer",
                                                   "destinations": ("--",)}),
            (["/s", "--", "-N", "3"], {"source": "/s", "destinations": ("-N", "3")}),
            (["--wait", "--", "60"], {"wait": float("inf"), "source": "60"}),
            (["/s", "--"], {"source": "/s"}),
        ])

    def test_the_last_one_counts(self):
        self.check([
            (["-N", "3", "-N", "5"], {"num_snapshots": 5}),
            (["-N", "3", "--latest-only"], {"num_snapshots": 1}),
            (["--latest-only", "-N", "3"], {"num_snapshots": 3}),
            (["-v", "debug", "-q"], {"verbosity": "warning"}),
        ])

    def test_what_may_be_repeated(self):
        self.check([
            (["--forget-destination", "/b"], {"forget": ("/b",)}),
            (["--forget-destination", "/b", "/s", "--forget-destination=/c"],
             {"source": "/s", "forget": ("/b", "/c")}),
        ])


class Refused(unittest.TestCase):
    """One line, which names the option."""

    def refuse(self, arguments, *words):
        with self.subTest(arguments=arguments):
            with self.assertRaises(UsageError) as caught:
                check_task(support.task_of(arguments))
            said = format_error(caught.exception)
            self.assertEqual(2, caught.exception.status)
            self.assertEqual(1, len(said.splitlines()), said)
            self.assertTrue(said.isprintable(), said)
            for word in words:
                self.assertIn(word, said)

    def test_numbers(self):
        bad = ["-1", "+1", "x", "", " ", "1.5", "1e3", "0x10", "3 ", " 3", "3\n", "1,000", "9999999999",
               "\u0663", "nan", "inf", "\udcff"]
        for value in bad:
            self.refuse(["-N", value, "/s"], "-N")
            self.refuse(["--num-backups=" + value, "/s"], "--num-backups")
            self.refuse(["-n" + value, "/s"] if value else ["-n"], "-n")

    def test_seconds(self):
        bad = ["-1", "+1", "x", "", " ", "1.", ".5", "1e3", "60s", "1.5.5", "5\n", "\u0663", "nan", "inf"]
        for value in bad:
            self.refuse(["--wait=" + value, "/s"], "--wait")
            self.refuse(["--stall-timeout=" + value, "/s"], "--stall-timeout")
            self.refuse(["--stall-timeout", value, "/s"], "--stall-timeout")
        for value in ("0", "0.0", "000"):
            self.refuse(["--stall-timeout=" + value, "/s"], "--stall-timeout")

    def test_verbosity(self):
        for value in ("", "loud", "DEBUG", "debug ", "infos", "progress"):
            self.refuse(["-v", value, "/s"], "-v")

    def test_prefix(self):
        for value in ("a/b", "/", "../x", "a\nb", "\n", "a\0b"):
            self.refuse(["-p", value, "/s"], "-p")
            self.refuse(["--snapshot-prefix=" + value, "/s"], "--snapshot-prefix")

    def test_paths_of_options(self):
        for flag in ("-f", "--snapshot-folder", "--log-json", "--forget-destination"):
            for value in ("", "a\nb", "a\0b"):
                self.refuse([flag, value, "/s"], flag)

    def test_unknown_options(self):
        for argument in ("-y", "-Sy", "-ySN3", "--no-such", "--no-such=1", "--num-snapshot-s", "---",
                         "--Sync", "-\u00e9", "-S=1", "-\n", "--a\nb"):
            self.refuse([argument, "/s"], "unknown option")

    def test_ambiguous_options(self):
        self.refuse(["--s", "/s"], "--s ", "-s", "--stall-timeout", "--skip-fs-checks")
        self.refuse(["--no-", "/s"], "--no- ", "--no-elevate")
        self.refuse(["--=3", "/s"], "--wait", "--dry-run")

    def test_what_deletes_forgets_or_is_deprecated_has_no_short_form(self):
        for short, whole in (("--num-s", "--num-snapshots"), ("--num-b=3", "--num-backups"),
                             ("--keep-s", "--keep-snapshots"),
                             ("--keep-b", "--keep-backups"), ("--forget", "--forget-destination"),
                             ("--convert", "--convert-rw"), ("--remove", "--remove-locks"),
                             ("--remove-lock", "--remove-locks"), ("--latest-o", "--latest-only")):
            self.refuse([short, "3", "/s"], short.partition("=")[0] + " must be written in full", whole)
        self.refuse(["--num", "3", "/s"], "--num ", "--num-snapshots", "--num-backups", "could be")

    def test_options_of_other_verbs_count(self):
        """As what one means may be another verb's."""
        self.refuse(["--latest", "/s"], "unknown option --latest", "restore and verify")
        self.refuse(["list", "-N", "3", "/s"], "unknown option -N", "-N is an option of a backup")
        self.refuse(["/b", "restore", "--latest", "/s"], "a verb comes first in its command")
        self.refuse(["/s", "list"], "list must come first in its command", "btrfs-backup-ng list /s;", "./list")
        self.refuse(["/s", "-q", "/b", "prune"], "btrfs-backup-ng prune /s /b;")
        self.assertEqual(("./list",), support.task_of(["/s", "./list"]).destinations)

    def test_the_options_of_printed_units_stand_behind_two_dashes(self):
        self.refuse(["print", "systemd", "-N", "3", "/s"], "unknown option -N", "print systemd -- [options] SOURCE")
        self.refuse(["--lates", "/s"], "--latest or --latest-only")
        self.refuse(["--late", "3", "/s"], "--latest or --latest-only")
        self.refuse(["--max", "3", "/s"], "unknown option --max", "doctor")
        self.refuse(["doctor", "--latest", "/s"], "unknown option --latest")
        self.refuse(["prune", "--partials", "3d", "/s"], "--partials-older-than")

    def test_an_equals_sign_after_a_short_option(self):
        for argument, words in (("-p=home-", ("--snapshot-prefix=home-", "-p ")), ("-N=3", ("--num-snapshots=3",)),
                                ("-SN=3", ("-N=3", "--num-snapshots=3")), ("-p=", ("-p=", "--snapshot-prefix=")),
                                ("-f==x", ("--snapshot-folder==x",))):
            self.refuse([argument, "/s"], "is ambiguous", *words)

    def test_without_the_value(self):
        for option in OPTIONS:
            if option.parse and not option.metavar.startswith("["):
                for flag in option.flags:
                    self.refuse(["/s", flag], flag, option.metavar)
        self.refuse(["/s", "-SN"], "-N")

    def test_a_flag_with_a_value(self):
        for option in OPTIONS:
            if option.parse is None:
                for flag in option.flags:
                    if flag.startswith("--"):
                        self.refuse([flag + "=1", "/s"], flag, "no value")
                        self.refuse([flag + "=", "/s"], flag, "no value")

    def test_no_source(self):
        for arguments in ([], ["-S"], ["--"], [""], ["", "/b"], ["-N", "3"]):
            self.refuse(arguments, "source")

    def test_remove_locks_of_nobody(self):
        self.refuse(["--remove-locks", "/s"], "--remove-locks", "--locked-destinations")
        check_task(support.task_of(["--remove-locks", "/s", "/b"]))
        check_task(support.task_of(["--remove-locks", "--locked-destinations", "/s"]))


class Commands(unittest.TestCase):
    """What is printed to be typed means the source and prefix of the task, and takes no snapshot."""

    TABLE = (
        ({}, "-S -T -p home- /s"),
        ({"snapshot_folder": "/a b"}, "-S -T -p home- -f '/a b' /s"),
        ({"snapshot_folder": ".z"}, "-S -T -p home- -f .z /s"),
        ({"snapshot_folder": "-"}, "-S -T -p home- -f - /s"),
        ({"ssh_options": ("Port=22", "User=me"), "source": "h:/s"},
         "-S -T -p home- --ssh-opt=Port=22 --ssh-opt=User=me h:/s"),
        ({"ssh_sudo": True, "source": "ssh://h:22/s"}, "-S -T -p home- --ssh-sudo ssh://h:22/s"),
        ({"source": "-s"}, "-S -T -p home- -- -s"),
        ({"source": "@s"}, "-S -T -p home- -- @s"),
        ({"source": "s:t"}, "-S -T -p home- s:t"),
        ({"source": "/s:t"}, "-S -T -p home- -- /s:t"),
        ({"source": "/s\\:t"}, "-S -T -p home- -- '/s\\:t'"),
        ({"source": "!s"}, "-S -T -p home- '!s'"),
        ({"source": "~s"}, "-S -T -p home- '~s'"),
        ({"source": "/s:"}, "-S -T -p home- -- /s:"),
    )

    def test_each_says_what_is_meant(self):
        for fields, words in self.TABLE:
            task = Task(source="/s")._replace(**fields)
            with self.subTest(fields=fields):
                text = source_command(task, "home-", ["-T"])
                self.assertEqual("btrfs-backup-ng " + words, text)
                self.assertEqual(task._replace(prefix="home-", no_snapshot=True, no_transfer=True),
                                 support.task_of(shlex.split(text)[1:]))

    def test_without_a_prefix(self):
        self.assertEqual("btrfs-backup-ng -S -p '' /s", source_command(Task(source="/s", prefix="other"), "", []))

    def test_to_give_a_destination_up(self):
        self.assertEqual("btrfs-backup-ng -S -T --forget-destination '/b c' -p h /s",
                         forget_command(Task(source="/s", destinations=("/d",)), "h", "/b c"))


class SeveralTasks(unittest.TestCase):

    def test_where_one_is_meant(self):
        for arguments in (["/a", ":", "/b"], ["/a:/b"]):
            self.assertEqual(["/a", "/b"], [request.task.source for request in parse_command(arguments)])

    def test_a_verb_takes_one(self):
        for arguments in (["list", "/a", ":", "/b"], ["list", "/a:/b", "/c:/d"]):
            with self.assertRaises(UsageError) as caught:
                parse_command(arguments)
            self.assertIn("list is done for one task", caught.exception.message)
        for arguments in (["list", "/a", ":"], ["list", ":", "/a"]):
            self.assertEqual(["/a"], [request.task.source for request in parse_command(arguments)])

    def test_after_two_dashes_all_are_paths_of_a_verb(self):
        self.assertEqual(Task(verb="list", source=":", destinations=("-x", "::", "/a:/b")),
                         support.task_of(["list", "--", ":", "-x", "::", "/a:/b"]))


class Together(unittest.TestCase):
    """Tasks of one command that would mix the snapshots of two sources."""

    REFUSED = (
        "/a /b : /c /b",
        "/a /b : /c /b/",
        "-p x /a /b : -p x /c /x /b",
        "/a ssh://h/b : /c h:/b",
        "/a ssh://u@h:2/b : /c ssh://u@h:2/b/",
        "/a raw:///b : /c raw:///b",
        "/a raw+ssh://h/b : /c raw+ssh://h/b",
        "-p HOST /a /b : /c /b",
        "ssh://h/a /b : ssh://h/c /b",
        "/a /b : /c /d : /e /b",
        "-f /s /a /b : -f /s /c /d",
        "-f one /a /b : -f two /a /b",
        "-S -f in1 /a /b : -S -f in2 /a /b",
    )
    TAKEN = (
        "/a /b",
        "/a /b : /a /b",
        "/a /b : /a/ /b/",
        "-p x /a /b : -p y /c /b",
        "/a /b : /c /b/c",
        "/a ssh://h/b : /c ssh://i/b",
        "/a ssh://h/b : /c /b",
        "/a ssh://h/b : /c ssh://h:2/b",
        "ssh://h/a /b : ssh://i/a /b",
        "/a shell://x : /c shell://x",
        "-f /s -p x /a /b : -f /s -p y /c /d",
        "/a : /c",
    )

    @staticmethod
    def check(text):
        check_together([request.task for request in parse_command(
            [os.uname().nodename + "-" if word == "HOST" else word for word in text.split()])])

    def test_refused(self):
        for text in self.REFUSED:
            with self.subTest(text=text):
                with self.assertRaises(UsageError) as caught:
                    self.check(text)
                self.assertIn("-p", caught.exception.hint)

    def test_taken(self):
        for text in self.TAKEN:
            with self.subTest(text=text):
                self.check(text)


class Endpoints(unittest.TestCase):

    PATHS = ("/", "/s", "s", ".", "..", "./a:b", "./@home", "-", "two words", "$HOME", "it's", "\udcff",
             "./ssh://x", "~", "#", "%20")

    WITH_COLONS = (":", "::", "/a:/b", "../a:b", "a/b:c", "/a/host:/b", "/ssh://x", "/a\\:b", "@home")

    NO_PATHS = ("", "a\nb", "/a\0b", "\n")

    SCHEMES = ("ftp://host/path", "file:///mnt", "FTP://host", "x-y+z.1://a", "s3://bucket", "btrfs://")

    NO_HOSTS = ("host:path", "a:b", "a b:/c", "\udcff:/c", "a::b", "ssh://host", "ssh:///path", "ssh://", "ssh://@h/p",
                "ssh://h:99x/p", "ssh://h:/p", "ssh://h:0/p", "ssh://h:65536/p", "raw+ssh://h:70000/p",
                "ssh://-oX/p", "ssh://-u@h/p", "ssh://u@-h/p", "-h:/p", "u@-h:/p",
                "ssh://::1/p", "ssh://[::1/p", "ssh://a b/p", "raw+ssh:///p")

    # (text, [user@]host, port, path, normalised id)
    HOSTS = (("host:/path", "host", "", "/path", "ssh://host/path"),
             ("user@nas.local:/p", "user@nas.local", "", "/p", "ssh://user@nas.local/p"),
             ("ssh://Host:2222/p/", "Host", "2222", "/p/", "ssh://Host:2222/p"),
             ("ssh://u@[fe80::1%eth0]:22/p q", "u@fe80::1%eth0", "22", "/p q", "ssh://u@[fe80::1%eth0]:22/p q"),
             ("[::1]:/p", "::1", "", "/p", "ssh://[::1]/p"),
             ("ssh://h/a#b?c%20$d'\udcff", "h", "", "/a#b?c%20$d'\udcff", "ssh://h/a#b?c%20$d'\udcff"),
             ("ssh://h//", "h", "", "//", "ssh://h/"))

    def refuse(self, text, *words):
        for arguments in ([text, "/b"], ["/s", text], ["/s", "/b", text]):
            with self.subTest(arguments=arguments):
                with self.assertRaises(UsageError) as caught:
                    check_task(support.task_of(["--"] + arguments))
                said = format_error(caught.exception)
                self.assertEqual(1, len(said.splitlines()), said)
                for word in words:
                    self.assertIn(word, said)

    def test_paths(self):
        for text in self.PATHS:
            with self.subTest(text=text):
                self.assertEqual((text, SUBVOLUMES, text, "", ""), parse_endpoint(text))
                check_task(support.task_of(["--", text, text]))

    def test_a_word_is_taken_as_it_stands(self):
        """Tasks and files are split off before."""
        for text in self.WITH_COLONS:
            with self.subTest(text=text):
                self.assertEqual((text, SUBVOLUMES, text, "", ""), parse_endpoint(text))

    def test_no_paths(self):
        for text in self.NO_PATHS:
            self.refuse(text)

    def test_unknown_schemes(self):
        for text in self.SCHEMES:
            self.refuse(text, text.partition("://")[0] + "://", "unknown")

    def test_hosts(self):
        for text, login, port, path, key in self.HOSTS:
            with self.subTest(text=text):
                self.assertEqual((text, SUBVOLUMES, path, login, port), parse_endpoint(text))
                self.assertEqual(key, destination_key(text))
                self.assertEqual(key, destination_key(key))

    def test_no_hosts(self):
        for text in self.NO_HOSTS:
            self.refuse(text)

    def test_what_is_no_source(self):
        for text in ("shell://cat > /x", "raw:///x", "raw+ssh://h/x"):
            parse_endpoint(text)
            with self.assertRaises(UsageError):
                check_task(support.task_of([text, "/b"]))

    def test_commands_are_taken_verbatim(self):
        command = "ssh -p 22 host 'cat > \"$HOME/a:b\"'; echo @x # %20"
        self.assertEqual(command, parse_endpoint("shell://" + command).path)
        self.assertEqual("shell://" + command, destination_key("shell://" + command))


class Table(unittest.TestCase):

    # What people's scripts and crontabs contain.
    PROMISED = (
        "-h", "--help", "-V", "--version", "-v", "--verbosity", "-q", "--quiet", "-d", "--btrfs-debug",
        "-l", "--live-layout", "--jobs",
        "-N", "--num-snapshots", "-n", "--num-backups", "--keep-snapshots", "--keep-backups",
        "-S", "--no-snapshot", "-f", "--snapshot-folder",
        "-p", "--snapshot-prefix", "-T", "--no-transfer", "-I", "--no-incremental", "-s", "--sync",
        "-w", "--convert-rw", "--remove-locks", "--locked-destinations", "--locked-dests",
        "--forget-destination", "--skip-fs-checks", "--latest-only", "--dry-run", "--wait",
        "-P", "--no-progress", "--log-json", "--stall-timeout", "--no-elevate")

    def test_every_promised_option_is_there(self):
        self.assertEqual([], [flag for flag in self.PROMISED if flag not in FLAGS])

    def test_no_flag_is_there_twice(self):
        for name in VERBS:
            flags = [flag for verb, option in ALL_OPTIONS if verb == name for flag in option.flags]
            self.assertEqual(sorted(set(flags)), sorted(flags))

    def test_options_and_fields_of_a_task_match(self):
        fields = {option.field for _, option in ALL_OPTIONS}
        self.assertEqual(set(Task._fields) - {"verb", "source", "destinations", "after_colon"}, fields)

    def test_every_option_has_a_long_form(self):
        """Tasks are handed on in it."""
        for verb in VERBS.values():
            for option in flags_of(verb.groups).values():
                self.assertTrue(option.flags[-1].startswith("--"), option.flags)

    def test_each_flag_sets_its_field(self):
        for verb, option in ALL_OPTIONS:
            for flag in option.flags:
                with self.subTest(verb=verb, flag=flag):
                    value = [SAMPLES[option.metavar]] if option.parse else []
                    task = support.task_of(([verb] if verb else []) + [flag] + value)
                    before = Task(verb=verb)
                    changed = [name for name in Task._fields if getattr(task, name) != getattr(before, name)]
                    self.assertEqual([option.field], changed)

    def test_each_verb_has_a_help_that_names_all(self):
        for name, verb in VERBS.items():
            with self.subTest(verb=name):
                text = format_help(name or "options")
                words = set(re.findall(r"(?<!\S)(-[-A-Za-z]+)", text))
                self.assertEqual(set(), set(flags_of(verb.groups)) - words)
                flat = " ".join(text.split())
                for option in (option for group in verb.groups for option in group.options):
                    shown = ", ".join(option.flags) + (" " + option.metavar if option.metavar else "")
                    self.assertIn(shown + " ", flat)
                    self.assertIn(" ".join(option.help.split()), flat)
                for group in verb.groups:
                    self.assertIn("\n" + group.title.lower() + ":\n", "\n" + text)
                for line in text.splitlines()[1:]:
                    self.assertLessEqual(len(line), 80 if not line.startswith("  btrfs-backup-ng") else 100, line)

    def test_the_overview(self):
        lines = format_help().splitlines()
        self.assertLessEqual(len(lines), 100)
        self.assertLessEqual(max(map(len, lines)), 80)
        for option in options_of(VERBS[""]):
            self.assertRegex(format_help(), r"(?m)^ .* {}$".format(re.escape(option.brief)))
            flag = next(flag for flag in option.flags if flag.startswith("--"))
            self.assertRegex(format_help(), r"(?m)^  (-., )?{}(,? |$)".format(flag))

    def test_topics(self):
        for topic in HELP_TOPICS:
            self.assertIn(topic, format_help())
            lines = format_help(topic).splitlines()
            self.assertGreater(len(lines), 5)
            self.assertLessEqual(max(map(len, lines)), 80, topic)
        laid_out = [line for text in TOPICS.values() for part in text.split("\n\n") if part.startswith(" ")
                    for line in part.split("\n")]
        self.assertEqual([], [line for line in laid_out if len(line) > 75])  # for the manual at 80 columns

    def test_the_help_names_the_verbs(self):
        for name, verb in VERBS.items():
            if name and verb.summary:
                self.assertRegex(format_help(), r"(?m)^  {} +{}".format(name, re.escape(verb.summary.split()[0])))

    def test_the_examples_are_command_lines(self):
        for name, verb in VERBS.items():
            self.assertIn("-h", flags_of(verb.groups), name)
            for example, effect in verb.examples:
                with self.subTest(example=example):
                    self.assertTrue(effect)
                    for request in parse_command(shlex.split(re.split(r" [|>]", example)[0])):
                        self.assertEqual(name, request.task.verb)
                        RUNS[name][0](request.task)


if __name__ == "__main__":
    unittest.main()
