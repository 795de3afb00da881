"""Documentation, demo, and the order of imports."""
