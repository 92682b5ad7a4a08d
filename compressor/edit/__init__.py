"""A decision → a smaller model or checkpoint."""
