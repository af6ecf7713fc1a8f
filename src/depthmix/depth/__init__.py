"""What each depth predicts, and which of them take part."""
