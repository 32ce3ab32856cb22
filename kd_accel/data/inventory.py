"""Inventory of a split: digests of its samples, colors, and the samples that cannot be decoded, each found in one pass.

Input: an image set. Output: the same set with its digests, and files under `$KD_ACCEL_HOME` (default ~/.cache/kd_accel) from
which the next start reads them. The files are found by the stamp of the split: path, size and time of each of its files. Bytes
that change under the same size and time are found by `kd-accel data check`, which reads everything again.

An image set in memory is decoded at every start, and its digests are taken from the same read. Nothing is kept for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL

import kd_accel
from kd_accel.config.data_schema import OnError
from kd_accel.data.dataset import Decoded, Digests, ImageSet, MemoryImages, empty_images
from kd_accel.data.encoded import EncodedImages, unreadable_image
from kd_accel.data.passes import Peers, over_samples
from kd_accel.errors import UserError
from kd_accel.io.hashing import arrays_digest, settings_digest
from kd_accel.io.home import keep_arrays, load_arrays

Result = TypeVar("Result")

_DIRECTORY = "inventory"
_MEMORY_CHUNK_SAMPLES = 1024


def stamp_of(paths: Sequence[str | Path], *, selection: Sequence[str] = ()) -> str:
    """Return a digest of the path, size and time of files. A change of any of them invalidates what is kept for the files.

    Args:
        paths: The files of a split, in the order of its samples.
        selection: Names that select the samples within the files, such as columns.
    """
    states = []
    for path in paths:
        try:
            state = os.stat(path)  # noqa: PTH116  (100,000 Path objects take half a second)
        except OSError:
            states.append((0, 0))
        else:
            states.append((state.st_size, state.st_mtime_ns))
    here = Path.cwd()
    names = "\0".join(os.path.join(here, path) for path in paths)  # noqa: PTH118  (as above)
    encoded = names.encode("utf-8", errors="surrogateescape")
    return arrays_digest(
        np.array(states, dtype=np.int64), np.frombuffer(encoded, np.uint8), np.frombuffer(repr(selection).encode(), np.uint8)
    )


@dataclass(frozen=True)
class Checked:
    """Result of a pass that has read and decoded samples.

    Attributes:
        digests: Digests of the samples.
        unreadable: Reason by the index of each sample that cannot be read or decoded.
        constant: Indices of the images of one color, int64 [k].
        counts: Number of pixels of each level of each channel, int64 [3, 256], over the readable samples.
    """

    digests: Digests
    unreadable: dict[int, str]
    constant: np.ndarray
    counts: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Checked]) -> Checked:
        """Combine the results of consecutive samples."""
        return cls(
            Digests.join([part.digests for part in parts]),
            {sample: reason for part in parts for sample, reason in part.unreadable.items()},
            np.concatenate([part.constant for part in parts]),
            np.sum([part.counts for part in parts], axis=0),
        )


def in_memory(encoded: EncodedImages, *, on_error: OnError, num_workers: int) -> MemoryImages:
    """Decode all images of a split into memory.

    Args:
        encoded: The split.
        on_error: Whether an image that cannot be decoded is an error (stop), or listed in `unreadable` (skip).
        num_workers: Number of worker processes, `data.num_workers`; 0 = one for each processor of this rank.

    Raises:
        UserError: If an image cannot be decoded, and `on_error` is stop.
    """
    samples = np.arange(encoded.num_samples)
    images = empty_images(len(samples), encoded.decoder.image_size)
    digests, unreadable, done = [], {}, 0
    workers, title = _workers(encoded, num_workers), f"decode {encoded.split}"
    for part in over_samples(encoded.decoded, samples, num_workers=workers, title=title):
        if part.unreadable and on_error == "stop":
            raise unreadable_image(*next(iter(part.unreadable.items())))
        images[done : done + len(part.pixels)] = part.pixels
        done += len(part.pixels)
        digests.append(part.digests)
        unreadable.update(part.unreadable)
    return MemoryImages(
        images,
        encoded.labels,
        encoded.label_names,
        digests=Digests.join(digests),
        unreadable=unreadable,
        notices=encoded.notices,
        paths=encoded.paths,
    )


@dataclass(frozen=True)
class Inventory:
    """Inventories of the splits of a launch. Every rank must call the same methods in the same order.

    Args:
        on_error: What happens with an image that cannot be decoded, `data.on_error`.
        num_workers: Number of worker processes, `data.num_workers`; 0 = one for each processor of this rank.
        peers: Ranks of the launch that share the work.
        rereads: Whether every image is read again, regardless of what is kept.

    Attributes:
        notices: Lines for the user about results that could not be kept.
    """

    on_error: OnError = "stop"
    num_workers: int = 0
    peers: Peers = field(default_factory=Peers)
    rereads: bool = False
    notices: list[str] = field(default_factory=list)

    def take(self, images: ImageSet) -> None:
        """Provide an image set with the digests of all its samples and, with `on_error: skip`, the unreadable samples.

        Raises:
            UserError: If a file cannot be read, and `on_error` is stop; or if the ranks read different images.
        """
        if not isinstance(images, EncodedImages) or images.is_held:
            return
        unreadable = _load_unreadable(images) if self.on_error == "skip" else {}
        digests = None if self.rereads else _load_digests(images)
        if self.peers.all(digests is not None and unreadable is not None):
            assert digests is not None and unreadable is not None
        elif self.on_error == "skip":
            checked = self.check(images)
            digests, unreadable = checked.digests, checked.unreadable
        else:
            digests, unreadable = Digests.join(self._share(images, images.read_digests, what="read")), {}
            self._keep(_digests_name(images), contents=digests.contents.view(np.int64), labeled=digests.labeled.view(np.int64))
        # Nodes may have copies of the files that differ.
        if not self.peers.agree(arrays_digest(digests.labeled, np.array(sorted(unreadable), dtype=np.int64))):
            raise UserError(
                f"data.source: the processes of this launch read different images or labels in the {images.split} split; make "
                "the copies of all nodes equal"
            )
        images.hold(digests, unreadable)

    def kept_contents(self, images: ImageSet) -> np.ndarray | None:
        """Return the digests of the images that an earlier start has kept, uint64 [N], or None."""
        digests = _load_digests(images) if isinstance(images, EncodedImages) else None
        return None if digests is None else digests.contents

    def check(self, images: ImageSet) -> Checked:
        """Read and decode all samples, regardless of what is kept, and keep the result. Images in memory are not read again."""
        if not isinstance(images, EncodedImages):
            return Checked.join([_Check(images)(part) for part in _chunks(np.arange(images.num_samples))])
        checked = Checked.join(self._share(images, _Check(images), what="check"))
        digests, reasons = checked.digests, json.dumps(list(checked.unreadable.items()))
        self._keep(_digests_name(images), contents=digests.contents.view(np.int64), labeled=digests.labeled.view(np.int64))
        self._keep(_unreadable_name(images), unreadable=np.frombuffer(reasons.encode(), np.uint8))
        return checked

    def color_counts(self, images: ImageSet, samples: np.ndarray) -> np.ndarray:
        """Count the pixels of each level of each channel.

        Args:
            images: The image set.
            samples: Indices, int64 [n].

        Returns:
            Counts, int64 [3, 256].

        Raises:
            UserError: If an image cannot be decoded.
        """
        count = _Colors(images)
        if not isinstance(images, EncodedImages):
            return _total([count(part) for part in _chunks(samples)])
        name = _name("colors", images, **_decoding(images), samples=arrays_digest(samples))
        kept = None if self.rereads else _load(name)
        if self.peers.all(kept is not None):
            assert kept is not None
            return kept["counts"]
        counts = _total(self._share(images, count, samples, what="colors of"))
        self._keep(name, counts=counts)
        return counts

    def _share(
        self,
        images: EncodedImages,
        function: Callable[[np.ndarray], Result],
        samples: np.ndarray | None = None,
        *,
        what: str,
    ) -> list[Result]:
        """Compute a function of chunks of samples (None = all), shared out over the ranks and their workers."""
        drawn = np.arange(images.num_samples) if samples is None else samples
        title = f"{what} {images.split}"

        def compute(share: np.ndarray) -> list[Result]:
            return list(over_samples(function, share, num_workers=_workers(images, self.num_workers), title=title))

        return self.peers.share(compute, drawn, key=images.stamp or "")

    def _keep(self, name: str | None, **arrays: np.ndarray) -> None:
        if name is None or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        problem = keep_arrays(name, arrays)
        if problem is not None:
            notice = f"{problem}; the digests and colors of the images are computed at every start: set another directory"
            self.notices[:] = [notice]


def _workers(images: EncodedImages, num_workers: int) -> int | None:
    """Return the number of worker processes; None = one for each processor."""
    return num_workers or (None if images.can_be_forked else 0)


@dataclass(frozen=True)
class _Check:
    """Function that checks samples of an image set."""

    images: ImageSet

    def __call__(self, samples: np.ndarray) -> Checked:
        decoded = _decoded(self.images, samples)
        is_readable = ~np.isin(samples, list(decoded.unreadable))
        pixels, readable = decoded.pixels[is_readable], samples[is_readable]
        is_constant = (pixels == pixels[:, :1, :1]).all(axis=(1, 2, 3))
        return Checked(decoded.digests, decoded.unreadable, readable[is_constant], _counts(pixels))


@dataclass(frozen=True)
class _Colors:
    """Function that counts the colors of samples of an image set."""

    images: ImageSet

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        return _counts(self.images.pixels(samples))


def _decoded(images: ImageSet, samples: np.ndarray) -> Decoded:
    if isinstance(images, EncodedImages):
        return images.decoded(samples)
    unreadable = {sample: images.unreadable[sample] for sample in samples.tolist() if sample in images.unreadable}
    return Decoded(images.pixels(samples), Digests(images.content_digests(samples), images.digests(samples)), unreadable)


def _chunks(samples: np.ndarray) -> list[np.ndarray]:
    return np.array_split(samples, max(1, -(-len(samples) // _MEMORY_CHUNK_SAMPLES)))


def mean_and_std(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute mean and standard deviation of each channel in 0..1, float64 [3], from `Inventory.color_counts`."""
    levels = np.arange(256) / 255
    frequency = counts / counts.sum(1, keepdims=True)
    mean = frequency @ levels
    return mean, np.sqrt(np.maximum(frequency @ levels**2 - mean**2, 0))


def _counts(pixels: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)])


def _total(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.sum([np.zeros((3, 256), dtype=np.int64), *parts], axis=0)


def _load_digests(images: EncodedImages) -> Digests | None:
    arrays = _load(_digests_name(images))
    return None if arrays is None else Digests(*(arrays[name].view(np.uint64) for name in ("contents", "labeled")))


def _load_unreadable(images: EncodedImages) -> dict[int, str] | None:
    arrays = _load(_unreadable_name(images))
    return None if arrays is None else dict(json.loads(arrays["unreadable"].tobytes()))


def _load(name: str | None) -> dict[str, np.ndarray] | None:
    return None if name is None else load_arrays(name)


def _digests_name(images: EncodedImages) -> str | None:
    return _name("digests", images, labels=arrays_digest(images.labels))


def _unreadable_name(images: EncodedImages) -> str | None:
    return _name("unreadable", images, **_decoding(images))


def _decoding(images: EncodedImages) -> dict[str, Any]:
    """Return what decides the pixels of an encoded image."""
    own = {"image_size": images.decoder.image_size, **images.decoder.fingerprint_fields()}
    return {**own, "pillow": PIL.__version__, "kd_accel": kd_accel.__version__}


def _name(kind: str, images: EncodedImages, **key: Any) -> str | None:
    """Return the name of a file of the inventory; None if the image set has no stamp."""
    if images.stamp is None:
        return None
    return f"{_DIRECTORY}/{kind}-{settings_digest({'stamp': images.stamp, 'samples': images.num_samples, **key})}"
