"""Options of dataclasses: their types, their checks, and what in them is secret."""
