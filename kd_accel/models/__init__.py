"""Networks and what is attached to them: stems, weights, taps, projectors, and the one module that is trained."""
