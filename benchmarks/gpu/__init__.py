"""What only a GPU can show, in one command and one report: ``make gpu``.

Each section is a module with ``run(section, settings)``. It runs in a process of its own, so that
what ends one (a fault of the device, no memory left) ends no other.
"""
