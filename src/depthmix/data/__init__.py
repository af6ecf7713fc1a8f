"""Data sets by name or from files, and what becomes of their records."""
