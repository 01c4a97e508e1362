"""What print writes: the manual in man, the completions in their shells, the units under systemd's eyes."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

import support

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from btrfs_backup_ng import EXPLAINED, FLAGS, PRINTS, SHELLS, VERBS, OneOf, flags_of, format_help


def run(*argv, **options):
    """Status and both outputs of a command, as text."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def program(*arguments, env=None):
    running = support.Running(*arguments, env=env)
    try:
        return tuple(running.finish())
    finally:
        running.close()


class PrintTestCase(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="print.")
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def need(self, name):
        if not shutil.which(name):
            self.skipTest("needs the program " + name)

    def printed(self, *arguments, **options):
        status, text, errors = program("print", *arguments, **options)
        self.assertEqual((0, ""), (status, errors))
        return text

    def file(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return path


class Arguments(PrintTestCase):

    usual_seconds = 5

    def test_bad_ones_get_one_line(self):
        for arguments, words in (
            ((), "nothing says what to print"),
            (("poem",), "poem"),
            (("man", "more"), "more"),
            (("completion",), "which shell"),
            (("completion", "tcsh"), "tcsh"),
            (("completion", "bash", "zsh"), "zsh"),
            (("systemd",), "no source"),
            (("systemd", "--", "/home", "-N", "x"), "-N"),
            (("systemd", "--", "home", "/mnt/b"), "home is a relative path"),
            (("systemd", "--", "/home", "b"), "b is a relative path"),
            (("systemd", "--", "ftp://x", "b"), "ftp"),
            (("systemd", "--", "print", "man"), "verb print"),
            (("systemd", "--unit", "a/b", "--", "/home"), "--unit"),
            (("systemd", "--on-calendar", "a\nb", "--", "/home"), "--on-calendar"),
            (("authorized-keys", "--under", "/b\udce4", "--allow", "send", "a.pub"), "cannot be printed as it is"),
            (("authorized-keys", "--under", "/missing/b", "--allow", "send", "a.pub"), "no such folder: /missing/b"),
            (("authorized-keys", "--under", "/dev/null", "--allow", "send", "a.pub"), "no such folder: /dev/null"),
        ):
            with self.subTest(arguments=arguments):
                status, text, errors = program("print", *arguments)
                self.assertEqual((2, ""), (status, text))
                self.assertEqual(1, len(errors.splitlines()), errors)
                self.assertIn(words, errors)

    def test_all_that_can_be_printed_is_offered(self):
        self.assertEqual(sorted(PRINTS), sorted(dict(VERBS["print"].operands)["print"]))
        for name in PRINTS:
            self.assertIn(name, format_help("print"))

    @unittest.skipUnless(os.geteuid() == 0, "only root can become another user")
    def test_it_takes_no_privilege(self):
        path = shutil.copy(support.PROGRAM, os.path.join(self.folder, "program.py"))
        os.chmod(self.folder, 0o755)
        argv = support.as_nobody() + [support.PYTHON, "-E", "-s", path, "print", "man"]
        self.assertEqual((0, self.printed("man")), run(*argv)[:2])

    def test_the_same_everywhere(self):
        for arguments in (("man",), ("completion", "bash"), ("completion", "zsh"), ("completion", "fish")):
            text = self.printed(*arguments)
            for environment in ({"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8", "TZ": "Asia/Tokyo"}, {"COLUMNS": "40"}):
                self.assertEqual(text, self.printed(*arguments, env=dict(os.environ, **environment)))
            text.encode("ascii")


class Manual(PrintTestCase):

    def test_every_verb_flag_and_topic_is_in_it(self):
        self.need("groff")
        status, text, errors = run("groff", "-man", "-ww", "-Tascii", "-P-cbou", "-rLL=100n",
                                   self.file("manual.8", self.printed("man")))
        self.assertEqual((0, ""), (status, errors), "groff has something to say")
        flat = " ".join(text.split())
        for name, verb in VERBS.items():
            if name and verb.summary:
                self.assertRegex(text, r"(?m)^{}$".format(name.upper()))
            for group in verb.groups:
                for option in group.options:
                    shown = ", ".join(option.flags) + (" " + option.metavar if option.metavar else "")
                    self.assertRegex(text, r"(?m)^ +{}( |$)".format(re.escape(shown)))
        for words in ("exit status", "FILES", "EXAMPLES", "another run is at work", ".outstanding_transfers"):
            self.assertIn(words.lower(), flat.lower())

    def test_it_fits_80_columns(self):
        self.need("groff")
        status, text, _ = run("groff", "-man", "-Tascii", "-P-cbou", "-rLL=78n",
                              self.file("manual.8", self.printed("man")))
        self.assertEqual(0, status)
        self.assertEqual([], [line for line in text.split("\n") if len(line) > 80])

    def test_man_shows_it(self):
        self.need("man")
        environment = dict(os.environ, MANWIDTH="80", LC_ALL="C.UTF-8", MANROFFOPT="-ww")
        path = self.file("manual.8", self.printed("man"))
        status, text, errors = run("man", "--warnings", "-l", path, env=environment)
        self.assertEqual((0, ""), (status, errors))
        typed = re.sub(r" \\\n +", " ", text).replace("\n       btrfs", "\nbtrfs")  # as a shell takes it
        for verb in VERBS.values():
            for command, _ in verb.examples:
                self.assertIn("\nbtrfs-backup-ng {}\n".format(command), typed)
        self.assertIn("-p, --snapshot-prefix P", text)


class Completion(PrintTestCase):

    def typed_already(self):
        """Backups of two prefixes in b, one of a name that a shell would run; snapshots of c; hosts."""
        for path in ("b/home-20260131-093000", "b/home-20260201-093000", "b/srv-260131-093000", "b/other",
                     "b/$(touch run)-20260131-093000", "c/.btrfs-backup-ng/snapshots/c-20260131-093000", ".ssh"):
            os.makedirs(os.path.join(self.folder, path))
        self.file(".ssh/config", "Host nas vault*\n  Port 22\nhost  desk\nMatch all\nHostName no\n")

    BACKUPS = ["home-20260131-093000", "home-20260201-093000", "srv-260131-093000"]


class Bash(Completion):

    def setUp(self):
        super().setUp()
        self.need("bash")
        self.script = self.file("completion", self.printed("completion", "bash"))

    def complete(self, *words, program="btrfs-backup-ng"):
        """What bash offers for the last of `words`."""
        driver = ("source {}\nCOMP_WORDS=({})\nCOMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n_btrfs_backup_ng\n"
                  "printf '%s\\n' \"${{COMPREPLY[@]}}\"").format(
                      shlex.quote(self.script), " ".join(map(shlex.quote, (program,) + words)))
        environment = dict(os.environ, HOME=self.folder)
        status, text, errors = run("bash", "--norc", "-uc", driver, cwd=self.folder, env=environment)
        self.assertEqual("", errors)
        return sorted(filter(None, text.splitlines()))

    def test_flags_of_each_verb(self):
        for name, verb in VERBS.items():
            words = (name,) if name else ()
            self.assertEqual(sorted(flags_of(verb.groups)), self.complete(*words, "-"))
        self.assertEqual(["--num-backups", "--num-snapshots"], self.complete("/home", "--num"))

    def test_values(self):
        os.mkdir(os.path.join(self.folder, "two words"))
        self.file("a file", "")
        self.assertEqual(["debug", "error", "info", "warning"], self.complete("-v", ""))
        self.assertEqual(["warning"], self.complete("--verbosity", "=", "w"))
        self.assertEqual(["debug", "error", "info", "warning"], self.complete("--verbosity", "="))
        self.assertEqual([], self.complete("-N", ""))
        self.assertEqual(["two words"], self.complete("-f", "t"))
        self.assertEqual(["a file"], self.complete("--log-json", "a"))
        self.assertEqual(["two words"], self.complete("/home", ""))
        for verb in "restore", "history":
            self.assertEqual(["a file"], self.complete(verb, "a"))
        self.assertEqual([], self.complete("list", "a"))
        self.assertEqual([], self.complete("restore", "--path", ""))  # which is inside of a backup

    def test_names_are_no_patterns(self):
        for name in ("*", "a", "[a]", "b c"):
            os.mkdir(os.path.join(self.folder, name))
        self.file("[f]", "")
        self.file("f", "")
        self.assertEqual(["*", "[a]", "a", "b c"], self.complete("/home", ""))
        self.assertEqual(["[a]"], self.complete("-f", "["))
        self.assertEqual(["[a]", "[f]"], self.complete("--log-json", "["))
        self.assertEqual(["@[a]", "@[f]"], self.complete("@["))

    def test_verbs(self):
        self.assertEqual(sorted(filter(None, VERBS)), self.complete(""))
        self.assertEqual(sorted(PRINTS), self.complete("print", ""))
        self.assertEqual(sorted(SHELLS), self.complete("print", "completion", ""))
        self.assertEqual(sorted(EXPLAINED), self.complete("help", ""))
        self.assertEqual(["remote", "restore", "restoring", "resuming", "retention"], self.complete("help", "re"))

    def test_what_is_on_disks(self):
        self.typed_already()
        self.assertEqual(self.BACKUPS, self.complete("verify", "b", "--name", ""))
        self.assertEqual(["c-20260131-093000"], self.complete("restore", "c", "--name", "c"))
        self.assertEqual(["home-", "srv-"], self.complete("/home", "b", "-p", ""))
        self.assertEqual(["@b/", "@c/"], [word + "/" for word in self.complete("@") if word in ("@b", "@c")])
        self.assertEqual(["//desk/", "//nas/"], self.complete("/home", "ssh", ":", "//"))
        self.assertEqual(["//nas/"], self.complete("/home", "ssh", ":", "//n"))
        self.assertNotIn("run", os.listdir(self.folder))

    def test_bash_calls_it(self):
        status, text, errors = run("bash", "--norc", "-c", "source {}; complete -p btrfs-backup-ng".format(self.script))
        self.assertEqual("complete -F _btrfs_backup_ng btrfs-backup-ng\n", text)


class Fish(Completion):

    def setUp(self):
        super().setUp()
        self.need("fish")
        self.script = self.file("completion.fish", self.printed("completion", "fish"))

    def complete(self, line):
        environment = dict(os.environ, HOME=self.folder, XDG_CONFIG_HOME=self.folder, XDG_DATA_HOME=self.folder)
        status, text, errors = run("fish", "--no-config", "-c", "source {}; complete -C {}".format(
            shlex.quote(self.script), shlex.quote("btrfs-backup-ng " + line)), cwd=self.folder, env=environment)
        self.assertEqual((0, ""), (status, errors))
        return sorted(offer.partition("\t")[0] for offer in text.splitlines())

    def test_flags_of_each_verb(self):
        for name, verb in VERBS.items():
            long_flags = sorted(flag for flag in flags_of(verb.groups) if flag.startswith("--"))
            self.assertEqual(long_flags, self.complete((name + " " if name else "") + "--"))
            offered = self.complete((name + " " if name else "") + "-")
            self.assertEqual([], sorted(set(flags_of(verb.groups)) - set(offered)))

    def test_values(self):
        os.mkdir(os.path.join(self.folder, "two words"))
        self.file("a file", "")
        self.assertEqual(["debug", "error", "info", "warning"], self.complete("-v "))
        self.assertEqual([], self.complete("-N "))
        self.assertEqual(["two words/"], self.complete("-f t"))
        self.assertEqual(["a file"], self.complete("--log-json a"))
        self.assertEqual(["two words/"], self.complete("/home t"))
        for verb in "restore", "history":
            self.assertEqual(["a file"], self.complete(verb + " a"))
        self.assertEqual([], self.complete("list a"))
        self.assertEqual([], self.complete("restore --path "))

    def test_what_is_on_disks(self):
        self.typed_already()
        self.assertEqual(self.BACKUPS, self.complete("verify b --name "))
        self.assertEqual(["home-", "srv-"], self.complete("/home b -p "))
        self.assertLessEqual({"@b/", "@c/"}, set(self.complete("@")))
        self.assertEqual(["ssh://desk/", "ssh://nas/"], self.complete("/home ssh://"))
        self.assertNotIn("run", os.listdir(self.folder))

    def test_verbs(self):
        self.assertLessEqual(set(filter(None, VERBS)), set(self.complete("")))
        self.assertEqual(sorted(PRINTS), self.complete("print "))
        self.assertEqual(sorted(SHELLS), self.complete("print completion "))
        self.assertEqual(sorted(EXPLAINED), self.complete("help "))


class Zsh(Completion):

    usual_seconds = 5

    def setUp(self):
        super().setUp()
        self.need("zsh")
        self.file("_btrfs-backup-ng", self.printed("completion", "zsh"))
        self.file(".zshrc", "PS1='READY> '\nLISTMAX=100000\nfpath=({0} $fpath)\nautoload -Uz compinit\n"
                            "compinit -u -d {0}/dump\nzstyle ':completion:*' verbose no\n"
                            "setopt list_packed no_beep no_auto_menu no_auto_remove_slash\n".format(self.folder))
        os.mkdir(os.path.join(self.folder, "work"))

    def test_what_is_on_disks(self):
        self.typed_already()
        for line, offers in (("verify ../b --name ", self.BACKUPS), ("/home ../b -p ", ["home-", "srv-"]),
                             ("/home ssh://", ["desk", "nas"]), ("@../c", ["@../c/"])):
            shown = self.shown(line)
            self.assertEqual([], [offer for offer in offers if offer not in shown], shown)
        self.assertNotIn("run", os.listdir(self.folder))

    def shown(self, line):
        """The terminal's text after TAB was pressed behind `line`; the offers are below it."""
        child, terminal = pty.fork()
        if child == 0:
            os.chdir(os.path.join(self.folder, "work"))
            environment = {"ZDOTDIR": self.folder, "HOME": self.folder, "TERM": "dumb", "LC_ALL": "C.UTF-8",
                           "PATH": os.environ["PATH"], "LINES": "500", "COLUMNS": "150"}
            os.execvpe("zsh", ["zsh", "-i"], environment)
        text = ""
        try:
            text = self.wait_for(terminal, "READY> ")
            os.write(terminal, "btrfs-backup-ng {}\t\x05#END".format(line).encode())
            text = self.wait_for(terminal, "#END")
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
            os.close(terminal)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)

    def wait_for(self, terminal, words):
        text, deadline = b"", time.monotonic() + support.HANGS
        while words.encode() not in text:
            ready = select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0]
            self.assertTrue(ready, "zsh did not show {!r}: {!r}".format(words, text))
            text += os.read(terminal, 65536)
        return text.decode("utf-8", "replace")

    def test_flags_of_each_verb(self):
        for name, verb in VERBS.items():
            begin = name + " " if name else ""
            # a single option is not listed but put onto the line
            words = set(re.findall(r"(?<!\S)(--?[-A-Za-z]+)", self.shown(begin + "-") + self.shown(begin + "--")))
            self.assertEqual([], sorted(set(flags_of(verb.groups)) - words))

    def test_values_and_verbs(self):
        os.mkdir(os.path.join(self.folder, "work", "two words"))
        self.assertIn("--verbosity warning", self.shown("--verbosity w"))
        self.assertIn("two\\ words/", self.shown("/home t"))
        self.assertIn("two\\ words/", self.shown("-f t"))
        self.file("work/a file", "")
        self.assertIn("a\\ file", self.shown("history a"))
        offered = self.shown("print ").split()
        self.assertEqual([], sorted(set(PRINTS) - set(offered)))
        offered = self.shown("print completion ").split()
        self.assertEqual([], sorted(set(SHELLS) - set(offered)))
        self.assertEqual([], sorted(set(EXPLAINED) - set(self.shown("help ").split())))
        offered = self.shown("").split()
        self.assertEqual([], sorted(set(filter(None, VERBS)) - set(offered)))


class Units(PrintTestCase):

    usual_seconds = 4

    def units(self, *arguments):
        """The folder of the units that the printed script writes, and the service's command line."""
        folder = os.path.join(self.folder, "units")
        script = self.printed("systemd", *arguments)
        self.assertEqual(0, run("sh", "-n", self.file("script", script))[0])
        status, _, errors = run("sh", self.file("script", script), folder)
        self.assertEqual((0, ""), (status, errors))
        return folder

    def unit(self, *arguments, suffix=".service"):
        folder = self.units(*arguments)
        (name,) = (name for name in os.listdir(folder) if name.endswith(suffix))
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            return file.read()

    HOSTILE = ("two words", "$HOME", "%h", '"quoted"', "it's", "back\\slash", ";", "tab\t", "caf\u00e9", "#", "~",
               "END OF UNIT")

    def test_systemd_finds_no_fault(self):
        self.need("systemd-analyze")
        for arguments in (["--", "/home", "/mnt/b"], ["--user", "--", "/home"],
                          ["--", "ssh://nas/home", "shell://cat >/x"],
                          ["--on-calendar", "Mon..Fri *-*-* 03:00", "--", "/", "/mnt/b"],
                          ["--unit", "nightly@1", "--", "/home"], ["--"] + ["/" + word for word in self.HOSTILE]):
            with self.subTest(arguments=arguments):
                folder = self.units(*arguments)
                paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
                self.assertEqual(2, len(paths))
                self.assertEqual((0, "", ""), run("systemd-analyze", "verify", *paths))
                shutil.rmtree(folder)

    def test_words_are_quoted_as_systemd_takes_them_apart(self):
        for word, quoted in (("two words", '"/two words"'), ("$HOME", '"/$$HOME"'), ("%h", '"/%%h"'), (";", '"/;"'),
                             ('a"b', '"/a\\"b"'), ("a\\b", '"/a\\\\b"'), ("tab\t", '"/tab\\x09"'),
                             ("\udcff", '"/\\xff"'), ("caf\u00e9", '"/caf\u00e9"'), ("a:b@c", None),
                             ("plain-1.2", "/plain-1.2")):
            command = ["--unit", "x", "--", "/" + word.replace(":", "\\:")]
            with self.subTest(word=word):
                (line,) = re.findall(r"(?m)^ExecStart=(.*)$", self.unit(*command))
                self.assertTrue(line.endswith(" " + (quoted or '"/a\\\\:b@c"')), line)

    def test_it_is_this_program_that_runs(self):
        (command,) = re.findall(r"(?m)^ExecStart=(.*)$", self.unit("--", "-N", "3", "/home", "/mnt/b"))
        path = shlex.split(command)
        self.assertEqual(["-N", "3", "/home", "/mnt/b"], path[-4:])
        self.assertEqual(support.FAST_PROGRAM, path[-5])

    def test_the_calendar(self):
        self.assertIn("\nOnCalendar=*-*-* 02:00\n", self.unit("--", "/home", suffix=".timer"))
        self.assertIn("\nOnCalendar=hourly\n", self.unit("--on-calendar", "hourly", "--", "/home", suffix=".timer"))

    TIMES = ("hourly", "semiannually", "Sun", "Mon..Fri 18:30", "Sat *-*-1..7 18:00", "*:0/15", "2026-12-24 18:00",
             "Mon..Fri 18:30 Europe/Berlin", "03-05 08:05:40 UTC", "Wed..Sat,Tue 12-10-15 1:2:3", "saturday 18:00")
    NO_TIMES = ("nonsense", "at night", "18h", "02:00 Mon")

    def test_a_calendar_that_is_none(self):
        self.need("systemd-analyze")
        without = dict(os.environ, PATH=os.path.join(self.folder, "none"))
        for when in self.TIMES:
            for environment in os.environ, without:
                self.assertIn("OnCalendar=" + when, self.printed("systemd", "--on-calendar", when, "--", "/home",
                                                                 env=environment))
        for when in self.NO_TIMES:
            for environment in os.environ, without:
                status, text, errors = program("print", "systemd", "--on-calendar", when, "--", "/home",
                                               env=environment)
                self.assertEqual((2, ""), (status, text), (when, errors))
                self.assertIn("knows no time such as '{}'; for example --on-calendar 'Mon..".format(when), errors)

    def test_the_network_is_waited_for_where_there_is_a_host(self):
        self.assertNotIn("network", self.unit("--", "/home", "/mnt/b"))
        shutil.rmtree(os.path.join(self.folder, "units"))
        self.assertIn("After=network-online.target", self.unit("--", "/home", "nas:/b"))

    def test_names(self):
        for source, name in (("/", "btrfs-backup-root"), ("/home", "btrfs-backup-home"),
                             ("/srv/a b", "btrfs-backup-srv-a-b"),
                             ("nas:/home/", "btrfs-backup-home"), ("/\u00e4", "btrfs-backup-root")):
            folder = self.units("--", source)
            self.assertEqual([name + ".service", name + ".timer"], sorted(os.listdir(folder)))
            shutil.rmtree(folder)

    def test_units_of_another_backup_are_not_overwritten(self):
        for one, other in ((["/a b"], ["/a-b"]), (["/a/b"], ["/a-b"]), (["/\u00e4"], ["/\u00fc"]),
                           (["/home"], ["nas:/home"]), (["/home", "/mnt/b"], ["/home", "/mnt/c"]),
                           (["/home", "/b", ":", "/var", "/c"], ["/home", "/b"]),
                           (["-p", "hourly-", "/home", "/b"], ["-p", "daily-", "/home", "/b"]),
                           (["/home", "/b"], ["-p", "daily-", "/home", "/b"]),
                           (["-p", "daily-", "/home", "/b"], ["/home", "/b"]),
                           (["-f", "/s", "/home", "/b"], ["-f", "/t", "/home", "/b"]),
                           (["/home", "/b, /c"], ["/home", "/b", "/c"])):
            with self.subTest(one=one, other=other):
                folder = self.units("--", *one)
                before = self.unit("--", "-n", "3", *one)  # the same again: a change
                self.assertIn("-n 3", before)
                script = self.file("other", self.printed("systemd", "--", *other))
                status, output, errors = run("sh", script, folder)
                self.assertEqual((1, ""), (status, output))
                self.assertIn("--unit NAME", errors)
                with open(os.path.join(folder, min(os.listdir(folder))), encoding="utf-8") as file:
                    self.assertEqual(before, file.read())
                shutil.rmtree(folder)


    def test_units_of_an_earlier_version_are_renewed(self):
        """They say only in their command which job they do."""
        for one, other, is_same in (
            (["/home", "/b"], ["/home", "/b"], True),
            (["-n", "3", "/home", "/b c"], ["-n", "4", "/home", "/b c"], True),
            (["-p", "x-", "/home", "/b"], ["-p", "x-", "/home", "/b"], True),
            (["/home", "/b", ":", "/var", "/c"], ["/home", "/b", ":", "/var", "/c"], True),
            (["/home", "/b"], ["/home", "/c"], False), (["-p", "x-", "/home", "/b"], ["/home", "/b"], False),
            (["/home", "/b"], ["-p", "x-", "/home", "/b"], False), (["/home", "/b c"], ["/home", "/b", "/c"], False),
            (["-f", "/s", "/home", "/b"], ["/home", "/b"], False),
        ):
            with self.subTest(one=one, other=other):
                folder = self.units("--", *one)
                path = os.path.join(folder, "btrfs-backup-home.service")
                with open(path, encoding="utf-8") as file:
                    text = re.sub(r"(?m)^# job: .*\n", "", file.read())
                text = re.sub("(?m)^Description=.*$", "Description=Back up with btrfs-backup-ng", text)
                with open(path, "w", encoding="utf-8") as file:
                    file.write(text.replace(support.FAST_PROGRAM, "/opt/earlier"))
                script = self.file("other", self.printed("systemd", "--", *other))
                self.assertEqual(0 if is_same else 1, run("sh", script, folder)[0])
                shutil.rmtree(folder)


class HardenedUnits(support.BackupTestCase):
    """What the service may do is enough for a backup."""

    def setUp(self):
        super().setUp()
        self.churn = support.Churn(self.source)
        self.churn.fill()

    def settings(self):
        """{setting: value} of the service for source and target."""
        status, text, errors = program("print", "systemd", "--", "-p", "home", self.source, self.target)
        self.assertEqual((0, ""), (status, errors))
        service = text.partition("\n[Service]\n")[2].partition("END OF UNIT")[0]
        return dict(re.findall(r"(?m)^([A-Za-z]+)=(.*)$", service))

    def back_up_twice(self, wrapper):
        for changes in (30, 0):
            self.run_program("-p", "home", self.source, self.target, wrapper=wrapper)
            self.churn.change(changes)
            support.next_second()
        for name in support.names(self.target):
            self.assertComplete(os.path.join(self.target, name), os.path.join(self.snapshots, name))

    def test_capabilities_and_mounts(self):
        settings = self.settings()
        kept = ",".join("+" + name[len("CAP_"):].lower() for name in settings["CapabilityBoundingSet"].split())
        self.assertEqual("yes", settings["NoNewPrivileges"])
        self.assertEqual("yes", settings["ProtectKernelTunables"])
        script = ('for at in /proc/sys /sys; do mount --rbind $at $at && mount -o remount,bind,ro $at || exit 99; '
                  'done; exec setpriv --no-new-privs --bounding-set "-all,$0" --inh-caps -all "$@"')
        self.back_up_twice(["unshare", "--mount", "--propagation", "slave", "sh", "-c", script, kept])

    def test_to_a_folder_that_others_may_write_to(self):
        """There receive is confined, which takes a namespace of mounts and a chroot."""
        os.chown(self.target, 1000, 1000)
        self.test_capabilities_and_mounts()
        self.assertEqual("mnt", self.settings()["RestrictNamespaces"])

    @unittest.skipUnless(shutil.which("strace"), "needs the program strace")
    @unittest.skipUnless(shutil.which("systemd-analyze"), "needs the program systemd-analyze")
    def test_system_calls(self):
        os.chown(self.target, 1000, 1000)
        forbidden = self.settings()["SystemCallFilter"]
        self.assertTrue(forbidden.startswith("~"))
        calls = set()
        for group in forbidden[1:].split():
            calls |= self.calls_of(group)
        self.assertIn("swapon", calls)
        trace = os.path.join(support.scratch_folder(), "trace")
        self.back_up_twice(["strace", "-f", "-qq", "-A", "-o", trace])
        with open(trace, errors="replace") as file:
            used = set(re.findall(r"(?m)^[0-9]+ +([a-z0-9_]+)\(", file.read()))
        self.assertLess({"ioctl", "mount", "chroot", "unshare"}, used)
        self.assertEqual([], sorted(calls & used))

    def calls_of(self, group):
        """The names of the system calls in one of systemd's groups, which name others."""
        _, text, _ = run("systemd-analyze", "syscall-filter", group)
        names = re.findall(r"(?m)^ +(@?[a-z0-9_-]+)$", text)
        return {name for name in names if not name.startswith("@")}.union(
            *(self.calls_of(name) for name in names if name.startswith("@")))


class Values(unittest.TestCase):

    def test_what_takes_one_of_some_words_says_which(self):
        """So that help and completions name them."""
        for flag, option in FLAGS.items():
            if isinstance(option.parse, OneOf):
                for word in option.parse.words:
                    self.assertIn(word, option.help, flag)


if __name__ == "__main__":
    unittest.main()
