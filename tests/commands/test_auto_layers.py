"""`layers: auto` in the commands: equal to the pairs that it stands for, in caches, runs and resumed runs."""

import pytest
import yaml

from tests.support.in_process import cache, say, train
from tests.support.launching import SMALL, losses

PAIRS = {"layer1": "layer1", "layer2": "layer2"}
VIT = "{img_size: 32, patch_size: 4, embed_dim: 24, depth: 4}"


def feature(layers):
    return f"--distill.features.mse={{layers: {layers}, args: {{direction: both, pca_images: 64}}}}"


def layers_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())["distill"]["features"]["mse"]["layers"]


def files(directory):
    """Return the contents of a cache without the time and place of its build."""
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*.safetensors"))}


@pytest.mark.slow
def test_a_run_stores_the_pairs_and_is_that_of_the_explicit_pairs(tmp_path, teacher_run):
    flags = [f"--teacher.run={teacher_run}", "--train.max_steps=3"]
    text = train(tmp_path / "auto", *flags, feature("auto"))
    assert "\nlayers      mse: {layer1: layer1, layer2: layer2}\n" in text
    assert layers_of(tmp_path / "auto") == PAIRS
    train(tmp_path / "explicit", *flags, feature(PAIRS))
    assert losses(tmp_path / "auto") == losses(tmp_path / "explicit")
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("auto", "explicit")]
    assert models[0] == models[1]
    assert "finished already" in train(tmp_path / "auto", *flags, feature(PAIRS))
    assert "finished already" in train(tmp_path / "explicit", *flags, feature("auto"))


def test_a_paused_run_resumes_with_auto_or_with_its_pairs(tmp_path, teacher_run):
    flags = [f"--teacher.run={teacher_run}", "--train.max_steps=3"]
    train(tmp_path / "run", *flags, feature("auto"), "--checkpoint.stop_after_steps=1")
    train(tmp_path / "run", *flags, feature(PAIRS), "--checkpoint.stop_after_steps=2")
    assert "resumed after step 2 of 3" in train(tmp_path / "run", *flags, feature("auto"))
    other = train(tmp_path / "run", *flags, feature("{layer1: layer2}"), code=2)
    assert "distill.features.mse.layers" in other


@pytest.mark.slow
def test_a_cache_built_with_auto_is_that_of_the_explicit_pairs(tmp_path):
    """A teacher of tokens, whose maps are stored like any others."""
    train(tmp_path / "vit", "--model.arch=timm/vit_tiny_patch16_224", f"--model.arch_args={VIT}", "--train.max_steps=2")
    pairs = {"layer1": "blocks.1", "layer2": "blocks.3"}
    stored = {}
    for name, layers in (("auto", "auto"), ("explicit", pairs)):
        directory = tmp_path / f"cache_{name}"
        teacher = f"{{run: {tmp_path}/vit, outputs: cached, min_accuracy: null, cache: {{dir: {directory}}}}}"
        stored[name] = [f"--teacher={teacher}", "--data.views=1", "--train.epochs=1", "--train.max_steps=2"]
        cache("build", *stored[name], feature(layers))
    assert files(tmp_path / "cache_auto") == files(tmp_path / "cache_explicit")
    specs = [(tmp_path / f"cache_{name}/spec.json").read_bytes() for name in stored]
    assert specs[0] == specs[1]
    say("cache", "verify", *SMALL, *stored["explicit"], feature("auto"))
    train(tmp_path / "student", *stored["explicit"], feature("auto"))
    assert layers_of(tmp_path / "student") == pairs
    live = [stored["explicit"][0].replace("cached", "live"), *stored["explicit"][1:]]
    train(tmp_path / "live", *live, feature("auto"))
    assert losses(tmp_path / "student") == pytest.approx(losses(tmp_path / "live"), rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher.run=nowhere"], "teacher.run: no finished run in nowhere"),
        (["--model.arch=torchvision/resnet81"], "model.arch: .*did you mean torchvision/resnet18"),
        (["--model.arch=torchvision/alexnet"], "data.image_size: AlexNet does not accept images of 32x32 pixels"),
    ],
)
def test_networks_that_cannot_be_compared_are_refused(tmp_path, teacher_run, flags, message):
    text = train(tmp_path / "run", f"--teacher.run={teacher_run}", feature("auto"), *flags, code=2)
    assert all(part in text for part in message.split(".*"))


@pytest.mark.slow
def test_a_plan_chooses_the_layers(teacher_run):
    text = say("plan", *SMALL, f"--teacher.run={teacher_run}", feature("auto"))
    assert "cached" in text
