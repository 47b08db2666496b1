"""Code that both evaluations, the audit and the bundle share: the validation stream, queries, byte trees, running an evaluation."""
