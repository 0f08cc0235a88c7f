"""Tests of lit_qlora/train."""
