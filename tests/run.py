"""Runs the test suite: a line per test with its time, then the failures, the slowest, the sum.

    python3 tests/run.py [-f] [--jobs N] [--slowest N] [--limit SECONDS] [--list] [PATTERN ...]

A pattern is a part of a test's full name, or has the shell's wildcards. The status is non-zero
when a test failed, was not run though it is in the list, none ran, or a loop device is left behind.
With CI set in the environment a skipped test is a failure, so that nothing goes untested in silence. Without a pattern,
three times as many processes as there are processors share the tests between them, as most tests wait for others most
of their time; what takes longest is begun first. No test gets a second try: one that passes only now and then is a
defect, of itself or of the program.

What is tested where, and how a test is written, stands at the head of tests/support.py.

SEED in the environment is what tests draw their random choices from; without it, a new one is taken. It is printed.
"""

import argparse
import contextlib
import fnmatch
import glob
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import unittest
import warnings
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

TESTS = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(TESTS)

Suite = unittest.TestSuite


class Problem(NamedTuple):
    test: str
    text: str


def say(text: str) -> None:
    """Print text whatever the locale's encoding: names may hold bytes that are not in it."""
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


class TooSlow(AssertionError):
    """A test ran into the time limit."""


def _raise_too_slow(_number: int, _frame: Any) -> None:
    raise TooSlow("the test took too long (see --limit)")


class Signals:
    """What the process does on signals, from its beginning to its end.

    The first one lets the test at work end and clean up, a second Ctrl-C raises. An exception at once would
    leave out a test's cleanups, so mounts would stay behind.

    What the process was begun with as ignored (by nohup, or by a script's &) it handles by doing nothing: that
    an ignored signal is ignored would be inherited by the programs under test, a handler is not.
    """

    came = False
    interrupted = False

    @classmethod
    def stop(cls, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and cls.interrupted:
            raise KeyboardInterrupt
        cls.came = True
        cls.interrupted |= number == signal.SIGINT

    @classmethod
    def handle(cls) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, lambda _number, _frame: None)
            elif number != signal.SIGQUIT:
                signal.signal(number, cls.stop)
        signal.signal(signal.SIGALRM, _raise_too_slow)


class Report(unittest.TestResult):
    """Prints each test as it ends, and keeps what the end of the run is about.

    A test counts once, however many of its parts failed. What goes wrong outside of a test (in
    setUpClass, say) counts as one more.
    """

    def __init__(self, skips_allowed: bool) -> None:
        super().__init__()
        self.skips_allowed = skips_allowed
        self.counts = {"ok": 0, "skip": 0, "FAIL": 0}
        self.problems: List[Problem] = []
        self.times: List[Tuple[float, str]] = []
        self.running: Any = None
        self.verdict = "ok"
        self.reason = ""
        self.started = 0.0
        self.seen: Set[str] = set()  # names of tests that ended, and of what else was judged

    @property
    def shouldStop(self) -> bool:
        return self._should_stop or Signals.came

    @shouldStop.setter
    def shouldStop(self, value: bool) -> None:
        self._should_stop = value

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self.running = test
        self.verdict, self.reason = "ok", ""
        self.started = time.monotonic()

    def stopTest(self, test: Any) -> None:
        seconds = time.monotonic() - self.started
        self.times.append((seconds, test.id()))
        self.count(self.verdict, test, seconds, self.reason)
        self.running = None
        super().stopTest(test)

    def count(self, verdict: str, test: Any, seconds: float, reason: str) -> None:
        self.counts[verdict] += 1
        self.seen.add(test.id())
        say("{:<5}{:>8.2f} s  {}{}".format(verdict, seconds, test.id(), reason and ": " + reason))

    def judge(self, verdict: str, test: Any, reason: str = "") -> None:
        if self.running is None:
            self.count(verdict, test, 0.0, reason)
        elif self.verdict != "FAIL":
            self.verdict, self.reason = verdict, reason

    def fail(self, test: Any, text: str) -> None:
        self.problems.append(Problem(test.id(), text))
        self.judge("FAIL", test)

    def addFailure(self, test: Any, err: Any) -> None:
        super().addFailure(test, err)
        self.fail(test, self.failures[-1][1])

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        self.fail(test, self.errors[-1][1])

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        failures, errors = len(self.failures), len(self.errors)
        super().addSubTest(test, subtest, err)
        for _, text in self.failures[failures:] + self.errors[errors:]:
            self.fail(subtest, text)

    def addSkip(self, test: Any, reason: str) -> None:
        super().addSkip(test, reason)
        if self.skips_allowed:
            self.judge("skip", test, reason)
        else:
            self.fail(test, "skipped, which CI does not allow: {}\n".format(reason))

    def addUnexpectedSuccess(self, test: Any) -> None:
        super().addUnexpectedSuccess(test)
        self.fail(test, "passed, though marked as an expected failure\n")


def all_tests(suite: Any) -> Iterator[Any]:
    for part in suite:
        if isinstance(part, Suite):
            yield from all_tests(part)
        else:
            yield part


def is_chosen(name: str, patterns: List[str]) -> bool:
    """Whether a test's full name contains one of the patterns, or matches it as a whole."""
    return not patterns or any(
        pattern in name or fnmatch.fnmatchcase(name, pattern) for pattern in patterns
    )


def choose_tests(patterns: List[str]) -> List[Any]:
    """The tests that the patterns name, those of a class together."""
    found = unittest.defaultTestLoader.discover(TESTS, top_level_dir=TESTS)
    return [test for test in all_tests(found) if is_chosen(test.id(), patterns)]


def limited(test: Any, seconds: int) -> Any:
    """Let a hanging test fail by an exception, so that its cleanups still run."""
    run = test.run

    def run_limited(result: Optional[unittest.TestResult] = None) -> Any:
        signal.alarm(seconds)
        try:
            return run(result)
        finally:
            signal.alarm(0)

    test.run = run_limited
    return test


def run_tests(tests: List[Any], options: argparse.Namespace) -> Report:
    report = Report(skips_allowed=not os.environ.get("CI"))
    report.failfast = options.failfast
    with warnings.catch_warnings():
        warnings.simplefilter("default", ResourceWarning)
        Suite(limited(test, options.limit) for test in tests).run(report)
    return report


# Several processes: the parent hands out shares of the tests, a line each, and gets the tests' lines back, and after
# each share a line with its figures, which begins with MARK. A share is a class, or a part of a large one. A process
# that dies has failed the share that it had, and another takes its place: each death costs one, so there is an end.

MARK = "\x1e"
SHARE = 20.0  # seconds


def class_of(test: Any) -> str:
    return test.id().rpartition(".")[0]


def seconds_of(tests: List[Any]) -> float:
    """About how long tests take, as their classes say."""
    return sum(getattr(test, "usual_seconds", 0.05) for test in tests)


def shares_of(tests: List[Any]) -> List[List[Any]]:
    """The tests in shares, the longest first."""
    classes: Dict[str, List[Any]] = {}
    for test in tests:
        classes.setdefault(class_of(test), []).append(test)
    shares: List[List[Any]] = []
    for members in classes.values():
        parts = min(len(members), 1 + int(seconds_of(members) / SHARE))
        shares += [members[part::parts] for part in range(parts)]
    return sorted(shares, key=seconds_of, reverse=True)


def figures_of(report: Report) -> str:
    return MARK + json.dumps([report.counts, report.problems, report.times, sorted(report.seen)])


def add_figures(report: Report, line: str) -> None:
    counts, problems, times, seen = json.loads(line[len(MARK):])
    for kind, count in counts.items():
        report.counts[kind] += count
        report.testsRun += count
    report.problems += [Problem(*problem) for problem in problems]
    report.times += [(seconds, name) for seconds, name in times]
    report.seen.update(seen)


def own_lines() -> Iterator[str]:
    """The lines of stdin. It and stdout are ours alone from here on.

    What a test starts could read our lines from them, or keep them open when we are dead.
    """
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    return iter(lines)


def work(options: argparse.Namespace) -> int:
    """Runs the tests that stdin names, as they come."""
    tests = {test.id(): test for test in choose_tests(options.patterns)}
    for line in own_lines():
        report = run_tests([tests[name] for name in json.loads(line)], options)
        say(figures_of(report))
        if report.shouldStop:
            return 1
    return 0


class Crew:
    """The processes that share the tests, each served by a thread, and the report of all."""

    def __init__(self, shares: List[List[Any]], options: argparse.Namespace) -> None:
        self.shares = shares
        self.argv = [sys.executable] + ["-W" + option for option in sys.warnoptions] + [
            os.path.abspath(__file__), "--worker", "--limit", str(options.limit)] + options.patterns
        self.report = Report(skips_allowed=not os.environ.get("CI"))
        self.lock = threading.Lock()  # of all that stands above and below
        self.workers: List[Any] = []

    def next_share(self) -> Optional[List[Any]]:
        with self.lock:
            return self.shares.pop(0) if self.shares and not self.report.shouldStop else None

    def begin(self) -> Any:
        with self.lock:
            worker = subprocess.Popen(self.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      universal_newlines=True, encoding="utf-8", errors="backslashreplace")
            self.workers.append(worker)
        return worker

    def serve(self) -> None:
        """Hands shares to one process, or to the next when it dies, until there are no more."""
        worker = None
        for share in iter(self.next_share, None):
            worker = worker or self.begin()
            if not self.hand_over(worker, share):
                self.lose(class_of(share[0]), worker)
                worker = None
        if worker:
            worker.communicate()

    def hand_over(self, worker: Any, share: List[Any]) -> bool:
        """Whether the process has run the tests. Its lines go to our stdout."""
        try:
            worker.stdin.write(json.dumps([test.id() for test in share]) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:
            return False
        for line in worker.stdout:
            if line.startswith(MARK):
                with self.lock:
                    add_figures(self.report, line)
                return True
            say(line.rstrip("\n"))
        return False

    def lose(self, name: str, worker: Any) -> None:
        worker.communicate()
        text = "the process that ran it ended with {}\n".format(worker.returncode)
        with self.lock:
            self.report.problems.append(Problem(name, text))
            self.report.counts["FAIL"] += 1
            self.report.seen.add("({})".format(name))

    def run(self, jobs: int) -> Report:
        threads = [threading.Thread(target=self.serve) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not self.report.shouldStop:
            time.sleep(0.2)
        if self.report.shouldStop:
            with self.lock:
                for worker in self.workers:
                    worker.terminate()
        for thread in threads:
            thread.join()
        return self.report


def run_shared(tests: List[Any], options: argparse.Namespace) -> Report:
    """The report of tests that several processes run."""
    return Crew(shares_of(tests), options).run(options.jobs)


def count_missing(tests: List[Any], report: Report) -> None:
    """Counts as failed what is in the list and was not run, without a word from its class or module.

    What is judged in the place of tests has a name like "setUpClass (test_x.Class)".
    """
    inside = {name.partition("(")[2].rstrip(")") for name in report.seen}
    for test in tests:
        name = class_of(test)
        if test.id() not in report.seen and not inside & {name, name.partition(".")[0]}:
            report.counts["FAIL"] += 1
            report.problems.append(Problem(test.id(), "it was not run\n"))


def count_unmatched(patterns: List[str], tests: List[Any], report: Report) -> None:
    """Counts as failed what names no test; it may be one of a file that cannot be imported."""
    for pattern in patterns:
        if not any(is_chosen(test.id(), [pattern]) for test in tests):
            report.counts["FAIL"] += 1
            errors = "\n".join(map(str, unittest.defaultTestLoader.errors))
            report.problems.append(Problem(pattern, "no test is called so\n" + errors))


# What is left behind. Images bear the mark of the run that made them, and of those in whose tests that was begun.


def mark_run() -> None:
    """Marks this run, for all that it starts."""
    above = os.environ.get("RUN_OF_TESTS", "")
    os.environ["RUN_OF_TESTS"] = above + "." * bool(above) + "{:08x}".format(random.SystemRandom().getrandbits(32))


def loops_of_run() -> List[str]:
    """The loop devices of images that this run has made, each with its image."""
    found = []
    for backing in sorted(glob.glob("/sys/block/loop*/loop/backing_file")):
        with contextlib.suppress(OSError), open(backing, errors="backslashreplace") as image:
            name = image.read().strip()
            if os.environ["RUN_OF_TESTS"] in name:
                found.append("/dev/{}: {}".format(backing.split("/")[3], name))
    return found


PATIENCE = float(os.environ.get("PATIENCE", 60))  # seconds for what is still in use to go


def count_left_behind(report: Report) -> None:
    """Counts as failed what is still attached once all scratch folders are gone."""
    if "disks" in sys.modules:
        sys.modules["disks"].remove_scratch()
    patient_until = time.monotonic() + PATIENCE
    while loops_of_run() and time.monotonic() < patient_until:  # what was busy goes a moment later
        time.sleep(0.1)
    for loop in loops_of_run():
        report.counts["FAIL"] += 1
        report.problems.append(Problem("(left behind)", "a loop device: {}\n".format(loop)))


def format_counts(report: Report) -> str:
    text = "{} passed, {} failed".format(report.counts["ok"], report.counts["FAIL"])
    skipped = report.counts["skip"]
    return text + (", {} skipped".format(skipped) if skipped else "")


def print_summary(report: Report, slowest: int) -> None:
    for problem in report.problems:
        say("\n==== {}\n{}".format(problem.test, problem.text.rstrip("\n")))
    times = sorted(report.times, reverse=True)[:slowest]
    if len(times) > 1:
        say("\nthe slowest:")
        for seconds, name in times:
            say("{:>8.2f} s  {}".format(seconds, name))
    if report.shouldStop:
        say("\nended before all tests had run")
    if not report.testsRun:
        say("\nno test ran")
    if report.problems:
        say("\nthe random choices again: SEED=" + os.environ["SEED"])
    say("\n" + format_counts(report))


def is_success(report: Report) -> bool:
    return bool(report.counts["ok"]) and not report.counts["FAIL"] and not report.shouldStop


def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    # The long versions of the tests may take their time.
    limit = 86400 if os.environ.get("TORTURE") else 600
    parser = argparse.ArgumentParser(description="Run the test suite.")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="part of a test's name")
    parser.add_argument("-f", "--failfast", action="store_true", help="stop at the first failure")
    parser.add_argument("--list", action="store_true", help="only print the tests' names")
    parser.add_argument("--slowest", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument(
        "--limit", type=int, default=limit, metavar="SECONDS", help="for one test; default: 600"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes; default: one, or all for the whole suite")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.jobs:
        options.jobs = 1 if options.patterns or options.failfast else 3 * (os.cpu_count() or 1)
    return options


def main(argv: Optional[List[str]] = None) -> int:
    options = parse_arguments(argv)
    Signals.handle()
    # Run by root, the suite must not leave root's files in a user's clone.
    sys.dont_write_bytecode = True
    sys.path[:0] = [REPOSITORY]
    if options.worker:
        return work(options)
    tests = choose_tests(options.patterns)
    if options.list:
        say("\n".join(test.id() for test in tests))
        return 0
    say("SEED={}".format(os.environ.setdefault("SEED", str(random.SystemRandom().getrandbits(32)))))
    mark_run()
    report = run_shared(tests, options) if options.jobs > 1 else run_tests(tests, options)
    if not report.shouldStop:
        count_missing(tests, report)
        count_unmatched(options.patterns, tests, report)
    count_left_behind(report)
    print_summary(report, options.slowest)
    return 0 if is_success(report) else 1


if __name__ == "__main__":
    raise SystemExit(main())
