"""How moments are stored."""
