"""Compress and decompress text with a packed model."""
