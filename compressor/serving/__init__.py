"""What each serving engine runs: rules as data, and what they say of a checkpoint."""
