"""Fuzzing of config files and flags: each input is parsed or refused with a UserError, in limited time and memory.

A short version runs with all tests. `make faults` runs a longer version, each time from another seed, which is printed.
"""

import json
from collections import Counter

import pytest
import yaml
from hypothesis import strategies as st

from kd_accel.config.fields import leaves
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import BenchConfig, ReproduceConfig, RunConfig
from kd_accel.config.validation import problems
from kd_accel.errors import UserError
from tests.support.fuzzing import junk, mutated_bytes, run, settings_of, timed
from tests.support.launching import ROOT


@pytest.fixture
def parsed(tmp_path):
    """Return a function that parses a file and flags for one or more commands and counts refused and accepted inputs."""

    def parse(data, flags=(), *, commands=1):
        path = tmp_path / "config.yaml"
        path.write_bytes(data)
        for config_class in (RunConfig, BenchConfig, ReproduceConfig)[:commands]:
            try:
                config, _ = parse_config(config_class, [f"--config={path}", *flags])
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


@timed
def test_random_settings_in_a_file(parsed, seconds):
    run(settings_of(RunConfig), lambda settings: parsed(dumped(settings)), seconds)
    assert parsed.seen["refused"] and parsed.seen["accepted"]


@timed
def test_random_flags(parsed, seconds):
    """Parse random flags after a valid file."""
    names = {".".join(keys[:end]).replace("NAME", "mse") for keys, _ in leaves(RunConfig) for end in range(1, len(keys) + 1)}
    names = sorted(names | {"distill.features.mse.args.direction", "distill.features.mse.args.pca_images"})
    flag = st.tuples(st.sampled_from(names), junk).map(lambda pair: f"--{pair[0]}={_typed(pair[1])}")
    odd = st.text(max_size=20).map(lambda text: f"--{text}")
    run(st.lists(st.one_of(flag, flag, odd), max_size=5), lambda flags: parsed(b"seed: 1\n", _without_help(flags)), seconds)
    assert parsed.seen["refused"] and parsed.seen["accepted"]


def _typed(value):
    return value if isinstance(value, str) else json.dumps(value)


def _without_help(flags):
    return [flag for flag in flags if not flag.startswith(("--help", "-h", "--print_config"))]


@timed
def test_mutated_and_random_files(parsed, seconds):
    texts = [path.read_bytes() for path in sorted((ROOT / "configs").rglob("*.yaml"))]
    run(
        st.one_of(st.sampled_from(texts).flatmap(mutated_bytes), st.binary(max_size=60)),
        lambda data: parsed(data, commands=3),
        seconds,
    )
    assert parsed.seen["refused"] and parsed.seen["accepted"]
