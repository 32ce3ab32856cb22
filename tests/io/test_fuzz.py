"""Fuzzing of all readers of untrusted files: a reader succeeds or raises UserError, within limits of time and memory.

A short variant runs with all tests. `make faults` runs a longer variant from a new seed each time, which is printed.
"""

import json
import shutil
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import strategies as st
from safetensors.torch import save_file

from kd_accel.builders.run import run_directory
from kd_accel.cache.info import info_text
from kd_accel.cache.manifest import (
    CachedSamples,
    read_manifest,
    read_samples,
    read_spec,
    read_targets,
    read_teacher_accuracy,
    write_manifest,
    write_samples,
)
from kd_accel.cache.reader import Reader
from kd_accel.cache.shard import find_damage, stored_checksum
from kd_accel.cache.spec import spec_to_json
from kd_accel.config.parsing import load_config_file
from kd_accel.config.schema import CheckpointConfig, RunConfig
from kd_accel.errors import UserError
from kd_accel.io.tensors import read_tensors
from kd_accel.models.weights import load_card
from kd_accel.report.tables import load_result
from tests.support.bad_files import sealed
from tests.support.caches import spec_of, store
from tests.support.fuzzing import mutated, mutated_bytes, run, timed
from tests.support.in_process import train


@pytest.fixture
def cache(tmp_path):
    """Return the directory of a complete cache."""
    directory = tmp_path / "cache"
    directory.mkdir()
    samples = {split: np.arange(count) for split, count in (("train", 100), ("val", 5), ("test", 7))}
    cached = {split: CachedSamples(samples[split], samples[split].astype(np.uint64)) for split in samples}
    cache_spec = spec_of("int8", views=1)
    contents = {split: cached[split].digest for split in samples}
    cache_spec.fingerprint_fields.update(teacher={"arch": "a", "weights": "w"}, views={"transform": "crop"})
    cache_spec.fingerprint_fields["data"] = {"contents": contents, "train_size": 200, "test_size": 7}
    store(directory, cache_spec)
    write_samples(directory, cached)
    (directory / "spec.json").write_text(json.dumps(spec_to_json(cache_spec)))
    write_manifest(
        directory, cache_spec, {shard.name: stored_checksum(directory, cache_spec, shard) for shard in cache_spec.all_shards()}
    )
    save_file({"layer1|conv.weight": torch.ones(6, 24, 1, 1)}, directory / "targets.safetensors")
    return directory


def read_cache(directory):
    """Read all files of a cache that a training reads."""
    cache_spec = read_spec(directory)
    files = read_manifest(directory, cache_spec)
    info = {"directory": "x", "is_complete": True, "files": cache_spec.num_files(), "bytes": cache_spec.total_bytes()}
    info["teacher_accuracy"] = read_teacher_accuracy(directory)
    rates = {name: spec.sample_bytes for name, spec in cache_spec.tensors.items()}
    info_text(
        {**info, "bytes_per_sample_and_view": {**rates, "all": cache_spec.sample_bytes(), "all with raw features": 0}},
        cache_spec,
    )
    samples = read_samples(directory, cache_spec)
    for shard in cache_spec.all_shards():
        if find_damage(directory, cache_spec, shard, checksum=files.get(shard.name)) is not None:
            raise UserError("a file is damaged")
    with suppress(UserError):
        read_targets(directory, cache_spec)
    for split in samples:
        tensors = tuple(cache_spec.tensors) if split == "train" else ("logits",)
        Reader(directory, cache_spec, split, samples[split].indices, tensors).read(0, samples[split].indices[:3])


def mutations_of(path, *, reseal=None):
    """Return a strategy for mutations of a JSON file, as a structure and as bytes.

    reseal: Function that updates the checksums of a mutated structure; the strategy then includes resealed structures.
    """
    content = json.loads(path.read_text())
    structures = mutated(content)
    if reseal is not None:
        structures = st.one_of(structures, structures.map(lambda changed: _resealed(changed, reseal)))
    return st.one_of(structures.map(lambda changed: json.dumps(changed).encode()), mutated_bytes(path.read_bytes()))


def _resealed(content, reseal):
    try:
        return reseal(content)
    except (TypeError, KeyError, AttributeError, ValueError):
        return content


@timed
def test_specs_manifests_and_samples(cache, seconds):
    names = ("spec.json", "manifest.json", "samples.safetensors", "targets.safetensors")
    original = {name: (cache / name).read_bytes() for name in names}
    read_cache(cache)
    changes = st.one_of(
        st.tuples(st.just("spec.json"), mutations_of(cache / "spec.json", reseal=sealed)),
        st.tuples(st.just("manifest.json"), mutations_of(cache / "manifest.json")),
        *(st.tuples(st.just(name), mutated_bytes(original[name])) for name in names[2:]),
    )

    def check(change):
        (cache / change[0]).write_bytes(change[1])
        try:
            with suppress(UserError):
                read_cache(cache)
        finally:
            (cache / change[0]).write_bytes(original[change[0]])

    run(changes, check, seconds)


@timed
def test_shards_and_tensor_files(cache, seconds):
    cache_spec, samples = read_spec(cache), {"train": np.arange(100)}
    shard = cache_spec.shards("train", 0, "layer1")[1]
    path, original = cache / shard.name, (cache / shard.name).read_bytes()

    def check(data):
        path.write_bytes(data)
        reader = Reader(cache, cache_spec, "train", samples["train"], ("layer1",))
        is_intact = find_damage(cache, cache_spec, shard) is None
        assert is_intact == (data == original)
        with suppress(UserError):
            reader.read(0, np.arange(40))
        with suppress(ValueError):
            read_tensors(path)

    run(st.one_of(mutated_bytes(original), st.binary(max_size=200), _headers()), check, seconds)


def _headers():
    """Return a strategy for safetensors files whose header is valid JSON, but rarely a valid header."""
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    header = {"a": entry, "b": {**entry, "dtype": "I64", "shape": [3], "data_offsets": [24, 48]}, "__metadata__": {"x": "y"}}

    def file_of(content):
        text = json.dumps(content).encode()
        return len(text).to_bytes(8, "little") + text + bytes(48)

    types = st.sampled_from(["F8_E4M3", "F8_E8M0", "F4", "BOOL", "C64", "U16", "U64", "BF16", "F6_E2M3", "X"])
    typed = types.map(lambda name: {"a": {**entry, "dtype": name}})
    return st.one_of(mutated(header), typed).map(file_of)


@pytest.fixture(scope="module")
def paused(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "paused"
    train(run_dir, "--checkpoint.every_steps=2", "--checkpoint.stop_after_steps=3")
    return run_dir


@timed
@pytest.mark.filterwarnings("ignore:checkpoint .* is passed over")
def test_checkpoints(paused, seconds):
    """Search the checkpoint to resume from, with and without updated sizes and checksums of the mutated files."""
    config = load_config_file(RunConfig, paused / "config.yaml").model_copy(update={"checkpoint": CheckpointConfig()})
    directory = max((paused / "checkpoints").iterdir())
    original = {path.name: path.read_bytes() for path in directory.iterdir()}
    tensors = ("module.safetensors", "optimizer.safetensors")
    changes = st.one_of(
        st.tuples(st.just("state.json"), mutations_of(directory / "state.json"), st.just(False)),
        *(st.tuples(st.just(name), mutated_bytes(original[name]), st.booleans()) for name in tensors),
    )

    def check(change):
        name, data, has_valid_checksum = change
        (directory / name).write_bytes(data)
        if has_valid_checksum:
            content = json.loads(original["state.json"])
            content["files"][name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
            (directory / "state.json").write_text(json.dumps(content))
        try:
            with suppress(UserError), warnings.catch_warnings(action="ignore"):
                run_directory(config).checkpoint_to_resume()
        finally:
            for file in ("state.json", name):
                (directory / file).write_bytes(original[file])

    assert run_directory(config).checkpoint_to_resume() == directory
    run(changes, check, seconds)


@timed
def test_files_of_a_finished_run(teacher_run, tmp_path, seconds):
    """Read the model card as a teacher, the summary and metrics for a report, and the config for another start."""
    shutil.copytree(teacher_run, tmp_path / "run")
    directory = tmp_path / "run"
    config = load_config_file(RunConfig, directory / "config.yaml").model_copy(update={"run_dir": str(directory)})
    original = {
        name: (directory / name).read_bytes() for name in ("model.json", "summary.json", "config.yaml", "metrics.jsonl")
    }
    assert run_directory(config).finished_summary() and load_result(directory, None) and load_card(directory)
    changes = st.one_of(
        *(st.tuples(st.just(name), mutations_of(directory / name)) for name in ("model.json", "summary.json")),
        *(st.tuples(st.just(name), mutated_bytes(original[name])) for name in ("config.yaml", "metrics.jsonl")),
    )

    def check(change):
        (directory / change[0]).write_bytes(change[1])
        for read in (
            lambda: load_card(directory),
            lambda: load_result(directory, None),
            lambda: run_directory(config).finished_summary(),
        ):
            with suppress(UserError):
                read()
        (directory / change[0]).write_bytes(original[change[0]])

    run(changes, check, seconds)
