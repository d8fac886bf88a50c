"""Symmetric linear operators that are applied, never stored, and what can be asked of any of them."""
