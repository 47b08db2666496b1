"""Statistics of the packed tensors."""
