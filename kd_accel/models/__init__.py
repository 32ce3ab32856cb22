"""Networks and what is attached to them: stems, weights, layers, projectors, and the one module that is trained."""
