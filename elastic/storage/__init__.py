"""Bytes on disk: atomic files, the manifest, tensors by byte ranges and in blocks."""
