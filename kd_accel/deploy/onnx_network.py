"""A network in ONNX Runtime as a module, for measurements next to PyTorch."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from kd_accel.deploy.export import WithInput, export_program, onnx_forward, write_onnx
from kd_accel.deploy.parity import Forward, measure_parity
from kd_accel.errors import UserError


class OnnxNetwork(nn.Module):
    """Module that runs a function of ONNX Runtime on the CPU.

    Args:
        run: Function from images [B, 3, S, S] to logits [B, C].
    """

    def __init__(self, run: Forward) -> None:
        super().__init__()
        self._run = run

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images, which are contiguous and on the CPU."""
        return self._run(images)


def onnx_network(network: nn.Module, images: Tensor, *, arch: str, threads: int) -> OnnxNetwork:
    """Export a network to ONNX, and load it into ONNX Runtime.

    Args:
        network: Network in evaluation mode, on the CPU and not compiled.
        images: Normalized images on which the logits are compared, [N, 3, S, S].
        arch: Architecture, for messages.
        threads: Threads within an operator.

    Raises:
        UserError: If the network cannot be exported, or its logits differ.
    """
    program = export_program(WithInput(network, nn.Identity()).eval(), images[:1], arch=arch)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        write_onnx(program, {}, path)
        run = onnx_forward(path, threads=threads)
    if not (parity := measure_parity(network, run, images)).holds:
        raise UserError(
            f"export: the ONNX file of {arch} does not compute the network's logits: {parity}; measure without onnx"
        )
    return OnnxNetwork(run)
