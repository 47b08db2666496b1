"""Entropy coding: integers to bytes and back."""
