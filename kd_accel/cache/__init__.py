"""The teacher cache: its files, its reader and its writer."""
