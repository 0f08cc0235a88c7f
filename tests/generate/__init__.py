"""Tests of lit_qlora/generate."""
