"""Merge runs that differ only in the seed into one record."""
