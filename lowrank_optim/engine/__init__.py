"""How a step runs: plan, refresh, project, adapt, apply."""
