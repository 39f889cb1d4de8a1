"""Benchmarks: this machine's limits, and how near to them Herder comes. Each module runs as `python -m bench.NAME`."""
