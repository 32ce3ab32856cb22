"""Figures of a bench file: complete, partial and damaged."""

import json

import pytest

from kd_accel.bench.provenance import model_digest
from kd_accel.errors import UserError
from kd_accel.report.bench_file import bench_figures, entry_of, refuse_other_models


def entry(*latencies, macs=7):
    """Return the entry of a model with (batch size, median in milliseconds); the interquartile range is 0.2 ms."""
    return {"macs": macs, "latency": [{"batch_size": size, "median_ms": ms, "spread_ms": 0.2} for size, ms in latencies]}


def test_throughput_is_that_of_the_largest_batch_size(tmp_path):
    found = bench_figures(entry((8, 4.0), (64, 16.0), (1, 2.0)), tmp_path)
    assert (found["images_per_second"], found["throughput_batch_size"], found["latency_ms"]) == (4000.0, 64, 2.0)
    assert found["latency_spread_ms"] == pytest.approx(0.2) and found["graph_latency_ms"] is None and found["macs"] == 7


def test_missing_batch_sizes_have_no_figures(tmp_path):
    assert bench_figures(entry(), tmp_path) == {"macs": 7}
    assert bench_figures(entry((8, 4.0)), tmp_path) == {"macs": 7, "images_per_second": 2000.0, "throughput_batch_size": 8}


@pytest.mark.parametrize(
    "damaged",
    [
        entry((1, 1.0), (8, float("nan"))),
        entry((1, 1.0), (8, "x"), (9, 1.0)),
        entry((1, 0.0)),
        entry((1, None)),
        {"macs": 1, "latency": [3]},
    ],
)
def test_damaged_entries_are_refused(tmp_path, damaged):
    with pytest.raises(UserError, match=f"--bench: the entry of {tmp_path} is damaged .*; measure it again"):
        bench_figures(damaged, tmp_path)


def test_a_model_that_was_not_measured_in_time_may_be_missing(tmp_path):
    content = {"models": [], "not_measured": [{"name": str(tmp_path), "batch_sizes": [1]}]}
    assert refuse_other_models(tmp_path / "b", content, [tmp_path]) is None
    for other in (3, ["x"], [{"name": "other"}], None):
        with pytest.raises(UserError, match="lacks the current model"):
            refuse_other_models(tmp_path / "b", {**content, "not_measured": other}, [tmp_path])


def model(directory, **changes):
    """Create a run directory with the files that identify a model."""
    directory.mkdir()
    card = {"arch": "torchvision/resnet18", "stem": "imagenet", "arch_args": {}, "image_size": 32, "label_names": ["a", "b"]}
    (directory / "model.json").write_text(json.dumps({**card, **changes}))
    (directory / "model.safetensors").write_bytes(directory.name.encode())
    return directory


def test_runs_of_one_architecture_share_an_entry(tmp_path):
    first, second, larger = model(tmp_path / "a"), model(tmp_path / "b", label_names=["c", "d"]), tmp_path / "c"
    model(larger, image_size=64)
    found = {str(first): {"name": str(first), "digest": model_digest(first), **entry((1, 2.0))}}
    assert entry_of(second, found) is entry_of(first, found) is found[str(first)]
    assert entry_of(larger, found) is None and entry_of(tmp_path / "nowhere", found) is None
    content = {"models": list(found.values())}
    assert refuse_other_models(tmp_path / "b.json", content, [first, second]) is None
    with pytest.raises(UserError, match="lacks the current model of .*c; measure"):
        refuse_other_models(tmp_path / "b.json", content, [first, larger])
    (first / "model.safetensors").write_bytes(b"trained again")
    with pytest.raises(UserError, match="lacks the current model of .*a, .*b; measure"):
        refuse_other_models(tmp_path / "b.json", content, [first, second])
