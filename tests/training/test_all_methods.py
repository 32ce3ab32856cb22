"""All registered losses in one launch of two processes with accumulation, against steps of one process, caches and resumes."""

import subprocess

import pytest
import torch
from safetensors.torch import load_file

from kd_accel.losses.registry import load_loss
from kd_accel.types import Batch, TeacherOutput
from tests.support.all_methods import (
    BATCH,
    LOSSES,
    MICRO_BATCH,
    OPTIM,
    STEPS,
    build_caches,
    build_distiller,
    cached,
    loader,
    weights_of,
)
from tests.support.launching import LAUNCH, ROOT, environment

pytestmark = pytest.mark.slow

WHOLE_BATCH = [range(BATCH)]
MICRO_BATCHES_OF_ONE_RANK = [range(start, start + MICRO_BATCH) for start in range(0, BATCH, MICRO_BATCH)]
MICRO_BATCHES_OF_ALL_RANKS = [
    [*one, *other] for one, other in zip(MICRO_BATCHES_OF_ONE_RANK[:2], MICRO_BATCHES_OF_ONE_RANK[2:], strict=True)
]
"""Positions in the batch of a step: the loader gives each rank a contiguous share, in contiguous micro-batches."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Train with all losses in two processes; return the directory of the caches, and the tensors of both ranks."""
    directory = tmp_path_factory.mktemp("all_methods")
    build_caches(directory)
    program = ["-m", "tests.support.all_methods", str(directory)]
    done = subprocess.run(
        [*LAUNCH, "--config_file", "launch/cpu2.yaml", *program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory, [load_file(directory / f"rank{rank}.safetensors") for rank in (0, 1)]


def found(launched, rank, *names):
    prefix = "|".join(names) + "|"
    return {key.removeprefix(prefix): value for key, value in launched[1][rank].items() if key.startswith(prefix)}


def cuts_of(kind, name):
    """Return the parts of a batch whose mean loss is that of the launch."""
    if name in ("crd", "mgd"):  # the same for any number of processes, but with a draw for each micro-batch
        return [MICRO_BATCHES_OF_ALL_RANKS]
    if load_loss(kind, name).per_sample:
        return [WHOLE_BATCH, MICRO_BATCHES_OF_ALL_RANKS]
    return [MICRO_BATCHES_OF_ONE_RANK]


def reference(directory, kind, name, cut):
    """Train in this process with torch alone, and the mean of the losses of the parts of each batch.

    Returns:
        The loss of each step, the weights before the first and after each step, and the last state.
    """
    distiller, source = build_distiller(kind, name).train(), cached(directory, kind, name)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=OPTIM.lr, momentum=OPTIM.momentum, nesterov=OPTIM.nesterov)
    losses, weights = [], [copied(distiller.named_parameters())]
    for _, (batch,) in zip(range(STEPS), loader().epoch(0), strict=False):
        target, values = source(batch), []
        for part in map(torch.tensor, map(list, cut)):
            own = Batch(batch.images[part], batch.labels[part], batch.index[part], batch.view)
            outputs = TeacherOutput(target.logits[part], {layer: maps[part] for layer, maps in target.features.items()})
            output = distiller(own.images, outputs, own.labels, weights_of(kind, name), index=own.index)
            (output.loss / len(cut)).backward()
            values.append(output.loss.item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(values) / len(values))
        weights.append(copied(distiller.named_parameters()))
    return losses, weights, copied(distiller.state_dict().items())


def copied(named):
    return {name: tensor.detach().clone() for name, tensor in named}


def largest_difference(launched, kind, name, expected):
    """Return the largest relative difference of losses and updates from a reference, over steps and parameters."""
    losses, weights = torch.tensor(expected[0], dtype=torch.float64), expected[1]
    ranks = [found(launched, rank, kind, name, "cached") for rank in (0, 1)]
    means = torch.stack([own["losses"].view(STEPS, -1).mean(1) for own in ranks]).mean(0)
    differences = [((means - losses) / losses).abs().max().item()]
    own = [weights[0], *({key: ranks[0][f"step{number}|{key}"] for key in weights[0]} for number in range(STEPS))]
    for number in range(STEPS):
        updates = {key: weights[number + 1][key] - weights[number][key] for key in weights[0]}
        largest = max(update.abs().max() for update in updates.values())
        for key, update in updates.items():
            difference = own[number + 1][key] - own[number][key] - update
            differences.append((difference.abs().max() / largest).item())
    return max(differences)


@pytest.mark.parametrize(("kind", "name"), LOSSES)
def test_two_processes_with_accumulation_train_what_one_does(launched, kind, name):
    """Gradients are the updates of SGD: in each step their relative difference is at most 1e-10."""
    for cut in cuts_of(kind, name):
        assert largest_difference(launched, kind, name, reference(launched[0], kind, name, cut)) < 1e-10
    if not load_loss(kind, name).per_sample:
        other = reference(launched[0], kind, name, WHOLE_BATCH)
        assert largest_difference(launched, kind, name, other) > 1e-4, "the cut of the batch must matter"


@pytest.mark.parametrize(("kind", "name"), LOSSES)
def test_both_ranks_have_the_same_weights_and_banks(launched, kind, name):
    zero, one = (found(launched, rank, kind, name, "cached") for rank in (0, 1))
    assert not torch.equal(zero.pop("losses"), one.pop("losses")), "the ranks trained with the same samples"
    statistics = ("running_mean", "running_var")  # of BatchNorm, which are those of a rank
    assert zero.keys() == one.keys()
    assert all(torch.equal(value, one[key]) for key, value in zero.items() if not key.endswith(statistics))


def test_banks_are_those_of_one_process(launched):
    expected = reference(launched[0], "features", "crd", MICRO_BATCHES_OF_ALL_RANKS)[2]
    state = found(launched, 1, "features", "crd", "cached", "state")
    assert state.keys() == expected.keys()
    banks = [key for key in state if key.endswith(("memory", "log_z", "drawn"))]
    assert len(banks) == 3
    for key in banks:
        torch.testing.assert_close(state[key], expected[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("way", ["live", "resumed"])
@pytest.mark.parametrize(("kind", "name"), LOSSES)
def test_losses_weights_and_banks_are_equal_bit_for_bit(launched, kind, name, way, rank):
    """A training from a cache equals that with the live teacher, and one that was stopped and resumed."""
    expected, other = (found(launched, rank, kind, name, each) for each in ("cached", way))
    assert len(expected) > STEPS and expected.keys() == other.keys()
    different = [key for key, value in expected.items() if not torch.equal(value, other[key])]
    # A checkpoint has the BatchNorm statistics of rank 0, which a training does not read.
    if way == "resumed" and rank == 1:
        different = [key for key in different if not key.endswith(("running_mean", "running_var"))]
    assert not different
