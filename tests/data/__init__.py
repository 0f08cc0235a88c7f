"""Tests of lit_qlora.data."""
