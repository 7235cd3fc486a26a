"""What generated tasks there are: names and difficulties, without anything that draws them."""

TASKS = ("arithmetic",)
"""What `elastic evaluate` can let members answer."""

FAMILIES = ("addition", "subtraction", "comparison", "sorting", "program")
"""Kinds of problems of `arithmetic`."""

DIFFICULTIES = range(1, 9)
"""Of each: 1 to 3 are a few dozen words, 4 to 8 some hundred."""
