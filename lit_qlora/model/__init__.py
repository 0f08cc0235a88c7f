"""The model's computation, in plain torch."""
