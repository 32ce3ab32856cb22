"""Model card for the Hub: metadata as the Hub reads them, figures of the summary, and no path of this machine."""

import pytest
import yaml
from huggingface_hub import ModelCard as HubCard

from kd_accel.builders.model_card import run_readme
from kd_accel.config.schema import RunConfig
from kd_accel.deploy.model_card import shown_source
from kd_accel.io.files import write_json
from kd_accel.models.card import ModelCard
from tests.support.models import SmallNet

TIMM = ModelCard("timm/resnet18", "imagenet", {}, ["a", "b", "c"], [0.5] * 3, [0.25] * 3, 48, crop_pct=0.9)
OWN = ModelCard("import:package.nets:small", "imagenet", {}, ["a", "b"], [0.5] * 3, [0.25] * 3, 32)
SUMMARY = {
    "accuracy": 0.81234,
    "teacher_accuracy": 0.9,
    "agreement": 0.85,
    "data": {"train_samples": 12345, "val_samples": 600, "test": {"samples": 1000}},
}


def page(tmp_path, card, source, summary=SUMMARY, **sections):
    if summary is not None:
        write_json(summary, tmp_path / "summary.json")
    config = RunConfig.model_validate({"name": "small", "data": {"source": source}, "model": {"arch": card.arch}, **sections})
    return run_readme(tmp_path, config, SmallNet(3, width=8), card)


def distilled(tmp_path, source="hub:uoft-cs/cifar10@main"):
    return page(
        tmp_path,
        TIMM,
        source,
        teacher={"arch": "torchvision/resnet50", "weights": "IMAGENET1K_V2"},
        distill={"temperature": 3.0, "alpha": 0.7, "features": {"mse": {"weight": 0.1, "layers": ["layer3"]}}},
    )


def test_metadata_of_the_hub(tmp_path):
    data = HubCard(distilled(tmp_path)).data
    assert data.library_name == "timm" and data.pipeline_tag == "image-classification" and data.datasets == ["uoft-cs/cifar10"]
    assert {"knowledge-distillation", "timm"} <= set(data.tags) and data.metrics == ["accuracy"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.8123, "test")
    assert (data.model_name, result.dataset_name) == ("small", "uoft-cs/cifar10")


def test_figures_and_settings(tmp_path):
    text = distilled(tmp_path)
    rows = dict(line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| "))
    assert rows["accuracy on the test samples"] == "81.23 %" and rows["agreement with the teacher"] == "85.00 %"
    assert rows["parameters"] == f"{sum(weight.numel() for weight in SmallNet(3, width=8).parameters()):,}"
    assert (rows["train samples"], rows["test samples"], rows["source"]) == ("12,345", "1,000", "hub:uoft-cs/cifar10@main")
    assert "Teacher: torchvision/resnet50 (IMAGENET1K_V2)." in text and "90 % of the shorter side" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["distill"]["temperature"] == 3.0 and settings["distill"]["features"]["mse"]["layers"] == ["layer3"]
    assert settings["train"]["epochs"] and settings["optim"]["lr"]


def shown_objective(tmp_path, **sections):
    text = page(tmp_path, OWN, "digits", **sections)
    return yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])


def test_the_objective_is_that_of_the_training(tmp_path):
    """Values of 0 and null differ from what is absent."""
    teacher = {"run": "teacher"}
    shown = shown_objective(tmp_path, teacher=teacher, distill={"alpha": 0.9, "label_weight": 0.0})["distill"]
    assert (shown["alpha"], shown["label_weight"], shown["logits"]["loss"]) == (0.9, 0.0, "kl") and "ensemble" not in shown
    distill = {"logits": None, "label_weight": 1.0, "features": {"mse": {"layers": ["layer3"]}}}
    shown = shown_objective(tmp_path, teacher=teacher, distill=distill)["distill"]
    assert shown["logits"] is None and list(shown) == ["label_weight", "logits", "features"]
    assert shown_objective(tmp_path, teacher=teacher, distill={"alpha": 0.0})["distill"]["alpha"] == 0.0
    teachers = {"a": {"run": "a", "weight": 2.0}, "b": {"run": "b"}}
    shown = shown_objective(tmp_path, teachers=teachers)
    assert shown["teachers"] == {"a": {"weight": 2.0}, "b": {"weight": 1.0}}


def test_no_path_is_in_the_card(tmp_path):
    secret = "/home/somebody/secret"
    teacher = {"run": f"{secret}/runs/teacher", "outputs": "cached", "cache": {"dir": f"{secret}/cache"}}
    text = page(tmp_path, OWN, f"imagefolder:{secret}/photos", teacher=teacher, run_dir=f"{secret}/run")
    assert "somebody" not in text and str(tmp_path) not in text
    assert "imagefolder:photos" in text and "a network whose outputs were stored" in text
    assert HubCard(text).data.library_name == "kd_accel" and HubCard(text).data.datasets is None


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("digits", "digits"),
        ("hub:uoft-cs/cifar10@main", "hub:uoft-cs/cifar10@main"),
        ("hub:/data/me/cifar10", "hub:cifar10"),
        ("parquet:/data/me/files/", "parquet:files"),
        ("csv:../lists/train.csv", "csv:train.csv"),
        ("import:package.data:images", "import:package.data:images"),
    ],
)
def test_shown_source(source, shown):
    assert shown_source(source) == shown


def test_a_run_without_summary_has_no_accuracy(tmp_path):
    text = page(tmp_path, OWN, "digits", summary=None)
    assert "accuracy" not in text and HubCard(text).data.eval_results is None
    assert "distill" not in text.split("## Training")[1]
