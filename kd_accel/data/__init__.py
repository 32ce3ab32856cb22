"""Images, which samples of them are used for what, how they are seen, and in which order they come."""
