"""How a step runs: plans, refreshes, failures, compilation, the product of the roles."""
