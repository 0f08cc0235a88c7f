"""Measures of a model: log-probabilities, metrics, validations during training."""
