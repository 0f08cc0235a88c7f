"""Tests of lit_qlora/prompts."""
