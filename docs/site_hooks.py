"""Hooks of MkDocs: pages outside of docs/, links to files of the repository, and a page printed by the program.

The Markdown files of the repository link to each other by their paths, as GitHub shows them. README.md is the first page of the
site, and links to other files of the repository lead to copies of them.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "launch/README.md": "launch.md",
}
"""Path in the site of each page outside of docs/."""

_SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"\]\((?!\w+://)([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of docs/, the page of the commands, and copies of the linked files."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "commands.md", content=commands_page()))
    linked = {path for page in files.documentation_pages() for path in linked_files(page.src_uri, page.content_string)}
    for path in sorted(linked):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between paths of the repository into links between paths of the site."""
    uri = page.file.src_uri

    def replaced(link: re.Match[str]) -> str:
        target = site_path(repository_path(uri, link[1]))
        return f"]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{link[2] or ''})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(replaced, part) for part in parts)


def linked_files(uri: str, markdown: str) -> Iterator[str]:
    """Yield the linked files of the repository that are not in docs/ and are not pages of the site.

    Args:
        uri: Path of a page in the site.
        markdown: Its text.

    Yields:
        Paths in the repository.
    """
    for link in _LINK.finditer(_FENCE.sub("", markdown)):
        path = repository_path(uri, link[1])
        if path not in PAGES and not path.startswith("docs/"):
            yield path


def repository_path(uri: str, target: str) -> str:
    """Return the path in the repository to which a link of a page leads.

    Args:
        uri: Path of the page in the site.
        target: Link in the page's file.
    """
    return posixpath.normpath(posixpath.join(posixpath.dirname(_SOURCES.get(uri, f"docs/{uri}")), target))


def site_path(path: str) -> str:
    """Return the path in the site of a file of the repository."""
    return PAGES.get(path, path.removeprefix("docs/"))


def commands_page() -> str:
    """Return the page of the commands and settings, from the help texts of the program."""
    overview = _help()
    sections = []
    for command in _listed(overview):
        text = _help(command)
        actions = [] if "\noptions:" in text else _listed(text)
        sections += [_section(f"{command} {action}", _help(command, action)) for action in actions] or [_section(command, text)]
    return "\n\n".join(["# Commands and settings", _as_code(overview), *sections]) + "\n"


def _listed(text: str) -> list[str]:
    """Return the names of the commands that a help text lists."""
    return re.findall(r"^  (\w+) +[A-Z]", text, re.MULTILINE)


def _help(*command: str) -> str:
    arguments = [sys.executable, "-m", "kd_accel", *command, "--help"]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def _section(command: str, text: str) -> str:
    return f"## {command}\n\n{_as_code(text)}"


def _as_code(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"
