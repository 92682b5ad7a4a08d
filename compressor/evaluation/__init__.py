"""Quality, size and speed of a live model, as plain numbers."""
