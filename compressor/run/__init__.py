"""One recipe from start to end, and decisions made or applied without a run."""
