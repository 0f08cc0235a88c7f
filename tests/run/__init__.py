"""Whole runs, interrupted in every way, in processes of their own."""
