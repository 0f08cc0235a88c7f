"""What a model is asked to judge it: log-probabilities, metrics, validations during training."""
