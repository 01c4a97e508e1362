"""What is read at the end of a run and of a dry run, by a person and by programs."""

import json
import os
import re
import sys
import unittest

import support
from running import go_on, is_met
from support import names

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from btrfs_backup_ng import TOPICS, Account, Event, Load, ToSend, Verdict, load_of, skipped_lines

SIZE = r"[0-9.]+ [KMG]?i?B"


class Loads(unittest.TestCase):

    def test_what_is_said(self):
        for load, line in (
                (Load("/mnt/backup", 12, 43 << 30, 38 << 30),
                 "12 to send, about 43.0 GiB; 38.0 GiB are free at /mnt/backup: it will not fit"),
                (Load("/mnt/backup", 1, 38 << 30, 38 << 30),
                 "1 to send, about 38.0 GiB; 38.0 GiB are free at /mnt/backup"),
                (Load("/mnt/backup", 0, 0, 0), "nothing to send; 0 B are free at /mnt/backup"),
                (Load("shell://cat", 2, 5, None), "2 to send, about 5 B to shell://cat"),
                (Load("/mnt/backup", 2, None, 5), "2 to send; 5 B are free at /mnt/backup"),
                (Load("/mnt/backup", 2, 6, 5, "at least"),
                 "2 to send, at least 6 B; 5 B are free at /mnt/backup: it will not fit")):
            self.assertEqual(line, load.line)

    def test_what_is_not_sent_for_one_reason_is_one_line(self):
        skipped = [Verdict("a", False, "old"), Verdict("b", False, "old"), Verdict("c", False, "older")]
        self.assertEqual(["do not send 2 snapshots, a to b: old", "do not send c: older"], skipped_lines(skipped))

    def test_what_is_known_of_a_sum(self):
        one, other = ToSend("a", None, 7, 3), ToSend("b", "a")
        self.assertEqual([4, 4, None, 0], [load_of("/b", sending, 5).bytes for sending in (
            [one], [one, other], [other], [])])
        self.assertEqual(["about", "at least"], [load_of("/b", sending, 5).known for sending in ([one], [one, other])])
        self.assertEqual([True, None, False], [load.fits for load in (
            Load("/b", 1, 5, 5), Load("/b", 1, None, 5), Load("/b", 1, 6, 5))])


class Room(support.BackupTestCase):

    target_size = "128M"

    def leave(self, mib):
        """Takes the room at the target, but for so much."""
        stat = os.statvfs(self.target)
        with open(os.path.join(self.target_disk.path, "fill"), "wb") as file:
            os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - (mib << 20))
        os.sync()

    def test_what_will_not_fit_is_said_in_the_dry_run_and_beside_the_transfer(self):
        support.bulk(os.path.join(self.source, "bulk"), 24)
        self.take(1, 2)
        self.leave(16)
        said = "2 to send, about {0}; {0} are free at {1}: it will not fit".format(SIZE, self.target)
        self.assertRegex(self.transfer("--dry-run").stdout.splitlines()[-1], "^in all: {}$".format(said))
        running = self.start_backup("-S", env=support.gate("receive"))
        held = running.met_at_gate("receive")
        running.wait_to_say("will not fit")
        go_on(held)
        result = running.finish()
        self.assertEqual(1, result.status)
        self.assertRegex(result.stderr, "(?m)^warning: {}$".format(said.replace("about", "at least")))
        self.assertErrorSays(result, "no space left on device")

    def test_no_byte_waits_for_a_measuring(self):
        """Nor does the end: what is deleted there must not be in the hands of a send."""
        support.bulk(os.path.join(self.source, "bulk"), 24)
        self.take(1, 2)
        support.bulk(os.path.join(self.source, "more"), 30)  # else it would be known that all fits
        self.leave(40)
        begun = os.path.join(self.target_disk.path, "begun")
        held = support.fake("btrfs", """case " $* " in
            *" --no-data "*) touch {0}; exec sleep 600;;
            *" receive "*) until [ -e {0} ]; do sleep 0.05; done;;
            esac
            exec REAL "$@"
            """.format(begun))
        result = self.transfer("-N", "1", env=held)
        self.assertTrue(os.path.exists(begun))
        self.assertEqual("done: 2 backups sent, 1 subvolume deleted", result.stderr.splitlines()[-1])

    @staticmethod
    def held_measurings(running, count):
        """The pids of so many that are measured at one moment, each held before it begins."""
        def met():
            found = [pid for pid, argv in running.processes().items() if b"--no-data" in argv and is_met(pid)]
            return found if len(found) == count else None
        return running.wait_for("%d measurings" % count, met)

    def test_a_dry_run_shows_its_plan_at_once_and_measures_several_beside_each_other(self):
        taken = self.take(1, 2, 3)
        running = self.start_backup("-S", "--dry-run", env=support.btrfs_where("kill -STOP $$", "--no-data"))
        held = self.held_measurings(running, 3)
        plan = os.fsdecode(os.pread(running.stdout.fileno(), 1 << 20, 0))
        self.assertRegex(plan, "from {}\nsizes, as they are measured:\n$".format(taken[1]))
        go_on(held)
        self.assertRegex(running.finish().stdout[len(plan):], "^ +{0} +{1} in full\n +{0} +{2} from {1}\n.*\nin all: "
                         .format(SIZE, *taken))

    def test_sizes_can_be_left_out(self):
        self.take(1)
        refusing = support.btrfs_where("exit 1", "--no-data")
        plan = self.transfer("--dry-run", "--no-sizes", env=refusing).stdout
        self.assertRegex(plan, "in full\nin all: 1 to send; {} are free".format(SIZE))
        document = json.loads(self.transfer("--dry-run", "--no-sizes", "--json", env=refusing).stdout)
        at, = document["tasks"][0]["destinations"]
        self.assertEqual((None, None, None), (at["bytes"], at["fits"], at["send"][0]["bytes"]))

    def test_what_fits_is_said_in_the_dry_run_alone(self):
        self.take(1)
        said = "in all: 1 to send, about {0}; {0} are free at {1}$".format(SIZE, self.target)
        self.assertRegex(self.transfer("--dry-run").stdout.splitlines()[-1], said)
        self.leave(16)
        self.assertNotIn("warning", self.transfer().stderr)
        self.assertRegex(self.transfer("--dry-run").stdout.splitlines()[-1], "^in all: nothing to send; ")

    def test_each_destination_has_its_line(self):
        self.take(1)
        other, raw = os.path.join(self.target_disk.path, "other"), os.path.join(self.target_disk.path, "raw")
        os.mkdir(other)
        os.mkdir(raw)
        lines = self.transfer("--dry-run", "--raw-compress", "gzip", to=[self.target, other, "raw://" + raw],
                              ).stdout.splitlines()[-3:]
        for line, place in zip(lines, (self.target, other)):
            self.assertRegex(line, "^in all: 1 to send, about {0}; {0} are free at {1}$".format(SIZE, re.escape(place)))
        self.assertRegex(lines[2], "^in all: 1 to send, about {} to raw://{}$".format(SIZE, re.escape(raw)))


FACTS = (
    ("snapshot", {"snapshot": "laptop-2"}),
    ("planned", {"endpoint": "/mnt/backup/home", "snapshots": 2}),
    ("planned", {"endpoint": "nas:/backups/a-rather-long-name-of-a-folder/home", "snapshots": 2}),
    ("sent", {"endpoint": "/mnt/backup/home", "snapshot": "laptop-1", "parent": None, "bytes": 3 << 20, "seconds": 1}),
    ("sent", {"endpoint": "/mnt/backup/home", "snapshot": "laptop-2", "parent": "laptop-1", "bytes": 1 << 20,
              "seconds": 1}),
    ("deleted", {"endpoint": "/mnt/backup/home", "deleted": 3}),
    ("deleted", {"endpoint": "/home", "deleted": 1}),
    ("room", {"endpoint": "/mnt/backup/home", "free": 112 << 30}),
    ("error", {"endpoint": "nas:/backups/a-rather-long-name-of-a-folder/home", "message": "refused", "hint": "look"}),
)
BLOCK = [
    "  /home  1 snapshot taken, 1 deleted",
    "    /mnt/backup/home  ok      2 sent, 4.0 MiB, 1 in full; 3 deleted;",
    "                              112.0 GiB free",
    "    nas:/backups/a-rather-long-name-of-a-folder/home",
    "                      FAILED  0 of 2 sent",
]


class Accounts(unittest.TestCase):

    def account(self, *more, **tasks):
        account = Account(tasks or {"": "/home"})
        for kind, facts in FACTS + more:
            account(Event(kind, "info", "", facts))
        return account

    def test_the_lines(self):
        account = Account({"/home": "/home", "/srv": "/srv"})
        for kind, facts in FACTS:
            account(Event(kind, "info", "", dict(facts, task="/home")))
        account(Event("error", "error", "", {"task": "/srv", "message": "no such source: /srv", "hint": ""}))
        self.assertEqual(BLOCK + ["  /srv  FAILED"], account.lines())
        self.assertLessEqual(max(map(len, account.lines())), 79)

    def test_the_words(self):
        account = self.account()
        self.assertEqual("2 backups sent, 1 snapshot taken, 4 subvolumes deleted", account.tasks[""].words)

    def test_what_may_not_be_there_was_not_sent(self):
        account = self.account(("doubtful", {"endpoint": "/mnt/backup/home"}))
        self.assertEqual("2 backups in doubt, 1 snapshot taken, 4 subvolumes deleted", account.tasks[""].words)
        self.assertIn("0 of 2 sent, 2 in doubt;", account.lines()[1])
        at = account.document(False, 1)["tasks"][0]["destinations"][0]
        self.assertEqual((0, 2), (len(at["sent"]), len(at["doubtful"])))

    def test_the_document(self):
        task, = self.account().document(False, 1)["tasks"]
        self.assertEqual(("/home", "laptop-2", 1, []), tuple(
            task[key] for key in ("source", "snapshot", "deleted", "errors")))
        first, second = task["destinations"]
        self.assertEqual(({"snapshot": "laptop-1", "parent": None, "bytes": 3 << 20, "seconds": 1}, 3, 112 << 30, []),
                         (first["sent"][0], first["deleted"], first["free"], first["errors"]))
        self.assertEqual((2, [], [{"message": "refused", "hint": "look"}]),
                         (second["planned"], second["sent"], second["errors"]))


class End(support.BackupTestCase):

    def setUp(self):
        super().setUp()
        self.other = os.path.join(self.target_disk.path, "other")
        os.mkdir(self.other)

    def test_one_destination_is_one_line(self):
        self.take(1)
        self.assertEqual("done: 1 backup sent", self.transfer().stderr.splitlines()[-1])
        self.assertEqual("done: nothing to do", self.transfer().stderr.splitlines()[-1])

    def test_several_have_a_line_each_and_errors_are_said_once(self):
        self.take(1, 2)
        self.transfer("-n", "1", to=[self.other])
        bad = os.path.join(self.source, "inside")
        for options in ((), ("-q",)):
            self.take(3 + len(options))
            result = self.transfer("-n", "1", *options, to=[self.target, self.other, bad], status=1)
            self.assertEqual(1, result.stderr.count("is inside the source"), result.stderr)
            if options:
                self.assertEqual(1, len(result.stderr.splitlines()), result.stderr)
                continue
            head, *rows = result.stderr[result.stderr.index("finished"):].splitlines()
            self.assertEqual("finished with errors: 2 backups sent, 1 subvolume deleted", head)
            text = " ".join(line.strip() for line in rows)
            self.assertRegex(text, "^{} +ok +1 sent, {}, 1 in full; {} free ".format(self.target, SIZE, SIZE))
            self.assertRegex(text, " {} +ok +1 sent, {}; 1 deleted; {} free ".format(self.other, SIZE, SIZE))
            self.assertRegex(text, " {} +FAILED  nothing done$".format(bad))

    def test_which_of_how_many_is_sent(self):
        names_of = self.take(1, 2, 3)
        lines = [line for line in self.transfer().stderr.splitlines() if line.startswith("sending")]
        self.assertEqual(["{} of 3".format(number) for number in (1, 2, 3)],
                         [line.rpartition("(")[2].rstrip(")") for line in lines])
        self.assertEqual(names_of, [line.split()[1] for line in lines])
        self.take(4)
        self.assertNotIn(" of ", self.transfer().stderr)

    def test_json_of_a_run(self):
        first, second = self.take(1, 2)
        self.transfer("-n", "1")
        third, = self.take(3)
        bad = os.path.join(self.source, "inside")
        result = self.transfer("-n", "1", "--json", to=[self.target, bad], status=1)
        document = json.loads(result.stdout)
        self.assertEqual((False, 1), (document["dry_run"], document["status"]))
        task, = document["tasks"]
        good, failed = task["destinations"]
        self.assertEqual((self.source, None, 0), (task["source"], task["snapshot"], task["deleted"]))
        self.assertEqual([(third, second)], [(one["snapshot"], one["parent"]) for one in good["sent"]])
        self.assertEqual((self.target, 1, 1, []), tuple(good[k] for k in ("endpoint", "planned", "deleted", "errors")))
        self.assertAlmostEqual(os.statvfs(self.target).f_bavail * 4096, good["free"], delta=64 << 20)
        self.assertEqual((bad, []), (failed["endpoint"], failed["sent"]))
        self.assertIn("inside the source", failed["errors"][0]["message"])
        self.assertEqual([third], names(self.target))

    def test_json_of_what_never_began(self):
        document = json.loads(self.run_program("--json", "/no/such", self.target, status=1).stdout)
        task, = document["tasks"]
        self.assertEqual(["no such source: /no/such"], [error["message"] for error in task["errors"]])

    def test_json_of_a_plan(self):
        first, second = self.take(1, 2)
        self.transfer()
        third, = self.take(3)
        before = support.listing(self.source_disk.path, self.target_disk.path)
        document = json.loads(self.transfer("-n", "2", "-N", "1", "--dry-run", "--json").stdout)
        self.assertUnchanged(before, self.source_disk.path, self.target_disk.path)
        task, = document["tasks"]
        at, = task["destinations"]
        self.assertEqual((True, 0, [first, second]), (
            document["dry_run"], document["status"], [gone["name"] for gone in task["delete"]]))
        self.assertEqual([(third, second)], [(one["snapshot"], one["parent"]) for one in at["send"]])
        self.assertEqual(([first], [second, third], True), (
            [gone["name"] for gone in at["delete"]], [kept["name"] for kept in at["keep"]], at["fits"]))
        bad = os.path.join(self.source, "inside")
        (task,) = json.loads(self.transfer("--dry-run", "--json", to=[self.target, bad], status=1).stdout)["tasks"]
        self.assertEqual([], task["errors"])
        self.assertEqual([(self.target, True, 0), (bad, False, 1)], [
            (at["endpoint"], at["usable"], len(at["errors"])) for at in task["destinations"]])

    def test_a_prune_of_several_folders(self):
        first, second, third = self.take(1, 2, 3)
        self.transfer()
        self.transfer("-n", "1", to=[self.other])
        plain = os.path.join(self.target_disk.path, "no such")
        places = [self.target, self.other, plain]
        plan = json.loads(self.run_program("prune", "-n", "2", "--dry-run", "--json", *places, status=1).stdout)
        task, = plan["tasks"]
        self.assertEqual((True, None), (plan["dry_run"], task["source"]))
        self.assertEqual([(True, [first], [second, third], 0), (True, [], [third], 0), (False, [], [], 1)], [
            (at["usable"], [gone["name"] for gone in at["delete"]], [kept["name"] for kept in at["keep"]],
             len(at["errors"])) for at in task["destinations"]])
        result = self.run_program("prune", "-n", "2", "--json", *places, status=1)
        task, = json.loads(result.stdout)["tasks"]
        self.assertEqual([(1, 2, 0), (0, 1, 0), (0, None, 1)], [
            (at["deleted"], at["kept"], len(at["errors"])) for at in task["destinations"]])
        self.assertEqual(1, result.stderr.count(plain + ":") + result.stderr.count("error: "), result.stderr)
        head, *rows = result.stderr[result.stderr.index("finished"):].splitlines()
        self.assertEqual("finished with errors: 1 subvolume deleted, 3 backups kept", head)
        text = " ".join(line.strip() for line in rows)
        self.assertRegex(text, "^{} +ok +1 deleted; 2 kept; {} free ".format(self.target, SIZE))
        self.assertRegex(text, " {} +ok +1 kept; {} free ".format(self.other, SIZE))
        self.assertRegex(text, " {} +FAILED  nothing done$".format(plain))

    def test_a_restore(self):
        first, second = self.take(1, 2)
        self.transfer()
        into = os.path.join(self.source_disk.path, "restored")
        words = ["restore", self.target, "--latest", into]
        plan = json.loads(self.run_program(*words + ["--dry-run", "--json"]).stdout)
        at, = plan["tasks"][0]["destinations"]
        self.assertEqual((True, into, True), (plan["dry_run"], at["endpoint"], at["new"]))
        self.assertEqual([second], [one["snapshot"] for one in at["send"]])
        result = self.run_program(*words + ["--json"])
        self.assertEqual("done: 1 backup restored", result.stderr.splitlines()[-1])
        task, = json.loads(result.stdout)["tasks"]
        at, = task["destinations"]
        self.assertEqual((self.target, into, [second], [second]), (task["source"], at["endpoint"], at["restored"],
                                                                   [one["snapshot"] for one in at["sent"]]))
        self.assertEqual(1, at["planned"])
        self.assertGreater(at["free"], 0)
        again = self.run_program(*words + ["--json"])
        self.assertEqual("done: nothing to do", again.stderr.splitlines()[-1])
        failed = self.run_program("restore", "--json", os.path.join(self.target, "homeless"), into, status=1)
        self.assertEqual(1, len(json.loads(failed.stdout)["tasks"][0]["errors"]))

    def keys(self, document):
        """All names of fields in a document."""
        if isinstance(document, dict):
            return set(document).union(*map(self.keys, document.values()))
        return set().union(*map(self.keys, document)) if isinstance(document, list) else set()

    def test_help_names_each_field_of_each_document(self):
        self.take(1, 2)
        bad, places = os.path.join(self.source, "inside"), (self.source, self.target)
        texts = [self.transfer("--json", to=[self.target, bad], status=1).stdout]
        self.take(3)
        texts.append(self.transfer("-n", "1", "-N", "1", "--dry-run", "--json").stdout)
        texts += [self.run_program("prune", "-n", "1", "--json", *more + (self.target,)).stdout
                  for more in (("--dry-run",), ())]
        texts += [self.run_program(verb, "--json", *places).stdout for verb in ("list", "verify")]
        texts.append(self.run_program("doctor", "--json", *places, status=None).stdout)
        told = set(re.findall("[a-z_]+", TOPICS["json"]))
        for text in texts:
            self.assertEqual(set(), self.keys(json.loads(text)) - told)


class Tasks(support.TasksTestCase):

    count, mib = 2, 1

    def test_all_in_one_block_and_one_document(self):
        tasks = self.tasks()
        tasks[1][-1] = os.path.join(self.disks[1].path, "away")
        result = self.run_program(*self.command("--json", tasks=tasks), status=1)
        block = result.stderr[result.stderr.index("finished with errors: 2 tasks"):]
        self.assertEqual(1, result.stderr.count("away; is its filesystem mounted?"), result.stderr)
        self.assertIn("\n  {}  1 snapshot taken\n    ".format(self.sources[0]), block)
        self.assertRegex(block.replace("\n  ", " "), r"{}\s+ok +1 sent, {}, 1 in full;\s+{} free".format(
            self.targets[0], SIZE, SIZE))
        self.assertRegex(block, "FAILED  nothing done")
        document = json.loads(result.stdout)
        self.assertEqual(self.sources, [task["source"] for task in document["tasks"]])
        self.assertEqual([1, 0], [len(task["destinations"][0]["sent"]) for task in document["tasks"]])
        plans = json.loads(self.run_program(*self.command("--json", "--dry-run", tasks=self.tasks("-S"))).stdout)
        self.assertEqual([0, 1], [len(task["destinations"][0]["send"]) for task in plans["tasks"]])


if __name__ == "__main__":
    unittest.main()
