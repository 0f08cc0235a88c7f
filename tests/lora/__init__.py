"""Tests of lit_qlora/lora."""
