"""Tests mirror the package: lit_qlora/x/y.py is tested by tests/x/test_y.py."""
