"""Test-time training of low-rank adapters, one set for each document."""
