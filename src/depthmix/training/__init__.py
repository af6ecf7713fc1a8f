"""A run: its settings, its folder, and the training itself."""
