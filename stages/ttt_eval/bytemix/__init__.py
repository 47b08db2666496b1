"""The byte model that is mixed in on the decisions of a token."""
