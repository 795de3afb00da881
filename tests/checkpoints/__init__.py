"""State: what it holds, saving, loading, importing."""
