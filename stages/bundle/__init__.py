"""bundle: the counted code as one file."""
