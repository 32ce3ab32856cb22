"""A teacher's answers on disk: what stands where (layout), one file (shards), what is complete (manifest), and reading."""
