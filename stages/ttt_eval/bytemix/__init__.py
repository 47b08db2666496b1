"""A model of bytes (context mixing), mixed in on the binary decisions of a token."""
