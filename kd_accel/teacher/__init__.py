"""The teacher: a frozen classifier with its own normalization, loaded from a run or from weights, run live."""
