"""Tests of lit_qlora/convert."""
