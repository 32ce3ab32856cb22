"""Model statistics and latency benchmark."""
