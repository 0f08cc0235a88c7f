"""Tests of lit_qlora/files."""
