"""Callbacks that draw figures during training. One file per method; conf/callbacks/<method>.yaml uses it."""
