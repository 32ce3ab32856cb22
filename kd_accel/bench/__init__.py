"""What a model costs: parameters, arithmetic, latency."""
