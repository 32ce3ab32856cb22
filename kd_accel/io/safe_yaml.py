"""Safe YAML loader for untrusted files: plain values, unique keys, and size limits that are checked before construction.

Input: text or a file. Output: mappings, lists and scalars. Aliases are allowed. Each alias counts as all values that it expands
to, because nine lines of nested aliases can expand to more values than fit in memory.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 256 * 2**10
MAX_VALUES = 20_000
MAX_DEPTH = 32
EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
"""Floats of YAML 1.2 that YAML 1.1, and therefore PyYAML, parses as text: `1e-3`, `1.0e3`."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that raises an error for a duplicate key in a mapping; PyYAML would keep the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            # pydantic replaces such a letter in the names of its errors, which could not be found then.
            if any("\ud800" <= letter <= "\udfff" for letter in str(key.value)):
                raise yaml.constructor.ConstructorError(None, None, "a key has half of a surrogate pair", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes text that `load_yaml` would parse as a number."""


for _class in (_UniqueKeyLoader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))


def dump_yaml(value: Any, *, in_one_line: bool = False) -> str:
    """Return plain values as YAML text that `load_yaml` parses to the same values; mappings keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=in_one_line)


def load_yaml(text: str) -> Any:
    """Parse YAML text.

    Raises:
        yaml.YAMLError: If the text is not valid YAML, or has a duplicate key or an unsafe tag.
        ValueError: If the text exceeds the limits of values and depth, or a value does not fit its tag.
    """
    try:
        loader = _UniqueKeyLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except (KeyError, AttributeError, TypeError, OverflowError) as error:
        # PyYAML's own constructors fail in this way for `!!bool x`, `!!timestamp x` and similar.
        raise ValueError(f"a value does not fit its tag ({type(error).__name__})") from None


def load_yaml_file(path: Path) -> Any:
    """Parse a YAML file, as `load_yaml` does.

    Raises:
        OSError: If the file cannot be read.
        yaml.YAMLError: See `load_yaml`.
        ValueError: See `load_yaml`; also if the file is too large.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES // 2**10} KiB, too long for settings")
    return load_yaml(data.decode("utf-8"))


def place(error: Exception) -> str:
    """Format the position and reason of a YAML error in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None)}"


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return (number of values, depth) of a node with its aliases expanded. known: results by node id; None = in progress."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ValueError("an alias contains itself")
        return size
    known[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = list(node.value)
    sizes = [_measure(part, known) for part in parts]
    count, depth = 1 + sum(size[0] for size in sizes), 1 + max((size[1] for size in sizes), default=0)
    if count > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values, its aliases expanded")
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    known[id(node)] = count, depth
    return count, depth
