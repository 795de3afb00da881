"""Each paper's method: oracles, facts, the contract of every class."""
