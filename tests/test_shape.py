"""The shape of the program: one file that reads from top to bottom, on every Python since 3.6."""

import ast
import builtins
import doctest
import os
import re
import sys
import unittest
import warnings
from typing import Dict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import btrfs_backup_ng

PROGRAM = os.path.join(sys.path[0], "btrfs_backup_ng.py")
TESTS = os.path.join(sys.path[0], "tests")
LONGEST = 40  # lines of a function

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


with open(PROGRAM, encoding="utf-8") as file:
    SOURCE = file.read()


# Sections.


def contents(docstring):
    """(title, description) of each line of the list of contents; parts are called as their banners are."""
    return [("PART " + part if part else section, description) for part, section, description in re.findall(
        r"^    (?:([IVX]+ [A-Z][A-Z ]*):|    ([A-Z][A-Z ]*[A-Z])) +(\S.*)$", docstring, re.MULTILINE)]


def banners(source):
    """(line, (title, description)) of each banner: a comment below a rule of #."""
    found = re.finditer(r"^#{20,}\n# ([A-Z][A-Z ]*): (.*)$", source, re.MULTILINE)
    return [(source.count("\n", 0, match.start()) + 2, match.groups()) for match in found]


# Names: what a definition uses, and what lies below it.


def top_level_names(tree):
    """{name: line} of all that the module itself defines."""
    defined: Dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.setdefault(node.name, node.lineno)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for name in stored_names(node.targets if isinstance(node, ast.Assign) else [node.target]):
                defined.setdefault(name, node.lineno)
    return defined


def walk_scope(nodes):
    """All nodes that share the nodes' scope; of inner functions and classes only the node itself."""
    left = list(nodes)
    while left:
        node = left.pop()
        yield node
        if not isinstance(node, FUNCTIONS + (ast.ClassDef,)):
            left += ast.iter_child_nodes(node)


def stored_names(nodes):
    """Names that these nodes bind in their own scope."""
    found = set()
    for node in walk_scope(nodes):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)):
            found.add(node.name or "")
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    return found


def parameters(function):
    return {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}


def body_of(node):
    return node.body if isinstance(node.body, list) else [node.body]


def used_names(node, bound=frozenset()):
    """Names that a definition takes from outside: neither parameters nor assigned in it."""
    if isinstance(node, ast.Name):
        return {node.id} - bound
    if isinstance(node, FUNCTIONS):
        return names_in_function(node, bound)
    if isinstance(node, COMPREHENSIONS):
        bound = bound | stored_names(node.generators)
    found = set()
    for child in ast.iter_child_nodes(node):
        found |= used_names(child, bound)
    return found


def names_in_function(node, bound):
    inside = bound | parameters(node) | stored_names(body_of(node))
    found = set()
    for child in body_of(node):
        found |= used_names(child, inside)
    # Defaults, annotations and decorators belong to the scope around.
    for child in [node.args, getattr(node, "returns", None)] + getattr(node, "decorator_list", []):
        if child is not None:
            found |= used_names(child, bound)
    return found


def upward_pairs(source):
    """Definitions that use what stands below them: a reader would have to look ahead."""
    tree = ast.parse(source)
    defined = top_level_names(tree)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for name in sorted(used_names(node) & set(defined)):
                if defined[name] > node.lineno:
                    yield "{} (line {}) uses {} (line {})".format(node.name, node.lineno, name, defined[name])


def programs_elsewhere(source):
    """(title, names) of each section that is a program by itself as well, and what it takes from above."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "own_section":
            title, *taken = map(ast.literal_eval, node.args)
            yield title, taken


def long_functions(source, most):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            last = max(getattr(inner, "end_lineno", None) or inner.lineno
                       for inner in ast.walk(node) if hasattr(inner, "lineno"))
            if last - node.lineno + 1 > most:
                yield "{} (line {}) has {} lines".format(node.name, node.lineno, last - node.lineno + 1)


class Program(unittest.TestCase):

    usual_seconds = 4

    def test_the_list_of_contents_tells_what_is_there(self):
        titles = [title for _, title in banners(SOURCE)]
        self.assertGreater(len(titles), 10)
        self.assertEqual(titles, contents(ast.get_docstring(ast.parse(SOURCE), clean=False)))
        self.assertEqual(len(titles), len({title for title, _ in titles}))

    def test_every_banner_is_closed_and_explained(self):
        lines = SOURCE.splitlines()
        for line, (title, _) in banners(SOURCE):
            with self.subTest(section=title):
                end = line
                while lines[end].startswith("# ") or lines[end] == "#":
                    end += 1
                self.assertRegex(lines[end], "^#{20,}$")
                explained = end - line - 1
                self.assertIn(explained, [-1] if title.startswith("PART ") else range(1, 10), "lines of explanation")

    def test_a_definition_uses_only_what_stands_above(self):
        self.assertEqual([], list(upward_pairs(SOURCE)))

    def test_what_runs_elsewhere_needs_nothing_more(self):
        programs = list(programs_elsewhere(SOURCE))
        self.assertGreater(len(programs), 0)
        for title, taken in programs:
            with self.subTest(section=title):
                tree = ast.parse(btrfs_backup_ng.own_section(title, *taken))
                used = set().union(*map(used_names, tree.body))
                self.assertEqual(set(), used - stored_names(tree.body) - set(dir(builtins)))
                self.assertEqual(set(), set(taken) - used)

    def test_what_comes_to_another_host_is_read_by_old_pythons(self):
        line = btrfs_backup_ng.stage_2()
        self.assertLess(len(line), 6000)
        if sys.version_info >= (3, 8):
            ast.parse(ast.literal_eval(ast.parse(line).body[0].value), feature_version=(3, 4))  # novm

    def test_functions_can_be_taken_in_at_a_glance(self):
        self.assertEqual([], list(long_functions(SOURCE, LONGEST)))

    def test_it_compiles_without_a_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compile(SOURCE, PROGRAM, "exec")

    def test_its_syntax_is_that_of_3_6(self):
        """Python 3.7 and older refuse newer syntax by themselves."""
        if sys.version_info >= (3, 8):
            ast.parse(SOURCE, feature_version=(3, 6))  # novm
        else:
            ast.parse(SOURCE)

    def test_examples_in_docstrings_hold(self):
        result = doctest.testmod(btrfs_backup_ng)
        self.assertGreater(result.attempted, 0)
        self.assertEqual(0, result.failed)


class ThePageOfTheTests(unittest.TestCase):
    """The head of tests/support.py maps what there is."""

    PAGE = os.path.join(TESTS, "support.py")

    @staticmethod
    def head_of(path):
        with open(path, encoding="utf-8") as file:
            return ast.get_docstring(ast.parse(file.read()), clean=False)

    def test_it_has_the_sections_of_the_program(self):
        row = re.compile("^(?:    ([IVX]+) |        )([A-Z][A-Z ]*[A-Z])(?:  |$)", re.MULTILINE)
        self.assertEqual([title for _, (title, _) in banners(SOURCE)],
                         ["PART {} {}".format(part, title) if part else title
                          for part, title in row.findall(self.head_of(self.PAGE))])

    def test_it_has_every_test_file_and_module(self):
        head = self.head_of(self.PAGE)
        there = {name[:-3] for name in os.listdir(TESTS) if name.endswith(".py")}
        self.assertEqual({name for name in there if name.startswith("test_")},
                         set(re.findall(r"\btest_[a-z_]+\b(?!\()", head)))
        self.assertLessEqual(set(re.findall("^    ([a-z]+) {5,}", head, re.MULTILINE)), there)

    def test_no_test_file_is_imported(self):
        for name in os.listdir(TESTS):
            if name.endswith(".py"):
                with self.subTest(name), open(os.path.join(TESTS, name), encoding="utf-8") as file:
                    self.assertEqual([], re.findall(r"^\s*(?:import|from) test_\w+", file.read(), re.MULTILINE))


class TheChecksSee(unittest.TestCase):
    """A check that sees nothing would pass for ever."""

    RULE = "#" * 100
    SAMPLE = "\n".join([
        RULE, "# PART I FIRST: what comes first", RULE,
        "LIMIT = 1",
        "def early({arguments}):",
        "    {body}",
        "class Early:",
        "    {member}",
        RULE, "# SECOND ONE: and what comes then", RULE,
        "late = 2",
        "def later(): return early",
        ""])

    def pairs(self, arguments="", body="pass", member="pass"):
        return [pair.partition(" (")[0] for pair in
                upward_pairs(self.SAMPLE.format(arguments=arguments, body=body, member=member))]

    def test_uses_of_what_stands_below(self):
        for body in ("return late", "return later()", "x = late + LIMIT", "return lambda: late",
                     "return [late for x in y]", "return [x for x in late]", "return late.attribute",
                     "return f'{late}'", "return early(late=late)", "global late; print(late)"):
            with self.subTest(body=body):
                self.assertEqual(["early"], self.pairs(body=body))
        for arguments in ("x=late", "x: late", "*x, y=later"):
            with self.subTest(arguments=arguments):
                self.assertEqual(["early"], self.pairs(arguments))
        for member in ("x: late = 1", "x = late", "def act(self): return late", "x = property(late)",
                       "def late(self): return late"):
            with self.subTest(member=member):
                self.assertEqual(["Early"], self.pairs(member=member))

    def test_names_of_its_own_are_no_uses(self):
        for body in ("late = 1; return late", "return [late for late in x]", "return lambda late: late",
                     "for late in x: print(late)", "import late; return late", "return x.late, LIMIT",
                     "def late(): pass; return late", "x: 'late' = 1", "return early(late=1)"):
            with self.subTest(body=body):
                self.assertEqual([], self.pairs(body=body))
        for arguments in ("late", "*late", "**late", "x, late=1"):
            with self.subTest(arguments=arguments):
                self.assertEqual([], self.pairs(arguments, "return late"))

    def test_banners_and_contents(self):
        titles = [("PART I FIRST", "what comes first"), ("SECOND ONE", "and what comes then")]
        self.assertEqual(titles, [title for _, title in banners(self.SAMPLE)])
        self.assertEqual(titles, contents("Contents\n\n    I FIRST: what comes first\n"
                                          "        SECOND ONE  and what comes then\n"))

    def test_long_functions(self):
        source = "def short():\n    pass\n\ndef long():\n    x = (1,\n         2,\n         3)\n"
        self.assertEqual(["long (line 4) has 4 lines"], list(long_functions(source, 2)))
        self.assertEqual([], list(long_functions(source, 4)))


if __name__ == "__main__":
    unittest.main()
