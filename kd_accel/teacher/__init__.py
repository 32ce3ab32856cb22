"""Who teaches: a teacher that answers live, locked, and the digests by which it is recognized."""
