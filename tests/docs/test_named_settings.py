"""Names in the documentation: the settings and source files exist."""

import re
from pathlib import Path

import pytest

from tests.support.in_process import say

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SETTING = re.compile(
    r"(?<![\w./])(?:--)?((?:data|model|teachers?|distill|optim|train|checkpoint|tracking)\.(?!yaml|md\b)[a-z][a-z0-9_]*(?:\.\w+)*)"
)
FILE = re.compile(
    r"(?<![\w./])((?:kd_accel/)?(?:io|config|data|models|losses|teacher|cache|training|bench|report|builders|commands|tests|benchmarks)"
    r"/[a-z0-9_/]+\.py)\b"
)
MISSPELLED = {"distill.temprature"}
"""Settings in examples of messages."""
RUN_FILES = {"model.safetensors", "model.json", "model.onnx", "model.pt2"}


@pytest.fixture(scope="module")
def settings():
    return set(re.findall(r"^  --(\S+) ", say("train", "--help"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_exist(page, settings):
    named = {name for name in SETTING.findall(page.read_text()) if name not in RUN_FILES | MISSPELLED}
    general = {
        name: re.split(r"\.args\.|(?<=arch_args)\.", re.sub(r"^(distill\.features|teachers)\.\w+(?=\.|$)", r"\1.NAME", name))[0]
        for name in named
    }
    is_known = {name: any(f"{known}.".startswith(f"{key}.") for known in settings) for name, key in general.items()}
    assert [name for name in sorted(named) if not is_known[name]] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_source_files_exist(page):
    named = FILE.findall(page.read_text())
    assert [name for name in named if not any((ROOT / folder / name).is_file() for folder in ("", "kd_accel"))] == []


def test_an_unknown_setting_is_noticed(settings):
    assert "distill.features.NAME.weight" in settings and "teacher.cache.dir" in settings
    assert SETTING.findall("`distill.feature.weight` and --teacher.cache_dir x, configs/data.yaml, RUN/model.json") == [
        "distill.feature.weight",
        "teacher.cache_dir",
    ]
    assert not any(f"{known}.".startswith("distill.feature.") for known in settings)
