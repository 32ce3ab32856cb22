"""Benchmark of models: parameters, multiply-adds and latency."""
