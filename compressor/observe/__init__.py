"""Text through a model, layer by layer, into statistics."""
