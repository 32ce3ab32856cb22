"""Parameters, multiply-adds and latency of the models: `python -m benchmarks.model_cost`.

ResNet-50 and ResNet-18 with 10 classes on 32x32 images, each with the ImageNet stem and without its max-pool, at batch 1, 8, 32
and 128. The modes are eager, compiled if torch finds a compiler, and on CPUs ONNX Runtime if it is installed with onnxscript.
The latency is measured by the functions of `kd-accel bench`. As a check, `torch.utils.benchmark` measures the eager ResNet-18
in turns with them.

The result is the median time of a forward in milliseconds. `latency/torch_benchmark` is the ratio of the two measurements, turn
by turn, for the batch size where it differs most from 1; the notes have it for every batch size.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from benchmarks.harness import Result, TurnRatio, finish, has_compiler, turn_ratio
from benchmarks.jobs import CLASSES, IMAGE_SIZE
from kd_accel.bench.latency import compile_for_latency, measure_latency
from kd_accel.bench.model_stats import count_macs, count_parameters
from kd_accel.config.schema import Stem
from kd_accel.models.factory import build_model
from kd_accel.models.inference import choose_kernels, image_memory_format

STEMS: tuple[Stem, ...] = ("imagenet", "no_pool")
_TURN_S = 0.1
"""Time of a measurement in the comparison with torch.utils.benchmark: short, since the machine's speed drifts in a second."""
MODELS = {f"{arch}-{stem}": (f"torchvision/{arch}", stem) for arch in ("resnet50", "resnet18") for stem in STEMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32, 128], help="images in a forward")
    parser.add_argument("--iterations", type=int, default=10, help="smallest number of timed forwards (default: 10)")
    parser.add_argument("--min_time_s", type=float, default=0.5, help="shortest measurement in seconds (default: 0.5)")
    parser.add_argument("--turns", type=int, default=40, help="turns of the check by torch.utils.benchmark (default: 40)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--modes", choices=list(MODES), nargs="+", default=_modes(), help="modes (default: all available)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    choose_kernels()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: build_model(arch, num_classes=CLASSES, stem=stem).eval() for name, (arch, stem) in MODELS.items()}
    notes = {name: {**count_parameters(model), "macs": count_macs(model, _images(1))} for name, model in models.items()}
    result = Result("model-cost", notes=dict(notes), unit="ms")
    for model in models.values():
        model.to(device).to(memory_format=image_memory_format(None, device))
    agreement: dict[int, TurnRatio] = {}
    for mode in arguments.modes:
        timed = {name: MODES[mode](model) for name, model in models.items()}
        if mode == "compiled":
            compile_for_latency(timed.values(), batch_sizes=len(arguments.batch_sizes))
        for batch_size in arguments.batch_sizes:
            images = {name: _images(batch_size).to(device, memory_format=image_memory_format(None, device)) for name in timed}
            found = measure_latency(timed, images, min_iterations=arguments.iterations, min_time_s=arguments.min_time_s)
            for name, figures in found.items():
                case = f"{name}/{mode}/{batch_size}"
                result.medians[case], result.spread[case] = figures["median_ms"], figures["spread_ms"] / figures["median_ms"]
            if mode == "eager":
                agreement[batch_size] = _agreement(timed["resnet18-imagenet"], images["resnet18-imagenet"], arguments)
    if agreement:
        result.notes["agreement"] = agreement
        worst = max(agreement.values(), key=lambda ratio: abs(ratio["median"] - 1))
        result.ratios["latency/torch_benchmark"], result.by_turn["latency/torch_benchmark"] = worst["median"], worst
    finish(result)


def torch_benchmark_ms(model: nn.Module, images: Tensor, *, min_time_s: float) -> float:
    """Return the median time of a forward in milliseconds, measured by `torch.utils.benchmark`."""
    timer = Timer(
        "with torch.inference_mode(): model(images)",
        globals={"model": model, "images": images, "torch": torch},
        num_threads=torch.get_num_threads(),
    )
    return 1000 * timer.blocked_autorange(min_run_time=min_time_s).median


def _agreement(model: nn.Module, images: Tensor, arguments: argparse.Namespace) -> TurnRatio:
    """Return the ratio of the latency by kd_accel to that by `torch.utils.benchmark`, for the same forward."""
    min_time_s = min(_TURN_S, arguments.min_time_s)

    def kd_accel_ms() -> float:
        numbers = {"min_iterations": arguments.iterations, "min_time_s": min_time_s}
        return measure_latency({"model": model}, {"model": images}, **numbers)["model"]["median_ms"]

    def reference_ms() -> float:
        return torch_benchmark_ms(model, images, min_time_s=min_time_s)

    times_ms: dict[Callable[[], float], list[float]] = {kd_accel_ms: [], reference_ms: []}
    for turn in range(arguments.turns):
        # The order alternates, so that a drift within a turn does not favor either.
        for measure in (kd_accel_ms, reference_ms) if turn % 2 else (reference_ms, kd_accel_ms):
            times_ms[measure].append(measure())
    return turn_ratio(times_ms[kd_accel_ms], times_ms[reference_ms])


class _OnnxRuntime(nn.Module):
    """Model exported to ONNX, run by ONNX Runtime with the number of threads of torch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        onnxruntime = importlib.import_module("onnxruntime")
        with tempfile.TemporaryDirectory() as directory:
            path = f"{directory}/model.onnx"
            dynamic_batch = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(
                model, (_images(2),), path, dynamo=True, external_data=False, verbose=False, dynamic_shapes=dynamic_batch
            )
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._name = self._session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, {self._name: images.numpy()})[0])


MODES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "compiled": copy.deepcopy,
    "onnx": _OnnxRuntime,
}


def _modes() -> list[str]:
    """Return the modes that are available on this machine."""
    has_gpu = torch.cuda.is_available()
    has_onnx = not has_gpu and all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript"))
    return ["eager", *(["compiled"] if has_compiler() else []), *(["onnx"] if has_onnx else [])]


def _images(batch_size: int) -> Tensor:
    return torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
