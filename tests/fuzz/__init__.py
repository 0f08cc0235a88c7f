"""Inputs that are broken on purpose."""
