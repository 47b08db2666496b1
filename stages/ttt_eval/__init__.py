"""ttt_eval: score a chunk, then learn from it: score-first test-time training."""
