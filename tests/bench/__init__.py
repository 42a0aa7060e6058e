"""Benchmarks of counts and of ratios within one run. Each is one command, `python -m
tests.bench.NAME`; none asserts a wall time.
"""
