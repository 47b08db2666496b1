"""calibrate: statistics of activations and gradients on training data, for quantisation."""
