"""The kernels of csrc/*.cu, executed on the CPU."""
