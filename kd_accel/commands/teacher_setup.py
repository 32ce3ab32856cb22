"""Source of the teacher's signals for a run: the live network, its cache, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from kd_accel.cache.compatibility import OpenCache, open_cache
from kd_accel.cache.manifest import read_projectors
from kd_accel.cache.spec import Split
from kd_accel.commands.cache_request import cache_request, refuse_other_outputs, used_views
from kd_accel.commands.teacher import (
    FrozenProjectors,
    LayerPairs,
    TeacherNetwork,
    fit_projectors,
    live_teacher,
    load_teacher,
    pair_layers,
    projectors_from,
    ready_teacher,
)
from kd_accel.config.schema import FeatureConfig, RunConfig
from kd_accel.data.datamodule import Data
from kd_accel.distributed import Accelerator
from kd_accel.models.projectors import FeatureProjector, Projectors
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.training.checkpoint import Checkpoint
from kd_accel.types import Batch, TeacherOutput, TeacherSource


@dataclass(frozen=True)
class TeacherSetup:
    """A teacher ready to answer.

    signals: for training batches. held_out: for those of a held-out split. digest: of the teacher. cache: digest of what is
    read from a cache, None without one. live: the network, where one answers. projectors: of the direction.
    frozen: its fitted PCA projectors by the teacher's layer, kept in every checkpoint; a cache keeps its own. explained: the
    share of the variance that each keeps.
    """

    source: TeacherSource
    held_out: Callable[[Split], TeacherSource]
    digest: str
    projectors: Projectors
    cache: str | None = None
    live: LiveTeacher | None = None
    frozen: dict[str, FeatureProjector] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def check_unchanged(self) -> None:
        """Our own invariant: a training must not have touched the teacher."""
        if self.live is not None:
            self.live.check_unchanged()

    def close(self) -> None:
        if self.live is not None:
            self.live.close()


def build_teacher_setup(
    config: RunConfig, data: Data, network: nn.Module, *, accelerator: Accelerator, checkpoint: Checkpoint | None
) -> TeacherSetup:
    """Load the teacher, pair its layers with the student's, and let it, its cache or both of them answer."""
    assert config.teacher is not None
    teacher = load_teacher(config.teacher, data)
    pairs = pair_layers(config, network, teacher.model)
    feature = config.distill.feature if config.distill else None
    notices = _warn_of_rectified_layers(feature, pairs.projectors) if feature else []
    cache = None
    if config.teacher.outputs != "live":
        cache = _open_cache(config, data, teacher, pairs, accelerator)
    if config.teacher.outputs == "cached":
        assert cache is not None
        return _from_cache(config, data, teacher, pairs, cache, notices, accelerator)
    return _from_network(config, data, teacher, pairs, cache, notices, accelerator, checkpoint)


def _open_cache(
    config: RunConfig, data: Data, teacher: TeacherNetwork, pairs: LayerPairs, accelerator: Accelerator
) -> OpenCache:
    assert config.teacher is not None and config.teacher.cache_dir is not None, "checked by checks.problems"
    request = cache_request(config, data, teacher, pairs, accelerator.device, views=used_views(config))
    return open_cache(Path(config.teacher.cache_dir), request)


def _from_cache(  # noqa: PLR0913  (what build_teaching has put together)
    config: RunConfig,
    data: Data,
    teacher: TeacherNetwork,
    pairs: LayerPairs,
    cache: OpenCache,
    notices: list[str],
    accelerator: Accelerator,
) -> TeacherSetup:
    """The network answers for a few samples, to be compared with the cache, and is then let go."""
    digest, device = teacher.digest, accelerator.device
    model, normalize = ready_teacher(config, teacher, accelerator, layers=cache.layers)
    frozen = FrozenProjectors(projectors_from(read_projectors(cache.directory, cache.cache_spec))).to(device)
    projectors = frozen.by_student_layer(cache.layers)
    live = live_teacher(config, model, normalize, accelerator, layers=cache.layers, projectors=projectors)
    try:
        refuse_other_outputs(cache, live, config, data, rank=accelerator.process_index, device=device)
    finally:
        live.close()
        model.cpu()
    specs = {layer: cache.cache_spec.tensors[name] for layer, name in cache.layers.items()}
    return TeacherSetup(
        source=cache.source("train"),
        held_out=cache.source,
        digest=digest,
        projectors=pairs.projectors,
        cache=cache.digest,
        explained={layer: spec.explained for layer, spec in specs.items() if spec.explained is not None},
        notices=notices,
    )


def _from_network(  # noqa: PLR0913  (what build_teaching has put together)
    config: RunConfig,
    data: Data,
    teacher: TeacherNetwork,
    pairs: LayerPairs,
    cache: OpenCache | None,
    notices: list[str],
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
) -> TeacherSetup:
    """The network answers; where there is a cache of its logits, only for the features."""
    digest = teacher.digest
    model, normalize = ready_teacher(config, teacher, accelerator, layers=pairs.teacher)
    if checkpoint is not None:
        frozen = FrozenProjectors(_saved_projectors(checkpoint), checkpoint.state["pca_explained"])
    else:
        frozen = fit_projectors(config, data, model, normalize, pairs.pca_channels(), accelerator)
    frozen.to(accelerator.device)
    projectors = frozen.by_student_layer(pairs.teacher)
    live = live_teacher(config, model, normalize, accelerator, layers=pairs.teacher, projectors=projectors)
    source: TeacherSource = live
    if cache is not None:
        refuse_other_outputs(cache, live, config, data, rank=accelerator.process_index, device=accelerator.device)
        source = _LogitsFrom(cache.source("train"), live)
    return TeacherSetup(
        source=source,
        held_out=cache.source if cache is not None else lambda split: live,
        digest=digest,
        projectors=pairs.projectors,
        cache=cache.digest if cache is not None else None,
        live=live,
        frozen=frozen.modules,
        explained=frozen.explained,
        notices=[*notices, *frozen.notices],
    )


@dataclass(frozen=True)
class _LogitsFrom:
    """mixed: logits of one source, features of another."""

    logits: TeacherSource
    features: TeacherSource

    def __call__(self, batch: Batch) -> TeacherOutput:
        return TeacherOutput(self.logits(batch).logits, self.features(batch).features)


def _saved_projectors(checkpoint: Checkpoint) -> dict[str, FeatureProjector]:
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.tensors.get("frozen", {}).items():
        layer, _, name = key.partition("|")
        saved.setdefault(layer, {})[name] = tensor
    return projectors_from(saved)


def _warn_of_rectified_layers(feature: FeatureConfig, projectors: Projectors) -> list[str]:
    """A student layer that ends in a ReLU cannot reach signed targets without a projector of its own."""
    if projectors.student:
        return []
    return [
        f"distill.feature.direction: {feature.direction} compares the student's layer {layer} directly with signed targets; if it "
        "ends in a ReLU it can never reach the negative ones: direction both has a learned projector there"
        for layer in feature.layers
    ]
