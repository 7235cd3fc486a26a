"""Studies: ways to train a family compared, at equal tokens, from the same parent.

`arms` turns an arm into runs, `work` does what is not done yet, `run` trains and measures one of
them, `compare` says how they differ.
"""
