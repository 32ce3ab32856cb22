"""The layout holds: imports point only left, and what only one place may know, only that place knows."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kd_accel"
LAYERS = [
    "types errors",
    "io",
    "config profiling",
    "distributed",
    "data",
    "models",
    "losses",
    "teacher",
    "cache",
    "training bench",
    "report",
    "commands cli",
]
RANK = {name: level for level, names in enumerate(LAYERS) for name in names.split()}


def _modules() -> list[Path]:
    return sorted(
        path
        for path in PACKAGE.rglob("*.py")
        if path.name not in ("__main__.py",) and path.parent != PACKAGE or path.stem in RANK
    )


def _imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def _layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path):
    own = _layer(path)
    for name in _imported(path):
        if name.startswith("kd_accel."):
            other = name.split(".")[1]
            assert other == own or RANK[other] < RANK[own] or own == "cli", f"{path} imports {name}"


def test_every_file_has_a_layer():
    assert {_layer(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"} == set(RANK)


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("accelerate", ["distributed.py", "training"]),
        ("torch.distributed", ["distributed.py", "training"]),
        ("wandb", ["training/wandb_tracker.py"]),
        ("matplotlib", ["report/plots.py"]),
        ("datasets", ["data/sources.py"]),
        ("tqdm", ["training/progress.py"]),
    ],
)
def test_only_one_place_knows(library, allowed):
    for path in _modules():
        where = str(path.relative_to(PACKAGE))
        if any(name == library or name.startswith(f"{library}.") for name in _imported(path)):
            assert where.startswith(tuple(allowed)), f"{where} imports {library}"


def test_there_is_no_drawer_for_everything():
    assert not {"utils", "common", "helpers", "misc"} & {path.stem for path in PACKAGE.rglob("*")}


@pytest.mark.parametrize(
    "module",
    [
        "kd_accel.cli",
        "kd_accel.config.schema",
        "kd_accel.types",
        "kd_accel.config.parsing",
        "kd_accel.config.settings",
        "kd_accel.config.validation",
        "kd_accel.commands.reproduce",
    ],
)
def test_no_torch_before_the_input_is_known_to_be_good(module):
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_losses_are_pure():
    for path in (PACKAGE / "losses").glob("*.py"):
        assert not {
            name for name in _imported(path) if name.startswith(("kd_accel.engine", "kd_accel.data", "accelerate", "logging"))
        }
