"""Compare two ledgers document by document: how many bits per byte they differ by, and where."""
