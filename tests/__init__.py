"""Tests mirror the package: lit_qlora/x.py is tested by tests/test_x.py."""
