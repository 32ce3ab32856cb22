"""Run configuration: schema, parsing of files and flags, rules. Imports no torch."""
