"""The command ``lowrank-optim``. Importing the package imports nothing of it."""
