"""One run: check, prepare, rank, train, write."""
