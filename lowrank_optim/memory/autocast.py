"""``torch.autocast`` of tensors without memory, as on the device that they stand for.

Weights stay in float32. The cast copy of each is kept from its first use to the end of forward, and
what backward needs of it until then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowrank_optim.ops.devices import HOSTS

Autocast = Literal["bfloat16", "float16"]
AUTOCASTS: tuple[Autocast, ...] = get_args(Autocast)

HALF = (torch.bfloat16, torch.float16)

FLOAT32 = frozenset({
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p",
    "reciprocal", "rsqrt", "sinh", "tan", "pow", "softplus", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "norm", "frobenius_norm", "nuclear_norm", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "hinge_embedding_loss", "kl_div",
    "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss",
    "multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss",
    "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp",
})  # fmt: skip
"""Operations that take float32 under ``torch.autocast`` of a GPU; of a CPU most of them do not."""

TO_FLOAT32 = frozenset({"prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum"})
"""Those that give float32 there, where they are given no dtype."""


class OfAGpu(TorchFunctionMode):
    """``autocast`` of a GPU, where that of a CPU is on: operations of these two lists."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``, of float32 or to float32."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name.startswith("__"):  # of an operator
            name = name.strip("_")
        if name in FLOAT32 | TO_FLOAT32 and torch.is_autocast_enabled("cpu"):
            halves = any(_is_half(x) for x in (*args, *kwargs.values()))
            if name in FLOAT32:
                args = tuple(x.float() if _is_half(x) else x for x in args)
                kwargs = {key: x.float() if _is_half(x) else x for key, x in kwargs.items()}
            elif halves and kwargs.get("dtype") is None:
                kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)


def _is_half(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in HALF


@contextmanager
def casting(autocast: Autocast | None, device_type: str) -> Iterator[None]:
    """Let tensors without memory be cast as under ``torch.autocast`` of a device.

    Args:
        autocast: to which dtype; None for none.
        device_type: that they stand for.
    """
    with ExitStack() as stack:
        if autocast is not None:
            stack.enter_context(run_again(device_type))
            stack.enter_context(torch.autocast("cpu", getattr(torch, autocast)))
        yield


def run_again(device_type: str) -> AbstractContextManager[Any]:
    """What of it a checkpointed layer does not bring back itself, where backward runs it again."""
    return nullcontext() if device_type in HOSTS else OfAGpu()


def check_autocast(autocast: Any, tokens: Any, dtypes: Collection[torch.dtype]) -> None:
    """Raise unless an autocast is known and would have an effect.

    Args:
        autocast: what was given.
        tokens: what was given for activations.
        dtypes: of the weights.

    Raises:
        ValueError: it is not, or would have none.
    """
    if autocast is None:
        return
    if not (isinstance(autocast, str) and autocast in AUTOCASTS):
        allowed = ", ".join(map(repr, AUTOCASTS))
        raise ValueError(f"autocast must be None or one of {allowed}, got {autocast!r}")
    if tokens is None:
        raise ValueError(
            f"autocast={autocast!r} has no effect without tokens, which count activations"
        )
    if torch.float32 not in dtypes:
        held = " and ".join(sorted(str(x).removeprefix("torch.") for x in dtypes))
        raise ValueError(
            f"autocast={autocast!r} casts weights of float32, and those of the model are {held}: "
            "give dtype=torch.float32, or a model in it, or leave autocast out"
        )
