"""Pure functions from tensors to scalars. No device, rank, config or logging."""
