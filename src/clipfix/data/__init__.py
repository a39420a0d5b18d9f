"""Batches from WebDataset shards, and the sources of shards: published data sets, corpora, the drawn world."""
