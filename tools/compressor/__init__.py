"""Compress text with a packed model, and decompress it without loss."""
