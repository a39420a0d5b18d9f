"""Shards to batches, and what they come from: published sets, corpora, the drawn world."""
