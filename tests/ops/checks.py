"""What an op wrote against what its float64 equation says."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_optim.ops import schema
from lowrank_optim.ops.quant import dynamic_map
from tests.ops import ops_cases as cases

UNITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
"""Of a value and of the largest in its tensor: GEMM results, too, are rounded to the format."""


def check(
    actual: Tensor, wanted: tuple[Tensor, Tensor | None], what: str, terms: float = 0.0
) -> None:
    """Within a unit of the format and of the tensor's largest value, where it is meant.

    Args:
        actual: what was written.
        wanted: what should be, and where.
        what: for the error.
        terms: the largest of what is added up: in a tensor of one entry they may cancel, and the
            sum is as exact as they are.
    """
    expected, firm = wanted
    assert actual.shape == expected.shape, what
    unit = UNITS.get(actual.dtype, 0.0)
    top = expected.abs().max() if expected.numel() else expected.sum()
    gap = (actual.double() - expected).abs()
    wrong = ~(gap <= unit * (expected.abs() + top + terms))
    if firm is not None:
        wrong &= firm
        assert firm.double().mean() > 0.5 or firm.numel() < 2, f"{what}: few signs are firm"
    assert not wrong.any(), (what, actual[wrong][:4], expected[wrong][:4])


def check_stored(
    codes: Tensor, scales: Tensor, value: Tensor, signed: bool, what: str, terms: float = 0.0
) -> None:
    """Scales are block maxima; each code is a nearest one, up to rounding of the value."""
    if not value.numel():
        return
    each = cases.per_element(scales, codes.shape)
    got = cases.decode(codes, scales, signed)
    table = dynamic_map(signed, codes.device).double()
    best = (value[..., None] - table * each[..., None]).abs().amin(-1)
    assert ((got - value).abs() <= best + 2e-6 * (each + terms)).all(), what
    assert (value.abs() <= each + 2e-6 * (each + terms)).all(), what


def run(op: str, a: cases.Arguments) -> None:
    """Call and compare everything the op writes."""
    wanted = cases.expected(op, a)
    terms = _terms(op, a)
    result = cases.call(op, a)
    if op in schema.FOUND:
        assert result is not None
        for got, want in zip(result, wanted[""], strict=True):
            check(got, want, op)
        return
    if op not in cases.ELEMENTWISE + cases.BITS8:
        for name, wants in wanted.items():
            own = terms if terms and name == "exp_avgs" else [0.0] * len(wants)
            for got, want, most in zip(a[name], wants, own, strict=True):
                check(got, want, f"{op} {name}", most)
        return
    for i, (got, want) in enumerate(zip(a["outs"], wanted["outs"], strict=True)):
        check(got, want, f"{op} outs", _of_outs(terms[i], want[0], wanted["first"][i][0]))
    for slot, key in ((1, "first"), (2, "second")):
        for i, want in enumerate(wanted[key]):
            what = f"{op} {key} {i}"
            if op in cases.BITS8:
                end = str(slot) if "codes1" in a else ""
                stored = a[f"codes{end}"][i], a[f"scales{end}"][i]
                check_stored(*stored, want[0], slot == 1, what, terms[i] * (slot == 1))
            else:
                held = a.get("moments", a.get("exp_avgs")) if slot == 1 else a["exp_avg_sqs"]
                check(held[i], want, what, terms[i] * (slot == 1))


def _largest(x: Tensor) -> float:
    return float(x.double().abs().max()) if x.numel() else 1.0


def _of_outs(terms: float, out: Tensor, first: Tensor) -> float:
    """The same of a direction, which is the first moment times something."""
    size = _largest(first)
    return terms * _largest(out) / size if size else 0.0


def _terms(op: str, a: cases.Arguments) -> list[float]:
    """The largest of what each first moment is the sum of, before it is written."""
    if op == "coordinate_adamw_":
        held = [x.double() for x in a["exp_avgs"]]
    elif op in cases.ELEMENTWISE + cases.BITS8:
        held = [cases._moments(a, i)[0] for i in range(len(a["outs"]))]
    else:
        return []
    finite = a.get("finite") or [True] * len(held)
    pairs = zip(held, a.get("grads", a.get("xs")), finite, strict=True)
    return [max(_largest(m), _largest(g)) if ok else 0.0 for m, g, ok in pairs]
