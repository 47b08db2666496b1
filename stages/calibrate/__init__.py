"""calibrate: what the inputs of every matrix look like on training data, for GPTQ."""
