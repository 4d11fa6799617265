"""Benchmarks: what things cost, against what they are compared with."""
