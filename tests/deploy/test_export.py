"""Exported files: run by ONNX Runtime and by torch alone, equal to the network; a broken export is refused."""

import copy
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from kd_accel.deploy import export
from kd_accel.deploy.export import METADATA_FILE, export_file
from kd_accel.deploy.samples import ParitySamples
from kd_accel.errors import UserError
from kd_accel.models.card import ModelCard, load_card
from kd_accel.models.factory import build_model
from kd_accel.models.preprocess import Normalize
from kd_accel.models.weights import load_run_model, save_model
from tests.support.in_process import say
from tests.support.launching import ROOT

DIGITS = [str(digit) for digit in range(10)]
SMALL = "import:tests.support.models:student_with_everything"


def finished_run(directory, arch, *, size=32, **arch_args):
    """Write the files of a run on the digits, with statistics of BatchNorm that differ from their initial values."""
    directory.mkdir()
    card = ModelCard(arch, "imagenet", arch_args, DIGITS, [0.3, 0.4, 0.5], [0.3, 0.25, 0.2], size)
    network = build_model(arch, num_classes=10, arch_args=arch_args, seed=1).train()
    with torch.no_grad():
        network(torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0)))
    save_model(directory, network, card=card)
    (directory / "config.yaml").write_text(f"name: run\ndata: {{image_size: {size}}}\nmodel: {{arch: '{arch}'}}\n")
    return directory


def pixels(count, size=32):
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def run_onnx(path, images, batch_size):
    """Return the logits of ONNX Runtime, in batches."""
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"images": batch.numpy()})[0] for batch in images.split(batch_size)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "arch_args", "is_normalized"),
    [
        ("torchvision/resnet18", {}, True),
        ("torchvision/mobilenet_v3_small", {}, False),
        ("timm/vit_tiny_patch16_224", {"img_size": 32}, True),
    ],
    ids=["resnet18", "mobilenet_v3_small", "vit_tiny"],
)
def test_onnx_runtime_computes_the_logits_of_the_network(tmp_path, arch, arch_args, is_normalized):
    run = finished_run(tmp_path / "run", arch, **arch_args)
    said = say("export", run, "--format=onnx", *(["--normalize"] if is_normalized else []))
    assert "on 200 test samples, in batches of 1 and 7: largest difference of the logits" in said
    network, card = load_run_model(run)
    images, normalize = pixels(200), Normalize(card.mean, card.std)
    with torch.no_grad():
        expected = network(normalize(images)).numpy()
    given = images if is_normalized else normalize(images)
    logits = {size: run_onnx(run / "export/model.onnx", given, size) for size in (1, 7)}
    for computed in logits.values():
        assert computed.shape == (200, 10)
        assert np.abs(computed - expected).max() <= 1e-3 * np.ptp(expected)
        margin = np.sort(expected)[:, -1] - np.sort(expected)[:, -2]
        is_clear = margin > 2e-3 * np.ptp(expected)
        assert is_clear.sum() > 100 and (computed.argmax(1) == expected.argmax(1))[is_clear].all()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of a small network, with both files for uint8 images."""
    run = finished_run(tmp_path_factory.mktemp("small") / "run", SMALL)
    for file_format in ("onnx", "torch"):
        say("export", run, f"--format={file_format}", "--normalize")
    return run


TORCH_ALONE = f"""
import json, sys, torch
sys.modules.update(dict.fromkeys(["kd_accel", "tests", "onnx", "onnxruntime", "timm"]))
extra = {{"{METADATA_FILE}": ""}}
program = torch.export.load("model.pt2", extra_files=extra)
torch.save(program.module()(torch.load("images.pt")), "logits.pt")
print(json.dumps(json.loads(extra["{METADATA_FILE}"])))
"""


@pytest.mark.slow
def test_torch_alone_runs_the_file_of_torch_export(small, tmp_path):
    (tmp_path / "model.pt2").write_bytes((small / "export/model.pt2").read_bytes())
    torch.save(pixels(5), tmp_path / "images.pt")
    done = subprocess.run([sys.executable, "-c", TORCH_ALONE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    network, card = load_run_model(small)
    with torch.no_grad():
        expected = network(Normalize(card.mean, card.std)(pixels(5)))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)
    described = json.loads(done.stdout)
    assert json.loads(described["class_names"]) == DIGITS and json.loads(described["mean"]) == [0.3, 0.4, 0.5]


@pytest.mark.slow
def test_onnx_file_has_the_metadata_and_a_named_batch(small):
    model = importlib.import_module("onnx").load(small / "export/model.onnx")
    described = {entry.key: entry.value for entry in model.metadata_props}
    assert ModelCard(**json.loads(described["model.json"])) == load_card(small)
    assert (json.loads(described["std"]), described["image_size"]) == ([0.3, 0.25, 0.2], "32")
    assert described["input"] == "images [B, 3, 32, 32], uint8 RGB in 0..255"
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    batch, *shape = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch" and [each.dim_value for each in shape] == [3, 32, 32]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_no_path_of_this_machine_is_in_a_file(small, name):
    content = (small / "export" / name).read_bytes()
    places = [*map(str, list(small.parents)[:2]), str(ROOT), sys.prefix]
    assert len(content) > 1000 and [place for place in places if place.encode() in content] == []


def permute_classes(network):
    with torch.no_grad():
        for parameter in network.fc.parameters():
            parameter.copy_(parameter.flip(0))


def scale_weights(network):
    with torch.no_grad():
        network.fc.weight.mul_(1.01)


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(("file_format", "break_network"), [("onnx", scale_weights), ("torch", permute_classes)])
def test_a_broken_export_is_refused(small, tmp_path, monkeypatch, file_format, break_network):
    """The network that is traced has other weights than that of the run."""
    original = export.export_program

    def broken(module, image, *, arch):
        traced = copy.deepcopy(module)
        break_network(traced.network)
        return original(traced, image, arch=arch)

    monkeypatch.setattr(export, "export_program", broken)
    out, earlier = tmp_path / "out/model", b"earlier export" if file_format == "onnx" else None
    out.parent.mkdir()
    if earlier:
        out.write_bytes(earlier)
    said = say("export", small, f"--format={file_format}", "--normalize", f"--out={out}", code=2)
    assert f"{out} is not written, because it does not compute the network's logits: largest difference" in said
    assert "on 200 test samples" in said
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == ({out: earlier} if earlier else {})


class OfTwoImages(nn.Module):
    """Network with a fixed size of the batch."""

    def forward(self, images):
        return images.view(2, -1)[:, :10]


@pytest.mark.slow
def test_a_network_for_one_batch_size_cannot_be_exported(tmp_path):
    card = ModelCard("import:mine:net", "imagenet", {}, DIGITS, [0.5] * 3, [0.25] * 3, 8)
    samples = ParitySamples(pixels(3, 8), "random images")
    with pytest.raises(UserError, match="cannot trace import:mine:net for every size of the batch .*; remove operations"):
        export_file(OfTwoImages(), card, tmp_path / "model.pt2", file_format="torch", normalizes=False, samples=samples)
    assert list(tmp_path.iterdir()) == []
