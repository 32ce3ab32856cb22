"""How values are kept: float32, float16, bfloat16, or int8 with a scale per channel.

Largest error of `decode(encode(x))`, relative to |x| for the float types (to the channel's largest |x| in the same shard for
int8): float32 0, float16 2^-11, bfloat16 2^-8, int8 1/254.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_accel.config.schema import StorageType
from kd_accel.errors import UserError

TORCH_TYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
INT8_LARGEST = 127
RELATIVE_ERROR = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 1 / 254}


def encode(values: Tensor, dtype: StorageType, *, name: str) -> tuple[Tensor, Tensor | None]:
    """float32 [n, ...] -> (values as they are kept, scale [D] or None). name: for the message.

    Raises UserError for numbers that are not finite, or too large for the type.
    """
    if dtype == "int8":
        largest = values.abs().transpose(0, 1).flatten(1).amax(1)
        _refuse_not_finite(largest, name, dtype)
        scale = torch.where(largest > 0, largest / INT8_LARGEST, torch.ones_like(largest))
        return torch.round(values / _by_channel(scale, values)).clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8), scale
    stored = values.to(TORCH_TYPE[dtype])
    _refuse_not_finite(stored, name, dtype)
    return stored, None


def decode(stored: Tensor, scale: Tensor | None) -> Tensor:
    """The inverse, float32. scale: [D], or [n, D] where samples come from several shards."""
    values = stored.float()
    return values if scale is None else values * _by_channel(scale, values)


def _by_channel(scale: Tensor, values: Tensor) -> Tensor:
    leading = scale.shape if scale.ndim == 2 else (1, *scale.shape)
    return scale.reshape(*leading, *[1] * (values.ndim - 2))


def _refuse_not_finite(values: Tensor, name: str, dtype: StorageType) -> None:
    extremes = torch.stack([values.amax(), values.amin()])  # a NaN is both; a tenth of the time of asking every value
    if not torch.isfinite(extremes).all():
        raise UserError(
            f"teacher.dtype: what the teacher gives at {name} is not finite, or too large for {dtype}; use bfloat16 or "
            "float32, and evaluate the teacher if that does not help"
        )
