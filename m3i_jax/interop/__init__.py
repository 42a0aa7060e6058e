"""Weights of other projects as trees of arrays, and back. Only names and layouts are known here, no
models: a tree goes in, a tree comes out."""
