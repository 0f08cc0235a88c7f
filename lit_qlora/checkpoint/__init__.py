"""Checkpoints on disk: reading and writing weights a tensor at a time."""
