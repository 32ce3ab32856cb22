"""Storage types: values that are not finite or too large are refused at any position."""

import pytest
import torch

from kd_accel.cache.shard import encode
from kd_accel.errors import UserError

INFINITE = float("inf")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), INFINITE, -INFINITE])
@pytest.mark.parametrize("place", [0, 29, 47])
def test_a_value_that_is_not_finite_is_refused(dtype, value, place):
    values = torch.linspace(-1, 1, 48)
    values[place] = value
    with pytest.raises(UserError, match="layer1 has a value that is not finite, or too large for"):
        encode(values.view(4, 3, 2, 2), dtype, name="layer1")


@pytest.mark.parametrize("value", [1e5, -1e5])
def test_a_value_that_is_too_large_for_the_type_is_refused(value):
    with pytest.raises(UserError, match="too large for float16"):
        encode(torch.tensor([[0.0, value]]), "float16", name="layer1")


def test_values_at_both_ends_of_the_type_are_kept():
    values = torch.tensor([[65504.0, -65504.0]])
    assert torch.equal(encode(values, "float16", name="layer1")[0].float(), values)
