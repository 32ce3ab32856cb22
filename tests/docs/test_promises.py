"""docs/promises.md: the guarantees of the README in the same order, each with tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/promises.md").read_text()
README = (ROOT / "README.md").read_text()
PROOFS = {
    section.split("\n")[0]: re.findall(r"^- `(tests/\S+?)`$", section, re.MULTILINE) for section in PAGE.split("\n## ")[1:]
}


class Collected:
    """Plugin of a collection: the ids of all tests, without their parameters."""

    def __init__(self):
        self.names = set()

    def pytest_collection_modifyitems(self, items):
        self.names |= {item.nodeid.partition("[")[0] for item in items}


def test_the_readme_lists_the_same_promises():
    guarantees = README.split("## Guarantees")[1].split("\n## ")[0]
    assert re.findall(r"^- \*\*(.+?)\*\*:", guarantees, re.MULTILINE) == list(PROOFS)


def test_each_promise_has_proofs_and_nothing_else_is_listed():
    assert [promise for promise, tests in PROOFS.items() if not tests] == []
    assert PAGE.count("\n- ") == sum(map(len, PROOFS.values()))


@pytest.mark.slow
def test_every_proof_exists():
    tests = {test for listed in PROOFS.values() for test in listed}
    files = sorted({str(ROOT / test.partition("::")[0]) for test in tests})
    collected = Collected()
    options = [
        "--collect-only",
        "-q",
        "-m",
        "",
        "-p",
        "no:cacheprovider",
        f"--rootdir={ROOT}",
        f"--config-file={ROOT}/pyproject.toml",
    ]
    assert [name for name in files if not Path(name).is_file()] == []
    pytest.main([*options, *files], plugins=[collected])
    assert sorted(tests - collected.names) == []
