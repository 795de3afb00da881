"""Say which backend serves each kind of device, and why: ``python -m lowrank_optim.ops``."""

import os

import torch

from lowrank_optim.ops import cublas
from lowrank_optim.ops.dispatch import BACKENDS, VARIABLE, available, backend


def main() -> None:
    """Print one table a device type that this torch knows."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    forced = os.environ.get(VARIABLE)
    print(f"{VARIABLE}: {forced or 'not set, the best available is chosen'}")
    for device in devices:
        for dtype in (torch.float32, torch.float64):
            try:
                module = backend(torch.empty(0, dtype=dtype, device=device))
                chosen = module.__name__.rsplit(".", 1)[-1]
            except (RuntimeError, ValueError) as error:
                chosen = f"none: {error}"
            print(f"{device}, {str(dtype)[6:]}: {chosen}")
        for name in BACKENDS:
            ready, reason = available(name, device)
            print(f"  {name:<12} {'yes' if ready else 'no':<4} {reason}")
    if "cuda" in devices:
        ready, reason = cublas.available()
        print(f"products read their factors on cuda: {'yes' if ready else 'no'}, {reason}")


if __name__ == "__main__":
    main()
