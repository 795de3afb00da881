"""The command: ``python -m benchmarks.study``. What must show on the task is run and printed first.

Every run is a file of its own in ``--out``, named by all that it depends on: a command that was
ended goes on where it was, and sets share their runs. Rates of all cases are searched before a
second seed of any, so that what is cut short is even. ``--records`` holds all runs in one file that
goes from machine to machine.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common import environment_line, markdown_table, print_table
from benchmarks.study import acceptance, report
from benchmarks.study.figures import draw
from benchmarks.study.progress import Runner
from benchmarks.study.published import RECIPES
from benchmarks.study.recipes import METHODS, Case
from benchmarks.study.records import pack, unpack
from benchmarks.study.search import SEARCH_SEED, search
from benchmarks.study.sets import SETS
from benchmarks.study.sizes import SIZES, Size
from benchmarks.study.training import Place, Trial, kept, machine, seconds_a_step

PUBLISHED = ("published",)
"""Has no runs of its own: relations are read from those of the other sets."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--set", nargs="*", choices=[*SETS, *PUBLISHED], default=[], dest="sets")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases of the sets, by name")
    parser.add_argument("--seeds", type=int, default=5, help="0, 1, ... (default: 5)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--compile", action="store_true", help="models by torch.compile")
    parser.add_argument("--jobs", type=int, default=1, help="processes that make runs")
    parser.add_argument("--stdlib", type=Path, help="a copy of the library: the same text anywhere")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--records", type=Path, help="a file of runs, which count as made; all are added to it"
    )
    parser.add_argument("--page", type=Path, help="where tables go, between its markers")
    parser.add_argument(
        "--recipe", metavar="NAME", choices=RECIPES,
        help="print a published setting as Python, and end; nothing is trained, as there is no "
        f"data: {', '.join(RECIPES)}",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if args.recipe is not None:
        known = {action.dest: action.option_strings[0] for action in parser._actions}
        given = [
            known[name]
            for name, value in vars(args).items()
            if name != "recipe" and value != parser.get_default(name)
        ]
        if given:
            parser.error(
                f"--recipe prints a setting and runs nothing: {', '.join(given)} would have no "
                "effect, drop it or --recipe"
            )
    return args


def cost(cases: Sequence[Case], size: Size, seeds: int, out: Path) -> tuple[int, float]:
    """Runs that a set needs at least, and their hours, from measured seconds a step."""
    runs, seconds = 0, 0.0
    for case in cases:
        tried = [kept(Trial(size, case, lr, SEARCH_SEED), out) for lr in METHODS[case.method].grid]
        line = report.read(case, size, range(seeds), out)
        missing = sum(record is None for record in tried) + seeds - len(line.records)
        if missing:
            runs += missing
            seconds += missing * size.steps * seconds_a_step(size, case, out)
    return runs, seconds / 3600


def named(found: Sequence[Case], only: Sequence[str] | None) -> list[Case]:
    """The cases asked for, with the first, which is what they are compared with.

    Raises:
        ValueError: a name is of no case.
    """
    if only is None:
        return list(found)
    names = [case.name for case in found]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"no case {unknown[0]!r}; there are {', '.join(names)}")
    return [case for i, case in enumerate(found) if i == 0 or case.name in only]


def study(cases: Sequence[Case], size: Size, seeds: int, runner: Runner) -> None:
    """Search every rate, then run every seed."""
    found = runner.each(lambda case: search(size, case, runner.loss, each=runner.each), cases)
    best = {case.name: f.best for case, f in zip(cases, found, strict=True)}
    trials = [
        Trial(size, case, best[case.name], seed)
        for seed, case in itertools.product(range(seeds), cases)
    ]
    runner.each(runner.loss, trials)


def checked(size: Size, runner: Runner, console: Console) -> tuple[bool, str]:
    """Whether every fact holds, and the table of them."""
    facts = acceptance.facts(acceptance.measure(size, runner.loss, runner.each))
    console.print(acceptance.spoken(facts), highlight=False)
    rows, header = acceptance.table(facts), acceptance.HEADER
    return all(fact.holds for fact in facts), markdown_table(header, rows)


def write(args: argparse.Namespace, size: Size, cases: dict[str, list[Case]], facts: str) -> None:
    """The page's tables and figures, of all that is kept."""
    if args.device.type == "cpu":
        for case in itertools.chain(*cases.values()):
            if any("device" in e for e in report.read(case, size, [], args.out).machines):
                seconds_a_step(size, case, args.out)
    lines = {
        name: [report.read(case, size, range(args.seeds), args.out) for case in own]
        for name, own in cases.items()
    }
    origin = report.provenance(
        [report.read(c, size, range(args.seeds), args.out) for c in cases["rank"][:1]]
    )
    report.place(args.page, f"{args.size}, acceptance", f"{facts}\n\n{origin}")
    for name, own in lines.items():
        report.place(args.page, f"{args.size}, {name}", report.section(own))
        full = {line.case.name: [*line.records.values()] for line in own if line.records}
        if name == "rank" and full:
            draw(full, args.page.parent / "images" / f"study_{args.size}.png")
    header = ("claim", "paper", "difference (nats)", "here")
    relations = markdown_table(header, report.published(lines, size))
    report.place(args.page, f"{args.size}, published", relations)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where the task does not show what is known."""
    args = parse(arguments)
    console, size = Console(), SIZES[args.size]
    if args.recipe is not None:
        print(RECIPES[args.recipe].text())
        return 0
    torch.set_num_threads(args.threads)
    machine(args.device, args.compile)
    console.print(environment_line(), highlight=False)
    if args.records is not None:
        console.print(f"{args.records}: {unpack(args.records, args.out)} runs taken from it")
    read_every = 1 if args.device.type == "cpu" else 10
    place = Place(args.device, args.stdlib, read_every, args.compile)
    with Runner(args.out, console, place, args.jobs) as runner:
        holds, facts = checked(size, runner, console)
        if not holds:
            console.print("The task does not show what is known. Nothing is compared on it.")
            return 1
        wanted = [name for name in args.sets if name in SETS]
        for name in wanted:
            cases = named(SETS[name](size), args.only)
            if args.device.type == "cpu":
                runs, hours = cost(cases, size, args.seeds, args.out)
                console.print(
                    f"{name}: {runs} runs at least, about {hours:.1f} hours of one core; searches "
                    "that grow their grids take more",
                    highlight=False,
                )
            begun = time.perf_counter()
            study(cases, size, args.seeds, runner)
            console.print(f"{name}: done in {(time.perf_counter() - begun) / 3600:.1f} hours")
    if args.records is not None:
        console.print(f"{args.records}: {pack(args.out, args.records)} runs put into it")
    for name in wanted:
        lines = [report.read(c, size, range(args.seeds), args.out) for c in SETS[name](size)]
        print_table(console, name, report.HEADER, report.table(lines))
    if args.page is not None:
        write(args, size, {name: make(size) for name, make in SETS.items()}, facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
