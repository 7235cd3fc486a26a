"""Cached top-k log-probabilities of a teacher: written once, read by every run on the same text."""
