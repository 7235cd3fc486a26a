"""Evaluate: what the members of a family say."""
