"""Tests of lit_qlora/serve."""
