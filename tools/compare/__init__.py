"""Compare two ledgers document by document: the difference in bits per byte, in total and by part."""
