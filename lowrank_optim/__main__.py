"""``python -m lowrank_optim`` is the command ``lowrank-optim``."""

from lowrank_optim.cli.main import main

if __name__ == "__main__":
    main(prog_name="lowrank-optim")
