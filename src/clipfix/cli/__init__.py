"""The command line: verbs, sweeps, the check of a config's types, and one-line error messages."""
