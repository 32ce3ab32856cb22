"""Items of `python -m benchmarks.gpu_acceptance`: one module each, and the guard around them."""
