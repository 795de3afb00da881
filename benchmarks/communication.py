"""What optimizers send and hold on each of several GPUs: bytes, messages, state.

Run as ``python -m benchmarks.communication --models llama-7b llama-70b --ranks 8 64``. One rank of
a process group that sends nothing takes real steps of tensors that have no data, and what it would
send is counted: of a model of one layer and of two, as every further layer adds what the second
does. Backwards under DDP, and inside backward, run too. What forward and backward of FSDP2 send is
the same for all optimizers, and is computed; so is the state of AdamW.

Weights, gradients and moments are float32; FSDP2 gathers weights and reduces gradients in
bfloat16, as with ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import lowrank_optim
from benchmarks.common import FIELDS, LLAMA_SHAPES, llama, print_table
from benchmarks.meter import Collective, Meter
from lowrank_optim import attach_in_backward, lowrank_groups, memory
from lowrank_optim.backward import averaging
from lowrank_optim.distributed import Placement, shard_placement_fn
from lowrank_optim.engine import tracing
from lowrank_optim.engine.bucket import CHUNK_BYTES
from lowrank_optim.memory import GIB
from lowrank_optim.memory.models import MODELS

GROUPED = (*FIELDS, "num_key_value_heads")
SHAPES: dict[str, tuple[int, ...]] = {
    **LLAMA_SHAPES,
    "llama-70b": tuple(MODELS["llama-70b"].config[key] for key in GROUPED),
}
MIB = 2**20
WIDTH = 110
"""Columns that the tables need."""
GAP = 200
"""Steps between refreshes, over which their messages are spread."""
SIZE, NARROW = 4, 2
"""Bytes of a float32, and of the bfloat16 that forward and backward of FSDP2 send."""

EVERY = {"update_proj_gap": GAP}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "GaLore rsvd": ("GaLoreAdamW", {"projector": "rsvd", **EVERY}),
    "GaLore 8-bit": ("GaLoreAdamW", {"projector": "rsvd", "state_dtype": "8bit", **EVERY}),
    "Fira rsvd": ("FiraAdamW", {"projector": "rsvd", **EVERY}),
    "GaLore random": ("GaLoreAdamW", {"projector": "random", **EVERY}),
    "FRUGAL columns": ("FrugalAdamW", {"projector": "columns", **EVERY}),
    "GaLore dct": ("GaLoreAdamW", {"projector": "dct", **EVERY}),
    "DCT-AdamW": ("DCTAdamW", {"update_proj_gap": 1}),
    "LDAdam": ("LDAdamW", {"error_feedback": "8bit", "update_proj_gap": 1}),
    "SST active": ("SSTAdamW", {"factors": "active", "steps_per_iteration": GAP}),
    "SwitchLoRA": ("SwitchLoRAAdamW", {"interval": 40}),
}
Layout = Literal["rows", "placed", "replicas", "subspace"]
"""FSDP2 that splits rows, or as ``shard_placement_fn`` says; DDP, or coordinates in its place."""
HEADER = (
    "bases",
    "moments",
    "sent\nShard(0)",
    "sent\nplaced",
    "refresh\n/ gap",
    "messages",
    "DDP:\nbases",
    "DDP:\nmoments",
    "DDP:\nsent",
    "in the\nsubspace",
)


@dataclass(frozen=True)
class Row:
    """One optimizer on one of ``ranks`` GPUs; bytes, of this rank."""

    name: str
    basis: float
    """Of the state under FSDP2."""
    moments: float
    sent: float
    """By an optimizer step between refreshes, where ``fully_shard`` splits rows."""
    placed: float
    """The same with ``shard_placement_fn``."""
    refresh: float
    """What refreshes of all matrices send, for each step of the gap."""
    messages: int
    """Of a step between refreshes, placed."""
    ddp_basis: float
    ddp_moments: float
    ddp_sent: float
    """By backward and a step under ``DistributedDataParallel``, refreshes spread over the gap."""
    subspace: float | None
    """The same, of ``attach_in_backward(process_group=...)``; None where it is refused."""


@dataclass(frozen=True)
class Model:
    """Matrices of a LLaMA, and which of them an optimizer projects."""

    name: str
    rank: int
    layers: int
    shapes: dict[str, tuple[int, ...]]
    projected: frozenset[str]

    @property
    def weights(self) -> int:
        """How many there are."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def cut(self, layers: int) -> Model:
        """The first ``layers`` of it, and what belongs to no layer."""
        kept = {k: x for k, x in self.shapes.items() if _layer(k) < layers}
        return replace(self, layers=layers, shapes=kept, projected=self.projected & kept.keys())


def _layer(name: str) -> int:
    """Which layer a parameter belongs to; -1 for none."""
    _, _, rest = name.partition(".layers.")
    return int(rest.partition(".")[0]) if rest else -1


def load(name: str, rank: int | None = None) -> Model:
    """The shapes of a model; its rank is a quarter of its width unless another is given."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(llama(*SHAPES[name], vocab_size=32000))
    shapes = {key: tuple(p.shape) for key, p in module.named_parameters()}
    rank = rank or SHAPES[name][0] // 4
    groups = lowrank_groups(module, rank=rank)
    low = frozenset(key for g in groups if g.get("rank") for key in g["param_names"])
    return Model(name, rank, SHAPES[name][2], shapes, low)


@contextmanager
def pretended(ranks: int) -> Iterator[DeviceMesh]:
    """The first of ``ranks`` processes; the others do not exist, and no tensor has data."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    together = dict(CHUNK_BYTES)
    # as many alike matrices in one message as on a GPU
    CHUNK_BYTES[False] = CHUNK_BYTES[True]
    try:
        mesh = init_device_mesh("cpu", (ranks,))
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield mesh
    finally:
        CHUNK_BYTES.update(together)
        dist.destroy_process_group()


def wire(sent: Sequence[Collective], ranks: int) -> int:
    """Bytes that leave one rank: rings for reductions, the data itself else.

    An all-reduce sends its input nearly twice, an all-to-all what is not its own part, and in a
    broadcast each rank passes on what it gets.
    """
    others = (ranks - 1) / ranks
    factors = {"all_reduce": 2 * others, "all_to_all": others, "broadcast": 1.0}
    return round(sum(factors[c.kind] * c.bytes for c in sent))


def laid(model: Model, mesh: DeviceMesh | None, places: Placement) -> list[dict[str, Any]]:
    """Groups of parameters with gradients: plain, or as ``fully_shard`` would lay them."""
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, shape in model.shapes.items():
        whole = torch.empty(shape, device="meta")
        if mesh is None:
            param = nn.Parameter(torch.empty(shape))
        else:
            place = places(whole) or Shard(0)
            local = list(shape)
            local[place.dim] = -(-shape[place.dim] // mesh.size())  # the first rank has most
            size = {"shape": whole.shape, "stride": whole.stride()}
            kinds = (mesh, [place])
            x = DTensor.from_local(torch.empty(local), *kinds, run_check=False, **size)
            param = nn.Parameter(x)
            param.grad = DTensor.from_local(torch.empty(local), *kinds, run_check=False, **size)
        groups[name in model.projected].append((name, param))
    low = {"params": groups[True], "rank": model.rank}
    return [low, {"params": groups[False], "rank": None}]


@dataclass(frozen=True)
class Counted:
    """What one rank keeps and sends; bytes."""

    basis: float
    moments: float
    sent: float = 0
    """By a step between refreshes."""
    refreshed: float = 0
    """By a step that refreshes everything."""
    messages: float = 0
    """Of a step between refreshes."""

    @property
    def spread(self) -> float:
        """Sent by a step, with its share of what refreshes send."""
        return self.sent + (self.refreshed - self.sent) / GAP

    def deeper(self, second: Counted, layers: int) -> Counted:
        """Of a model with more layers, from those of one layer and of two."""
        one, two = astuple(self), astuple(second)
        return Counted(*(a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True)))


def count(
    method: str, model: Model, ranks: int, layout: Layout, *, refreshes: bool = True
) -> Counted:
    """A step that refreshes everything, unless told not to, and one that refreshes nothing."""
    found = []
    for layers in (1, 2):
        with pretended(ranks) as mesh:
            found.append(_counted(method, model.cut(layers), mesh, layout, refreshes))
    return found[0].deeper(found[1], model.layers)


def _counted(
    method: str, model: Model, mesh: DeviceMesh, layout: Layout, refreshes: bool = True
) -> Counted:
    cls, options = METHODS[method]
    ranks = mesh.size()
    place = shard_placement_fn(ranks, projector=options.get("projector", "dct"))
    alike = layout in ("replicas", "subspace")
    groups = laid(model, None if alike else mesh, place if layout == "placed" else lambda _: None)
    stagger = {} if cls.startswith("Switch") else {"stagger": False}
    made = getattr(lowrank_optim, cls)(groups, lr=1e-3, **stagger, **options)
    if not refreshes:
        with tracing.hosted():
            made._make_state()
        _refreshed(made)
    sent = list(_steps_alike(made, layout) if alike else _steps(made, 1 + refreshes))
    held = memory.report(made)
    both = (wire(x, ranks) for x in (sent[-1], sent[0]))
    return Counted(held.basis, held.moments, *both, len(sent[-1]))


def _refreshed(made: Any) -> None:
    """Let no basis be due."""
    with unset_fake_temporarily():
        for state in made.state.values():
            if "refresh_step" in state:
                state["refresh_step"].fill_(0)


def _steps(made: Any, steps: int) -> Iterator[list[Collective]]:
    """What each step sends."""
    for _ in range(steps):
        with Meter() as meter:
            made.step()
        yield meter.collectives


class Whole(nn.Module):
    """Parameters in the order of their groups, and a loss that reaches all of them."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.every = nn.ParameterList(p for g in made.param_groups for p in g["params"])

    def forward(self) -> Tensor:
        """A number."""
        return torch.stack([p.sum() for p in self.every]).sum()


def _steps_alike(made: Any, layout: Layout) -> Iterator[list[Collective]]:
    """What each of two steps sends, with its backward, where every rank has the whole model."""
    world = dist.group.WORLD
    model: nn.Module = Whole(made)
    params = list(model.parameters())
    if layout == "replicas":
        model = DistributedDataParallel(model, init_sync=False)
        model.register_comm_hook(world, lambda group, bucket: _reduce(group, bucket))
        made._replicas.share(params, world)
    else:
        with mock.patch.object(averaging, "check_same_parameters"):  # there is nobody to ask
            handle: Any = attach_in_backward(made, process_group=world)
        handle._ranks._order = params  # else rank 0 is asked, whose answer has no data here
    backward: list[Collective] = []
    for n in range(2):
        if n == 0 or layout == "subspace":  # DDP's second is its first, and looks at data before
            with Meter() as meter:
                model().backward()
            backward = meter.collectives
        with Meter() as meter:
            made.step()
        _refreshed(made)  # which from other ranks it is not, as nothing arrived
        yield [*backward, *meter.collectives]


def _reduce(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does with a bucket, which it does where no meter sees it."""
    dist.all_reduce(bucket.buffer(), group=group)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def measure(model: Model, ranks: int, methods: Sequence[str] = tuple(METHODS)) -> list[Row]:
    """AdamW first, then the methods."""
    adamw = 2 * model.weights * SIZE
    gradients = 2 * (ranks - 1) / ranks * model.weights * SIZE
    rows = [Row("AdamW", 0, adamw / ranks, 0, 0, 0, 0, 0, adamw, gradients, None)]
    for name in track(methods, f"{model.name}, {ranks} ranks", transient=True):
        cls, options = METHODS[name]
        always = options.get("update_proj_gap") == 1
        split = count(name, model, ranks, "rows", refreshes=always)
        placed, whole = (count(name, model, ranks, layout) for layout in ("placed", "replicas"))
        refresh = 0 if always else (placed.refreshed - placed.sent) / GAP
        # their steps use coordinates alone
        exact = cls in ("GaLoreAdamW", "SSTAdamW")
        low = count(name, model, ranks, "subspace").spread if exact else None
        rows.append(
            Row(
                name, placed.basis, placed.moments, split.sent, placed.sent, refresh,
                round(placed.messages), whole.basis, whole.moments,
                whole.sent if always else whole.spread, low,
            )
        )  # fmt: skip
    return rows


def cells(row: Row) -> list[str]:
    """One line of the table."""
    state = [f"{x / GIB:.2f}" for x in (row.basis, row.moments)]
    sent = [f"{x / MIB:,.2f}" for x in (row.sent, row.placed, row.refresh)]
    replicas = [f"{x / GIB:.2f}" for x in (row.ddp_basis, row.ddp_moments)]
    ddp = ["–" if x is None else f"{x / MIB:,.0f}" for x in (row.ddp_sent, row.subspace)]
    return [row.name, *state, *sent, str(row.messages), *replicas, *ddp]


def reading(rows: Sequence[Row], model: Model, ranks: int) -> str:
    """The table in words, from its figures."""
    adamw, others = rows[0], rows[1:]
    total = {row.name: row.basis + row.moments for row in rows}
    more = [name for name, size in total.items() if size > total["AdamW"]]
    least = min(others, key=lambda row: row.basis + row.moments)
    text = f"Sharded AdamW keeps {total['AdamW'] / GIB:.2f} GiB on each of {ranks} GPUs. "
    if more:
        text += (
            f"{', '.join(more)} {'keeps' if len(more) == 1 else 'keep'} more: bases are on every "
            f"rank, and do not shrink with their number. "
        )
    word = "Take" if total[least.name] < total["AdamW"] else "The least is"
    text += f"{word} {least.name}: {total[least.name] / GIB:.2f} GiB. "
    weights = 3 * (ranks - 1) / ranks * model.weights * NARROW
    most = max(row.placed + row.refresh for row in others)
    return text + (
        f"FSDP2 sends {weights / MIB:,.0f} MiB a step for weights and gradients, whatever the "
        f"optimizer; with shard_placement_fn no optimizer adds more than {most / MIB:,.1f}. Under "
        f"DDP the gradients of {adamw.name} are {adamw.ddp_sent / MIB:,.0f} MiB a step."
    )


def plot(tables: Sequence[tuple[Model, int, Sequence[Row]]], path: Path) -> None:
    """State of a rank, and what it sends in a step, of every table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (11.0, 2.1 * len(tables) + 0.6)
    figure, axes = plt.subplots(len(tables), 2, figsize=size, layout="constrained", squeeze=False)
    for (model, ranks, rows), (state, sent) in zip(tables, axes, strict=True):
        names, base = [row.name for row in rows], [row.basis / GIB for row in rows]
        state.barh(names, base, color="#55a868", label="bases")
        moments = [row.moments / GIB for row in rows]
        state.barh(names, moments, left=base, color="#dd8452", label="moments")
        state.axvline(sum((base[0], moments[0])), color="black", linestyle="--", linewidth=1)
        state.set_title(f"{model.name}, {ranks} GPUs: state of one, GiB", loc="left", fontsize=10)
        height = 0.4
        at = range(len(rows))
        for shift, key, label in ((-0.5, "sent", "Shard(0)"), (0.5, "placed", "placed")):
            figures = [(getattr(row, key) + row.refresh) / MIB for row in rows]
            sent.barh([y + shift * height for y in at], figures, height=height, label=label)
        sent.set_yticks(list(at), [""] * len(rows))
        sent.set_title("sent by a step, MiB, FSDP2", loc="left", fontsize=10)
        for ax in (state, sent):
            ax.invert_yaxis()
            ax.spines[["top", "right"]].set_visible(False)
            ax.tick_params(labelsize=8)
    for ax in axes[0]:
        ax.legend(frameon=False, fontsize=8, loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description="What optimizers send between GPUs.")
    models = ["llama-60m", "llama-1b", "llama-7b", "llama-70b"]
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=models, metavar="MODEL")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64], metavar="K")
    parser.add_argument("--rank", type=int, help="of the projection (default: width / 4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, in bytes")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    args = parser.parse_args(arguments)
    if min(args.ranks) < 2:
        parser.error("--ranks: two or more")
    console, tables = Console(), []
    console = console if console.width >= WIDTH else Console(width=WIDTH)
    for name in args.models:
        model = load(name, args.rank)
        for ranks in args.ranks:
            rows = measure(model, ranks)
            tables.append((model, ranks, rows))
            title = (
                f"{name}, rank {model.rank}, each of {ranks} GPUs: state in GiB, sent in MiB a step"
            )
            print_table(console, title, ("", *HEADER), [cells(row) for row in rows])
            console.print(reading(rows, model, ranks) + "\n", highlight=False)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = [
            {"model": m.name, "rank": m.rank, "ranks": k, "rows": [asdict(row) for row in rows]}
            for m, k, rows in tables
        ]
        args.json.write_text(json.dumps(found, indent=1))
    if args.plot:
        plot(tables, args.plot)


if __name__ == "__main__":
    main()
