"""bundle: the counted code, packed into one file."""
