"""pack: weights and Hessians to model.bin. GPTQ, the byte budget, the codec, the container."""
