"""Models from anywhere: found, loaded, and what they write."""
