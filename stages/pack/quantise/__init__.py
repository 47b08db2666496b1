"""Quantisation: weights to integers, within the byte budget."""
