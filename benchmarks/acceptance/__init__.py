"""Items of `python -m benchmarks.gpu_acceptance`, one module each, and their isolation from each other."""
