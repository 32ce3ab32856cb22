"""Builders of the parts of a training: functions from a `RunConfig` to objects that take plain arguments."""
