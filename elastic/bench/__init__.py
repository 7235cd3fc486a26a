"""Bench: what a step costs in time and memory, as ratios within one run."""
