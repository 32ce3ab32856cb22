"""Image sources, splits, views, and the loaders of training and evaluation batches."""
