"""Networks: construction by name, weights, feature extraction, projectors, input normalization, and fast inference."""
