"""Benchmarks, one per file. Each computes named percentages of a model, and its result for every item."""
