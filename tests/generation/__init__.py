"""Tests of lit_qlora/generation."""
