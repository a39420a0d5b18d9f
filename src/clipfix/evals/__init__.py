"""Benchmarks, one a file: what a model answers, as named percentages and as what every item got."""
