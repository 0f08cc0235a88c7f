"""The training loop and its parts: optimizers, guards, several processes, state."""
