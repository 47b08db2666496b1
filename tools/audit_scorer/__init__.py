"""Audit an external scorer against the rules of the challenge (docs/audit.md)."""
