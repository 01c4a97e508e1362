"""Many tasks in one command, and arguments in files: what the words become, and where a mistake is."""

import os
import shutil
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support

from btrfs_backup_ng import (
    SHARED,
    VERBS,
    Forbidden,
    Task,
    UsageError,
    format_error,
    parse_command,
    parse_policy,
    split_word,
)


def tasks_of(arguments):
    return [request.task for request in parse_command(arguments)]


def paths_of(arguments):
    """The paths of each task."""
    return [list(request.paths) for request in parse_command(arguments)]


class TableTest(unittest.TestCase):

    def check_paths(self, table):
        for arguments, expected in table:
            with self.subTest(arguments=arguments):
                self.assertEqual(expected, paths_of(arguments))

    def refuse(self, arguments, *words):
        with self.subTest(arguments=arguments):
            with self.assertRaises(UsageError) as caught:
                parse_command(arguments)
            said = format_error(caught.exception)
            self.assertEqual(1, len(said.splitlines()), said)
            self.assertEqual(2, caught.exception.status)
            for word in words:
                self.assertIn(word, said)
            return said


class Separators(TableTest):

    def test_alone(self):
        self.check_paths([
            (["/a", "/b", ":", "/c", "/d"], [["/a", "/b"], ["/c", "/d"]]),
            (["/a", "/b", "::", "/c", "/d"], [["/a", "/b"], ["/c", "/d"]]),
            (["/a", ":", "/b", ":", "/c"], [["/a"], ["/b"], ["/c"]]),
        ])

    def test_glued(self):
        self.check_paths([
            (["/home", "/mnt/b/home:/opt", "/mnt/b/opt"], [["/home", "/mnt/b/home"], ["/opt", "/mnt/b/opt"]]),
            (["/home", "/mnt/b/home::/opt", "/mnt/b/opt"], [["/home", "/mnt/b/home"], ["/opt", "/mnt/b/opt"]]),
            (["/a:", "/b"], [["/a"], ["/b"]]),
            (["/a", ":/b"], [["/a"], ["/b"]]),
            (["/a:/b:/c"], [["/a"], ["/b"], ["/c"]]),
            (["a/b:c"], [["a/b"], ["c"]]),
            (["../a:.b:.."], [["../a"], [".b"], [".."]]),
            (["/two words:/more words"], [["/two words"], ["/more words"]]),
            (["/a/host:/b"], [["/a/host"], ["/b"]]),
            (["/\udcff:/\udcfe"], [["/\udcff"], ["/\udcfe"]]),
            (["/a:-S", "/b"], [["/a"], ["/b"]]),
        ])
        self.assertEqual([False, True], [task.no_snapshot for task in tasks_of(["/a:-S", "/b"])])

    def test_an_empty_task_is_none(self):
        self.check_paths([
            ([":", "/a"], [["/a"]]),
            (["/a", ":"], [["/a"]]),
            (["/a", ":", ":", "/b"], [["/a"], ["/b"]]),
            ([":", "::"], [[]]),
            ([], [[]]),
        ])

    def test_part_of_an_endpoint(self):
        self.check_paths([
            (["ssh://host:22/a:/b"], [["ssh://host:22/a"], ["/b"]]),
            (["ssh://u@[::1]:22/a", "/b"], [["ssh://u@[::1]:22/a", "/b"]]),
            (["ssh://host:22"], [["ssh://host:22"]]),
            (["host:/a", "/b:host:/c:/d"], [["host:/a", "/b"], ["host:/c"], ["/d"]]),
            (["user@host:/a:user@[::1]:/b"], [["user@host:/a"], ["user@[::1]:/b"]]),
            (["raw:///a:raw+ssh://h:2/b:/c"], [["raw:///a"], ["raw+ssh://h:2/b"], ["/c"]]),
            (["/a", "shell://cat > /x:/y \\: z", ":", "/b"], [["/a", "shell://cat > /x:/y \\: z"], ["/b"]]),
            (["/a:shell://x:y"], [["/a"], ["shell://x:y"]]),
            (["ftp://host:2/a:/b"], [["ftp://host:2/a:/b"]]),  # refused as a whole
            (["a:b", "a::b", "home:"], [["a:b", "a::b", "home:"]]),  # refused as hosts
            (["a:-b:/c", "a:.:/c", "ssh://host:/"], [["a:-b:/c", "a:.:/c", "ssh://host:/"]]),
            (["./name:/path", "./a:b:c"], [["./name:/path", "./a:b:c"]]),
        ])

    def test_escaped(self):
        self.check_paths([
            (["/a\\:b:/c"], [["/a:b"], ["/c"]]),
            (["./a\\:b"], [["./a:b"]]),
            (["/a\\b"], [["/a\\b"]]),
            (["ssh://h:2/a\\:b:/c"], [["ssh://h:2/a:b"], ["/c"]]),
            (["/a\\:/b"], [["/a:/b"]]),
        ])

    def test_part_of_a_value(self):
        for arguments in (["-p", ":", "/a"], ["-p:", "/a"], ["--snapshot-prefix=:", "/a"]):
            self.assertEqual([Task(source="/a", prefix=":")], tasks_of(arguments))
        self.assertEqual([Task(source="/a", snapshot_folder="x:/y")], tasks_of(["-f", "x:/y", "/a"]))
        self.assertEqual([Task(source="/a", forget=("h:/a:/b",))], tasks_of(["/a", "--forget-destination=h:/a:/b"]))
        self.assertEqual([Task(source="/a", wait=float("inf")), Task(source="5")],
                         tasks_of(["/a", "--wait", ":", "5"]))

    def test_after_two_dashes_only_a_separator_alone_is_one(self):
        self.check_paths([
            (["--", "/a:/b", "@c", "\\:", ":", "/d:/e"], [["/a:/b", "@c", "\\:"], ["/d"], ["/e"]]),
            (["--", "-S", "::", "-S", "/b"], [["-S"], ["/b"]]),
        ])

    def test_each_task_has_its_options(self):
        self.assertEqual(
            [Task(source="/a", destinations=("/b",), prefix="a", num_snapshots=3),
             Task(source="/c", prefix="c", no_snapshot=True, forget=("/x", "/y"))],
            tasks_of(["-p", "a", "/a", "-N3", "/b:/c", "-Sp", "c", "--forget-destination", "/x",
                      "--forget-destination", "/y"]))

    def test_display_options_hold_for_all(self):
        for arguments, fields in ((["-q"], {"verbosity": "warning"}), (["-v", "debug"], {"verbosity": "debug"}),
                                  (["--dry-run"], {"dry_run": True}), (["-l"], {"live_layout": True}),
                                  (["-d"], {"btrfs_debug": True}), (["-P"], {"no_progress": True}),
                                  (["--log-json", "/x:y"], {"log_json": "/x:y"}), (["--help"], {"help": True}),
                                  (["--jobs", "3"], {"jobs": 3}), (["--no-elevate"], {"no_elevate": True})):
            self.assertLessEqual(set(fields), SHARED)
            for words in (arguments + ["/a:/b"], ["/a:/b"] + arguments, ["/a"] + arguments + [":/b"]):
                with self.subTest(words=words):
                    one, other = tasks_of(words)
                    self.assertEqual(Task(source="/a", **fields), one)
                    self.assertEqual(Task(source="/b", **fields), other._replace(after_colon=False))
        self.assertEqual(["error"] * 2, [t.verbosity for t in tasks_of(["-q", "/a:/b", "-v", "error"])])

    def test_the_words_of_a_task_give_it_again(self):
        arguments = ["-p", "a b", "/a", "-SN3", "/b:/c", "--wait", "--log-json=/x", "-q", "--forget-destination",
                     "/:/", "--forget-destination=-x", ":", "/d", "-p", "", "--wait", "5"]
        requests = parse_command(arguments)
        self.assertEqual(3, len(requests))
        for request in requests:
            self.assertEqual(request.task, support.task_of(
                list(request.words) + ["--log-json=/x", "-q", "--"] + list(request.paths)))


class Files(TableTest):

    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)

    def file(self, name, content):
        path = os.path.join(self.folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return "@" + path

    def read(self, content):
        return tasks_of([self.file("conf", content)])

    def check(self, table):
        for content, *tasks in table:
            with self.subTest(content=content):
                self.assertEqual([Task(**fields) for fields in tasks], self.read(content))

    def test_the_example_of_0_6_6(self):
        self.file("global.conf", "# This file gets included by the other one.\n--quiet\n\n"
                                 "--num-snapshots 1\n--num-backups 3\n")
        task = self.read("# This is a comment and thus ignored, as well as blank lines.\n\n"
                         "# Include another configuration file here.\n@global.conf\n\n"
                         "        # Indentation has no effect.\n        -p home\n\n"
                         "# This is the source.\n/home\n\n# Back up to both local and remote storage.\n"
                         "/mnt/backups/home\nssh://server/mnt/btrfs_storage/backups/home\n")
        self.assertEqual([Task(source="/home", prefix="home", verbosity="warning", num_snapshots=1, num_backups=3,
                               destinations=("/mnt/backups/home",
                                             "ssh://server/mnt/btrfs_storage/backups/home"))], task)

    def test_lines(self):
        self.check([
            ("", {}),
            ("/a\n/b", {"source": "/a", "destinations": ("/b",)}),
            ("\t /a \t\n", {"source": "/a"}),
            ("# x\n  # y\n/a\n#/b\n", {"source": "/a"}),
            ("/a\r\n/b\r\n\r\n-S\r\n", {"source": "/a", "destinations": ("/b",), "no_snapshot": True}),
            ("\ufeff/a\n", {"source": "/a"}),
            ("\ufeff# comment\r\n-p home\r\n/a\r\n", {"source": "/a", "prefix": "home"}),
            (b"/caf\xe9\n", {"source": "/caf\udce9"}),
            ("/a\nsync:/b\n", {"source": "/a", "destinations": ("sync:/b",)}),  # a host, no option
            ("/a\u2028b\u00a0\x0c/c\n", {"source": os.fsdecode("/a\u2028b\u00a0\x0c/c".encode())}),
        ])

    def test_nothing_is_escaped_or_unquoted(self):
        self.check([
            ("/two words\n$HOME\n/a\\:b\n/a:/b\n--\n'/quoted'\n\"x\"",
             {"source": "/two words", "destinations": ("$HOME", "/a\\:b", "/a:/b", "'/quoted'", '"x"')}),
            ("/s\nshell://ssh h 'cat > \"a:b\"' # x", {"source": "/s",
                                                      "destinations": ("shell://ssh h 'cat > \"a:b\"' # x",)}),
        ])

    def test_options_with_values(self):
        self.check([
            ("-p home", {"prefix": "home"}),
            ("-p   two  words  ", {"prefix": "two  words"}),
            ("-p\thome", {"prefix": "home"}),
            ("-p @home", {"prefix": "@home"}),
            ("-p@home", {"prefix": "@home"}),
            ("-p # no comment", {"prefix": "# no comment"}),
            ("--snapshot-prefix=\"q\"", {"prefix": "\"q\""}),
            ("-p a=b", {"prefix": "a=b"}),
            ("-pa b", {"prefix": "a b"}),
            ("--snapshot-prefix=a b", {"prefix": "a b"}),
            ("--snapshot-prefix=", {"prefix": ""}),
            ("--snapshot-prefix a=b", {"prefix": "a=b"}),
            ("--snapshot-folder /a b:c", {"snapshot_folder": "/a b:c"}),
            ("--snapshot-p 3", {"prefix": "3"}),
            ("-SN 3", {"no_snapshot": True, "num_snapshots": 3}),
            ("-SN3", {"no_snapshot": True, "num_snapshots": 3}),
            ("--wait\n60", {"wait": float("inf"), "source": "60"}),
            ("--wait 60", {"wait": 60.0}),
            ("-", {"source": "-"}),
        ])

    def test_tasks(self):
        self.check([
            ("-p a\n/a\n:\n-p b\n/b\n", {"source": "/a", "prefix": "a"}, {"source": "/b", "prefix": "b"}),
            ("/a\n::\n/b\n:\n", {"source": "/a"}, {"source": "/b"}),
            ("-q\n/a\n  :  \n/b\n-N 1", {"source": "/a", "verbosity": "warning"},
             {"source": "/b", "verbosity": "warning", "num_snapshots": 1}),
        ])

    def test_after_two_dashes_all_are_paths(self):
        self.check([("--\n-S\n@x\n:\n-S\n/b", {"source": "-S", "destinations": ("@x",)},
                     {"source": "/b", "no_snapshot": True})])

    def test_two_dashes_in_a_file_hold_to_its_end(self):
        conf = self.file("dashes.conf", "-p h-\n--\n/home\n-x\n")
        task = Task(source="/home", destinations=("-x", "/b"), prefix="h-", dry_run=True)
        self.assertEqual([task], tasks_of([conf, "--dry-run", "/b"]))
        self.file("outer.conf", "@dashes.conf\n--dry-run\n/b\n")
        self.check([("@outer.conf\n-q\n", dict(task._asdict(), verbosity="warning"))])

    def test_among_other_words(self):
        conf = self.file("conf", "-p home\n/home\n")
        one = Task(source="/home", prefix="home")
        self.assertEqual([one._replace(destinations=("/b",), num_snapshots=3)], tasks_of(["-N3", conf, "/b"]))
        self.assertEqual([Task(destinations=("/b",), source="/home", prefix="x")], tasks_of([conf, "-p", "x", "/b"]))
        self.assertEqual([one, Task(source="/b")], tasks_of([conf, ":", "/b"]))
        self.assertEqual([one, one], tasks_of([conf + ":" + conf]))
        self.assertEqual([Task(source=conf)], tasks_of(["--", conf]))
        self.assertEqual([Task(snapshot_folder=conf)], tasks_of(["-f", conf]))

    def test_those_that_the_command_line_names_are_known(self):
        self.file("inner", "-S\n")
        one, two = self.file("one", "/a\n@inner\n"), self.file("two", "/b\n")
        self.assertEqual([(one[1:], two[1:])] * 2, [request.files for request in parse_command([one, ":", two])])
        self.assertEqual([()], [request.files for request in parse_command(["/a", "--", one])])

    def test_what_does_not_concern_a_verb_that_looks_at_a_job(self):
        conf = self.file("conf", "-p home\n-N 3\n/a\n--keep-snapshots 7d\n/b\n")
        for verb in sorted({verb for verb, row in VERBS.items() if row.reads_jobs} - {"prune", "restore"}):
            with self.subTest(verb=verb):
                self.assertEqual(Task(verb=verb, source="/a", destinations=("/b",), prefix="home"),
                                 support.task_of([verb, conf]))
                self.refuse([verb, "-N", "3", conf], "unknown option -N")
                self.refuse([verb, self.file("bad", "-N x")], "-N", "'x'")
                self.refuse([verb, self.file("bad", "--no-such")], "unknown option --no-such")

    def test_prune_takes_the_destinations_of_a_job_and_no_source(self):
        """What lies in the source by the policy of its backups is none of them."""
        conf = self.file("conf", "-p home\n-N 3\n/a\n--keep-backups 7d\n/b\n/c\n")
        days = parse_policy("7d")
        task = Task(verb="prune", source="/b", destinations=("/c",), prefix="home", keep_backups=days)
        self.assertEqual(task, support.task_of(["prune", conf]))
        self.assertEqual(task._replace(dry_run=True, destinations=("/c", "/d")),
                         support.task_of(["prune", "--dry-run", conf, "/d"]))
        self.assertEqual(task._replace(source="/d", destinations=("/b", "/c")), support.task_of(["prune", "/d", conf]))
        self.file("places", "/a\n/b\n/c\n")
        self.file("policy", "-p home\n--keep-backups 7d\n-N 3\n")
        self.assertEqual(task, support.task_of(["prune", self.file("outer", "@places\n@policy\n")]))
        self.refuse(["prune", self.file("any", "-N 3\n-n 1\n/a\n/b\n")], "of which prefix", "-p")
        folders = self.file("folders", "--keep-backups 7d\n/b\n/c\n")
        self.assertEqual(task._replace(prefix=None), support.task_of(["prune", folders]))
        self.refuse(["prune", "-N", "3", conf], "unknown option -N")
        self.refuse(["prune", self.file("bad", "-N x")], "-N", "'x'")
        self.refuse(["prune", self.file("both", "@conf\n:\n-p opt\n/opt\n/d\n-N 3\n")], "one task at a time")

    def test_restore_takes_the_destination_of_a_job(self):
        task = Task(verb="restore", source="/b", destinations=("/new",), prefix="home", latest=True)
        conf = self.file("conf", "-p home\n-N 3\n/a\n/b\n")
        self.assertEqual(task, support.task_of(["restore", conf, "--latest", "/new"]))
        in_place = task._replace(destinations=(), in_place="/a")
        self.assertEqual(in_place, support.task_of(["restore", conf, "--latest", "--in-place", "/a"]))
        short = self.file("short", "-p home\n/a\n/b\n")
        self.assertEqual(task, support.task_of(["restore", short, "--latest", "/new"]))
        self.assertEqual(in_place, support.task_of(["restore", short, "--latest", "--in-place", "/a"]))
        own = self.file("own", "--latest\n-p home\n/b\n/new\n")
        self.assertEqual(task, support.task_of(["restore", own]))
        self.refuse(["restore", self.file("two", "-N 3\n/a\n/b\n/c\n"), "/new"], "2 destinations", "/b or /c")
        several = self.file("several", "/a\n/b\n:\n/c\n/d\n")
        self.refuse(["restore", several, "/new"], "one task at a time", "a file of its own")

    def test_with_a_colon_in_its_name(self):
        conf = self.file("a:b", "/home\n")
        self.assertEqual([Task(source="/home")], tasks_of([conf.replace(":", "\\:")]))

    def test_files_include_files(self):
        self.file("sub/second.conf", "@third one.conf\n/b\n@../first.conf\n")
        self.file("sub/third one.conf", "-S\n")
        self.file("first.conf", "-T\n")
        self.check([("@first.conf\n/a\n@  sub/second.conf\n@first.conf\n",
                     {"source": "/a", "destinations": ("/b",), "no_snapshot": True, "no_transfer": True}),
                    ("@" + os.path.join(self.folder, "first.conf"), {"no_transfer": True})])

    def test_relative_to_the_working_folder(self):
        self.file("sub/conf", "@more\n/a\n")
        self.file("sub/more", "-S\n")
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.folder)
        self.assertEqual([Task(source="/a", no_snapshot=True)], tasks_of(["@sub/conf"]))
        os.chdir("sub")
        self.assertEqual([Task(source="/a", no_snapshot=True)], tasks_of(["@conf"]))

    def test_an_included_file_may_hold_tasks(self):
        self.file("both", "/a\n:\n/b\n")
        self.check([("@both\n-S\n:\n/c", {"source": "/a"}, {"source": "/b", "no_snapshot": True}, {"source": "/c"})])

    # Mistakes.

    def refuse_line(self, number, content, *words):
        conf = self.file("conf", content)
        said = self.refuse([conf], *words)
        self.assertTrue(said.startswith("{}:{}: ".format(conf[1:], number)), said)

    def test_a_mistake_is_named_with_its_line(self):
        self.refuse_line(3, "/a\n\n--no-such\n", "unknown option --no-such")
        self.refuse_line(1, "-y 3", "unknown option -y")
        self.refuse_line(1, "-+", "unknown option -+")
        self.refuse_line(2, "\r\n--num 3\r\n", "could be")
        self.refuse_line(1, "-N x", "-N", "'x'")
        self.refuse_line(1, "-p", "needs a value")
        self.refuse_line(2, "# x\n-p\nhome\n", "needs a value")
        self.refuse_line(1, "-q /a", "-q takes no value")
        self.refuse_line(1, "--quiet=1", "--quiet takes no value")
        self.refuse_line(1, "--quiet /a", "--quiet takes no value")
        self.refuse_line(1, "-S -T", "-S takes no value")
        self.refuse_line(1, "-- /a", "-- must stand alone")
        self.refuse_line(2, "/a\nftp://x/y", "ftp://")
        self.refuse_line(2, "/a\nhost:relative", "no absolute path")
        self.refuse_line(1, "@", "names no file")
        self.refuse_line(2, "/a\n/b\0c", "is not a path")

    def test_a_line_is_one_thing(self):
        """Else the second path on a line would silently get no backup."""
        for line, other in (("/data /mnt/a /mnt/b", "/mnt/a /mnt/b"), ("/data\t/mnt/a", "/mnt/a"),
                            ("/data ./a", "./a"), ("/data ../a", "../a"), ("/data ~/a", "~/a"), ("data /a", "/a"),
                            ("/data ssh://h/p", "ssh://h/p"), ("/data u@h:/p", "u@h:/p"), ("/data raw:///a", "raw:///a"),
                            ("/data shell://cat > /x", "shell://cat > /x"), ("ssh://h/p /a", "/a"),
                            ("/data -N 3", "-N 3"), ("/data --quiet", "--quiet"), ("/data # mine", "# mine"),
                            ("/data #mine", "#mine"), ("/data @other", "@other"), ("/data :", ":"),
                            (": /data", "/data"), ("/data : /b", ": /b"), ("/data:", ":"), ("/data::", "::"),
                            ("-p home- -N 3", "-N 3"), ("-phome- # mine", "# mine"), ("--snapshot-prefix x /a", "/a"),
                            ("-f /s /a", "/a"), ("--snapshot-p x # y", "# y"), ("@other # mine", "# mine")):
            self.refuse_line(2, "# x\n" + line + " \t\r\n/more", "more than one thing on a line",
                             "give {} a line of its own".format(other))

    def test_nothing_is_quoted(self):
        for line in ('"/my disk"', "'/data'", '"/data" "/a"', "/my\\ disk", '-p "home-"', "-p'home-'", '@"other"'):
            self.refuse_line(1, line, "nothing is quoted or escaped")

    def test_one_thing_with_blanks(self):
        lines = ("/my disk", "/a - b", "/disk #2", "/it's", "/a:b", "ssh://h:2/p q", "shell://x -y '/z' # u : /v")
        self.assertEqual([list(lines)], paths_of([self.file("conf", "\n".join(lines))]))
        odd = ("/a /b", '"a', "/a -b", "/a # b", "/a:", "/my\\ disk")
        self.assertEqual([list(odd)], paths_of([self.file("odd", "\n".join(("--",) + odd))]))
        self.assertEqual(Task(source="/a", prefix="x # -y", ssh_options=("ProxyCommand=ssh -W /x # y",)),
                         support.task_of([self.file("values", "--snapshot-prefix=x # -y\n/a\n"
                                                    "--ssh-opt ProxyCommand=ssh -W /x # y")]))

    def test_a_missing_file(self):
        self.refuse(["@/no/such.conf"], "/no/such.conf", "no such file")
        self.refuse(["@" + self.folder], "cannot read {}: is a directory".format(self.folder))
        self.refuse(["@a\0b"], "names no file")
        self.refuse(["@"], "names no file")
        self.refuse_line(2, "/a\n@missing.conf", os.path.join(self.folder, "missing.conf"), "no such file")

    def test_a_mistake_in_an_included_file_is_named_there(self):
        inner = self.file("inner", "\n-y")
        said = self.refuse([self.file("outer", "@inner")], "unknown option -y")
        self.assertTrue(said.startswith(inner[1:] + ":2: "), said)

    def test_cycles(self):
        self.refuse_line(2, "/a\n@conf", "includes itself")
        os.symlink("conf", os.path.join(self.folder, "link"))
        self.refuse_line(1, "@link", "includes itself")
        one, two = self.file("one", "\n@two"), self.file("two", "\n\n@sub/three")
        three = self.file("sub/three", "@../one")
        for first, last, line in ((one, three, 1), (two, one, 2), (three, two, 3)):
            said = self.refuse([first], "includes itself")
            self.assertTrue(said.startswith("{}:{}: ".format(os.path.normpath(last[1:]), line))
                            or os.path.normpath(said.partition(":")[0]) == last[1:], said)

    def test_no_file_of_arguments(self):
        self.refuse(["@/dev/zero"], "/dev/zero", "larger than 1.0 MiB")

    def test_the_largest(self):
        lines = "/a\n#".ljust(1 << 20, "x")
        self.check([(lines, {"source": "/a"})])
        self.refuse([self.file("conf", lines + "x")], "larger than")

    def test_not_allowed(self):
        conf = self.file("conf", "/a")
        os.chmod(conf[1:], 0)
        os.chmod(self.folder, 0o755)
        if os.geteuid() == 0:
            os.seteuid(65534)
            self.addCleanup(os.seteuid, 0)
        with self.assertRaises(Forbidden):
            parse_command([conf])


class Verbs(TableTest):

    def test_a_verb_stands_first_or_behind_options(self):
        for before in ([], ["-q"], ["-v", "info"], ["--wait", "5"], ["-p", "list"], ["-qp", "x"]):
            for word in ("prune", "restore"):
                task, = tasks_of(before + [word, "/b"])
                self.assertEqual((word, "/b"), (task.verb, task.source))
        self.assertEqual("./list", tasks_of(["./list"])[0].source)
        self.assertEqual("list", tasks_of(["-p", "list", "/b"])[0].prefix)


class Words(unittest.TestCase):

    def test_what_is_split_can_be_put_together(self):
        for word in ("/a:/b", "host:/a", "x", ":", "ssh://h:1/a:b:c", "@a:b"):
            path, rest = split_word(word)
            self.assertEqual(word, path if rest is None else path + ":" + rest)


if __name__ == "__main__":
    unittest.main()
