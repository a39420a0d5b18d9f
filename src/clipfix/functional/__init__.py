"""Formulas: tensors in, tensors out. No state, no processes, no config; randomness is handed in."""
