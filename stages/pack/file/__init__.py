"""The container model.bin, and the processes that encode and decode its tensors."""
