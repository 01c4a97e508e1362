"""Breaks the program's pure sections in small ways, one at a time, and sees whether the quick tests notice.

    make mutants
    make mutants MUTANTS='[--most N] [--goal PERCENT] [SECTION | SECTION.NAME ...]'

Prints what survived, as the line that was changed, and how many of each section did not. What survives is
either a test that is missing, or a change that makes no difference. SEED in the environment repeats a sample.

The changes are those of cosmic-ray's operators, and the leaving out of a statement. The work tree is not
touched: each mutant is a module in the memory of a process of its own, and all is done as an ordinary user.
Tests that need disks, ssh or more than a second are left out.
"""

import argparse
import ast
import contextlib
import importlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
import unittest
from typing import Any, Dict, Iterator, List, NamedTuple

import cosmic_ray.operators.provider as operators_of_cosmic_ray  # type: ignore
import parso  # type: ignore

TESTS = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(os.path.dirname(TESTS), "btrfs_backup_ng.py")

# {section: the test files that are about it}. Of sections that do more than think, the part that thinks.
SECTIONS = {
    "NAMES": ["test_names"],
    "RETENTION": ["test_retention_time", "test_planning", "test_options"],
    "PLACES": ["test_options"],
    "ARGUMENTS": ["test_options", "test_files"],
    "IDENTITY": ["test_planning", "test_retention_time"],
    "OWNERS": ["test_planning"],
    "PLANNING": ["test_planning", "test_retention_time"],
    "STREAM": ["test_gate", "test_stream"],
    "GATE": ["test_gate", "test_stream"],
    "STATE": ["test_state"],
}
PARTS = {"STATE": r"LockChange|parse_\w+|format_\w+|add_locks|clear_locks|locks_of|changed_pins|run_lock_name"}

SLOWEST = 1.0  # seconds of a processor that a test may take on the program as it is, with what it starts
HANGS = 60.0  # seconds after which a mutant that waits is killed
COMPUTES = 10  # seconds of a processor after which one that does not wait is
NOBODY = 65534

# Comparisons by identity say the same as those of values for all that is small, and a function without
# its cache what it says with one. One operator of arithmetic in the place of each is enough, or those that any
# test kills would make the figures look good.
LEFT_OUT = re.compile("ReplaceComparisonOperator_.*(Eq|Lt|LtE|Gt|GtE)_Is|Variable|RemoveDecorator|"
                      "ReplaceBinaryOperator_|ReplaceUnaryOperator_(?!Delete_(Not|USub))")
ARITHMETIC = {"Add_Sub", "Sub_Add", "Mul_FloorDiv", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "LShift_RShift",
              "RShift_LShift", "BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitAnd", "Pow_Mul"}


class LeaveOut:
    """An operator in cosmic-ray's way: a statement in a function becomes `pass`."""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        statement = node.type in ("expr_stmt", "raise_stmt", "return_stmt", "atom_expr")
        if statement and node.parent.type == "simple_stmt" and parso.python.tree.search_ancestor(node, "funcdef"):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, _index: int) -> Any:
        return parso.parse(node.get_first_leaf().prefix + "pass")


def all_operators() -> Iterator[Any]:
    provider = operators_of_cosmic_ray.OperatorProvider()
    for name in provider:
        if not LEFT_OUT.match(name) or name.rpartition("Operator_")[2] in ARITHMETIC:
            yield provider[name]()
    yield LeaveOut()


OPERATORS = list(all_operators())


class Mutant(NamedTuple):
    section: str
    name: str  # of the function, class or constant that is changed
    line: int  # in the program
    changed: str  # that line afterwards
    number: int  # of the statement in the program
    text: str  # of the whole statement


# The program as statements, and what becomes of them.


class Statement(NamedTuple):
    section: str
    name: str
    line: int
    text: str
    code: Any


def statement_name(node: Any, text: str) -> str:
    return getattr(node, "name", "") or re.split("[ :.=(]", text)[0]


def first_line(node: Any) -> int:
    return min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", [])])


def compiled(text: str, line: int) -> Any:
    return compile("\n" * (line - 1) + text, PROGRAM, "exec", dont_inherit=True)


def statements(source: str) -> List[Statement]:
    """The statements of the module, each compiled by itself."""
    starts = [(source.count("\n", 0, match.start()) + 2, match.group(1))
              for match in re.finditer(r"^#{20,}\n# ([A-Z][A-Z ]*): ", source, re.MULTILINE)]
    lines, found = source.split("\n"), []
    for node in ast.parse(source).body:
        section = ([""] + [name for line, name in starts if line < node.lineno])[-1]
        text = "\n".join(lines[first_line(node) - 1:node.end_lineno]) + "\n"
        name, line = statement_name(node, text), first_line(node)
        found.append(Statement(section, name, line, text, compiled(text, line)))
    return found


def mutated(text: str) -> Iterator[str]:
    """The text with each operator used at each place, one after another."""
    whole = list(nodes(parso.parse(text)))
    for operator in OPERATORS:
        for place in range(sum(1 for node in whole for _ in operator.mutation_positions(node))):
            yield replaced(parso.parse(text), operator, [place]).get_code()


def nodes(node: Any) -> Iterator[Any]:
    yield node
    for child in getattr(node, "children", ()):
        yield from nodes(child)


def replaced(node: Any, operator: Any, left: List[int]) -> Any:
    """The tree with the operator used at the place number left[0]; nodes are changed where they stand."""
    for index, _ in enumerate(operator.mutation_positions(node)):
        if left[0] == 0:
            left[0] = -1
            return operator.mutate(node, index)
        left[0] -= 1
    if hasattr(node, "children"):
        children = [replaced(child, operator, left) if left[0] >= 0 else child for child in node.children]
        node.children = [child for child in children if child is not None]
    return node


def mutants_of(number: int, statement: Statement) -> Iterator[Mutant]:
    before = statement.text.split("\n")
    for text in dict.fromkeys(mutated(statement.text)):
        after = text.split("\n")
        at = next((n for n, (one, other) in enumerate(zip(before, after)) if one != other), None)
        if at is not None:
            yield Mutant(statement.section, statement.name, statement.line + at, after[at].strip(), number, text)


def is_chosen(statement: Statement, patterns: List[str]) -> bool:
    section = statement.section
    if section not in SECTIONS or not re.fullmatch(PARTS.get(section, ".*"), statement.name):
        return False
    return not patterns or any(p in (section, section + "." + statement.name) for p in patterns)


def chosen_mutants(program: List[Statement], patterns: List[str]) -> List[Mutant]:
    return [mutant for number, statement in enumerate(program) if is_chosen(statement, patterns)
            for mutant in mutants_of(number, statement)]


# A process for each mutant.


def load(program: List[Statement], mutant: Any = None) -> None:
    """Makes the module of the program, with the mutant in its place."""
    module = types.ModuleType("btrfs_backup_ng")
    module.__file__ = PROGRAM
    sys.modules["btrfs_backup_ng"] = module
    for number, statement in enumerate(program):
        changed = mutant is not None and mutant.number == number
        code = compiled(mutant.text, statement.line) if changed else statement.code
        exec(code, module.__dict__)


def all_tests(suite: Any) -> Iterator[Any]:
    for part in suite:
        if isinstance(part, unittest.TestSuite):
            yield from all_tests(part)
        else:
            yield part


def quick_tests(files: List[str]) -> List[Any]:
    """The tests of the files that need no disks, no ssh and no processes in their way."""
    import support
    loader = unittest.TestLoader()
    found = [test for name in files for test in all_tests(loader.loadTestsFromModule(importlib.import_module(name)))]
    return [test for test in found if not isinstance(test, support.TestCase)]


def run_quietly(tests: List[Any]) -> Iterator[Any]:
    """(test, seconds, whether it passed), one after another."""
    for test in tests:
        result, started = unittest.TestResult(), sum(os.times()[:4])
        unittest.TestSuite([test]).run(result)
        yield test, sum(os.times()[:4]) - started, result.wasSuccessful()


def in_child(work: Any, seconds: float) -> int:
    """The status of a process that does the work; -1 for one that was killed as it took too long."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 99
        try:
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(nothing, fd)
            status = work()
        finally:
            os._exit(status)
    return wait_for(pid, seconds)


def wait_for(pid: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -1
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what a test has left
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1


def measure(program: List[Statement], files: List[str]) -> Dict[str, float]:
    """{test: seconds} of those that are quick, the quickest first; all must pass on the program as it is."""
    reading, writing = os.pipe()

    def work() -> int:
        load(program)
        tests = quick_tests(files)
        for test, seconds, passed in run_quietly(tests):
            os.write(writing, "{} {} {}\n".format(test.id(), seconds, passed).encode())
        return 0

    status = in_child(work, 300)
    os.close(writing)
    with open(reading) as lines:
        found = [line.split() for line in lines]
    failed = [name for name, _, passed in found if passed != "True"]
    if status or failed:
        print("left out, as they fail on the program as it is: " + " ".join(failed or ["status", str(status)]))
    times = {name: float(seconds) for name, seconds, passed in found if passed == "True" and float(seconds) < SLOWEST}
    return dict(sorted(times.items(), key=lambda item: item[1]))


def is_killed(program: List[Statement], mutant: Mutant, order: Dict[str, float]) -> bool:
    """Whether a test fails, the module cannot even be loaded, or it hangs."""
    def work() -> int:
        resource.setrlimit(resource.RLIMIT_CPU, (COMPUTES, COMPUTES))
        load(program, mutant)
        tests = {test.id(): test for test in quick_tests(SECTIONS[mutant.section])}
        return 0 if all(passed for _, _, passed in run_quietly([tests[name] for name in order])) else 1

    return in_child(work, HANGS) != 0


# The run.


class Count(NamedTuple):
    killed: int
    all: int

    def __str__(self) -> str:
        return "{} of {} killed, {:.1f} %".format(self.killed, self.all, 100 * self.killed / (self.all or 1))


def report(mutant: Mutant) -> None:
    print("survived  {}.{} line {}: {}".format(mutant.section, mutant.name, mutant.line, mutant.changed), flush=True)


def hunt(program: List[Statement], mutants: List[Mutant]) -> Dict[str, Count]:
    counts: Dict[str, Count] = {}
    for section in dict.fromkeys(mutant.section for mutant in mutants):
        order, killed, those = measure(program, SECTIONS[section]), 0, [m for m in mutants if m.section == section]
        print("{}: {} mutants, {} tests".format(section, len(those), len(order)), flush=True)
        for mutant in those:
            if is_killed(program, mutant, order):
                killed += 1
            else:
                report(mutant)
        counts[section] = Count(killed, len(those))
        print("{}: {}".format(section, counts[section]), flush=True)
    return counts


def sample(mutants: List[Mutant], most: int) -> List[Mutant]:
    seed = os.environ.get("SEED") or str(random.SystemRandom().getrandbits(32))
    if not most or most >= len(mutants):
        return mutants
    print("a sample of {} of {} mutants, SEED={}".format(most, len(mutants), seed))
    chosen = random.Random(seed).sample(range(len(mutants)), most)
    return [mutants[number] for number in sorted(chosen)]


@contextlib.contextmanager
def scratch() -> Iterator[None]:
    """A folder for temporary files, and for the tests' compiled code."""
    folder = tempfile.mkdtemp(prefix="btrfs-backup-ng-mutants-")
    try:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        os.environ["HOME"] = folder
        sys.pycache_prefix = os.path.join(folder, "pycache")  # novm
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def become_nobody() -> None:
    """Begins anew as an ordinary user, who may read Python and the tests wherever they are: mutants can do anything."""
    if os.geteuid() == 0:
        rights = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
        os.execvp("setpriv", ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"] + rights
                  + [sys.executable, os.path.abspath(__file__)] + sys.argv[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description="Sees which small defects the quick tests notice.")
    parser.add_argument("patterns", nargs="*", metavar="SECTION[.NAME]", help="default: all of " + " ".join(SECTIONS))
    parser.add_argument("--most", type=int, default=0, metavar="N", help="a sample of so many mutants")
    parser.add_argument("--goal", type=float, default=90, metavar="PERCENT", help="status 1 below it; default: 90")
    options = parser.parse_args()
    become_nobody()
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))  # so that the scratch folder goes
    sys.path[:0] = [TESTS]
    with open(PROGRAM, encoding="utf-8") as file:
        program = statements(file.read())
    with scratch():
        counts = hunt(program, sample(chosen_mutants(program, options.patterns), options.most))
    whole = Count(sum(count.killed for count in counts.values()), sum(count.all for count in counts.values()))
    print("\n" + "\n".join("{:<10} {}".format(name, count) for name, count in counts.items()))
    print("{:<10} {}".format("all", whole))
    return 0 if whole.all and 100 * whole.killed >= options.goal * whole.all else 1


if __name__ == "__main__":
    raise SystemExit(main())
