"""The command line: verbs, sweeps, the check of a config, and errors in one line."""
