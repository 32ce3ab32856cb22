"""The layers of the package: imports point left only, and each library has its place."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kd_accel"
LAYERS = [
    "types errors",
    "io",
    "config profiling exit_codes",
    "distributed",
    "data",
    "models",
    "losses",
    "teacher",
    "cache",
    "deploy",
    "training bench",
    "report",
    "builders",
    "commands cli api",
]
RANK = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
SHORTCUTS = {("cli", "commands"), ("api", "commands")}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in RANK)


@functools.cache
def _imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, anywhere in it, and `torch.distributed` where it is reached by attribute."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return names | {
        "torch.distributed"
        for node in nodes
        if isinstance(node, ast.Attribute) and node.attr == "distributed" and ast.unparse(node.value) == "torch"
    }


def _layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_left(path):
    own = _layer(path)
    others = {name.split(".")[1] for name in _imported(path) if name.startswith("kd_accel.")} - {own}
    assert {other for other in others if RANK[other] >= RANK[own] and (own, other) not in SHORTCUTS} == set()


def test_every_file_has_a_layer():
    assert {_layer(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"} == set(RANK)


def test_contributing_lists_the_layers():
    assert " | ".join(LAYERS) in " ".join((ROOT / "CONTRIBUTING.md").read_text().split())


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("accelerate", ["distributed.py", "training"]),
        ("torch.distributed", ["distributed.py", "training"]),
        ("torch.profiler", ["profiling.py"]),
        ("wandb", ["training/wandb_tracker.py"]),
        ("matplotlib", ["report/plots.py"]),
        ("datasets", ["data/tables.py"]),
        ("sklearn", ["data/sources.py"]),
        ("timm", ["models"]),
        ("tqdm", ["data/passes.py", "training/progress.py"]),
    ],
)
def test_a_library_has_its_place(library, allowed):
    found = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if any(name == library or name.startswith(f"{library}.") for name in _imported(path))
    }
    assert found and {where for where in found if not where.startswith(tuple(allowed))} == set()


@pytest.mark.parametrize("path", sorted((PACKAGE / "losses").glob("*.py")), ids=lambda path: path.name)
def test_losses_are_pure(path):
    foreign = ("kd_accel.config.schema", "kd_accel.data", "kd_accel.distributed", "accelerate", "torch.distributed", "logging")
    assert {name for name in _imported(path) if name.startswith(foreign)} == set()


def test_no_module_is_a_drawer_for_everything():
    assert not {"utils", "common", "helpers", "misc"} & {path.stem for path in PACKAGE.rglob("*")}


def test_mistakes_are_found_before_torch_is_loaded():
    modules = [
        "kd_accel",
        "kd_accel.types",
        "kd_accel.errors",
        *(f"kd_accel.config.{path.stem}" for path in (PACKAGE / "config").glob("*.py") if path.stem != "__init__"),
        "kd_accel.losses.registry",
        "kd_accel.cli",
        "kd_accel.commands.reproduce",
        "kd_accel.commands.sweep",
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    if {'torch', 'numpy'} & sys.modules.keys(): sys.exit(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.alone
def test_the_package_is_imported_in_a_fifth_of_a_second():
    code = "import time; start = time.perf_counter(); import kd_accel; print(time.perf_counter() - start)"
    times = [float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)) for _ in range(3)]
    assert min(times) < 0.2


CLIENT = """
from __future__ import annotations
from collections.abc import Callable
from pathlib import Path
from typing import Any
import torch
import kd_accel as kd

def distill(network: torch.nn.Module, student: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    data: kd.ImageDataset = kd.ImageDataset("digits", image_size=32)
    views: kd.ViewDataset = kd.ViewDataset(data, transform=kd.transforms.Crop(32), num_views=2, view_seed=0)
    sampler: kd.EpochBatchSampler = kd.EpochBatchSampler(views, batch_size=64)
    batches: list[list[int]] = list(sampler)
    teacher: kd.Teacher = kd.Teacher(network, mean=data.mean, std=data.std, class_names=data.class_names)
    target: kd.targets.TargetFunction = kd.targets.PCA(8)
    cache: kd.TeacherCache = kd.TeacherCache.build("caches/x", teacher, views, layers={"layer4": target}, dtype="float16")
    shapes: dict[str, tuple[int, int, int]] = cache.shapes
    losses: dict[str, kd.losses.FeatureLoss] = {"mse": kd.losses.MSE(direction="both")}
    distiller = kd.Distiller(
        student, mean=data.mean, std=data.std, logits=kd.losses.KL(), features=losses, layers={"layer4": "layer4"},
        target_shapes=shapes,
    )
    kd.use_cpu_kernels(distiller, torch.device("cpu"))
    weights = kd.LossWeights(temperature=4.0, alpha=0.9, features={"mse": 0.1})
    stored: kd.TeacherOutput = cache.read(torch.tensor(batches[0]), 0)
    output: kd.losses.DistillerOutput = distiller.forward(images, stored, labels, weights)
    divergence: torch.Tensor = kd.losses.kl_loss(output.logits, output.logits, temperature=4.0)
    return output.loss + divergence + kd.losses.mse_loss(images, images) + kd.losses.cross_entropy(output.logits, labels)

def run(config: kd.RunConfig) -> tuple[list[kd.Prediction], dict[str, Any], str]:
    result: kd.RunResult = kd.train(config, **{"optim.lr": 0.05})
    model: kd.Model = kd.load_model(Path("runs/student"))
    try:
        figures: dict[str, Any] = kd.evaluate(result.directory, split="test")
    except kd.UserError as error:
        figures = {"error": str(error)}
    except kd.Preempted as stop:
        figures = {"signal": stop.number}
    return model.predict(["a.png"]), figures, kd.__version__
"""


@pytest.mark.slow
def test_a_program_that_uses_every_public_name_passes_mypy_strict(tmp_path):
    import kd_accel

    assert {name for name in kd_accel.__all__ if f"kd.{name}" not in CLIENT} == set()
    (tmp_path / "client.py").write_text(CLIENT)
    (tmp_path / "mistaken.py").write_text(CLIENT.replace("alpha=0.9", "alpha='0.9'").replace("batch_size=64", "batches=64"))
    mypy = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
    files = [str(tmp_path / name) for name in ("client.py", "mistaken.py")]
    done = subprocess.run([*mypy, *files], capture_output=True, text=True, check=False, cwd=ROOT)
    mistakes = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(mistakes) == 2 and all("mistaken.py" in line for line in mistakes), done.stdout
    assert "[call-arg]" in mistakes[0] and "[arg-type]" in mistakes[1]
