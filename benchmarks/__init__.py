"""Suites that compare and record: `python -m benchmarks.NAME`. Each ends with one line of JSON and writes a dated file."""
