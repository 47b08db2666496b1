"""sliding_eval: the loss of every target with a long context behind it, by overlapping windows."""
