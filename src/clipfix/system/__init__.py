"""Processes, files and secrets. Imports the standard library and torch.distributed alone; all rooms may import it."""
