"""Mistakes in data, models and runs, in real processes: exit code 2, a message of one paragraph, nothing overwritten."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.support.image_files import color, encoded, write_parquet
from tests.support.launching import check_message, run, summary, train


@pytest.fixture
def parquet(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    for split, count in (("train", 40), ("test", 8)):
        write_parquet(
            directory, split, [encoded(color(sample)) for sample in range(count)], [sample % 4 for sample in range(count)]
        )
    return directory


def from_parquet(run_dir, directory, *flags):
    return train(run_dir, f"--data.source=parquet:{directory}", "--data.image_column=img", *flags, code=2)


def test_missing_column_or_split_is_refused(tmp_path, parquet):
    check_message(from_parquet(tmp_path / "run", parquet, "--data.label_column=fine"), "no column 'fine'", "img, label")
    check_message(from_parquet(tmp_path / "run", parquet, "--data.test_split=val"), "no split 'val'", "test, train")
    assert not (tmp_path / "run").exists()


def test_damaged_image_is_refused(tmp_path, parquet):
    images = [encoded(color(sample)) for sample in range(40)]
    images[17] = images[17][:50]
    write_parquet(parquet, "train", images, [sample % 4 for sample in range(40)])
    check_message(from_parquet(tmp_path / "run", parquet), "sample 17 of the train split cannot be decoded")


def test_label_out_of_range_is_refused(tmp_path, parquet):
    write_parquet(parquet, "test", [encoded(color(sample)) for sample in range(4)], [0, 1, 9, 3])
    check_message(from_parquet(tmp_path / "run", parquet), "the label of sample 2 of the test split is 9, but labels must be")


def test_wrong_settings_of_several_losses_are_reported_together(tmp_path):
    """They are reported before the teacher, which does not exist, is read."""
    flags = ["--teacher.run=nowhere", "--distill.logits.args.t_square=true", "--distill.features.mse.args.direction=up"]
    message = train(tmp_path / "run", *flags, code=2)
    check_message(message, "distill.logits.args.t_square: no such setting; did you mean distill.logits.args.t_squared?")
    check_message(message, "distill.features.mse.args.direction: 'up'")


def test_layer_that_is_missing_or_not_a_feature_map_is_refused(tmp_path, teacher_run):
    flags = [f"--teacher.run={teacher_run}", "--distill.features.mse.args.pca_images=64"]
    done = train(tmp_path / "run", *flags, "--distill.features.mse.layers=[layer9]", code=2)
    check_message(done, "no module 'layer9'", "top level: layer1, layer2, dropout, fc")
    done = train(tmp_path / "run", *flags, "--distill.features.mse.layers=[fc]", code=2)
    check_message(done, "'fc' of SmallNet is not a feature map", "use one of layer1, layer2")


def test_a_single_pixel_for_the_pca_is_refused(tmp_path, teacher_run):
    flags = [f"--teacher.run={teacher_run}", "--distill.features.mse={layers: [layer2], args: {pca_images: 1}}"]
    done = train(tmp_path / "run", *flags, "--data.image_size=16", "--teacher.image_size=16", code=2)
    check_message(done, "a PCA of layer2 needs two pixels or more, the images have 1", "pca_images")


def test_a_teacher_with_other_classes(tmp_path, teacher_run):
    check_message(
        run("train", f"--run_dir={tmp_path / 'run'}", f"--teacher.run={teacher_run}", code=2),
        "teacher.class_map: null, but the teacher has 4 classes, and the data 10, of which the teacher lacks 10 by name",
    )
    renamed = tmp_path / "renamed"
    shutil.copytree(teacher_run, renamed)
    card = renamed / "model.json"
    card.write_text(card.read_text().replace('"green"', '"lime"'))
    check_message(
        train(tmp_path / "run", f"--teacher.run={renamed}", code=2),
        "lacks 1 by name ('green'; it has 'red', 'lime', 'blue', 'olive'); use a teacher that was trained on these classes",
    )
    train(tmp_path / "run", f"--teacher.run={renamed}", "--teacher.class_map.green=lime", "--train.max_steps=1")


def test_missing_empty_or_damaged_teacher_is_refused(tmp_path, teacher_run):
    check_message(train(tmp_path / "run", "--teacher.run=runs/nowhere", code=2), "no finished run")
    (tmp_path / "empty").mkdir()
    check_message(train(tmp_path / "run", f"--teacher.run={tmp_path / 'empty'}", code=2), "no finished run")
    damaged = tmp_path / "damaged"
    shutil.copytree(teacher_run, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    check_message(train(tmp_path / "run", f"--teacher.run={damaged}", code=2), "damaged")


def test_weights_of_another_architecture_or_in_a_pickle_are_refused(tmp_path):
    save_file({"conv1.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    done = train(tmp_path / "run", f"--model.weights={tmp_path / 'other.safetensors'}", code=2)
    check_message(done, "does not fit import:tests.support.models:student")
    torch.save({}, tmp_path / "weights.pth")
    check_message(train(tmp_path / "run", f"--model.weights={tmp_path / 'weights.pth'}", code=2), "is a pickle")


def test_empty_or_damaged_run_directory_is_refused(tmp_path, teacher_run):
    (tmp_path / "empty").mkdir()
    check_message(run("evaluate", tmp_path / "empty", code=2), "no finished run")
    check_message(run("report", tmp_path / "empty", "--out", tmp_path / "report", code=2), "not a finished run")
    check_message(run("bench", tmp_path / "empty", code=2), "no finished run")
    check_message(run("bench", "runs/nowhere", code=2), "run directory 'runs/nowhere' not found")
    (tmp_path / "file").write_text("")
    check_message(train(tmp_path / "file", code=2), "is a file; name a directory")
    damaged = tmp_path / "damaged"
    shutil.copytree(teacher_run, damaged)
    shutil.rmtree(damaged / "checkpoints")
    (damaged / "model.safetensors").unlink()
    check_message(train(damaged, code=2), "neither all results nor an intact checkpoint")
    (damaged / "summary.json").write_text("{")
    check_message(run("report", damaged, "--out", tmp_path / "report", code=2), "damaged")


def test_settings_that_need_a_gpu_are_refused_on_a_cpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    check_message(train(tmp_path / "run", "--train.precision=fp16", code=2), "fp16 needs a GPU")
    check_message(train(tmp_path / "run", "--train.sync_batchnorm=true", code=2), "torch.nn.SyncBatchNorm requires a GPU")
    check_message(run("bench", "torchvision/resnet18", "--device=cuda", code=2), "device: cuda not found")


@pytest.mark.parametrize(("processes", "code"), [(1, 2), pytest.param(2, None, marks=pytest.mark.slow)])
def test_model_with_an_unused_layer_is_refused(tmp_path, processes, code):
    flags = ["--model.arch=import:tests.support.models:with_an_idle_layer"]
    done = train(tmp_path / "run", *flags, processes=processes, code=code)
    expected = "kd-accel: model.arch: no gradient reaches idle.weight, idle.bias; every trained parameter must take part"
    assert done.stderr.count(expected) == 1
    if processes == 1:
        check_message(done, "requires_grad")


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--train.batch_size=4096", "train.batch_size: 4096 is more than the 128 training samples; lower it"),
        (
            "--checkpoint.stop_after_steps=24",
            "checkpoint.stop_after_steps: 24 has no effect, because the training has 24 steps",
        ),
    ],
)
def test_refused_training_leaves_no_run_directory(tmp_path, flag, expected):
    done = train(tmp_path / "run", flag, "--tracking.wandb=offline", code=2)
    check_message(done, expected)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_images_too_small_for_the_model_are_refused(tmp_path):
    done = train(tmp_path / "run", "--model.arch=torchvision/alexnet", code=2)
    check_message(done, "data.image_size: AlexNet does not accept images of 32x32", "choose another size or arch")
    assert not (tmp_path / "run").exists()


def test_model_without_logits_is_refused(tmp_path):
    done = train(tmp_path / "run", "--model.arch=import:tests.support.models:without_a_classifier", code=2)
    check_message(done, "model.arch: Conv2d returns a tensor of shape (2, 4, 32, 32)", "logits of shape (2, 4)", "another arch")


@pytest.mark.parametrize(("processes", "code", "batch_size"), [(1, 2, 1), pytest.param(2, None, 2, marks=pytest.mark.slow)])
def test_one_sample_per_forward_with_batchnorm_is_refused(tmp_path, processes, code, batch_size):
    flags = ["--model.arch=torchvision/resnet18", "--train.max_steps=1", f"--train.batch_size={batch_size}"]
    done = train(tmp_path / "run", *flags, processes=processes, code=code)
    expected = f"train.batch_size: {batch_size} over {processes} processes x 1 accumulation steps is one sample in each forward"
    assert done.stderr.count(f"kd-accel: {expected}") == 1
    assert f"use {2 * batch_size} or more" in done.stderr


def test_one_sample_per_forward_without_batchnorm_is_accepted(tmp_path):
    train(tmp_path / "run", "--train.max_steps=1", "--train.batch_size=2", "--train.grad_accum_steps=2")
    assert summary(tmp_path / "run")["steps"] == 1


def test_operator_without_a_deterministic_kernel_is_refused(tmp_path):
    arch = "--model.arch=import:tests.support.models:undeterministic"
    done = train(tmp_path / "run", arch, "--train.deterministic=true", code=2)
    check_message(
        done, "train.deterministic: put_ of the model has no deterministic GPU kernel", "set train.deterministic to false"
    )
    train(tmp_path / "run", arch, "--train.max_steps=2")
