"""What strangers may have written, mutated at random: each reader works, or says a UserError; nothing else, no hang, no bomb.

A short form runs with all tests; `make faults` runs two minutes of it, from another seed each time, which is printed.
"""

import json
import random
import shutil
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
import yaml
from hypothesis import strategies as st
from safetensors.torch import save_file

from kd_accel.checks import problems
from kd_accel.commands.cache_report import _described
from kd_accel.commands.run_directory import checkpoint_to_resume, finished_summary
from kd_accel.config import BenchConfig, CheckpointConfig, ReproduceConfig, RunConfig
from kd_accel.models.files import load_card
from kd_accel.models.tensor_files import read_tensors
from kd_accel.parse import build_parser, load_config_file, parse_config
from kd_accel.report.tables import load_result
from kd_accel.teacher.store.layout import SPLITS, plan_to_json
from kd_accel.teacher.store.manifest import (
    CachedRows,
    read_manifest,
    read_plan,
    read_projectors,
    read_rows,
    read_teacher_accuracy,
    write_manifest,
    write_rows,
)
from kd_accel.teacher.store.reader import Reader
from kd_accel.teacher.store.shards import damage, stored_checksum
from kd_accel.types import UserError
from tests.bad_files import sealed
from tests.fuzzing import fuzz, junk, mutated, mutated_bytes, settings_of
from tests.in_process import train
from tests.launching import ROOT
from tests.test_store import plan_of, written

LONG = pytest.param(15.0, marks=pytest.mark.faults)
timed = pytest.mark.parametrize("seconds", [1.5, LONG])


def run(strategy, check, seconds):
    first_seed = random.SystemRandom().randrange(2**31) if seconds > 2 else 0
    count = fuzz(strategy, check, seconds=seconds, first_seed=first_seed)
    print(f"{count} examples from seed {first_seed}")
    assert count >= 20


@pytest.fixture
def parsed(tmp_path):
    """Parse a file and flags as a training does, or as other commands do; says what came of it. The parsers are made once."""
    classes = (RunConfig, BenchConfig, ReproduceConfig)
    parsers = [(each, build_parser(each, prog="x", description="")) for each in classes]

    def parse(data, flags=(), *, commands=1):
        path = tmp_path / "config.yaml"
        path.write_bytes(data)
        for config_class, parser in parsers[:commands]:
            try:
                config, _ = parse_config(config_class, [f"--config={path}", *flags], parser=parser)
            except UserError as error:
                assert str(error).strip() and "Traceback" not in str(error)
                seen["refused"] += 1
            else:
                assert isinstance(config, config_class) and not problems(config)
                seen["accepted"] += 1

    seen = parse.seen = Counter()
    return parse


def dumped(settings):
    return yaml.safe_dump(settings, allow_unicode=False).encode()


@pytest.mark.slow
@timed
def test_trees_of_settings(parsed, seconds):
    run(settings_of(RunConfig), lambda settings: parsed(dumped(settings)), seconds)
    assert parsed.seen["refused"] and parsed.seen["accepted"]


@pytest.mark.slow
@timed
def test_flags(parsed, seconds):
    """Each value as it would be typed, beside a file with others."""
    names = [name for name, _ in _leaves(RunConfig)]
    flag = st.tuples(st.sampled_from(names), junk).map(lambda pair: f"--{pair[0]}={_typed(pair[1])}")
    odd = st.text(max_size=20).map(lambda text: f"--{text}")
    run(st.lists(st.one_of(flag, flag, odd), max_size=5), lambda flags: parsed(b"seed: 1\n", _without_help(flags)), seconds)
    assert parsed.seen["refused"] and parsed.seen["accepted"]


def _leaves(config_class):
    from kd_accel.written import field_types, section_type

    for name, annotation in field_types(config_class).items():
        section = section_type(annotation)
        yield name, annotation
        for inner, of in _leaves(section) if section else ():
            yield f"{name}.{inner}", of


def _typed(value):
    return value if isinstance(value, str) else json.dumps(value)


def _without_help(flags):
    return [flag for flag in flags if not flag.startswith(("--help", "-h", "--print_config"))]


@pytest.mark.slow
@timed
def test_texts_of_configs(parsed, seconds):
    texts = [path.read_bytes() for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    run(
        st.one_of(st.sampled_from(texts).flatmap(mutated_bytes), st.binary(max_size=60)),
        lambda data: parsed(data, commands=3),
        seconds,
    )
    assert parsed.seen["refused"] and parsed.seen["accepted"]


@pytest.fixture
def cache(tmp_path):
    """A whole cache and what stands in its files."""
    directory = tmp_path / "cache"
    directory.mkdir()
    rows = {split: np.arange(count) for split, count in (("train", 100), ("val", 5), ("test", 7))}
    cached = {split: CachedRows(rows[split], rows[split].astype(np.uint64)) for split in SPLITS}
    plan = plan_of("int8", views=1)
    contents = {split: cached[split].digest for split in SPLITS}
    plan.identity.update(teacher={"arch": "a", "weights": "w"}, views={"policy": "crop"})
    plan.identity["data"] = {"contents": contents, "train_size": 200, "test_size": 7}
    written(directory, plan)
    write_rows(directory, cached)
    (directory / "plan.json").write_text(json.dumps(plan_to_json(plan)))
    write_manifest(directory, plan, {shard.name: stored_checksum(directory, plan, shard) for shard in plan.all_shards()})
    save_file({"layer1|conv.weight": torch.ones(6, 24, 1, 1)}, directory / "projectors.safetensors")
    return directory


def read_whole(directory):
    """All that a training reads of a cache."""
    plan = read_plan(directory)
    files = read_manifest(directory, plan)
    about = {"directory": "x", "is_complete": True, "files": plan.num_files(), "bytes": plan.total_bytes()}
    about["teacher_accuracy"] = read_teacher_accuracy(directory)
    rates = {name: spec.row_bytes for name, spec in plan.tensors.items()}
    _described({**about, "bytes_per_row_and_view": {**rates, "all": plan.row_bytes(), "all with raw features": 0}}, plan)
    rows = read_rows(directory, plan)
    for shard in plan.all_shards():
        if damage(directory, plan, shard, checksum=files.get(shard.name)) is not None:
            raise UserError("a file is damaged")
    with suppress(UserError):
        read_projectors(directory, plan)
    for split in SPLITS:
        tensors = tuple(plan.tensors) if split == "train" else ("logits",)
        Reader(directory, plan, split, rows[split].rows, tensors).read(0, rows[split].rows[:3])


def mutations_of(path, *, reseal=None):
    """Of a JSON file: as a structure, perhaps with digests to match, and as bytes."""
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


@pytest.mark.slow
@timed
def test_plans_manifests_and_rows(cache, seconds):
    names = ("plan.json", "manifest.json", "rows.safetensors", "projectors.safetensors")
    whole = {name: (cache / name).read_bytes() for name in names}
    read_whole(cache)
    changes = st.one_of(
        st.tuples(st.just("plan.json"), mutations_of(cache / "plan.json", reseal=sealed)),
        st.tuples(st.just("manifest.json"), mutations_of(cache / "manifest.json")),
        *(st.tuples(st.just(name), mutated_bytes(whole[name])) for name in names[2:]),
    )

    def check(change):
        (cache / change[0]).write_bytes(change[1])
        try:
            with suppress(UserError):
                read_whole(cache)
        finally:
            (cache / change[0]).write_bytes(whole[change[0]])

    run(changes, check, seconds)


@pytest.mark.slow
@timed
def test_shards_and_tensor_files(cache, seconds):
    plan, rows = read_plan(cache), {"train": np.arange(100)}
    shard = plan.shards("train", 0, "layer1")[1]
    path, whole = cache / shard.name, (cache / shard.name).read_bytes()

    def check(data):
        path.write_bytes(data)
        reader = Reader(cache, plan, "train", rows["train"], ("layer1",))
        is_whole = damage(cache, plan, shard) is None
        assert is_whole == (data == whole)
        with suppress(UserError):
            reader.read(0, np.arange(40))
        with suppress(ValueError):
            read_tensors(path)

    run(st.one_of(mutated_bytes(whole), st.binary(max_size=200), _headers()), check, seconds)


def _headers():
    """A safetensors file with a header that is JSON, but hardly a good one."""
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    whole = {"a": entry, "b": {**entry, "dtype": "I64", "shape": [3], "data_offsets": [24, 48]}, "__metadata__": {"x": "y"}}

    def file_of(content):
        text = json.dumps(content).encode()
        return len(text).to_bytes(8, "little") + text + bytes(48)

    types = st.sampled_from(["F8_E4M3", "F8_E8M0", "F4", "BOOL", "C64", "U16", "U64", "BF16", "F6_E2M3", "X"])
    typed = types.map(lambda name: {"a": {**entry, "dtype": name}})
    return st.one_of(mutated(whole), typed).map(file_of)


@pytest.fixture(scope="module")
def paused(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "paused"
    train(run_dir, "--checkpoint.every_steps=2", "--checkpoint.stop_after_steps=3")
    return run_dir


@pytest.mark.slow
@timed
@pytest.mark.filterwarnings("ignore:checkpoint .* is passed over")
def test_checkpoints(paused, seconds):
    """Reading one for a resume, with sizes and checksums that match what was mutated or do not."""
    config = replace(load_config_file(RunConfig, paused / "config.yaml"), checkpoint=CheckpointConfig())
    directory = max((paused / "checkpoints").iterdir())
    whole = {path.name: path.read_bytes() for path in directory.iterdir()}
    tensors = ("module.safetensors", "optimizer.safetensors")
    changes = st.one_of(
        st.tuples(st.just("state.json"), mutations_of(directory / "state.json"), st.just(False)),
        *(st.tuples(st.just(name), mutated_bytes(whole[name]), st.booleans()) for name in tensors),
    )

    def check(change):
        name, data, is_vouched_for = change
        (directory / name).write_bytes(data)
        if is_vouched_for:
            content = json.loads(whole["state.json"])
            content["files"][name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
            (directory / "state.json").write_text(json.dumps(content))
        try:
            with suppress(UserError), warnings.catch_warnings(action="ignore"):
                checkpoint_to_resume(config)
        finally:
            for file in ("state.json", name):
                (directory / file).write_bytes(whole[file])

    assert checkpoint_to_resume(config) == directory
    run(changes, check, seconds)


@pytest.mark.slow
@timed
def test_what_a_finished_run_leaves(teacher_run, tmp_path, seconds):
    """Its card for a teacher, its summary and metrics for a report, its config for another start."""
    shutil.copytree(teacher_run, tmp_path / "run")
    directory = tmp_path / "run"
    config = replace(load_config_file(RunConfig, directory / "config.yaml"), run_dir=str(directory))
    whole = {name: (directory / name).read_bytes() for name in ("model.json", "summary.json", "config.yaml", "metrics.jsonl")}
    assert finished_summary(config) and load_result(directory, None) and load_card(directory)
    changes = st.one_of(
        *(st.tuples(st.just(name), mutations_of(directory / name)) for name in ("model.json", "summary.json")),
        *(st.tuples(st.just(name), mutated_bytes(whole[name])) for name in ("config.yaml", "metrics.jsonl")),
    )

    def check(change):
        (directory / change[0]).write_bytes(change[1])
        for read in (lambda: load_card(directory), lambda: load_result(directory, None), lambda: finished_summary(config)):
            with suppress(UserError):
                read()
        (directory / change[0]).write_bytes(whole[change[0]])

    run(changes, check, seconds)
