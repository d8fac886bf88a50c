"""The derivative of a function as equations, and their check by numbers."""
