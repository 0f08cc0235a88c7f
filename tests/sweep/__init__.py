"""Tests of lit_qlora/sweep."""
