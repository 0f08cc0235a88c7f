"""Tests of lit_qlora/evaluate."""
