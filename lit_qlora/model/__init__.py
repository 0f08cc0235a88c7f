"""What the model computes, in plain torch."""
