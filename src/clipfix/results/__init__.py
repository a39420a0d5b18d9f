"""Results of runs: scores before and after training, their provenance, figures, and the comparison of runs."""
