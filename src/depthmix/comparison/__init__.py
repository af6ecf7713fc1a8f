"""Evaluated runs, compared on the same items."""
