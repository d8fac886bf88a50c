"""Rematerialisation: what to save for the backward sweep, and what to compute again."""
