"""Image sources, splits, views, and loaders of training and evaluation batches."""
