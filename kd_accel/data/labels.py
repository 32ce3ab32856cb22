"""Class indices from the labels of a source: integers, strings or booleans, one per sample.

Input: the label column of a split, as an Arrow or NumPy column or a Python list. Output: class indices, int64 [N], with -1 for
a sample without a label (null or -1 in the column). The classes are those of the training split.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kd_accel.config.data_schema import LabelRule
from kd_accel.data.folders import quoted
from kd_accel.errors import IneffectiveSetting, UserError

Label = int | str | bool
Kind = Literal["integer", "string", "boolean"]

UNLABELED = -1
"""Class index of a sample without a label."""

MAX_CLASSES = 1_000_000
"""Limit of the number of classes; more are probably identifiers from another column."""

_UNKNOWN = -2
_LONGEST_EXAMPLE = 60
_LISTS, _DICTS, _FLOATS = "lists (multi-label)", "dicts", "floating-point numbers"
_REMEDIES = {
    _LISTS: "use a column with one label per sample",
    _DICTS: "use a column with one label per sample",
    _FLOATS: "store them as integers (class indices, null for no label) or strings (class names)",
}
_KIND_OF_DTYPE: Mapping[str, Kind] = {"i": "integer", "u": "integer", "b": "boolean", "U": "string"}


def no_labels(samples: int) -> np.ndarray:
    """Return the label column of a split whose labels are not read."""
    return np.full(samples, UNLABELED, dtype=np.int64)


@dataclass(frozen=True)
class LabelSource:
    """Origin of labels, for messages.

    Attributes:
        field: Setting or argument that the labels come from.
        split: Name of the split in the source.
        rule_setting: Name of the setting that holds the rule for integers.
    """

    field: str
    split: str
    rule_setting: str = "data.labels"

    def sample(self, index: int) -> str:
        """Return the beginning of a message about a sample."""
        return f"{self.field}: the label of sample {index} of the {self.split} split"


@dataclass(frozen=True)
class _Column:
    """Labels of a split as distinct values and positions.

    Attributes:
        kind: Kind of the values; None without a value.
        distinct: The distinct values.
        codes: Position of each sample's value in `distinct`, int64 [N]; -1 for null.
    """

    kind: Kind | None
    distinct: Sequence[Label]
    codes: np.ndarray

    def first(self, position: int) -> int:
        """Return the index of the first sample with a value."""
        return int((self.codes == position).argmax())


@dataclass(frozen=True)
class LabelEncoding:
    """Map from labels to class indices, fitted on the training split.

    Attributes:
        label_names: Class names, by class index.
        kind: Kind of the labels.
        classes: Class index of each label.
        has_own_names: Whether the source defines the class names, so that a label is a class index or one of these names.
        rule: Rule for integers without class names.
        train: The training split.
    """

    label_names: tuple[str, ...]
    kind: Kind
    classes: Mapping[Label, int]
    has_own_names: bool
    rule: LabelRule
    train: LabelSource

    @classmethod
    def fit(
        cls, values: Any, *, source: LabelSource, names: Sequence[str] | None = None, rule: LabelRule = "keep"
    ) -> LabelEncoding:
        """Determine the classes from the labels of the training split.

        Integers are class indices: with rule `keep`, every integer up to the largest one is a class; with `remap`, the integers
        that occur are the classes, in ascending order. Strings and booleans become sorted class names.

        Args:
            values: The label column of the training split.
            source: Its origin.
            names: Class names that the source defines; labels are then class indices or these names. None = no names.
            rule: Rule for integers without class names.

        Raises:
            UserError: If the column has labels of another type or out of range, no label at all, or the rule has no effect.
        """
        column = _read_column(values, source)
        if names is not None:
            refuse_remap(rule, setting=source.rule_setting, because="the source defines the class names")
            return cls._with_names(tuple(names), column, source)
        labels = _present(column)
        if column.kind is None or not labels:
            raise UserError(f"{source.field}: no sample of the {source.split} split has a label; use another column or split")
        if column.kind != "integer":
            refuse_remap(rule, setting=source.rule_setting, because=f"the labels are {column.kind}s")
        if len(labels) > MAX_CLASSES:
            raise UserError(
                f"{source.field}: the {source.split} split has {len(labels)} different labels, more than {MAX_CLASSES}; use "
                "another column"
            )
        _refuse_out_of_range(column, source, rule)
        is_numbered = column.kind == "integer" and rule == "keep"
        ordered: Sequence[Label] = range(int(max(labels)) + 1) if is_numbered else sorted(labels)
        classes = {label: index for index, label in enumerate(ordered)}
        return cls(tuple(map(str, ordered)), column.kind, classes, has_own_names=False, rule=rule, train=source)

    @classmethod
    def _with_names(cls, names: tuple[str, ...], column: _Column, source: LabelSource) -> LabelEncoding:
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{source.field}: two classes have the same name {quoted(repeated[:1])}; rename one of them")
        kind = column.kind or "integer"
        indices = {False: 0, True: 1} if kind == "boolean" else {index: index for index in range(len(names))}
        by_name = {name: index for index, name in enumerate(names)}
        classes: Mapping[Label, int] = by_name if kind == "string" else indices  # type: ignore[assignment]
        return cls(names, kind, classes, has_own_names=True, rule="keep", train=source)

    def encode(self, values: Any, *, source: LabelSource) -> np.ndarray:
        """Map the labels of a split to class indices.

        Args:
            values: The label column of the split.
            source: Its origin.

        Returns:
            Class indices, int64 [N]; -1 (`UNLABELED`) for a sample without a label.

        Raises:
            UserError: If a label is of another type than those of the training split, or is not one of its labels.
        """
        column = _read_column(values, source)
        if column.kind not in (None, self.kind):
            raise UserError(
                f"{source.field}: the labels of the {self.train.split} split are {self.kind}s, those of the {source.split} "
                f"split are {column.kind}s ({quoted(list(map(str, column.distinct[:1])))}); both must be of the same type"
            )
        found = [self._class_of(label) for label in column.distinct]
        if _UNKNOWN in found:
            position = found.index(_UNKNOWN)
            raise UserError(self._unknown(column.distinct[position], source.sample(column.first(position))))
        # A null has the position -1, the last entry.
        return np.array([*found, UNLABELED], dtype=np.int64)[column.codes]

    def notices(self, labels: np.ndarray, *, source: LabelSource) -> tuple[str, ...]:
        """Return lines for the user about the training split: classes and samples without labels, names that look alike.

        Args:
            labels: Class indices of a split, int64 [N].
            source: Their origin.
        """
        if source != self.train:
            return ()
        is_labeled = labels >= 0
        if not is_labeled.any():
            return (
                "data.label_column: null, so that the training learns from the teacher alone; the agreement with the teacher "
                "takes the place of the accuracy",
            )
        counts = np.bincount(labels[is_labeled], minlength=len(self.label_names))
        empty = [self.label_names[index] for index in np.flatnonzero(counts == 0)]
        setting = self.train.rule_setting
        is_numbered = self.kind == "integer" and not self.has_own_names
        lines = []
        if empty:
            field = setting if is_numbered else self.train.field
            remedy = f"; set {setting} to remap if only the labels that occur are classes" if is_numbered else ""
            lines.append(f"{field}: {len(empty)} of {len(counts)} classes have no training sample: {quoted(empty)}{remedy}")
        if unlabeled := int((~is_labeled).sum()):
            lines.append(
                f"{self.train.field}: {unlabeled} of {len(labels)} samples of the {self.train.split} split have no label (null "
                "or -1); they are trained with the teacher alone, and not drawn for validation"
            )
        by_look: dict[str, list[str]] = {}
        for name in self.label_names:
            by_look.setdefault(_look(name), []).append(name)
        lines += [
            f"{self.train.field}: the class names {quoted(names)} look alike but differ; fix the labels if they are one class"
            for names in by_look.values()
            if len(names) > 1
        ]
        return tuple(lines)

    def _class_of(self, label: Label) -> int:
        if self.kind == "integer" and label == UNLABELED:
            return UNLABELED
        return self.classes.get(label, _UNKNOWN)

    def _unknown(self, label: Label, sample: str) -> str:
        if self.kind == "integer" and self.rule == "keep":
            return (
                f"{sample} is {label}, but labels must be integers, at least 0 and below {len(self.label_names)}, the number "
                f"of classes of the {self.train.split} split; fix the label or remove the sample"
            )
        alike = [name for name in self.label_names if _look(name) == _look(str(label))]
        hint = f" ({quoted(alike)} looks alike but differs)" if alike else ""
        rule = "is not one of the class names" if self.has_own_names else f"no sample of the {self.train.split} split has"
        return f"{sample} is {label!a}, which {rule}{hint}; fix the label or remove the sample"


def refuse_unlabeled(labels: np.ndarray, *, split: str, remedy: str) -> None:
    """Raise UserError if a sample of a held-out split has no label.

    Args:
        labels: Class indices of the split, int64 [N].
        split: Purpose of the split, validation or test.
        remedy: What to do.
    """
    if len(unlabeled := np.flatnonzero(labels < 0)):
        raise UserError(
            f"data.label_column: {len(unlabeled)} of {len(labels)} samples of the {split} split have no label (null or -1; the "
            f"first is sample {unlabeled[0]}), but nothing can be measured on them; {remedy}"
        )


def refuse_remap(rule: LabelRule, *, setting: str, because: str) -> None:
    """Raise IneffectiveSetting for the rule `remap` where it has no effect."""
    if rule == "remap":
        raise IneffectiveSetting(setting, f"remap has no effect, because {because}; leave it out")


def _look(name: str) -> str:
    """Return a key that is equal for names that are drawn alike: composed letters, without spaces around them."""
    return unicodedata.normalize("NFKC", name).strip()


def _present(column: _Column) -> list[Any]:
    """Return the distinct labels without -1."""
    if column.kind != "integer":
        return list(column.distinct)
    return [label for label in column.distinct if label != UNLABELED]


def _refuse_out_of_range(column: _Column, source: LabelSource, rule: LabelRule) -> None:
    """Raise UserError for an empty string, or an integer that is not valid under the rule."""
    limit = MAX_CLASSES if rule == "keep" else 2**63
    for position, label in enumerate(column.distinct):
        if isinstance(label, str):
            value, is_valid = "an empty string", bool(label)
            allowed, remedy = "not empty", "use null for a sample without a label, or remove the sample"
        else:
            value, is_valid = str(label), UNLABELED <= label < limit
            allowed = f"at least 0 and below {limit}"
            remedy = "fix the label or remove the sample"
            remedy += f", or set {source.rule_setting} to remap if it is an identifier" if label >= limit else ""
        if not is_valid:
            raise UserError(
                f"{source.sample(column.first(position))} is {value}, but labels must be {column.kind}s, {allowed}; {remedy}"
            )


def _read_column(values: Any, source: LabelSource) -> _Column:
    """Determine the distinct labels. Raises UserError for labels that are not integers, strings or booleans."""
    if hasattr(values, "dictionary_encode"):
        return _read_arrow(values, source)
    if isinstance(values, np.ndarray) and (values.dtype.kind != "O" or values.ndim > 1):
        return _read_array(values, source)
    return _read_list(list(values), source)


def _read_arrow(values: Any, source: LabelSource) -> _Column:
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind = values.type
    if types.is_null(kind):
        return _Column(None, [], np.full(len(values), -1))
    if types.is_struct(kind) or types.is_map(kind):
        raise _refused(_DICTS, source)
    if types.is_nested(kind):
        raise _refused(_LISTS, source)
    if types.is_floating(kind) or types.is_decimal(kind):
        raise _refused(_FLOATS, source)
    is_string = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    if not (is_string or types.is_integer(kind) or types.is_boolean(kind)):
        raise _refused(f"of type {kind}", source)
    encoded = values.dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    name: Kind = "string" if is_string else "boolean" if types.is_boolean(kind) else "integer"
    return _Column(name, encoded.dictionary.to_pylist(), codes)


def _read_array(values: np.ndarray, source: LabelSource) -> _Column:
    if values.ndim != 1:
        raise _refused(_LISTS, source)
    if values.dtype.kind == "f":
        raise _refused(_FLOATS, source, example=(0, values[0].item()) if len(values) else None)
    if values.dtype.kind not in _KIND_OF_DTYPE:
        raise _refused(f"of type {values.dtype}", source)
    distinct, codes = np.unique(values, return_inverse=True)
    return _Column(_KIND_OF_DTYPE[values.dtype.kind], distinct.tolist(), codes.astype(np.int64))


def _read_list(values: list[Any], source: LabelSource) -> _Column:
    kinds = {each: _kind_of(each) for each in set(map(type, values)) if each is not type(None)}
    for what in (kind for kind in kinds.values() if kind not in ("integer", "string", "boolean")):
        position = next(index for index, value in enumerate(values) if kinds.get(type(value)) == what)
        raise _refused(what, source, example=(position, values[position]))
    if len(set(kinds.values())) > 1:
        raise _refused(f"of several types ({_one_of_each(values, kinds)})", source)
    distinct = [value for value in dict.fromkeys(values) if value is not None]
    positions: dict[Any, int] = {value: position for position, value in enumerate(distinct)} | {None: -1}
    codes = np.fromiter(map(positions.__getitem__, values), np.int64, len(values))
    kind: Any = next(iter(kinds.values()), None)
    return _Column(kind, [value.item() if isinstance(value, np.generic) else value for value in distinct], codes)


def _kind_of(label_type: type) -> str:
    """Return the kind of labels of a Python or NumPy type, or words for labels that are refused."""
    if issubclass(label_type, bool | np.bool_):
        return "boolean"
    if issubclass(label_type, int | np.integer):
        return "integer"
    if issubclass(label_type, str):
        return "string"
    if issubclass(label_type, float | np.floating):
        return _FLOATS
    if issubclass(label_type, Mapping):
        return _DICTS
    is_list = issubclass(label_type, Sequence | set | np.ndarray) and not issubclass(label_type, bytes)
    return _LISTS if is_list else f"of type {label_type.__name__}"


def _one_of_each(values: list[Any], kinds: Mapping[type, str]) -> str:
    """Return the first label of each kind, for a message."""
    first: dict[str, str] = {}
    for index, value in enumerate(values):
        if value is not None:
            first.setdefault(kinds[type(value)], f"sample {index}: {value!a}")
    return ", ".join(first.values())


def _refused(what: str, source: LabelSource, *, example: tuple[int, Any] | None = None) -> UserError:
    text = "" if example is None else f" (sample {example[0]}: {ascii(example[1])[:_LONGEST_EXAMPLE]})"
    return UserError(
        f"{source.field}: the labels of the {source.split} split are {what}{text}, but each sample must have one label, an "
        f"integer, a string or a boolean; {_REMEDIES.get(what, 'use another column')}"
    )
