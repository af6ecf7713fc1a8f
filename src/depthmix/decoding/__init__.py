"""Generation that runs layers only when they are needed."""
