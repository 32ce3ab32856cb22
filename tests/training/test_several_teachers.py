"""Several teachers through all commands: each live, cached or mixed, with its own files, and their mean."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from kd_accel import api
from kd_accel.builders.ensemble import held_out_ensemble
from kd_accel.training import step
from kd_accel.types import TeacherOutput
from tests.support.caches import files_of
from tests.support.in_process import cache, say, train
from tests.support.launching import SMALL, metrics, run, summary
from tests.support.launching import train as launched_train
from tests.support.parsing import parse

ONE, TWO, FEATURE = (torch.full((2, 3), float(number)) for number in (1, 2, 3))
SECOND = torch.tensor([[3.0, 0.0, 1.0], [0.0, -2.0, 1.0]])
CPU_ACCELERATOR = SimpleNamespace(autocast=contextlib.nullcontext)
SCHEDULES = [
    "--distill.temperature={start: 4.0, floor: 2.0, decay: 0.9}",
    "--distill.alpha=0.8",
    "--data.views=2",
]


@pytest.fixture(scope="module")
def second_run(tmp_path_factory):
    """A finished run of another, weaker teacher, with another architecture."""
    run_dir = tmp_path_factory.mktemp("runs") / "second"
    train(run_dir, "--role=teacher", "--model.arch=import:tests.support.models:student_with_everything", "--train.max_steps=4")
    return run_dir


def flags(first, second, *more, **outputs):
    """Flags of a distillation from teachers a and b. outputs: source of the outputs of each, live by default."""
    return [f"--teachers.a.run={first}", f"--teachers.b.run={second}", *SCHEDULES, *more] + [
        f"--teachers.{name}.outputs={source}" for name, source in outputs.items()
    ]


FEATURES = [
    "--distill.features.mse={teacher: a, weight: 0.1, layers: [layer1], args: {direction: both, pca_images: 64}}",
    "--distill.features.second={loss: mse, teacher: b, weight: 0.1, layers: {layer1: layer2}, args: {pca_images: 64}}",
]


def weights(run_dir):
    return (run_dir / "model.safetensors").read_bytes()


def test_schedules_that_leave_a_step_without_a_teacher_are_refused(tmp_path, teacher_run, second_run):
    falling = "--teachers.a.weight={start: 1, kind: linear, end: 0, unit: step, length: 3}"
    rising = "--teachers.b.weight={start: 0, kind: linear, end: 1}"
    argv = [*flags(teacher_run, second_run), falling, rising, "--train.epochs=2"]
    text = train(tmp_path / "run", *argv, code=2)
    assert "teachers: the weights of all of them are 0 at step 4 of " in text and not (tmp_path / "run/metrics.jsonl").exists()


def test_a_teacher_twice_is_that_teacher(tmp_path, teacher_run):
    """The mean of equal logits is exact at weights that are powers of two, up to the rounding of log and exp."""
    one = [f"--teacher.run={teacher_run}", *SCHEDULES]
    train(tmp_path / "one", *one)
    for mean in ("probabilities", "logits"):
        twice = flags(teacher_run, teacher_run, f"--distill.ensemble.mean={mean}")
        train(tmp_path / mean, *twice)
        for alone, together in zip(metrics(tmp_path / "one", "train"), metrics(tmp_path / mean, "train"), strict=True):
            assert [together.pop(f"teachers/{name}/weight") for name in "ab"] == [1.0, 1.0]
            assert (together.pop("split"), alone["split"]) == ("train", "train")
            assert together == pytest.approx({name: alone[name] for name in together}, rel=1e-3)
    assert weights(tmp_path / "logits") == weights(tmp_path / "one")


def test_a_weight_of_zero_leaves_the_other_teacher(tmp_path, teacher_run, second_run):
    train(tmp_path / "one", f"--teacher.run={teacher_run}", *SCHEDULES, "--train.max_steps=9")
    both = flags(teacher_run, second_run, "--distill.ensemble.mean=logits", "--train.max_steps=9")
    train(tmp_path / "both", *both, "--teachers.b.weight={start: 0.0, kind: linear, end: 1.0, length: 2}")
    losses = [[line["kl"] for line in metrics(tmp_path / name, "train")] for name in ("one", "both")]
    assert losses[0][:8] == losses[1][:8]  # the first epoch, in which b has no weight
    assert losses[0][8] != losses[1][8]
    assert [line["teachers/b/weight"] for line in metrics(tmp_path / "both", "train")] == [0.0] * 8 + [0.5]


@pytest.fixture
def cached(tmp_path, teacher_run, second_run):
    """Flags of a hybrid distillation from two caches."""
    dirs = [f"--teachers.{name}.cache.dir={tmp_path / 'caches' / name}" for name in "ab"]
    own = [f"--teachers.{name}.cache.dtype=float32" for name in "ab"]
    return flags(teacher_run, second_run, *FEATURES, *dirs, *own, a="cached", b="cached")


def live(arguments):
    return [flag for flag in arguments if ".cache." not in flag and ".outputs=" not in flag]


@pytest.mark.slow
def test_cached_teachers_are_equal_to_live_ones(tmp_path, cached):
    text = cache("build", *cached)
    assert f"cache       {tmp_path / 'caches/a'}" in text and f"cache       {tmp_path / 'caches/b'}" in text
    files = files_of(tmp_path / "caches/a") | files_of(tmp_path / "caches/b")
    assert "every byte matches" in cache("verify", *cached)
    assert sorted(json.loads(cache("verify", "--json", *cached))) == ["a", "b"]
    assert sorted(json.loads(cache("info", "--json", *cached))) == ["a", "b"]
    train(tmp_path / "cached", *cached)
    train(tmp_path / "live", *live(cached))
    assert weights(tmp_path / "cached") == weights(tmp_path / "live")
    assert metrics(tmp_path / "cached") == metrics(tmp_path / "live")
    one_live = [*live(cached), *(flag for flag in cached if flag.startswith(("--teachers.b.cache", "--teachers.b.outputs")))]
    train(tmp_path / "one_live", *one_live)
    assert weights(tmp_path / "one_live") == weights(tmp_path / "live")
    assert files == files_of(tmp_path / "caches/a") | files_of(tmp_path / "caches/b")
    mixed = [flag.replace("a.outputs=cached", "a.outputs=mixed") for flag in cached]
    train(tmp_path / "mixed", *mixed)
    assert weights(tmp_path / "mixed") == weights(tmp_path / "live")


def test_a_cache_of_another_teacher_is_refused_by_its_name(tmp_path, cached):
    cache("build", *cached)
    swap = {f"--teachers.{name}.cache.dir={tmp_path / 'caches' / name}": name for name in "ab"}
    swapped = [f"{flag[:-1]}{'ba'[flag[-1] == 'b']}" if flag in swap else flag for flag in cached]
    text = train(tmp_path / "swapped", *swapped, code=2)
    assert f"teachers.a.cache.dir: the cache in {tmp_path / 'caches/b'} does not match" in text
    shutil.rmtree(tmp_path / "caches/b")
    missing = train(tmp_path / "missing", *cached, code=2)
    assert "teachers.b.cache.dir" in missing and "teachers.a.cache.dir" not in missing


@pytest.mark.slow
def test_a_resumed_training_is_exact_and_refuses_other_teachers(tmp_path, cached, teacher_run, second_run):
    """Live teachers restore their PCA from the checkpoint."""
    cache("build", *cached)
    one_live = [flag for flag in cached if not flag.startswith(("--teachers.a.cache.", "--teachers.a.outputs="))]
    for name, arguments in (("cached", cached), ("one_live", one_live)):
        train(tmp_path / f"{name}-straight", *arguments, "--distill.ensemble.confidence=true")
        stopped = [*arguments, "--distill.ensemble.confidence=true", "--checkpoint.every_steps=5"]
        train(tmp_path / name, *stopped, "--checkpoint.stop_after_steps=11")
        train(tmp_path / name, *stopped)
        assert weights(tmp_path / name) == weights(tmp_path / f"{name}-straight")
    assert weights(tmp_path / "cached") == weights(tmp_path / "one_live")


@pytest.mark.slow
def test_a_resumed_training_refuses_other_teachers(tmp_path, teacher_run, second_run):
    both = flags(teacher_run, second_run)
    train(tmp_path / "run", *both, "--checkpoint.stop_after_steps=11")
    for changes, message in (
        ([f"--teachers.b.run={teacher_run}"], "was trained with the teacher"),
        (["--teachers.b.weight=2.0"], "teachers.b.weight: 1.0 in the run, 2.0 now"),
        (["--distill.ensemble.mean=logits"], "distill.ensemble.mean: 'probabilities' in the run, 'logits' now"),
        ([f"--teachers.c.run={second_run}"], "teachers.c.weight: None in the run, 1.0 now"),
    ):
        assert message in train(tmp_path / "run", *both, *changes, code=2)
    shutil.copytree(second_run, tmp_path / "moved")
    train(tmp_path / "run", *both, f"--teachers.b.run={tmp_path / 'moved'}")
    train(tmp_path / "straight", *both)
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


def test_the_start_shows_the_teachers_and_the_accuracy_of_their_mean(tmp_path, teacher_run, second_run):
    text = train(tmp_path / "run", *flags(teacher_run, second_run), "--teachers.b.weight=3.0")
    (line,) = [line for line in text.splitlines() if line.startswith("teacher ")]
    for name, own in (("a", teacher_run), ("b", second_run)):
        assert f"{name}: {own}, live, accuracy {100 * summary(own)['accuracy']:.2f} % on the test samples" in line
    assert f"; their mean: accuracy {100 * summary(tmp_path / 'run')['teacher_accuracy']:.2f} %" in line
    result = api.evaluate(tmp_path / "run", split="test")
    assert result["agreement"] == summary(tmp_path / "run")["agreement"]


@pytest.mark.slow
def test_an_evaluation_may_have_other_teachers(tmp_path, cached, teacher_run, second_run):
    """The losses of the run, which belong to its own teachers, have no part in it."""
    train(tmp_path / "run", *live(cached), "--distill.ensemble.mean=logits")

    def agreement(*flags):
        return json.loads(say("evaluate", tmp_path / "run", *flags).splitlines()[-1]).get("agreement")

    assert agreement() == summary(tmp_path / "run")["agreement"]
    assert agreement("--teachers=null") is None
    alone = agreement("--teachers=null", f"--teacher.run={teacher_run}")
    assert agreement("--teachers.b.weight=0.000001") == pytest.approx(alone, abs=0.05)
    weak = agreement("--teachers=null", f"--teacher.run={second_run}")
    assert agreement(f"--teachers.a.run={second_run}") == pytest.approx(weak, abs=0.05) and weak != alone
    train(tmp_path / "one", f"--teacher.run={teacher_run}", *SCHEDULES, FEATURES[0].replace("teacher: a, ", ""))
    both = [f"--teachers.{name}.run={run_dir}" for name, run_dir in (("a", teacher_run), ("b", second_run))]
    text = say("evaluate", tmp_path / "one", "--teacher=null", *both)
    assert 0 <= json.loads(text.splitlines()[-1])["agreement"] <= 1


def test_held_out_outputs_have_the_weights_of_the_config_and_no_confidence():
    weights = [1.0, "{kind: linear, start: 3.0, end: 0.0}"]
    own = [f"--teachers.{name}.weight={weight}" for name, weight in zip("ab", weights, strict=True)]
    config = parse(*flags("x", "y", *own, "--distill.ensemble.confidence=true"))
    sources = {name: lambda batch, logits=logits: TeacherOutput(logits) for name, logits in (("a", ONE), ("b", SECOND))}
    output = held_out_ensemble(config, sources)(None)
    assert output.members == {"a": ONE, "b": SECOND}
    expected = (ONE.softmax(1) + 3 * SECOND.softmax(1)) / 4
    torch.testing.assert_close(output.logits.softmax(1), expected)


def test_a_source_of_a_user_may_have_several_teachers():
    fetched = step._Fetched(lambda batch: TeacherOutput(None, {"a/x": FEATURE}, {"a": ONE, "b": TWO}), CPU_ACCELERATOR)
    output = fetched.finish(None, fetched.fetch(None))
    assert output.logits is None and output.features == {"a/x": FEATURE} and output.members == {"a": ONE, "b": TWO}


def test_a_teacher_that_is_not_better_than_chance_is_refused(tmp_path, teacher_run, second_run):
    text = train(tmp_path / "run", *flags(teacher_run, second_run), "--teachers.b.min_accuracy=0.999", code=2)
    assert "teachers.b.min_accuracy" in text


@pytest.mark.slow
@pytest.mark.proof
def test_two_processes_train_from_two_caches(tmp_path, cached):
    run("cache", "build", *SMALL, *cached, processes=2)
    files = files_of(tmp_path / "caches/a") | files_of(tmp_path / "caches/b")
    launched_train(tmp_path / "two", *cached, "--distill.ensemble.confidence=true", processes=2)
    train(tmp_path / "one", *cached, "--distill.ensemble.confidence=true", "--train.grad_accum_steps=2")
    shutil.rmtree(tmp_path / "caches")
    cache("build", *cached)
    assert {path: data for path, (_, data) in files.items()} == {
        path: data for path, (_, data) in (files_of(tmp_path / "caches/a") | files_of(tmp_path / "caches/b")).items()
    }
    for two, one in zip(metrics(tmp_path / "two", "train"), metrics(tmp_path / "one", "train"), strict=True):
        assert two["kl"] == pytest.approx(one["kl"], rel=2e-2)
