"""The module form of Sparse Spectral Training: factors as parameters, no dense gradient."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_optim.engine.draws import seeded
from lowrank_optim.engine.plan import State
from lowrank_optim.groups import Group
from lowrank_optim.nn.base import Factored, check_saved_index, register_form
from lowrank_optim.subspaces.refresh import RefreshContext
from lowrank_optim.subspaces.spectral import Spectral
from lowrank_optim.tensors.matrix import MatrixView


class _Product(torch.autograd.Function):
    """``x -> U diag(s) V^T x + b`` with gradients of x, s, bias and the vectors in use.

    Of N tokens, with ``h = x V`` and ``d = dY U``: ``dU = dY^T h``, ``dV = x^T d`` (times s where
    ``enhanced`` is off), ``ds = sum_tokens h d``. Nothing has the size of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor,
        v: Tensor,
        s: Tensor,
        u_rest: Tensor,
        v_rest: Tensor,
        order: Tensor,
        bias: Tensor | None,
        enhanced: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, u, v, s, u_rest, v_rest, order)
        ctx.enhanced, ctx.biased = enhanced, bias is not None
        tokens = x.reshape(-1, x.shape[-1])
        rank, index = u.shape[0], order.long()
        s = s.to(x.dtype)
        y = ((tokens @ v.mT.to(x.dtype)) * s[index[:rank]]) @ u.to(x.dtype)
        if u_rest.shape[0]:
            wide = (tokens @ v_rest.mT.to(x.dtype)) * s[index[rank:]]
            y.addmm_(wide, u_rest.to(x.dtype))
        if bias is not None:
            y += bias.to(x.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u, v, s, u_rest, v_rest, order = ctx.saved_tensors
        dtype, rank, index = x.dtype, u.shape[0], order.long()
        tokens, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = torch.zeros_like(tokens) if ctx.needs_input_grad[0] else None
        grad_s = torch.zeros_like(s)
        grad_u, grad_v = None, None
        for where, own_u, own_v in ((index[:rank], u, v), (index[rank:], u_rest, v_rest)):
            own_u, own_v = own_u.to(dtype), own_v.to(dtype)
            h, d = tokens @ own_v.mT, grad @ own_u.mT
            values = s[where]
            grad_s[where] = (h * d).sum(0, dtype=s.dtype)
            if grad_u is None:
                gain = 1.0 if ctx.enhanced else values.unsqueeze(-1)
                grad_u = (h.mT @ grad).to(u.dtype) * gain
                grad_v = (d.mT @ tokens).to(v.dtype) * gain
            if grad_x is not None:
                grad_x.addmm_(d * values.to(dtype), own_v)
        grad_x = None if grad_x is None else grad_x.reshape(x.shape)
        grad_bias = grad.sum(0) if ctx.biased else None
        return grad_x, grad_u, grad_v, grad_s, None, None, None, grad_bias, None


@register_form("sst")
class SpectralLinear(Factored):
    r"""A linear layer as :math:`y = U \mathrm{diag}(s) V^T x + b`, trained by ``SSTAdamW``.

    Parameters: ``u (r, out)``, ``v (r, in)``, ``s (k,)`` and the bias; ``u_rest``, ``v_rest`` and
    ``order`` are parameters without gradient, so that the optimizer can exchange vectors. Factors
    are in float32 or wider, whatever the weight was; products are in the dtype of the input, or of
    autocast. Made by :func:`lowrank_optim.nn.convert`.

    Example:
        >>> import torch
        >>> from lowrank_optim import SSTAdamW
        >>> from lowrank_optim.nn import convert, merge
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> optimizer = SSTAdamW(convert(model, "sst", rank=4), lr=1e-2)
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> model[0].u.grad.shape, model[0].v.grad.shape, model[0].u_rest.grad
        (torch.Size([4, 32]), torch.Size([4, 64]), None)
        >>> optimizer.step()
        >>> type(merge(model)[0])
        <class 'torch.nn.modules.linear.Linear'>

    References:
        Zhao et al. (2024), arXiv:2405.15481.
    """

    u: nn.Parameter
    v: nn.Parameter
    s: nn.Parameter
    u_rest: nn.Parameter
    v_rest: nn.Parameter
    order: nn.Parameter
    enhanced: bool
    swapped: bool
    options: ClassVar[Group] = {
        "proj_type": "std", "seed": 0, "sampling": "mixed", "enhanced": True,
        "iterations_per_round": None, "factors": "exact", "factor_dtype": "float32",
        "offload_inactive": False,
    }  # fmt: skip

    @classmethod
    def initial(cls, group: Group, view: MatrixView, weight: Tensor, uid: int) -> State:
        """Factored and drawn from, with the numbers that the dense form would take."""
        subspace = Spectral.from_group(group, view)
        state = subspace.init(view, weight)
        ctx = RefreshContext(view, seeded(group["seed"], uid, 0), uid, 0, param=view.of(weight))
        subspace.refresh_(state, weight, ctx)
        return state

    @classmethod
    def from_state(cls, layer: nn.Module, group: Group, view: MatrixView, state: State) -> Self:
        """Take over the factors of the dense form.

        Raises:
            ValueError: they are not all there.
        """
        if group["factors"] != "exact" or group["offload_inactive"]:
            raise ValueError("modules hold all factors: factors='exact', offload_inactive=False")
        self = cls(layer)
        self.enhanced = bool(group["enhanced"])
        self.swapped = view.flip != self.conv1d
        out, into = ("v", "u") if self.swapped else ("u", "v")
        for name, key in (("u", out), ("v", into)):
            self.register_parameter(name, nn.Parameter(state.pop(f"basis_{key}")))
        self.s = nn.Parameter(state.pop("basis_s"))
        for name, key in (("u_rest", out), ("v_rest", into)):
            rest = nn.Parameter(state.pop(f"basis_{key}_rest"), requires_grad=False)
            self.register_parameter(name, rest)
        self.order = nn.Parameter(state.pop("basis_order"), requires_grad=False)
        return self

    def members(self) -> dict[str, nn.Parameter]:
        """The dense form's u first, which is the side of the smaller dimension."""
        names = ["u", "v", "s", "u_rest", "v_rest", "order"]
        if self.swapped:
            names = ["v", "u", "s", "v_rest", "u_rest", "order"]
        return {name: getattr(self, name) for name in names}

    def to_state(self) -> State:
        """As :class:`~lowrank_optim.subspaces.spectral.Spectral` keeps them."""
        return dict(zip(Spectral.keys, (x.detach() for x in self.members().values()), strict=True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As of any module, unless ``order``, which indexes singular values, is no permutation."""
        size = self.order.numel()
        try:
            check_saved_index(state_dict, f"{prefix}order", self.order, size, "distinct")
        except ValueError as error:
            args[-1].append(f"{error}, in any order")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def product(self) -> Tensor:
        """``U diag(s) V^T``."""
        index, rank = self.order.long(), self.u.shape[0]
        rest = self.s[index[rank:], None] * self.v_rest.to(self.v)
        active = self.s[index[:rank], None] * self.v
        return self.u.mT @ active + self.u_rest.mT.to(self.u) @ rest

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        if self.order.is_floating_point():
            raise RuntimeError(
                f"the order of the singular values is in {self.order.dtype}, which has not all "
                "indices: keep int32 where parameters are cast, as FSDP2 of torch 2.13 does"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        output: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x, self.u, self.v, self.s, self.u_rest, self.v_rest, self.order, self.bias,
            self.enhanced,
        )  # fmt: skip
        return output
