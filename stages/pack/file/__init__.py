"""The file model.bin, and the processes that write and read it."""
