"""The n-gram table, and the tilt of a distribution towards its hint."""
