"""A 7B model on a 24 GB card, with transformers' Trainer.

    python examples/train_trainer.py --model huggyllama/llama-7b --data my_texts/
    python examples/train_trainer.py --model mistralai/Mistral-7B-v0.1 --rank 512
    python examples/train_trainer.py --model llama-7b --lr 5e-3 --scale 0.25   # from random weights

What it needs beside the step's own temporaries, before anything is downloaded:

    lowrank-optim memory --model llama-7b --rank 1024 --budget-gib 24 \
        --only "GaLore 8-bit" --tokens 1024 --checkpointing

Stop it whenever you like: run again, it goes on from its last whole checkpoint, which has the
model, the optimizer's state, the schedule, the place in the data and the random generators' states.
Weights and losses are those of a run that was never stopped, to the bit where the device's kernels
give the same bits twice (`full_determinism=True` asks for those that do).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared import last_checkpoint, load_model, load_tokenizer, options, read_files, windows
from transformers import Trainer, TrainingArguments

from lowrank_optim import GaLoreAdamW8bit
from lowrank_optim.integrations.transformers import trainer_optimizer


def main(arguments: Sequence[str] | None = None, **more: Any) -> Trainer:
    """Train; `more` is for `Trainer`, such as `callbacks`."""
    args = options(__doc__).parse_args(arguments)

    # ------------------------------------------------------------ the model and the data
    model = load_model(args.model, args.seed)  # in bfloat16; Trainer moves it to the GPU
    tokenizer = load_tokenizer(args.model)
    rows = windows(read_files(args.data), tokenizer, args.tokens)
    data = [{"input_ids": row, "labels": row} for row in rows]
    print(f"{len(data):,} sequences of {args.tokens} tokens")

    # ------------------------------------------------------------ how to train
    training = TrainingArguments(
        output_dir=str(args.output),
        seed=args.seed,
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
        # The weights are bfloat16, and so are activations. `bf16=True` is autocast, for float32.
        bf16=False,
        logging_steps=1,
        save_steps=args.save_every,
        save_total_limit=2,  # the one before stays until the last is whole
        report_to=[],
    )

    # ------------------------------------------------------------ the optimizer
    # Linear layers get 8-bit moments in a subspace of `rank` directions, and all other parameters
    # (embeddings, head, norms) plain 8-bit AdamW. Learning rate, betas and decay are those of the
    # arguments. Without `in_backward` a 7B does not fit, whatever the optimizer: weights and
    # gradients are 25 GiB. With it each gradient is replaced by its coordinates in the subspace.
    choice = trainer_optimizer(
        training,
        GaLoreAdamW8bit,
        target_modules="all-linear",
        in_backward="project",
        rank=args.rank,
        scale=args.scale,
        update_proj_gap=args.gap,
        # Updates far smaller than a bfloat16 weight are lost if they are rounded to the nearest.
        stochastic_rounding=True,
    )

    # ------------------------------------------------------------ training
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=data,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=choice,
        **more,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output))
    trainer.save_model(str(args.output / "model"))
    return trainer


if __name__ == "__main__":
    main()
