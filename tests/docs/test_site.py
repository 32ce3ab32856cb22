"""Documentation site: each page has a place, each public name is described, and the built site needs no network."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import yaml

import kd_accel
import kd_accel.losses
from kd_accel.cli import _COMMANDS
from kd_accel.data import transforms
from kd_accel.losses import targets
from tests.support.launching import ROOT

API = (ROOT / "docs/api.md").read_text()


def pages_in(entries):
    """Yield the pages of a part of the navigation."""
    for entry in entries:
        (value,) = entry.values()
        yield from [value] if isinstance(value, str) else pages_in(value)


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_page_has_one_place(hooks):
    listed = list(pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted([*pages, *hooks.PAGES.values(), "commands.md"])


def test_each_public_name_is_described():
    described = re.findall(r"^::: (\S+)$", API, re.MULTILINE)
    public = {f"kd_accel.{name}" for name in kd_accel.__all__} - {
        "kd_accel.__version__",
        "kd_accel.losses",
        "kd_accel.targets",
        "kd_accel.transforms",
    }
    public |= {f"kd_accel.losses.{name}" for name in kd_accel.losses.__all__} - {
        "kd_accel.losses.Distiller",
        "kd_accel.losses.LossWeights",
    }
    public |= {f"kd_accel.transforms.{name}" for name in transforms.__all__}
    own = [value for value in vars(targets).values() if isinstance(value, type) and value.__module__ == targets.__name__]
    public |= {f"kd_accel.targets.{each.__name__}" for each in own if not each.__name__.startswith("_")}
    assert len(described) == len(set(described)) and set(described) == public


def test_links_between_files_become_links_between_pages(hooks):
    assert hooks.site_path(hooks.repository_path("tutorials/slurm.md", "../../launch/README.md")) == "launch.md"
    assert hooks.site_path(hooks.repository_path("index.md", "docs/speed.md")) == "speed.md"
    assert hooks.site_path(hooks.repository_path("launch.md", "../docs/gpu.md")) == "gpu.md"
    text = "[a](../configs/x.yaml) [b](speed.md#top) [c](https://a.b/c) ```sh\n```\n```sh\n[d](../e.py)\n```\n"
    assert list(hooks.linked_files("data.md", text)) == ["configs/x.yaml"]


@pytest.mark.slow
def test_the_site_is_built_without_warnings_and_needs_no_network(tmp_path):
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path / "site"): path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//|<link(?![^>]*canonical)[^>]* href=\"?(?:https?:)?//"
    )
    assert len(pages) > 30 and [str(path) for path, text in pages.items() if loaded.search(text)] == []
    api, commands = ((tmp_path / "site" / name).read_text() for name in ("api.html", "commands.html"))
    assert "kd_accel.Distiller" in api and "target_shapes" in api
    assert "--distill.temperature" in commands and "cache verify" in commands
    headings = {heading.split()[0] for heading in re.findall(r"<h2 id=\"[\w-]+\">([a-z ]+)<", commands)}
    assert headings == set(_COMMANDS)
    styles = "".join(path.read_text() for path in (tmp_path / "site").rglob("*.css"))
    assert styles and not re.search(r"(?:@import|url\()[^;)]*//", styles)
    assert (tmp_path / "site/configs/digits/wandb_sweep.yaml").is_file() and not (tmp_path / "site/site_hooks.py").exists()
