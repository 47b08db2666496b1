"""Rebuild a record in a temporary clone and compare every byte."""
