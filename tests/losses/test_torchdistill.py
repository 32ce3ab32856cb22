"""Values and gradients of torchdistill's losses, in float64: equal to ours, or with a difference that is explained."""

import math

import pytest
import torch
from torch.nn import functional
from torchdistill.losses import mid_level

from kd_accel.losses import DIST, KL, at_loss, hcl_loss, pkt_loss, rkd_loss, sp_loss
from kd_accel.losses.attention import AttentionMap
from kd_accel.losses.crd import CRD

BATCH, CLASSES, CHANNELS, SIZE = 6, 5, 4, 8
PAIR = {"student": {"io": "output", "path": "s"}, "teacher": {"io": "output", "path": "t"}}
PATHS = {"student_output_path": "s", "teacher_output_path": "t"}
MODULES = {
    f"{whose}_module_{kind}": value
    for whose in ("student", "teacher")
    for kind, value in (("path", whose[0]), ("io", "output"))
}


def maps(*shape):
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def difference(ours, theirs, student):
    """Return the largest relative difference of two scalars that depend on `student`, and of their gradients."""
    own, other = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (ours, theirs))
    scale = other.abs().max()
    if scale < 1e-6:
        raise ValueError("the gradient is too small for a comparison")
    return max(((ours - theirs) / theirs).abs().item(), ((own - other).abs().max() / scale).item())


def outputs(student, teacher, io="output"):
    """Return the outputs in torchdistill's form."""
    return {"s": {io: student}}, {"t": {io: teacher}}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_the_sum_of_kdloss(temperature):
    """KDLoss adds the cross-entropy with weight alpha and the divergence with 1 - alpha, times T^2."""
    student, teacher = maps(BATCH, CLASSES)
    labels = torch.arange(BATCH) % CLASSES
    theirs = mid_level.KDLoss("s", "output", "t", "output", temperature=temperature, alpha=0.3, reduction="batchmean")
    total = theirs(*outputs(student, teacher), labels)
    own = KL()(student, teacher, temperature=temperature, labels=labels)
    assert difference(0.3 * functional.cross_entropy(student, labels) + 0.7 * own, total, student) < 1e-12


def test_standardized_kl_is_logitstdkdloss():
    student, teacher = maps(BATCH, CLASSES)
    theirs = mid_level.LogitStdKDLoss("s", "output", "t", "output", temperature=2.0, alpha=0.3, beta=0.7)
    labels = torch.arange(BATCH) % CLASSES
    own = KL(standardize=True)(student, teacher, temperature=2.0, labels=labels)
    total = theirs(*outputs(student, teacher), labels)
    assert difference(0.3 * functional.cross_entropy(student, labels) + 0.7 * own, total, student) < 1e-12


def test_dist_is_distloss():
    student, teacher = maps(BATCH, CLASSES)
    theirs = mid_level.DISTLoss("s", "output", "t", "output", beta=1.5, gamma=0.5, tau=3.0)
    own = DIST(beta=1.5, gamma=0.5)(student, teacher, temperature=3.0, labels=torch.zeros(BATCH, dtype=torch.int64))
    assert difference(own, theirs(*outputs(student, teacher)), student) < 1e-7  # an epsilon of 1e-8 in their correlation


def test_at_is_atloss_as_in_the_paper():
    student, teacher = maps(BATCH, CHANNELS, SIZE, SIZE)
    theirs = mid_level.ATLoss({"pair": PAIR}, mode="paper")
    assert difference(at_loss(student, AttentionMap()(teacher)), theirs(*outputs(student, teacher)), student) < 1e-12


def test_hcl_is_hierarchicalcontextloss():
    student, teacher = maps(BATCH, CHANNELS, SIZE, SIZE)
    theirs = mid_level.HierarchicalContextLoss("s", "output", "t", "output")
    first, second = outputs((student, None), teacher)
    assert difference(hcl_loss(student, teacher), theirs(first, second), student) < 1e-12


def test_rkd_is_rkdloss():
    """Their distances come from |x|^2 + |y|^2 - 2xy, which loses half of the digits."""
    student, teacher = maps(BATCH, CHANNELS, 1, 1)
    theirs = mid_level.RKDLoss(**PATHS, dist_factor=25.0, angle_factor=50.0, reduction="mean")
    assert difference(rkd_loss(student, teacher), theirs(*outputs(student, teacher)), student) < 1e-7


def test_sp_has_rows_of_euclidean_length_1():
    """So has the paper (section 3.1). SPKDLoss passes 1 as the norm of `normalize`: its rows have absolute sums of 1."""
    student, teacher = maps(BATCH, CHANNELS, SIZE, SIZE)
    products = [each.flatten(1) @ each.flatten(1).T for each in (student, teacher)]
    own, other = ([each / each.norm(p=p, dim=1, keepdim=True) for each in products] for p in (2, 1))
    assert difference(sp_loss(student, teacher), (own[0] - own[1]).pow(2).sum() / BATCH**2, student) < 1e-12
    theirs = mid_level.SPKDLoss(**PATHS, reduction="batchmean")
    assert difference((other[0] - other[1]).pow(2).sum() / BATCH**2, theirs(*outputs(student, teacher)), student) < 1e-12


def neighbors(embeddings, *, has_itself):
    directions = embeddings / embeddings.norm(dim=1, keepdim=True)
    similarities = (1 + directions @ directions.T) / 2
    similarities = similarities if has_itself else similarities.masked_fill(torch.eye(len(embeddings), dtype=torch.bool), 0)
    return similarities / similarities.sum(1, keepdim=True)


def divergence(student, teacher, *, has_itself):
    """Return the sum over all pairs of t log(t / s)."""
    probabilities = [neighbors(each.flatten(1), has_itself=has_itself) for each in (teacher, student)]
    others = ... if has_itself else ~torch.eye(len(student), dtype=torch.bool)
    target, own = (each[others] for each in probabilities)
    return (target * (target / own).log()).sum()


def test_pkt_leaves_out_the_sample_itself_and_is_a_mean_over_samples():
    """The paper's equation (4) has i != j. PKTLoss counts a sample as its own neighbor, and averages over all B^2 pairs."""
    student, teacher = maps(BATCH, CHANNELS, 1, 1)
    assert difference(pkt_loss(student, teacher), divergence(student, teacher, has_itself=False) / BATCH, student) < 1e-9
    theirs = mid_level.PKTLoss("s", "output", "t", "output", eps=1e-15)
    own = divergence(student, teacher, has_itself=True) / BATCH**2
    assert difference(own, theirs(*outputs(student.flatten(1), teacher.flatten(1))), student) < 1e-9
    ratio = (BATCH * theirs(*outputs(student.flatten(1), teacher.flatten(1))) / pkt_loss(student, teacher)).item()
    assert not math.isclose(ratio, 1, rel_tol=1e-3)


def test_crd_is_crdloss_for_the_same_negatives_and_banks():
    """Z is estimated in the first batch, and the second one meets the updated banks."""
    samples, negatives, components = 64, 16, 8
    torch.manual_seed(1)
    loss = CRD(feat_dim=components, nce_k=negatives)
    loss.set_samples(torch.arange(samples))
    loss.build({"x": (CHANNELS, 1, 1)}, {"x": (CHANNELS, 1, 1)}, seed=0)
    contrast = loss.double().contrasts["x"]
    theirs = mid_level.CRDLoss("s", "empty", "t", components, samples, negatives, samples, eps=0).double()
    theirs.memory_v1.copy_(contrast.memory[0])
    theirs.memory_v2.copy_(contrast.memory[1])
    student, teacher = maps(BATCH, CHANNELS, 1, 1)
    for step in range(2):
        rows = torch.randperm(samples)[:BATCH]
        drawn = torch.randint(0, samples, (BATCH, negatives))
        counts = torch.zeros(BATCH, samples).scatter_add_(1, drawn, torch.ones(BATCH, negatives))
        embedded = [
            functional.normalize(linear(each.flatten(1)), dim=1)
            for linear, each in ((contrast.embed_s, student), (contrast.embed_t, teacher))
        ]
        first, second = outputs(*embedded)
        first["empty"] = {"input": {"pos_idx": rows, "contrast_idx": torch.cat([rows[:, None], drawn], 1)}}
        expected = theirs(first, second).squeeze()
        own = contrast(student, teacher, rows, counts, lambda tensor: tensor)
        # Their Z and temperature pass through float32 buffers and Python numbers.
        assert difference(own, expected, student) < 1e-6
        torch.testing.assert_close(contrast.memory, torch.stack([theirs.memory_v1, theirs.memory_v2]), rtol=1e-9, atol=1e-12)
        assert step == 0 or contrast.log_z.isfinite().all()
