"""Writing a store of what the teacher says: `python -m elastic.teach`."""
