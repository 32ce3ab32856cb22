"""Files for tools and for GitHub: .editorconfig, .pre-commit-config.yaml, issue forms, pull request template."""

import configparser
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HOOKS = [hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]]
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
FIELDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
TEXT_FILES = [
    ROOT / name
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    if (ROOT / name).is_file() and not name.endswith(".png")
]


def editor_settings(section):
    parser = configparser.ConfigParser()
    parser.read_string(f"[top]\n{(ROOT / '.editorconfig').read_text()}")
    return dict(parser["*"]) | dict(parser[section])


def hook(name):
    (found,) = (each for each in HOOKS if each["id"] == name)
    return found


def test_editor_and_linter_agree():
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    python = editor_settings("*.py")
    assert (python["max_line_length"], python["indent_size"]) == (str(ruff["line-length"]), str(ruff.get("indent-width", 4)))
    assert python["indent_style"] == "space" and python["end_of_line"] == "lf"


@pytest.mark.parametrize(("name", "section"), [("Makefile", "Makefile"), ("launch/cpu2.yaml", "*.{yaml,yml}")])
def test_files_are_indented_as_the_editor_does(name, section):
    settings = editor_settings(section)
    unit = "\t" if settings["indent_style"] == "tab" else " " * int(settings["indent_size"])
    indents = {re.match(r"\s*", line)[0] for line in (ROOT / name).read_text().splitlines() if line.strip()} - {""}
    assert {indent for indent in indents if indent.replace(unit, "")} == set()


def test_text_files_have_no_trailing_whitespace_and_a_final_newline():
    pattern = re.compile(hook("trailing-whitespace")["entry"].encode(), re.MULTILINE)
    for path in TEXT_FILES:
        content = path.read_bytes()
        assert not pattern.search(content), path
        assert content == b"" or content.endswith(b"\n"), path


def test_merge_markers_are_found():
    pattern = re.compile(hook("merge-markers")["entry"], re.MULTILINE)
    for marker in ("<<<<<<< HEAD", ">>>>>>> branch", "||||||| base", "<<<<<<<"):
        assert pattern.search(f"a\n{marker}\nb")
    assert not pattern.search("    <<<<<<< in a text, and <<<< this\n=======\n>>>>")


def test_large_files_are_refused(tmp_path):
    for name, size in (("small.bin", 1000), ("large.bin", 1_200_000)):
        (tmp_path / name).write_bytes(bytes(size))
    command = f"{hook('large-files')['entry']} {tmp_path}/small.bin"
    assert subprocess.run(command, shell=True, check=False).returncode == 0
    done = subprocess.run(f"{command} {tmp_path}/large.bin", shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout.split() == [f"{tmp_path}/large.bin"]


def test_hooks_need_no_network():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    assert {each["language"] for each in HOOKS} <= {"system", "pygrep"}


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_issue_forms_have_the_structure_of_github(form):
    content = yaml.safe_load(form.read_text())
    assert content["name"] and content["description"]
    fields = content["body"]
    assert {field["type"] for field in fields} <= FIELDS
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_bug_report_asks_for_what_reproduces_it():
    (form,) = (path for path in FORMS if path.name == "bug_report.yml")
    fields = yaml.safe_load(form.read_text())["body"]
    assert [field["id"] for field in fields] == ["command", "config", "output", "expected", "devices", "versions", "launch"]
    text = form.read_text()
    assert all(part in text for part in ("kd-accel --version", "accelerate env", "--print_config"))


def test_pull_request_template_fits_on_a_screen():
    lines = (ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text().splitlines()
    assert len(lines) <= 30
    assert [line for line in lines if line.startswith("## ")] == ["## What", "## Why", "## Proof", "## Checklist"]
