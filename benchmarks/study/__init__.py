"""What the methods learn: a task that is checked first, and the runs on it."""
