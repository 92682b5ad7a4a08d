"""Processes, hardware, memory, progress, the network."""
