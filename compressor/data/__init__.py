"""Text → token sequences → batches."""
