"""The forward and the backward sweep of any function, every value and gradient by name."""
