"""Data sources with random access: one file per kind, see `registry`."""
