"""Adapters: the layers that learn, PEFT's files, and merging."""
