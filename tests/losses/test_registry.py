"""The registry of losses: names without torch, lookup, messages for invalid settings, and the table of losses."""

import subprocess
import sys
from pathlib import Path

import pytest

from kd_accel.config.help import descriptions
from kd_accel.errors import UserError
from kd_accel.losses.base import FeatureLoss, LogitLoss
from kd_accel.losses.features import MSE
from kd_accel.losses.logits import KL
from kd_accel.losses.registry import build_loss, find_losses, load_loss, losses_table, names
from tests.support.in_process import say
from tests.support.losses import BankLoss, PowerLoss

ROOT = Path(__file__).parents[2]
REGISTERED = [(kind, name) for kind in ("logits", "features") for name in names(kind)]
FIELD = "distill.features.mse"


def error_of(kind, name, args, *, field=FIELD):
    with pytest.raises(UserError) as caught:
        build_loss(kind, name, args, field=field)
    return str(caught.value)


def test_names_are_available_without_torch():
    code = (
        "import sys; from kd_accel.losses.registry import names\n"
        "print(names('logits'), names('features'))\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{names('logits')} {names('features')}"


def test_registered_names_match_the_classes():
    assert "kl" in names("logits") and "mse" in names("features")
    assert load_loss("logits", "kl") is KL and load_loss("features", "mse") is MSE
    assert all(load_loss(kind, name).name == name for kind, name in REGISTERED)
    assert all(issubclass(load_loss("logits", name), LogitLoss) for name in names("logits"))
    assert all(issubclass(load_loss("features", name), FeatureLoss) for name in names("features"))


def test_unknown_name_is_refused_with_a_suggestion():
    message = error_of("features", "mes", {})
    assert message.startswith(f"{FIELD}.loss: 'mes' is not the name of a loss between features; did you mean mse?")
    assert message.endswith(f"(known: {', '.join(names('features'))}, import:package.module:Class)")
    assert "kl" in error_of("logits", "mse", {}).partition("known: ")[2]


def test_user_class_is_imported():
    loss = build_loss("features", "import:tests.support.losses:BankLoss", {"samples": 9}, field="distill.features.own")
    assert type(loss) is BankLoss and loss.settings.samples == 9
    assert type(build_loss("logits", "import:tests.support.losses:PowerLoss", {}, field="distill.logits")) is PowerLoss


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("logits", "import:tests.support.losses:BankLoss", "must be a class derived from kd_accel.losses.LogitLoss"),
        ("features", "import:tests.support.losses:PowerLoss", "must be a class derived from kd_accel.losses.FeatureLoss"),
        ("features", "import:tests.support.models:student", "must be a class derived from kd_accel.losses.FeatureLoss"),
        ("features", "import:tests.support.losses:Missing", "has no function 'Missing'"),
        ("features", "import:tests.support.losses", "must have the form import:"),
    ],
)
def test_class_that_is_not_a_loss_of_the_kind_is_refused(kind, name, message):
    found = error_of(kind, name, {})
    assert found.startswith(f"{FIELD}.loss: ") and message in found


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"direction": "forward"}, [f"{FIELD}.args.direction: 'forward' is not valid: input should be 'student_to_teacher'"]),
        ({"directoin": "both"}, [f"{FIELD}.args.directoin: no such setting; did you mean {FIELD}.args.direction?"]),
        ({"xyz": 1}, [f"{FIELD}.args.xyz: no such setting; use one of direction, pca_images"]),
        ({"pca_images": 0}, [f"{FIELD}.args.pca_images: 0 is not valid: input should be greater than or equal to 1"]),
        ({"pca_images": "64"}, [f"{FIELD}.args.pca_images: '64' is not valid: input should be a valid integer"]),
        ({"pca_images": True}, [f"{FIELD}.args.pca_images: True is not valid"]),
        (
            {"pca_images": -1, "direction": 3, "xyz": 1},
            [f"{FIELD}.args.{name}: " for name in ("pca_images", "direction", "xyz")],
        ),
        (
            {"direction": "student_to_teacher", "pca_images": 64},
            [f"{FIELD}.args.pca_images: has no effect (no PCA is fitted with direction student_to_teacher); leave it out"],
        ),
    ],
)
def test_all_invalid_settings_are_reported_by_dotted_name(args, expected):
    message = error_of("features", "mse", args)
    assert all(part in message for part in expected)
    assert len(message.split("; distill.")) == len(expected)


def test_settings_of_another_loss_are_refused():
    field = "distill.logits"
    assert error_of("logits", "kl", {"direction": "both"}, field=field).startswith(
        "distill.logits.args.direction: no such setting"
    )
    assert error_of("logits", "kl", {"t_squared": 1}, field=field).startswith("distill.logits.args.t_squared: 1 is not valid")
    name = "import:kd_accel.losses.base:LogitLoss"
    assert error_of("logits", name, {"x": 1}, field=field) == f"{field}.args.x: no such setting; remove it: the loss has none"
    name = "import:tests.support.losses:BankLoss"
    assert error_of("features", name, {}) == f"{FIELD}.args.samples: missing, and without a default; set it"
    assert error_of("features", name, {"samples": 3, "momentum": 1.5}) == (
        f"{FIELD}.args.momentum: 1.5 is not valid: must be at least 0 and below 1"
    )


def test_settings_are_validated_from_python():
    with pytest.raises(ValueError, match="pca_images: has no effect"):
        MSE(direction="student_to_teacher", pca_images=64)
    with pytest.raises(ValueError, match="directoin"):
        MSE(directoin="both")
    assert MSE().settings.direction == "both" and MSE(pca_images=64).settings.pca_images == 64


@pytest.mark.parametrize(("kind", "name"), REGISTERED)
def test_every_loss_has_a_complete_description(kind, name):
    settings = load_loss(kind, name).Settings
    described = descriptions(settings)
    assert described.keys() == settings.model_fields.keys()
    assert all(len(text.split()) >= 3 for text in described.values())
    (loss,) = [loss for loss in find_losses(name) if loss.kind == kind]
    assert loss.formula and loss.paper and loss.summary.endswith(".")
    assert [(setting, text) for setting, _, text in loss.settings] == list(described.items())


def test_documentation_contains_the_table():
    assert f"\n{losses_table()}\n" in (ROOT / "docs/losses.md").read_text()


def test_table_has_a_row_for_each_loss():
    header, _, *rows = [line.replace(r"\|", "/").strip("| ").split(" | ") for line in losses_table().splitlines()]
    assert header == ["loss", "compares", "formula", "settings", "per sample", "mixed labels", "paper"]
    assert [(row[1], row[0].strip("`")) for row in rows] == REGISTERED
    assert all(len(row) == len(header) for row in rows)
    mse = next(row for row in rows if row[0] == "`mse`")
    assert mse[3:6] == ["`direction: both`, `pca_images: 2048`", "yes", "yes"]


def test_command_prints_the_table_or_one_loss():
    assert say("losses") == f"{losses_table()}\n"
    printed = say("losses", "mse")
    assert printed.startswith("mse (between features): Mean squared error")
    assert "pca_images  (default 2048) Number of training images, in view 0, on which the PCA is fitted." in printed
    own = say("losses", "import:tests.support.losses:BankLoss")
    assert "samples  (required)" in own and "computed over the micro-batch of one process" in own
    assert "losses: 'mes' is not the name of a loss; did you mean mse?" in say("losses", "mes", code=2)
    assert "must be a class derived from" in say("losses", "import:tests.support.models:student", code=2)
