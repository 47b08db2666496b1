"""Code that all stages share.

This file imports nothing: stages/__init__.py must pin the instruction set before numpy is imported.
"""
