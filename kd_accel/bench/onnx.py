"""ONNX Runtime as a column of the benchmark: each network is exported, and timed in turn with its module in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_accel.config.schema import BenchConfig
from kd_accel.deploy.export import require_onnx
from kd_accel.deploy.onnx_network import onnx_network
from kd_accel.errors import UserError

_SUFFIX = "/onnx"
"""End of the name of a network in ONNX Runtime, after that of its module."""


def check_onnx_setting(config: BenchConfig, device: torch.device) -> None:
    """Raise UserError if `onnx` is set, but the networks cannot be timed in ONNX Runtime next to PyTorch."""
    if not config.onnx:
        return
    if device.type != "cpu":
        raise UserError("onnx: true is timed on the CPU, as the modules next to it must be; add --device cpu, or leave it out")
    if config.precision != "float32":
        raise UserError(f"onnx: true is timed in float32, unlike precision {config.precision}; leave one of them out")
    require_onnx()


class OnnxColumn:
    """Networks in ONNX Runtime, next to their modules.

    Attributes:
        models: Exported networks by name.
        errors: Reason by name of the module for each network that cannot be exported.
    """

    def __init__(self) -> None:
        self.models: dict[str, nn.Module] = {}
        self.errors: dict[str, str] = {}

    def add(self, name: str, network: nn.Module, images: Tensor, *, arch: str) -> None:
        """Export a network with PyTorch's number of threads, or keep the reason why that fails.

        Args:
            name: Name of its module in the measurement.
            network: The module, in evaluation mode, on the CPU and not compiled.
            images: Images on which the logits of both are compared, [N, 3, S, S].
            arch: Its architecture.
        """
        try:
            self.models[name + _SUFFIX] = onnx_network(network, images, arch=arch, threads=torch.get_num_threads())
        except UserError as error:
            self.errors[name] = str(error)

    def images(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the input of each exported network, contiguous, from that of the modules by name."""
        return {name: images[name.removesuffix(_SUFFIX)].contiguous() for name in self.models}

    def figures(self, name: str, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the figures of a module's exported network, of all measured ones by name; none if it was not asked for."""
        if name in self.errors:
            return {"onnxruntime_median_ms": None, "onnxruntime_error": self.errors[name]}
        own = measured.get(name + _SUFFIX)
        return {f"onnxruntime_{key}": own[key] for key in ("median_ms", "p90_ms", "spread_ms")} if own else {}
