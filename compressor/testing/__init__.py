"""What a plugin's tests need: tiny random models of every architecture that transformers knows."""
