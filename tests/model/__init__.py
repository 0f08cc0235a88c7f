"""Tests of lit_qlora/model."""
