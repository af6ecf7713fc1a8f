"""What other libraries bring: in which extra they come, and what their releases do differently."""
