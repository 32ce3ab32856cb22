"""CONTRIBUTING.md: its length, and the names in its tables exist in the files, the Makefile and pyproject.toml."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
KINDS = [
    "loss",
    "model library",
    "data source",
    "transform",
    "command",
    "setting",
    "part of a cache's fingerprint",
    "page",
    "benchmark",
]


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def is_defined(name: str, source: str) -> bool:
    """Return whether a module defines a name: a function, a class, or a variable at its top level."""
    return re.search(rf"^(?:def {name}\(|class {name}\b|{name}\b[^=\n]*=)", source, re.MULTILINE) is not None


def test_page_is_read_in_three_minutes():
    assert len(PAGE.split()) < 700


def test_table_names_each_extension_with_a_test():
    rows = [line.strip("|").split("|") for line in section("Where to add what").splitlines() if line.startswith("| a ")]
    assert [cells[0].strip().removeprefix("a ") for cells in rows] == KINDS
    assert [kind for kind, _, proof in rows if "tests/" not in proof] == []


def test_named_definitions_are_in_their_files():
    named = re.findall(r"`(\w+)` in `(\S+\.py)`", section("Where to add what"))
    assert len(named) >= 7
    missing = [pair for pair in named if not is_defined(pair[0], (ROOT / "kd_accel" / pair[1]).read_text())]
    assert missing == []


def test_a_name_that_is_gone_is_noticed():
    source = "SOURCES = ('hub:',)\n_COMMANDS: dict[str, int] = {}\nclass View(Base):\n    inner = 1\ndef load(x):\n    pass\n"
    assert [is_defined(name, source) for name in ("SOURCES", "_COMMANDS", "View", "load")] == [True] * 4
    assert [is_defined(name, source) for name in ("SOURCE", "inner", "Vie", "loa")] == [False] * 4


def test_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^\| `make ([\w-]+)`", PAGE, re.MULTILINE)) == targets - {"clean"}


def test_markers_are_those_of_pytest():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    declared = [marker.partition(":")[0] for marker in options["markers"]]
    assert sorted(re.findall(r"^- `(\w+)`: ", section("Commands"), re.MULTILINE)) == sorted(declared)
