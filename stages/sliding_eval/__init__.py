"""sliding_eval: the loss of every target with a long context, by overlapping windows."""
