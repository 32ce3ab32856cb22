"""The teacher of a cache as its spec describes it, in place of a teacher that is not on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kd_accel.cache.manifest import read_spec
from kd_accel.cache.spec import LOGITS, CacheSpec
from kd_accel.errors import UserError
from kd_accel.io.hashing import settings_digest
from kd_accel.models.projectors import Shape


@dataclass(frozen=True)
class StoredTeacher:
    """Teacher that cannot run: what its cache records of it.

    Attributes:
        directory: Directory of the cache.
        cache_spec: Spec of the cache.
    """

    directory: Path
    cache_spec: CacheSpec

    @classmethod
    def read(cls, directory: Path) -> StoredTeacher:
        """Read the spec of a cache. Raises UserError if it is missing, damaged, or of another version."""
        cache_spec = read_spec(directory)
        for name in ("teacher", "numerics", "data", "views"):
            if not isinstance(cache_spec.fingerprint_fields.get(name), dict):
                raise UserError(
                    f"teacher.cache.dir: {directory}/spec.json is damaged (no {name}); copy or build the cache again"
                )
        return cls(directory, cache_spec)

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the fields of the teacher in the fingerprint of the cache."""
        return dict(self.cache_spec.fingerprint_fields["teacher"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names of the data from which the cache was built, in the order of the logits."""
        return tuple(self.cache_spec.fingerprint_fields["data"]["label_names"])

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the teacher, equal to that of the teacher from which the cache was built."""
        return settings_digest(self.fingerprint_fields())

    def numerics(self) -> dict[str, Any]:
        """Return the numerics of the teacher's forward during the build."""
        return dict(self.cache_spec.fingerprint_fields["numerics"])

    def raw_shapes(self, layers: Mapping[str, str]) -> dict[str, Shape]:
        """Return the shapes (D, H, W) of the teacher's feature maps, before the target functions.

        Args:
            layers: The setting that lists each layer, for messages.

        Raises:
            UserError: If the cache lacks the features of a layer.
        """
        missing = [
            f"{layer} ({field})" for layer, field in layers.items() if layer not in self.cache_spec.tensors or layer == LOGITS
        ]
        if missing:
            stored = ", ".join(name for name in self.cache_spec.tensors if name != LOGITS) or "no features"
            raise UserError(
                f"teacher.cache.dir: the cache in {self.directory} lacks the features of {' and '.join(missing)}, which need "
                f"the teacher (stored: {stored}); compare stored layers, or set teacher.run and run `kd-accel cache build`"
            )
        specs = {layer: self.cache_spec.tensors[layer] for layer in layers}
        # The stored functions (identity, PCA) keep height and width.
        return {layer: cast(Shape, (spec.raw_channels, *spec.shape[1:])) for layer, spec in specs.items()}

    def notice(self) -> str:
        """Return a line for the user: the outputs are used as stored."""
        teacher, numerics = self.fingerprint_fields(), self.numerics()
        switches = ", ".join(f"{name} {str(value).lower()}" for name, value in numerics.items())
        return (
            f"teacher: not set, so the outputs in {self.directory} ({teacher.get('arch') or 'unnamed architecture'}, "
            f"fingerprint {self.fingerprint}; computed with {switches}) are used as stored; none was recomputed, and another "
            "teacher or other numerics cannot be detected"
        )
