"""Builders: they take a RunConfig apart and build the parts of a training from plain arguments."""
