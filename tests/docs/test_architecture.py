"""Picture of the layers in docs/architecture.md, compared with the layers that tests/test_layers.py enforces."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()


def enforced_layers() -> list[list[str]]:
    """Return the packages of each layer, lowest layer first, from the source of tests/test_layers.py."""
    for node in ast.parse((ROOT / "tests/test_layers.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS":
            return [names.split() for names in ast.literal_eval(node.value)]
    raise AssertionError("tests/test_layers.py has no LAYERS")


def drawn_layers(page: str) -> list[list[str]]:
    """Return the packages of each box of the picture, lowest box first."""
    picture = page.split("```text\n")[1].split("```")[0]
    boxes = re.split(r"^[┌├└]─*[┐┤┘]\n", picture, flags=re.MULTILINE)
    return [re.findall(r"^│ (\w+) +\S", box, re.MULTILINE) for box in boxes if box][::-1]


def sorted_within(layers: list[list[str]]) -> list[list[str]]:
    return [sorted(names) for names in layers]


def test_picture_shows_the_enforced_layers():
    assert sorted_within(drawn_layers(PAGE)) == sorted_within(enforced_layers())


def test_picture_is_a_closed_box_of_one_width():
    picture = PAGE.split("```text\n")[1].split("```")[0].splitlines()
    assert {len(line) for line in picture} == {len(picture[0])} and {line[-1] for line in picture} == set("┐│┤┘")


def test_page_begins_with_the_picture():
    assert PAGE.index("```text") < 600 and PAGE.count("```") == 2


def test_a_moved_or_missing_package_is_noticed():
    row = next(line for line in PAGE.splitlines() if line.startswith("│ losses "))
    without = PAGE.replace(f"{row}\n", "")
    assert drawn_layers(without) != drawn_layers(PAGE)
    upward = without.replace("│ cli ", f"{row}\n│ cli ", 1)
    assert ["losses" in names for names in drawn_layers(upward)].index(True) == len(drawn_layers(upward)) - 1


def test_versions_of_stored_data_are_those_of_the_source():
    named = re.findall(r"`(\w*VERSION)` in `(\S+)`", PAGE.split("## Versions of stored data")[1])
    assert len(named) == 4
    for name, file in named:
        assert re.search(rf"^{name} = \d+$", (ROOT / "kd_accel" / file).read_text(), re.MULTILINE), file
