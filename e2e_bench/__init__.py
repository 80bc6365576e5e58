"""Benchmarks with the peers beside us, and the demo: ``python -m e2e_bench --help``."""
