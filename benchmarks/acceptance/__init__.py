"""Items of `python -m benchmarks.gpu_acceptance`, a module for each, and the guard around them."""
