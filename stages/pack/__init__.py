"""Stage pack: quantises the weights with GPTQ, encodes them, and writes model.bin within the byte budget."""
