"""Evaluate the members of a family: size, loss, samples."""
