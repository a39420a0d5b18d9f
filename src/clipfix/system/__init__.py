"""Processes, files and secrets: the standard library and torch.distributed alone. Everything may import it."""
