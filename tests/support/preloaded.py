"""Imports of all commands, made once in the fork server, so that no forked process has to make them."""

import importlib
import pkgutil
from pathlib import Path

import kd_accel

for module in pkgutil.walk_packages(kd_accel.__path__, "kd_accel."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
# Not wandb: the first fork to end would remove the directory in which W&B, when it is imported, keeps pictures for all of them.
for name in ("datasets", "sklearn.datasets", "torchvision.models", "PIL.Image", "torch._dynamo"):
    importlib.import_module(name)

_THREADS = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert len(_THREADS) == 1, f"a fork would lose threads: {_THREADS}"
