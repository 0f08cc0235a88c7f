"""Tests of lit_qlora/checkpoint."""
