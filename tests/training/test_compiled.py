"""Trainings with `train.compile`: number of compilations, and gradients in several buckets."""

import pytest
import torch
from torch import nn

from tests.support import in_process, launching
from tests.support.launching import metrics

pytestmark = pytest.mark.slow

TEACHER, STUDENT = [(False, 16), (False, 32)], [(True, 16), (False, 32)]
"""Compilations for training batches of 16 images and evaluation batches of 32. Both networks are of one class."""


@pytest.fixture
def compiled(monkeypatch):
    """Record (network is in training mode, number of images) of each compilation; graphs run eagerly."""
    seen, compile_module = [], nn.Module.compile

    def compile_recorded(module, **options):
        def record(graph, inputs):
            (images,) = (each for each in inputs if each.dim() == 4 and not isinstance(each, nn.Parameter))
            seen.append((module.training, images.shape[0]))
            return graph.forward

        compile_module(module, backend=record, **options)

    monkeypatch.setattr(nn.Module, "compile", compile_recorded)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def test_a_smaller_last_batch_of_an_evaluation_compiles_nothing(tmp_path, distilled, compiled):
    """41 test samples are a batch of 32 and one of 9, and each is counted once. No graph is for any number of images."""
    flags = [*distilled, "--train.eval_batch_size=32", "--train.max_steps=8"]
    in_process.train(tmp_path / "eager", *flags)
    assert not compiled
    in_process.train(tmp_path / "compiled", *flags, "--train.compile=true")
    assert sorted(compiled) == sorted([*TEACHER, *STUDENT])
    for one, other in zip(metrics(tmp_path / "eager"), metrics(tmp_path / "compiled"), strict=True):
        assert one.keys() == other.keys()
        assert all(other[name] == pytest.approx(one[name], rel=1e-5) for name in one if name != "split")


@pytest.mark.parametrize(
    ("outputs", "expected"), [("cached", STUDENT), ("mixed", [TEACHER[0], *STUDENT])], ids=["cached", "mixed"]
)
def test_a_teacher_is_not_compiled_for_the_comparison_with_its_cache(tmp_path, distilled, compiled, outputs, expected):
    flags = [*distilled, "--train.max_steps=2", "--train.compile=true", f"--teacher.cache.dir={tmp_path / 'cache'}"]
    flags += [f"--teacher.outputs={outputs}", "--teacher.cache.batch_size=16", "--train.eval_batch_size=32", "--data.views=1"]
    in_process.cache("build", *flags)
    compiled.clear()
    torch._dynamo.reset()
    in_process.train(tmp_path / "run", *flags)
    assert sorted(compiled) == sorted(expected)


def test_several_buckets_of_gradients_compiled_in_two_processes(tmp_path, distilled):
    """The student's graph is divided at the buckets, so that their exchange begins before the backward pass ends."""
    flags = [*distilled, "--train.max_steps=4"]
    in_process.train(tmp_path / "eager", *flags)
    compiled = {"patch": "fills_buckets", "TORCH_LOGS": "ddp_graphs"}
    done = launching.train(tmp_path / "compiled", *flags, "--train.compile=true", processes=2, **compiled)
    assert "submod_1 graph" in done.stderr, done.stderr
    eager, compiled = (metrics(tmp_path / name, "train") for name in ("eager", "compiled"))
    assert len(eager) == len(compiled) == 4
    for one, two in zip(eager, compiled, strict=True):
        assert all(two[term] == pytest.approx(one[term], rel=1e-4) for term in ("features/mse", "kl", "ce", "loss"))
