"""Run a record's pipeline again in a temporary clone and compare every byte."""
