"""Trainers with the whole objective, their log and their evaluation, and what they resume from."""
