"""The runner of the small tables of M3I against other methods: `python -m tests.bench.tables`."""
