"""Experts that are skipped while a model runs."""
