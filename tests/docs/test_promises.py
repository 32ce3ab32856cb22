"""Guarantees of the README in docs/promises.md: same order, tests that exist, and proofs in bold that `make test` runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/promises.md").read_text()
README = (ROOT / "README.md").read_text()
TEST = re.compile(r"^- (\*\*)?`(tests/\S+?)`(?:\*\*)?$", re.MULTILINE)
PROOFS = {section.split("\n")[0]: TEST.findall(section) for section in PAGE.split("\n## ")[1:]}


class Collected:
    """Plugin of a collection: the marks of each case of a test, by its id without parameters."""

    def __init__(self):
        self.marks = {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            marks = {mark.name for mark in item.iter_markers()}
            self.marks.setdefault(item.nodeid.partition("[")[0], []).append(marks)


def is_in_make_test(marks):
    """Return whether `make test` runs a case with these marks."""
    return "faults" not in marks and ("slow" not in marks or "proof" in marks)


@pytest.fixture(scope="module")
def collected():
    """Marks of every case of the listed tests, by test id."""
    files = sorted({str(ROOT / test.partition("::")[0]) for listed in PROOFS.values() for _, test in listed})
    assert [name for name in files if not Path(name).is_file()] == []
    plugin = Collected()
    options = [f"--rootdir={ROOT}", f"--config-file={ROOT}/pyproject.toml", "-p", "no:cacheprovider"]
    pytest.main(["--collect-only", "-q", "-m", "", *options, *files], plugins=[plugin])
    return plugin.marks


def test_readme_and_page_list_the_same_promises():
    guarantees = README.split("## Guarantees")[1].split("\n## ")[0]
    assert re.findall(r"^- \*\*(.+?)\*\*:", guarantees, re.MULTILINE) == list(PROOFS)


def test_each_promise_has_a_proof_in_bold():
    assert [promise for promise, tests in PROOFS.items() if not any(bold for bold, _ in tests)] == []


def test_every_line_with_a_test_is_read():
    assert PAGE.count("`tests/") - PAGE.split("\n## ")[0].count("`tests/") == sum(map(len, PROOFS.values()))


@pytest.mark.slow
def test_every_listed_test_exists(collected):
    assert sorted({test for listed in PROOFS.values() for _, test in listed} - collected.keys()) == []


@pytest.mark.slow
def test_proofs_in_bold_run_in_make_test(collected):
    bold = {test for listed in PROOFS.values() for is_bold, test in listed if is_bold}
    assert [test for test in sorted(bold) if not any(map(is_in_make_test, collected.get(test, [])))] == []


def test_marks_of_make_test():
    assert is_in_make_test(set()) and is_in_make_test({"slow", "proof"}) and is_in_make_test({"alone"})
    assert not is_in_make_test({"slow"}) and not is_in_make_test({"slow", "proof", "faults"})
