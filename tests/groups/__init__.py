"""Parameter groups."""
