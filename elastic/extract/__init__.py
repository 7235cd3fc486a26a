"""Cut a member out of an elastic checkpoint: to a directory, or into memory.

Nothing is imported here: `import elastic` goes through this package to `layerwise`, and must not
cost the import of torch.
"""
