"""Files on disk: atomic writes, YAML, tensors, digests, and the user's own code."""
