"""The n-gram table, and the tilt of the distribution towards its guess."""
