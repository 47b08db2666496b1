"""train: the model, its optimizer, the order of its data, and the training loop."""
