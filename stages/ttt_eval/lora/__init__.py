"""Test-time training of low-rank adapters, one set per document."""
