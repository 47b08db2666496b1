"""Score-first test-time training: score a chunk, then learn from it."""
