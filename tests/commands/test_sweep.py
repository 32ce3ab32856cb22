"""`kd-accel sweep`: its grid and mistakes, and real sweeps that are stopped and resumed."""

import json
import signal
import time

import pytest
import yaml

from kd_accel.cli import _sweep_parser
from kd_accel.config.sweep import parse_sweep
from kd_accel.errors import UserError
from tests.support import forked_children
from tests.support.in_process import say
from tests.support.launching import ROOT, SMALL, environment, kill_all, run, summary

STUDENT = "configs/digits/hybrid_fixed.yaml"


def sweep_of(*argv):
    return parse_sweep([str(ROOT / STUDENT), *argv], parser=_sweep_parser())[0]


def names(sweep):
    return [trial.name for trial in sweep.trials]


def test_trials_are_the_grid_in_the_order_given():
    sweep = sweep_of(
        "--over", "distill.temperature=1,{start: 4, floor: 2, decay: 0.9}", "--over=distill.alpha=0.5,0.9", "--seeds", "0,5"
    )
    objectives = [trial.config.distill for trial in sweep.trials]
    assert [(each.temperature, each.alpha) for each in objectives[:2]] == [(1, 0.5), (1, 0.9)]
    assert objectives[2].temperature.decay == 0.9
    assert names(sweep)[:2] == ["temperature=1,alpha=0.5", "temperature=1,alpha=0.9"]
    assert all(name.replace(",", "").replace("=", "").replace("-", "").replace(".", "").isalnum() for name in names(sweep))
    assert len(set(names(sweep))) == 4 and sweep.notices == []
    runs = [run for _, run in sweep.runs()]
    assert [run.seed for run in runs] == [0] * 4 + [5] * 4
    assert str(runs[0].directory) == "runs/digits/hybrid_fixed-sweep/temperature=1,alpha=0.5-seed0"


def test_names_are_unique_and_safe():
    sweep = sweep_of(
        "--over=distill.features.mse.weight=0.1,0.2", "--over=distill.features.at.weight=1,2", "--over=model.arch=timm/a"
    )
    assert names(sweep)[0].startswith("mse.weight=0.1,at.weight=1,arch=timm-a-")
    long = sweep_of("--over", f"tracking.tags=[{'x' * 300}],[{'x' * 299}y]")
    assert len(set(names(long))) == 2 and all(len(name) < 60 for name in names(long))


def test_equal_numbers_have_equal_names():
    assert names(sweep_of("--over=distill.temperature=1.0,2.5")) == ["temperature=1", "temperature=2.5"]
    with pytest.raises(UserError, match=r"--over distill.temperature: 1 is listed twice"):
        sweep_of("--over=distill.temperature=1,1.0")


def test_the_best_config_is_named_after_its_own_trial():
    argv = ["--data.source=digits", "--over=model.arch=torchvision/resnet18,torchvision/resnet34"]
    sweep, _ = parse_sweep(argv, parser=_sweep_parser())
    assert [sweep.settings_of(trial)["name"] for trial in sweep.trials] == [
        "resnet18-digits-student-best",
        "resnet34-digits-student-best",
    ]


def test_a_feature_loss_with_dots_in_its_name_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_ACCEL_ALLOW_IMPORT", "1")
    name = "import:tests.losses.own_losses:Centered"
    (tmp_path / "own.yaml").write_text(f'distill: {{features: {{"{name}": {{weight: 0, layers: [layer1]}}}}}}')
    with pytest.raises(UserError, match=f"^distill.features.{name}.weight: 0, so that the term has no effect; remove it"):
        sweep_of(str(tmp_path / "own.yaml"), "--over=optim.lr=0.1,0.2")


def write_finished(sweep, trial, **changes):
    """Write the files by which a run of a sweep counts as finished, with other values of some settings."""
    run = sweep.run(sweep.trials[trial], 0)
    run.directory.mkdir(parents=True)
    (run.directory / "summary.json").write_text("{}")
    settings = {**run.model_dump(mode="json"), **changes}
    (run.directory / "config.yaml").write_text(yaml.safe_dump(settings))
    return run


def test_a_finished_run_with_other_settings_is_refused_before_anything_is_written(tmp_path):
    sweep = sweep_of("--over=optim.lr=0.1,0.2", f"--out={tmp_path / 'sweep'}")
    write_finished(sweep, 0)
    run = write_finished(sweep, 1, train={**sweep.trials[1].config.model_dump(mode="json")["train"], "epochs": 77})
    message = say("sweep", ROOT / STUDENT, "--over=optim.lr=0.1,0.2", f"--out={tmp_path / 'sweep'}", code=2)
    assert message.startswith(f"kd-accel: {run.directory / 'config.yaml'}: a finished run of the sweep has other settings: ")
    assert "train.epochs: 77 in the run, " in message and "give the sweep another --out" in message
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["lr=0.1-seed0", "lr=0.2-seed0"]


def test_seeds_are_a_number_or_a_list():
    of = {text: sweep_of("--over=optim.lr=0.1,0.2", f"--seeds={text}").seeds for text in ("3", "5,", "0,5,7")}
    assert of == {"3": [0, 1, 2], "5,": [5], "0,5,7": [0, 5, 7]}
    assert sweep_of("--over=optim.lr=0.1,0.2").seeds == [0]
    for text in ("0", "-1", "1,1", "x", "1.5"):
        with pytest.raises(UserError, match="--seeds: "):
            sweep_of("--over=optim.lr=0.1,0.2", f"--seeds={text}")


def test_all_mistakes_are_reported_at_once_with_their_trials():
    argv = ["--over=distill.temprature=1,2", "--over=optim.lr=0.1,0", "--over=seed=1", "--over=train.epochs=[", "--run_dir=x"]
    with pytest.raises(UserError) as raised:
        sweep_of(*argv, "--over=data.views=3,3", "--over=model.arch")
    text = str(raised.value)
    assert text.startswith("7 mistakes:")
    assert "--distill.temprature: no such setting; did you mean --distill.temperature?\n" in text
    assert "optim.lr: 0.0 must be above 0 (on the command line) (in trial temprature=1,lr=0" in text and " and 3 more)" in text
    assert "--over seed: is not a setting of the grid: the seeds are those of --seeds" in text
    assert "--over train.epochs: '[' is not a list of values" in text
    assert "--over data.views: 3 is listed twice" in text
    assert "--over model.arch: must have the form NAME=V1,V2,..." in text
    assert "--run_dir: cannot be set for a sweep" in text


def test_a_grid_has_at_most_a_thousand_trials():
    values = ",".join(map(str, range(1, 42)))
    with pytest.raises(UserError, match="--over: 1681 trials, but at most 1000"):
        sweep_of(f"--over=train.epochs={values}", f"--over=data.views={values}")


def test_a_setting_without_effect_in_a_trial_is_left_out_with_a_notice():
    sweep = sweep_of("--over=distill.alpha=0,0.5,1", "--over=distill.temperature=1,2")
    assert names(sweep) == ["alpha=0", *(f"alpha={alpha},temperature={value}" for alpha in ("0.5", "1") for value in (1, 2))]
    assert [trial.config.distill.temperature for trial in sweep.trials] == [4, 1, 2, 1, 2]
    assert [trial.config.train.label_smoothing for trial in sweep.trials] == [0.1, 0.1, 0.1, 0, 0]
    notice = "left out of trial alpha=0: distill.temperature: has no effect (with distill.alpha 0); leave it out"
    assert sweep.notices[0] == notice
    assert sweep.notices[1].startswith("left out of trial alpha=1,temperature=1 and 1 more: train.label_smoothing: 0.1 has no")
    assert sweep.notices[2:] == ["trial alpha=0: stands for 2 equal points of the grid"]


def test_a_weight_of_zero_removes_the_feature_loss():
    sweep = sweep_of("--over=distill.features.mse.weight=0,0.1", "--over", "distill.features.mse.args.pca_images=64,128")
    assert names(sweep) == ["weight=0", "weight=0.1,pca_images=64", "weight=0.1,pca_images=128"]
    assert [list(trial.config.distill.features) for trial in sweep.trials] == [[], ["mse"], ["mse"]]


def test_a_setting_without_effect_in_all_trials_is_refused():
    with pytest.raises(UserError, match=r"^distill: has no effect without a teacher"):
        sweep_of("--over=distill.temperature=1,2", "--teacher=null")
    with pytest.raises(UserError, match=r"^--over: the 2 trials are equal \(left out of trial plain: train.label_smoothing"):
        sweep_of("--over=train.label_smoothing=0,0.1", "--distill.alpha=1")


def test_a_notice_names_missing_validation_samples():
    sweep = sweep_of("--over=optim.lr=0.1,0.2", "--data.val_fraction=0")
    assert len(sweep.notices) == 1 and sweep.notices[0].startswith("data.val_fraction: 0")


def test_configs_of_all_trials_are_printed():
    printed = yaml.safe_load(say("sweep", ROOT / STUDENT, "--over=optim.lr=0.1,0.2", "--print_config"))
    assert {name: config["optim"]["lr"] for name, config in printed.items()} == {"lr=0.1": 0.1, "lr=0.2": 0.2}


def test_a_missing_launch_file_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "sweep"
    message = say("sweep", ROOT / STUDENT, "--over=optim.lr=0.1,0.2", f"--out={out}", "--launch=no.yaml", code=2)
    assert message.startswith("kd-accel: --launch: file 'no.yaml' not found") and not out.exists()


def digits_flags(directory):
    """Flags of eight steps on 64 digits, with the stored outputs of a teacher that is trained here."""
    small = ["--data.source=digits", "--data.limit_train=64", "--data.limit_test=32", "--train.epochs=2"]
    small = [*SMALL, *small, "--checkpoint.every_steps=1"]
    teacher = [f"--run_dir={directory / 'teacher'}", "--role=teacher", "--model.arch=import:tests.support.models:teacher"]
    run("train", *small, *teacher)
    cached = ["--teacher.outputs=cached", f"--teacher.cache.dir={directory / 'cache'}", "--data.views=2"]
    return [*small, *cached, f"--teacher.run={directory / 'teacher'}", "--teacher.min_accuracy=null"]


def wait_for_a_checkpoint(run_dir, process):
    deadline = time.monotonic() + 200
    while not any(run_dir.glob("checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_a_sweep_of_six_trials_and_two_seeds_is_killed_and_resumed(tmp_path):
    grid = ["--over=distill.temperature=1,2,4", "--over=distill.alpha=0.5,0.9", "--seeds=2", f"--out={tmp_path / 'sweep'}"]
    argv = ["sweep", *digits_flags(tmp_path), *grid]
    process = forked_children.start(argv, environment())
    interrupted = tmp_path / "sweep/temperature=1,alpha=0.9-seed1"
    wait_for_a_checkpoint(interrupted, process)
    kill_all(process)
    finished = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/summary.json")}
    assert 7 <= len(finished) < 12 and not (tmp_path / "sweep/best.yaml").exists()
    table = (tmp_path / "sweep/results.md").read_text()
    assert table.count("| 1 of 2 |") >= 4 and "Best" not in table

    assert forked_children.start(argv, environment()).wait(timeout=200) == 0
    summaries = {path.parent.name: path for path in (tmp_path / "sweep").glob("*/summary.json")}
    assert len(summaries) == 12 and {name: summaries[name].stat().st_mtime_ns for name in finished} == finished
    assert len({(path.parent / "model.safetensors").read_bytes() for path in summaries.values()}) == 12
    assert "| 1 of 2 |" not in (tmp_path / "sweep/results.md").read_text()
    results = json.loads((tmp_path / "sweep/results.json").read_text())
    best = max(results["trials"], key=lambda trial: trial["val_accuracy"]["mean"])
    assert results["best"] == best["name"] and [trial["n"] for trial in results["trials"]] == [2] * 6
    for trial in results["trials"]:
        accuracies = [summary(each["directory"])["accuracy"] for each in trial["runs"]]
        assert trial["test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)

    # The interrupted run and the best one have the bytes of trainings that were never interrupted.
    alone = {interrupted: tmp_path / "sweep/configs" / f"{interrupted.name}.yaml"}
    alone[tmp_path / "sweep" / f"{best['name']}-seed0"] = tmp_path / "sweep/best.yaml"
    for number, (directory, config) in enumerate(alone.items()):
        run("train", config, f"--run_dir={tmp_path / str(number)}")
        assert (tmp_path / str(number) / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_signal_stops_the_sweep_after_a_checkpoint(tmp_path):
    argv = ["sweep", *SMALL, "--over=optim.lr=0.05,0.02", f"--out={tmp_path / 'sweep'}", "--train.epochs=40"]
    process = forked_children.start([*argv, "--checkpoint.every_steps=1"], environment())
    first, second = (tmp_path / "sweep" / f"lr={lr}-seed0" for lr in ("0.05", "0.02"))
    wait_for_a_checkpoint(first, process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM and "== training of lr=0.05-seed0, 1 of 2" in stdout
    assert stderr == "kd-accel: stopped by SIGTERM; run the same command again to continue with the unfinished runs\n"
    assert any((first / "checkpoints").iterdir()) and not (first / "summary.json").exists() and not second.exists()
    # Other settings are refused by name, here in a process that is started as outside of tests.
    done = run(*argv, "--optim.momentum=0.5", code=2)
    assert "optim.momentum: 0.9 in the run, 0.5 now" in done.stderr
    assert "kd-accel: the training of lr=0.05-seed0, 1 of 2 exited with code 2; its messages are above" in done.stderr
