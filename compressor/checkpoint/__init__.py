"""Folders of safetensors: find, verify, load, stream, save whole."""
