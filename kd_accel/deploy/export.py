"""Export of a trained network to one file, for ONNX Runtime or for PyTorch alone.

In: a network and its model card. Out: `model.onnx`, or `model.pt2` of `torch.export`, with a dynamic batch: input `images`
[B, 3, S, S], output `logits` [B, C]. The images are uint8 with the normalization in the file, or normalized float32. The file
holds the model card as metadata. It is loaded and compared with the network before it gets its name, so a file that exists has
passed the comparison.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import kd_accel
from kd_accel.deploy.parity import Forward, Parity, measure_parity
from kd_accel.deploy.samples import ParitySamples
from kd_accel.errors import UserError, describe_error
from kd_accel.io.files import readable_size, write_whole
from kd_accel.models.card import ModelCard
from kd_accel.models.preprocess import Normalize

FileFormat = Literal["onnx", "torch"]
METADATA_FILE = "metadata.json"
"""Name of the metadata in the extra files of `torch.export`."""
_EXAMPLE_IMAGES = 2
"""Size of the batch that torch.export traces; a batch of 1 would become a constant."""
_MAX_ONNX_BYTES = 3 * 2**29
"""Size up to which PyTorch writes the weights into the ONNX file itself; protobuf ends at 2 GiB."""


def export_file(
    network: nn.Module,
    card: ModelCard,
    out: Path,
    *,
    file_format: FileFormat,
    normalizes: bool,
    samples: ParitySamples,
) -> Parity:
    """Export a network, and keep the file only if its logits are those of the network.

    Args:
        network: Plain network in evaluation mode, on the CPU.
        card: Card of the network.
        out: The file to create or replace; its directory is created.
        file_format: `onnx`, or `torch` for `torch.export`.
        normalizes: Whether the file takes uint8 images and normalizes them.
        samples: Images for the comparison.

    Returns:
        The comparison, which holds.

    Raises:
        UserError: If packages are missing, the network cannot be exported, its logits differ, or the file cannot be written.
            A previous file is then kept.
    """
    handler = _FORMATS[file_format]
    handler.check()
    normalize = Normalize(card.mean, card.std)
    module = WithInput(network, normalize if normalizes else nn.Identity()).eval()
    images = samples.images if normalizes else normalize(samples.images)
    program = export_program(module, images[:1], arch=card.arch)
    found: list[Parity] = []

    def write(path: Path) -> None:
        handler.write(program, metadata(card, normalizes=normalizes), path)
        found.append(measure_parity(module, handler.load(path), images))
        refuse_difference(found[0], samples, where=str(out))

    write_checked(out, write)
    return found[0]


class WithInput(nn.Module):
    """A network behind the part that is exported with it; the name of the argument becomes that of the input."""

    def __init__(self, network: nn.Module, first: nn.Module) -> None:
        super().__init__()
        self.network, self.first = network, first

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images."""
        return self.network(self.first(images))


def export_program(module: nn.Module, image: Tensor, *, arch: str) -> ExportedProgram:
    """Trace a network with a dynamic batch.

    Args:
        module: The network, with or without normalization.
        image: An image, [1, 3, S, S].
        arch: Its architecture, for the error message.

    Raises:
        UserError: If torch.export cannot trace the network for every size of the batch.
    """
    example = image.expand(_EXAMPLE_IMAGES, -1, -1, -1).contiguous()
    try:
        with torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes={"images": {0: Dim("batch", min=1)}})
    except Exception as error:
        # torch.export has no common exception.
        raise UserError(
            f"export: torch.export cannot trace {arch} for every size of the batch ({describe_error(error)}); remove "
            "operations on values of tensors and fixed sizes from its forward, or deploy the folder of --format hub"
        ) from None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def metadata(card: ModelCard, *, normalizes: bool) -> dict[str, str]:
    """Return the description of an export as texts by name; lists and the card are JSON."""
    kind = "uint8 RGB in 0..255" if normalizes else "float32 RGB, (image / 255 - mean) / std"
    return {
        "producer": f"kd_accel {kd_accel.__version__}",
        "input": f"images [B, 3, {card.image_size}, {card.image_size}], {kind}",
        "output": f"logits [B, {len(card.label_names)}]",
        "class_names": json.dumps(card.label_names),
        "mean": json.dumps(card.mean),
        "std": json.dumps(card.std),
        "image_size": str(card.image_size),
        "model.json": json.dumps(asdict(card)),
    }


def refuse_difference(parity: Parity, samples: ParitySamples, *, where: str) -> None:
    """Raise UserError if the logits of an export are not those of its network."""
    if not parity.holds:
        raise UserError(
            f"export: {where} is not written, because it does not compute the network's logits: {parity}, on {samples.origin}; "
            "use another --format, and report the architecture with the versions of torch and onnxruntime"
        )


def write_checked(out: Path, write: Callable[[Path], None]) -> None:
    """Write a file atomically, and create its directory. Raises UserError if it cannot be written."""
    if out.is_dir():
        raise UserError(f"--out: {out} is a directory; give the path of a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, write)
    except OSError as error:
        raise UserError(
            f"--out: cannot write {out} ({error.strerror or error}); free disk space, check the permissions, or use another "
            "file"
        ) from None


def onnx_forward(path: Path, *, threads: int | None = None) -> Forward:
    """Load an ONNX file into ONNX Runtime on the CPU.

    Args:
        path: The file.
        threads: Threads within an operator; None = the choice of ONNX Runtime.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def require_onnx() -> None:
    """Raise UserError if a package for ONNX is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f'export: ONNX needs {error.name}, which is not installed; pip install "kd-accel[export]"') from None


def write_onnx(program: ExportedProgram, described: Mapping[str, str], path: Path) -> None:
    """Write an exported program as an ONNX file, with metadata.

    Raises:
        UserError: If an operator has no counterpart, or the weights are too large for one file.
    """
    if (size := sum(tensor.nbytes for tensor in program.state_dict.values())) > _MAX_ONNX_BYTES:
        raise UserError(
            f"export: the weights, {readable_size(size)}, do not fit into one ONNX file ({readable_size(_MAX_ONNX_BYTES)}); "
            "use --format torch"
        )
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": {"images": {0: "batch"}}}
    try:
        onnx_program = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False, **names)
        assert onnx_program is not None
        onnx_program.model.metadata_props.update(described)
        content = onnx_program.model_proto.SerializeToString()
    except (ImportError, RuntimeError, ValueError) as error:
        raise UserError(
            f"export: torch.onnx cannot convert the network ({describe_error(error)}); update onnx and onnxscript (pip install "
            '--upgrade "kd-accel[export]"), or use --format torch'
        ) from None
    path.write_bytes(content)


def _write_torch(program: ExportedProgram, described: Mapping[str, str], path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(dict(described), indent=2)})


def _torch_forward(path: Path) -> Forward:
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda images: module(images)


@dataclass(frozen=True)
class _Format:
    """Functions of a file format: check before the work, write and load a file."""

    check: Callable[[], None]
    write: Callable[[ExportedProgram, Mapping[str, str], Path], None]
    load: Callable[[Path], Forward]


_FORMATS: dict[FileFormat, _Format] = {
    "onnx": _Format(require_onnx, write_onnx, onnx_forward),
    "torch": _Format(lambda: None, _write_torch, _torch_forward),
}
