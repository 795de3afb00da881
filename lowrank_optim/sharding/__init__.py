"""Parameters that lie on several processes: which part is here, and what the ranks exchange."""
