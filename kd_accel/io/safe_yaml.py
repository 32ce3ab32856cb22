"""YAML that somebody else may have written: plain values only, no key twice, bounded before anything is built from it.

In: text or a file. Out: mappings, lists and scalars. Aliases are allowed, but what they stand for is counted each time: nine
lines of them can stand for more values than any memory holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 256 * 2**10
MAX_VALUES = 20_000
MAX_DEPTH = 32


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Raises yaml.YAMLError or ValueError for what is no YAML, too much, or of a kind that is not plain."""
    try:
        loader = _OnceLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    except (KeyError, AttributeError, TypeError, OverflowError) as error:  # `!!bool x`, `!!timestamp x` and their like
        raise ValueError(f"a value does not fit its tag ({type(error).__name__})") from None


def load_yaml_file(path: Path) -> Any:
    """Raises OSError as well."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES // 2**10} KiB are no settings")
    return load_yaml(data.decode("utf-8"))


def place(error: Exception) -> str:
    """Where and what, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None)}"


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(values that stand below a node with its aliases written out, depth)."""
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise ValueError("an alias stands for what contains it")
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
        raise ValueError(f"more than {MAX_VALUES} values, its aliases written out")
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    known[id(node)] = count, depth
    return count, depth
