"""Atomic files and locks, JSON, YAML, tensors, digests, and user code."""
