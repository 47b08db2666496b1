"""Audit anybody's scorer against the rules of the challenge (docs/audit.md)."""
