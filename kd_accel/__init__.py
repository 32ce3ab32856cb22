"""kd_accel: train a teacher, a student and its distilled versions, and compare them."""

__version__ = "0.1.0"
