"""Merge runs of several seeds into one record."""
