"""Test-time training of the model's own weights by SGD."""
