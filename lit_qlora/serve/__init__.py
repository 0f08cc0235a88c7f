"""An OpenAI-compatible server of a model and its adapters. It is imported by scripts/serve.py alone."""
