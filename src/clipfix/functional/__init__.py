"""Formulas: pure functions of tensors. They hold no state and use no ranks and no config; random draws are arguments.

Errors begin with the name of the argument, so that a caller can put the config key in front of it.
"""
