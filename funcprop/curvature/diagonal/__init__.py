"""The exact diagonal of a Hessian."""
