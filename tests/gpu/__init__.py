"""Tests that need a CUDA device; run by `make test-gpu`."""
