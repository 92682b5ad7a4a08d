"""`compressor plugin new`: a small project that is a plugin."""
