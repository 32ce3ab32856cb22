"""Classes of a teacher and of the data: comparison by name, and selection of the teacher's logits by a class map.

A class map gives the teacher's class, a name or the index of a logit, for each class of the data. It is resolved to indices
once, so that live outputs, a cache and an evaluation have the same logits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from kd_accel.config.fields import nearest
from kd_accel.data.folders import quoted
from kd_accel.errors import UserError

ClassMap = Literal["auto"] | Sequence[int | str] | Mapping[str, int | str]
"""The teacher's class for each class of the data.

`auto` = the class of the same name; a sequence = the teacher's index or name for each class of the data, in order; a mapping =
{class of the data: the teacher's index or name}, in which a class that is left out has the same name in both.
"""

_LISTED = 5
_LONGEST_LIST = 32


def resolve_class_map(
    class_map: ClassMap | None, teacher_names: Sequence[str] | None, data_names: Sequence[str]
) -> tuple[int, ...] | None:
    """Find the teacher's logit for each class of the data.

    Args:
        class_map: The class map; None = the classes must be the same, in the same order.
        teacher_names: Class names in the order of the teacher's logits; None if unknown.
        data_names: Class names of the data, by label.

    Returns:
        Index of a logit by label; None if the logits are used as they are.

    Raises:
        UserError: If the classes differ without a class map, or the class map does not give one logit for each class.
    """
    if class_map is None:
        _refuse_other_classes(teacher_names, data_names)
        return None
    if isinstance(class_map, Mapping):
        by_name = {str(name): value for name, value in class_map.items()}
        _refuse_unknown_keys(by_name, data_names)
        requested = [by_name.get(name, name) for name in data_names]
    elif isinstance(class_map, str):  # auto
        requested = list(data_names)
    else:
        requested = list(class_map)
        if len(requested) != len(data_names):
            raise UserError(
                f"class_map: lists {len(requested)} classes, but the data has {len(data_names)}; list the teacher's class for "
                "each class of the data, in order"
            )
    return resolve_indices(requested, teacher_names)


def resolve_indices(requested: Sequence[int | str], teacher_names: Sequence[str] | None) -> tuple[int, ...] | None:
    """Find the logits of the teacher's classes.

    Args:
        requested: Indices or names of the teacher's classes.
        teacher_names: Class names in the order of the teacher's logits; None if unknown.

    Returns:
        Indices of the logits; None if these are all logits in order.

    Raises:
        UserError: If a name or an index is not found, a name is ambiguous, or a class is listed twice.
    """
    _refuse_unknown_names(requested, teacher_names)
    names = list(teacher_names or ())
    indices = tuple(names.index(value) if isinstance(value, str) else int(value) for value in requested)
    classes = f"the teacher's {len(names)} classes" if names else "the teacher's classes"
    for index in indices:
        if index < 0 or (names and index >= len(names)):
            last = f" to {len(names) - 1}" if names else " upward"
            raise UserError(f"class_map: index {index} is not one of {classes}; use an index from 0{last}")
    repeated = [index for index, count in Counter(indices).items() if count > 1]
    if repeated:
        name = f" ({names[repeated[0]]!a})" if names else ""
        raise UserError(
            f"class_map: the teacher's class {repeated[0]}{name} stands for several classes of the data; use each class of the "
            "teacher at most once"
        )
    return None if names and indices == tuple(range(len(names))) else indices


def natural_order(names: Sequence[str]) -> list[str]:
    """Sort names by the value of their numbers and without regard to case, as timm sorts class folders: 9 before 10."""
    return sorted(names, key=_natural_key)


def class_notices(
    indices: Sequence[int] | None, teacher_names: Sequence[str] | None, data_names: Sequence[str], *, has_map: bool
) -> list[str]:
    """Return lines for the user: the logits that are selected, or a warning if the order of the classes is likely to differ.

    Args:
        indices: Index of a logit by label; None if the logits are used as they are.
        teacher_names: Class names in the order of the teacher's logits; None if unknown.
        data_names: Class names of the data, by label.
        has_map: Whether a class map is set.
    """
    if indices is not None:
        pairs = [f"{name!a} = {index}" for name, index in zip(data_names, indices, strict=True)]
        more = ", ..." if len(pairs) > _LISTED else ""
        total = f" of {len(teacher_names)}" if teacher_names else ""
        return [
            f"teacher.class_map: {len(pairs)}{total} logits of the teacher are used, by class of the data: "
            f"{', '.join(pairs[:_LISTED])}{more}"
        ]
    natural = natural_order(data_names)
    if teacher_names is not None or has_map or natural == list(data_names) or sorted(data_names) != list(data_names):
        return []
    place = next(index for index, pair in enumerate(zip(data_names, natural, strict=True)) if pair[0] != pair[1])
    listed = f"{[natural.index(name) for name in data_names]}" if len(natural) <= _LONGEST_LIST else "the list of its indices"
    return [
        f"teacher.class_map: null, and the teacher has no class names to compare; class {place} of the data is "
        f"{data_names[place]!a}, because the names are sorted as text, but {natural[place]!a} for a teacher that timm has "
        f"trained on these folders, because timm sorts numbers by value; set teacher.class_map to {listed} for such a teacher"
    ]


def _natural_key(name: str) -> list[str | int]:
    """Return texts and numbers in turn."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name.lower()))]


def _refuse_other_classes(teacher_names: Sequence[str] | None, data_names: Sequence[str]) -> None:
    """Raise UserError if the teacher's classes are known, and are not those of the data in the same order."""
    if teacher_names is None or list(teacher_names) == list(data_names):
        return
    missing = [name for name in data_names if name not in set(teacher_names)]
    counts = f"the teacher has {len(teacher_names)} classes, and the data {len(data_names)}"
    if missing:
        raise UserError(
            f"class_map: null, but {counts}, of which the teacher lacks {len(missing)} by name ({quoted(missing)}; it has "
            f"{quoted(list(teacher_names))}); use a teacher that was trained on these classes, or set it to "
            "{DATA CLASS: TEACHER CLASS} for those with another name"
        )
    if len(teacher_names) > len(data_names):
        extra = [name for name in teacher_names if name not in set(data_names)]
        problem = f"{counts}, without {quoted(extra)}"
    else:
        pairs = enumerate(zip(teacher_names, data_names, strict=True))
        place, (theirs, ours) = next(each for each in pairs if each[1][0] != each[1][1])
        is_natural = list(teacher_names) == natural_order(data_names) != sorted(data_names)
        timm = " (numbers by value, as timm sorts folders)" if is_natural else ""
        problem = (
            f"class {place} is {theirs!a} for the teacher{timm} and {ours!a} in the data, the same classes in another order"
        )
    raise UserError(f"class_map: null, but {problem}; set it to auto, which selects the teacher's logits by name")


def _refuse_unknown_keys(class_map: Mapping[str, int | str], data_names: Sequence[str]) -> None:
    unknown = [name for name in class_map if name not in set(data_names)]
    if unknown:
        raise UserError(
            f"class_map: the data has no class {unknown[0]!a}{nearest(unknown[0], data_names)}; the keys are classes of the "
            f"data ({quoted(list(data_names))})"
        )


def _refuse_unknown_names(requested: Sequence[int | str], teacher_names: Sequence[str] | None) -> None:
    """Raise UserError if a name is not that of exactly one of the teacher's classes."""
    counts, named = Counter(teacher_names or ()), [value for value in requested if isinstance(value, str)]
    if teacher_names is None and named:
        raise UserError(
            f"class_map: {named[0]!a} is a class name, but the teacher has no class names; give the index of its logit for "
            "each class of the data, as a list of integers"
        )
    missing = [name for name in named if not counts[name]]
    if missing:
        close = nearest(missing[0], list(counts))
        raise UserError(
            f"class_map: the teacher has no class {quoted(missing)}{close} (it has {quoted(list(counts))}); set it to "
            "{DATA CLASS: TEACHER CLASS} for classes with another name, or use a teacher that was trained on these classes"
        )
    ambiguous = [name for name in named if counts[name] > 1]
    if ambiguous:
        raise UserError(
            f"class_map: the teacher has several classes named {ambiguous[0]!a}; give the index of the class that is meant, "
            f"as in {{{ambiguous[0]}: {list(teacher_names or ()).index(ambiguous[0])}}}"
        )
