"""Instruction tuning of a 7B model on a 24 GB card, all weights, with TRL's SFTTrainer.

    pip install 'lowrank-optim[transformers]' trl
    python examples/train_sft.py --model mistralai/Mistral-7B-Instruct-v0.3 \
        --rank 512 --data chats.jsonl

`--data` is a file of JSON lines in any form that TRL knows, such as {"prompt": …, "completion": …}
or {"messages": [{"role": "user", "content": …}, …]}; or a folder of Python (default: Python's own
library), whose functions are to be written from their documentation.

What it needs beside the step's own temporaries, before anything is downloaded:

    lowrank-optim memory --model Mistral-7B --rank 512 --budget-gib 24 \
        --only "GaLore 8-bit" --tokens 1024 --checkpointing

Stop it whenever you like: run again, it goes on from its last whole checkpoint, as
train_trainer.py does.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from shared import last_checkpoint, load_model, load_tokenizer, options, read_files
from trl import SFTConfig, SFTTrainer

from lowrank_optim import GaLoreAdamW8bit
from lowrank_optim.integrations.transformers import trainer_optimizer


def main(arguments: Sequence[str] | None = None, **more: Any) -> SFTTrainer:
    """Train; `more` is for `SFTTrainer`, such as `callbacks`."""
    args = options(__doc__).parse_args(arguments)

    # ------------------------------------------------------------ the model and the data
    model = load_model(args.model, args.seed)  # in bfloat16; SFTTrainer moves it to the GPU
    tokenizer = load_tokenizer(args.model)
    data = Dataset.from_list(read_rows(args.data))
    print(f"{len(data):,} examples")

    # ------------------------------------------------------------ how to train
    training = SFTConfig(
        output_dir=str(args.output),
        seed=args.seed,
        max_length=args.tokens,  # what is longer is cut: the memory of a step depends on it
        max_steps=args.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=args.micro_batches,  # need no more memory than one
        learning_rate=args.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=args.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,  # of the coordinates, which are all that is left of a gradient
        # Each layer keeps its input alone, and runs again inside backward.
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        # The weights are bfloat16, and so are activations. `bf16=True`, which is TRL's default, is
        # autocast, for float32 weights.
        bf16=False,
        logging_steps=1,
        save_steps=args.save_every,
        save_total_limit=2,  # the one before stays until the last is whole
        report_to=[],
    )

    # ------------------------------------------------------------ the optimizer
    # As in train_trainer.py: 8-bit moments in a subspace of `rank` directions of every linear
    # layer, and gradients that never coexist.
    choice = trainer_optimizer(
        training,
        GaLoreAdamW8bit,
        target_modules="all-linear",
        in_backward="project",
        rank=args.rank,
        scale=args.scale,
        update_proj_gap=args.gap,
        stochastic_rounding=True,
    )

    # ------------------------------------------------------------ training
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=data,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=choice,
        **more,
    )
    if len(trainer.train_dataset) == 0:
        raise SystemExit(f"--tokens {args.tokens}: no prompt leaves room for its completion")
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output))
    trainer.save_model(str(args.output / "model"))
    return trainer


def read_rows(data: str) -> list[dict[str, Any]]:
    """JSON lines as they are; of Python, functions that are documented."""
    if data.endswith(".jsonl"):
        return [json.loads(line) for line in read_files(data)[0].splitlines() if line.strip()]
    rows = [row for source in read_files(data, "*.py") for row in functions(source)]
    if not rows:
        raise SystemExit(
            f"--data: {data} is no .jsonl, and has no Python with documented functions"
        )
    return rows


def functions(source: str) -> Iterator[dict[str, str]]:
    """The signature and documentation of each function, and what follows."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            start, end = node.lineno - 1, node.body[0].end_lineno
            yield {
                "prompt": "".join(lines[start:end]),
                "completion": "".join(lines[end : node.end_lineno]),
            }


if __name__ == "__main__":
    main()
