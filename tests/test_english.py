"""Language of the repository: Google docstrings, standard terms, American spelling, as far as a program can check them."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
PROSE = [name for name in TRACKED if name.endswith((".py", ".md", ".yaml", ".toml", ".sbatch", "Makefile"))]
PROGRAMS = [name for name in PROSE if name.endswith(".py")]

CLAUSES = {"what", "who", "whose", "where", "how", "when", "why", "whether", "which", "that"}
"""First words of a clause; a module or a class is described by a noun phrase."""

REPLACED = {
    r"mend(s|ed|ing)?": "fix",
    r"anew": "again, from scratch",
    r"go(es)? on|going on|went on": "continue, resume",
    r"whole|wholly": "complete, intact, entire",
    r"beside": "next to",
    r"whatever": "regardless of",
    r"reckon\w*": "estimate",
    r"likewise": "also",
    r"the former|the latter": "the noun itself",
    r"(is|are) no(?! longer| more| less)": "is not a, not found",
    r"says|tells|answers|listens|knows": "a verb for the work of a program",
}
"""Pattern of a word: today's word."""

SPELLED = r"(optim|normal|serial|initial|synchron|general|organ|recogn|real|minim|maxim|special|standard|summar|util|visual)"
BRITISH = (
    rf"{SPELLED}is(e|ed|es|ing|ation)|(label|model|cancel|signal)l(ed|ing)|(col|behavi|fav|hon|neighb)our\w*|centred?|grey"
    r"|whilst|amongst|towards|catalogue|artefacts?|analyse[ds]?|spelt|learnt"
)
PATTERNS = {**REPLACED, BRITISH: "American spelling"}
HERE = "tests/test_english.py"


def nodes_with_docstring(module: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yield (module, class or function, its docstring)."""
    for node in ast.walk(module):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                yield node, text


def strings(module: ast.Module, *, with_messages: bool) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the string constants; without messages only those that are statements: docstrings."""
    nodes = ast.walk(module) if with_messages else (node.value for node in ast.walk(module) if isinstance(node, ast.Expr))
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from enumerate(node.value.splitlines(), node.lineno)


def prose(name: str) -> list[tuple[int, str]]:
    """Return (line, text) of the prose of a file; of a test without its messages, which may quote any input."""
    content = (ROOT / name).read_text()
    if not name.endswith(".py"):
        return list(enumerate(content.splitlines(), 1))
    tokens = tokenize.generate_tokens(io.StringIO(content).readline)
    comments = [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]
    return [*comments, *strings(ast.parse(content), with_messages=not name.startswith("tests/"))]


@pytest.mark.parametrize("name", [name for name in PROSE if name != HERE])
def test_words(name):
    found = [
        f"{name}:{line}: {match[0]!r} ({remedy})"
        for line, text in prose(name)
        for pattern, remedy in PATTERNS.items()
        for match in re.finditer(rf"(?<![\w.])({pattern})\b", text, re.IGNORECASE)
    ]
    assert found == [], "\n".join(found)


@pytest.mark.parametrize("name", PROGRAMS)
def test_docstrings(name):
    """The first line of a module or class is a noun phrase; each description of an argument stands alone."""
    found = []
    for node, text in nodes_with_docstring(ast.parse((ROOT / name).read_text())):
        first = re.sub(r"\W", "", text.split()[0]).lower()
        if first in CLAUSES or first in ("of", "for", "in", "as", "from", "with", "by", "to"):
            found.append(f"{name}:{getattr(node, 'lineno', 1)}: begins with {first!r}")
        found += [f"{name}: {line!r} is not a phrase with a capital letter" for line in fragments(text)]
    assert found == [], "\n".join(found)


def fragments(docstring: str) -> list[str]:
    """Return the lines of Args, Attributes, Returns, Yields and Raises whose description begins with a small letter."""
    found, section = [], ""
    for line in docstring.splitlines()[1:]:
        if re.fullmatch(r"\s*\w+:", line):
            section, depth = line.strip(" :"), len(line) - len(line.lstrip()) + 4
        elif line.strip() == "":
            section = ""
        elif section and len(line) - len(line.lstrip()) == depth:
            is_named = section in ("Args", "Attributes", "Raises")
            description = line.strip().partition(": ")[2] if is_named else line.strip()
            if description[:1].islower():
                found.append(line.strip())
            section = section if is_named else ""
    return found


def test_the_checks_can_fail():
    assert fragments("X.\n\n    Args:\n        a: of the run.\n        b: The run.\n            more: text\n") == [
        "a: of the run."
    ]
    assert fragments("X.\n\n    Returns:\n        the run.\n        Second line.\n") == ["the run."]
    for text in ("the whole run", "colour", "normalised", "there is no file", "labelled"):
        assert any(re.search(rf"\b({pattern})\b", text) for pattern in PATTERNS), text
