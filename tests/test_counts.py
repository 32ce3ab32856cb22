"""Counts that keep the program easy to read: frames to a step, sizes, nesting, import cycles, and names that are retired."""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kd_accel.cli import _COMMANDS
from kd_accel.training.step import TrainStep
from tests.support import in_process

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kd_accel"
FILES = sorted(PACKAGE.rglob("*.py"))
WITH_RUN_CONFIG = {"config", "builders", "commands", "cli", "api"}
"""Parts of the package that may take a RunConfig; the rest takes plain arguments, or a section of it."""

BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef, ast.Lambda)

RETIRED = set(
    re.findall(
        r"\w+",
        "answer answered answers asked course cpu_forms cuts finite_watch folded forms interruption journal layout prepared "
        "signals signal_source stage stages tap tap_recorder taps teaching trainee trainees wanted watch written",
    )
)
"""Names of version 1, as words of an identifier in snake case."""

ENGLISH = {"asked", "forms", "prepared", "stage", "stages", "written"}
"""Those that prose may use."""

USUAL_MEANING = {("training/preemption.py", "signals"), ("exit_codes.py", "signals")}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (found for found in ast.walk(node) if isinstance(found, FUNCTIONS))


def test_six_frames_from_the_command_line_to_a_step(tmp_path, monkeypatch):
    stacks, step = [], TrainStep.__call__

    def recorded(self, *arguments):
        frame, stack = sys._getframe(1), ["step"]
        while frame is not None:
            if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                stack.append(frame.f_code.co_name)
            frame = frame.f_back
        stacks.append(stack[::-1])
        return step(self, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", recorded)
    in_process.train(tmp_path / "run", "--train.max_steps=2")
    assert len(stacks) == 2
    for stack in stacks:
        assert stack[0] == "main" and stack[-1] == "step"
        assert len(stack) <= 6, stack


def test_the_commands_are_thin():
    lines = {path.name: len(path.read_text().splitlines()) for path in (PACKAGE / "commands").glob("*.py")}
    assert sum(lines.values()) < 900, lines


def test_only_builders_and_commands_take_the_whole_config():
    found = [
        f"{path.relative_to(PACKAGE)}: {function.name}"
        for path in FILES
        if part(path) not in WITH_RUN_CONFIG
        for function in functions(tree(path))
        if any("RunConfig" in ast.unparse(annotation) for annotation in annotations(function))
    ]
    assert found == []


def annotations(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.expr]:
    arguments = function.args
    all_arguments = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [node for node in (function.returns, *(one.annotation for one in all_arguments if one)) if node is not None]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_short_and_flat(path):
    assert len(path.read_text().splitlines()) <= 400
    for function in functions(tree(path)):
        assert function.end_lineno - function.lineno + 1 <= 60, function.name
        assert nesting(function) <= 3, function.name


def nesting(node: ast.AST) -> int:
    """Return the deepest nesting of blocks in a node. `elif` is as deep as its `if`; inner functions count for themselves."""
    depths = [0]
    for name, value in ast.iter_fields(node):
        children = [child for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)]
        is_elif = name == "orelse" and isinstance(node, ast.If) and len(children) == 1
        for child in children:
            if not isinstance(child, SCOPES):
                depths.append(nesting(child) + (isinstance(child, BLOCKS) and not (is_elif and isinstance(child, ast.If))))
    return max(depths)


def test_the_nesting_is_counted():
    code = "def f():\n if a:\n  pass\n elif b:\n  for c in d:\n   with e:\n    def g():\n     if h:\n      pass"
    assert nesting(ast.parse(code).body[0]) == 3
    assert nesting(ast.parse("def f():\n while a:\n  try:\n   pass\n  finally:\n   if b:\n    if c: pass").body[0]) == 4


def test_no_two_packages_import_each_other():
    imports = {
        (part(path), node.module.split(".")[1])
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kd_accel.")
    }
    assert len(imports) > 30
    assert {(one, other) for one, other in imports if one != other and (other, one) in imports} == set()


def words(name: str) -> set[str]:
    """Return the words of an identifier, and each two that follow each other, in snake case."""
    parts = [
        word.lower() for piece in name.split("_") for word in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+", piece)
    ]
    return {*parts, *(f"{one}_{other}" for one, other in zip(parts, parts[1:], strict=False))}


def test_words_of_names():
    assert words("FiniteWatch") == {"finite", "watch", "finite_watch"}
    assert words("_num_TAPs2") & {"taps2", "num"} and words("cpu_forms") >= {"cpu_forms", "forms"}


def defined_names(module: ast.Module) -> Iterator[str]:
    """Yield the names that a file defines; it does not choose those of libraries (`signal.Signals`, a keyword `layout`)."""
    for node in ast.walk(module):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_name_is_retired(path):
    where = str(path.relative_to(PACKAGE))
    allowed = {word for file, word in USUAL_MEANING if file == where}
    retired = {name: words(name) & (RETIRED - allowed) for name in (path.stem, *defined_names(tree(path)))}
    assert {name for name, found in retired.items() if found} == set()


def keys(content: object) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield str(key)
            yield from keys(value)
    elif isinstance(content, list):
        for value in content:
            yield from keys(value)


def test_no_key_of_a_config_is_retired():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert files
    for path in files:
        assert {key for key in keys(yaml.safe_load(path.read_text())) if words(key) & RETIRED} == set(), path


@pytest.mark.parametrize("command", ["", *_COMMANDS, "cache build"])
def test_no_word_of_the_help_is_retired(command):
    text = in_process.say(*command.split(), "--help")
    assert len(text) > 100
    assert {word for word in re.findall(r"[a-z_]+", text.lower()) if word in RETIRED - ENGLISH} == set()
