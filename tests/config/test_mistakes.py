"""Mistakes that the real program finds in data, models and runs: exit code 2, one paragraph, nothing overwritten."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.support.image_files import colour, encoded, write_parquet
from tests.support.launching import check_message, run, summary, train


@pytest.fixture
def parquet(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    for split, count in (("train", 40), ("test", 8)):
        write_parquet(
            directory, split, [encoded(colour(sample)) for sample in range(count)], [sample % 4 for sample in range(count)]
        )
    return directory


def from_parquet(run_dir, directory, *flags):
    return train(run_dir, f"--data.source=parquet:{directory}", "--data.image_column=img", *flags, code=2)


def test_a_column_or_split_that_is_not_there(tmp_path, parquet):
    check_message(from_parquet(tmp_path / "run", parquet, "--data.label_column=fine"), "no column 'fine'", "img, label")
    check_message(from_parquet(tmp_path / "run", parquet, "--data.test_split=val"), "no split 'val'", "test, train")
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_decoded(tmp_path, parquet):
    images = [encoded(colour(sample)) for sample in range(40)]
    images[17] = images[17][:50]
    write_parquet(parquet, "train", images, [sample % 4 for sample in range(40)])
    check_message(from_parquet(tmp_path / "run", parquet), "sample 17 of the train split cannot be decoded")


def test_a_label_out_of_range(tmp_path, parquet):
    write_parquet(parquet, "test", [encoded(colour(sample)) for sample in range(4)], [0, 1, 9, 3])
    check_message(from_parquet(tmp_path / "run", parquet), "the label of sample 2 is 9, but classes are 0..3")


def test_wrong_settings_of_several_losses_are_told_together(tmp_path):
    """Before the teacher is read, which does not exist."""
    flags = ["--teacher.run=nowhere", "--distill.logits.args.t_square=true", "--distill.features.mse.args.direction=up"]
    message = train(tmp_path / "run", *flags, code=2)
    check_message(message, "distill.logits.args.t_square: no such setting; did you mean distill.logits.args.t_squared?")
    check_message(message, "distill.features.mse.args.direction: 'up'")


def test_a_layer_that_does_not_exist_or_is_no_map(tmp_path, teacher_run):
    flags = [f"--teacher.run={teacher_run}", "--distill.features.mse.args.pca_images=64"]
    done = train(tmp_path / "run", *flags, "--distill.features.mse.layers=[layer9]", code=2)
    check_message(done, "no module 'layer9'", "top level: layer1, layer2, dropout, fc")
    done = train(tmp_path / "run", *flags, "--distill.features.mse.layers=[fc]", code=2)
    check_message(done, "'fc' of SmallNet is not a feature map", "use one of layer1, layer2")


def test_too_few_images_for_the_pca(tmp_path, teacher_run):
    flags = [f"--teacher.run={teacher_run}", "--distill.features.mse={layers: [layer2], args: {pca_images: 2}}"]
    check_message(
        train(tmp_path / "run", *flags, code=2), "8 pixels at layer2 are too few", "16 principal directions", "raise pca_images"
    )


@pytest.mark.slow
def test_a_teacher_with_other_classes(tmp_path, teacher_run):
    check_message(
        run("train", f"--run_dir={tmp_path / 'run'}", f"--teacher.run={teacher_run}", code=2),
        "has 4 classes, the data has 10",
    )
    renamed = tmp_path / "renamed"
    shutil.copytree(teacher_run, renamed)
    card = renamed / "model.json"
    card.write_text(card.read_text().replace('"green"', '"lime"'))
    check_message(train(tmp_path / "run", f"--teacher.run={renamed}", code=2), "class 1 of", "'lime', but 'green' in the data")


@pytest.mark.slow
def test_a_teacher_that_is_missing_empty_or_damaged(tmp_path, teacher_run):
    check_message(train(tmp_path / "run", "--teacher.run=runs/nowhere", code=2), "no finished run")
    (tmp_path / "empty").mkdir()
    check_message(train(tmp_path / "run", f"--teacher.run={tmp_path / 'empty'}", code=2), "no finished run")
    damaged = tmp_path / "damaged"
    shutil.copytree(teacher_run, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    check_message(train(tmp_path / "run", f"--teacher.run={damaged}", code=2), "damaged")


def test_weights_of_another_architecture_or_in_a_pickle(tmp_path):
    save_file({"conv1.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    done = train(tmp_path / "run", f"--model.weights={tmp_path / 'other.safetensors'}", code=2)
    check_message(done, "does not fit import:tests.support.models:student")
    torch.save({}, tmp_path / "weights.pth")
    check_message(train(tmp_path / "run", f"--model.weights={tmp_path / 'weights.pth'}", code=2), "is a pickle")


@pytest.mark.slow
def test_a_run_directory_that_is_empty_damaged_or_a_file(tmp_path, teacher_run):
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


def test_a_precision_that_this_machine_has_not(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    check_message(train(tmp_path / "run", "--train.precision=fp16", code=2), "fp16 needs a GPU")
    check_message(train(tmp_path / "run", "--train.sync_batchnorm=true", code=2), "torch has it on GPUs only")
    check_message(run("bench", "torchvision/resnet18", "--device=cuda", code=2), "device: cuda not found")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "code"), [(1, 2), (2, None)])
def test_a_model_with_an_idle_layer(tmp_path, processes, code):
    flags = ["--model.arch=import:tests.support.models:with_an_idle_layer"]
    done = train(tmp_path / "run", *flags, processes=processes, code=code)
    told = "kd-accel: model.arch: no gradient reaches idle.weight, idle.bias; every trained parameter must take part"
    assert done.stderr.count(told) == 1
    if processes == 1:
        check_message(done, "requires_grad")


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--train.batch_size=4096", "train.batch_size: 4096 is more than the 128 training samples; lower it"),
        ("--checkpoint.stop_after_steps=24", "checkpoint.stop_after_steps: 24 has no effect, the training has 24 steps"),
    ],
)
def test_what_the_samples_cannot_be_trained_with_leaves_nothing_behind(tmp_path, flag, told):
    done = train(tmp_path / "run", flag, "--tracking.wandb=offline", code=2)
    check_message(done, told)
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_images_that_are_too_small_for_the_model(tmp_path):
    done = train(tmp_path / "run", "--model.arch=torchvision/alexnet", code=2)
    check_message(done, "data.image_size: AlexNet does not accept images of 32x32", "choose another size or arch")
    assert not (tmp_path / "run").exists()


def test_a_model_that_gives_no_logits(tmp_path):
    done = train(tmp_path / "run", "--model.arch=import:tests.support.models:without_a_classifier", code=2)
    check_message(done, "model.arch: Conv2d returns a tensor of shape (2, 4, 32, 32)", "logits of shape (2, 4)", "another arch")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "code", "batch_size"), [(1, 2, 1), (2, None, 2)])
def test_one_sample_for_batchnorm(tmp_path, processes, code, batch_size):
    flags = ["--model.arch=torchvision/resnet18", "--train.max_steps=1", f"--train.batch_size={batch_size}"]
    done = train(tmp_path / "run", *flags, processes=processes, code=code)
    told = f"train.batch_size: {batch_size} over {processes} processes x 1 accumulation steps is one sample in each forward"
    assert done.stderr.count(told) == 1
    assert f"use {2 * batch_size} or more" in done.stderr


def test_one_sample_without_batchnorm_is_enough(tmp_path):
    train(tmp_path / "run", "--train.max_steps=1", "--train.batch_size=2", "--train.grad_accum_steps=2")
    assert summary(tmp_path / "run")["steps"] == 1


def test_an_operator_without_a_deterministic_kernel(tmp_path):
    arch = "--model.arch=import:tests.support.models:undeterministic"
    done = train(tmp_path / "run", arch, "--train.deterministic=true", code=2)
    check_message(
        done, "train.deterministic: put_ of the model has no deterministic GPU kernel", "set train.deterministic to false"
    )
    train(tmp_path / "run", arch, "--train.max_steps=2")
