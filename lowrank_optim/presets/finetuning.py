"""Presets of fine-tuning: tasks of GLUE, and instructions."""

from __future__ import annotations

from lowrank_optim.presets.tables import Arguments, adamw, galore, golore, one

_BADAM = {"llama2-7b": 1e-5, "llama3-8b": 1e-6}

_GALORE_GLUE = {
    4: {"cola": 3e-5, "mrpc": 3e-5} | dict.fromkeys(("mnli", "sst2", "qnli", "qqp"), 1e-5)
    | dict.fromkeys(("rte", "stsb"), 1e-5),
    8: dict.fromkeys(("mnli", "cola", "qnli"), 1e-5)
    | dict.fromkeys(("sst2", "mrpc", "qqp", "rte"), 2e-5) | {"stsb": 3e-5},
}  # fmt: skip

_FRUGAL_GLUE = {"cola": 5e-4, "mnli": 5e-5, "mrpc": 2e-4, "qnli": 1e-4}
_FRUGAL_GLUE |= {"qqp": 5e-5, "rte": 2e-4, "sst2": 5e-5, "stsb": 1e-4}


def galore_glue(task: str, rank: int = 4) -> Arguments:
    """Arguments of ``GaLoreAdamW`` for RoBERTa-base on a task of GLUE, such as ``"cola"``.

    30 epochs, batches of 16 (CoLA: 32), sequences of 512.

    Args:
        task: cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb.
        rank: 4, at scale 4, or 8, at scale 2 (default: 4).

    Source: Zhao et al. (2024), arXiv:2403.03507, tables 7 to 10; the gap is the README's.

    Raises:
        ValueError: nothing was published for ``task`` or ``rank``.

    Example:
        >>> from lowrank_optim import presets
        >>> presets.galore_glue("cola")["lr"], presets.galore_glue("cola", rank=8)["scale"]
        (3e-05, 2.0)
    """
    lr = one(one(_GALORE_GLUE, rank, "rank"), task, "task")
    return galore(lr, rank, 500, scale={4: 4.0, 8: 2.0}[rank])


def golore_glue(task: str, *, total_steps: int) -> Arguments:
    """Arguments of ``GaLoreAdamW`` for RoBERTa-base on GLUE as GoLore; the README has MRPC.

    Bases are singular vectors for 80 % of the steps and random for the rest. 30 epochs, batches of
    16, sequences of 512. The README gives no eps and no decay: neither does this.

    Args:
        task: mrpc.
        total_steps: of the run, of which the switch is at 80 %: batches of all epochs.

    Source: the README of the release (62b8183) of He et al. (2024), arXiv:2410.11289, not the
    paper's tables. Neither was the code read.

    Raises:
        ValueError: nothing was published for ``task``, or ``total_steps`` is no number of steps.

    Example:
        >>> from lowrank_optim import presets
        >>> settings = presets.golore_glue("mrpc", total_steps=6900)
        >>> settings["rank"], settings["scale"], settings["random_from"], settings["lr"]
        (4, 4.0, 0.8, 3e-05)
    """
    one(("mrpc",), task, "task")
    return golore(total_steps, lr=3e-5, rank=4, update_proj_gap=500, scale=4.0)


def frugal_glue(task: str, rank: int = 8) -> Arguments:
    """Arguments of ``FrugalAdamW`` for RoBERTa-base on a task of GLUE, such as ``"cola"``.

    Columns of the query and value matrices are state-full: a group of the other matrices of the
    encoder needs ``density=0``, biases and norms no decay. 6 % warm-up, sequences of 512; batch and
    epochs: CoLA 128, 80; MNLI 128, 30; MRPC 16, 30; QNLI 128, 25; QQP 128, 25; RTE 32, 80; SST-2
    128, 60; STS-B 16, 40.

    Args:
        task: cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb.
        rank: 8, which is a density of 8/768, or 0, no state-full columns at all (default: 8).

    Source: the GLUE scripts of the release of FRUGAL (Zmushko et al., 2024, arXiv:2411.07837), not
    the paper's tables.

    Raises:
        ValueError: nothing was published for ``task`` or ``rank``.

    Example:
        >>> from lowrank_optim import presets
        >>> presets.frugal_glue("rte")["lr"], presets.frugal_glue("rte", rank=0)["density"]
        (0.0002, 0.0)
    """
    lr = one(_FRUGAL_GLUE, task, "task")
    found = adamw(lr, weight_decay=0.1)
    found |= {"density": one({8: 8 / 768, 0: 0.0}, rank, "rank"), "projector": "columns"}
    found |= {"update_proj_gap": 500, "free_rule": "sign", "free_lr_scale": 0.1}
    return found | {"on_refresh": "reset", "proj_params_lr_scale": 1.0}


def lisa_finetune(model: str) -> Arguments:
    """Arguments of ``LisaAdamW`` for LLaMA-2-7B on Alpaca; the model is llama2-7b.

    One epoch in bfloat16, sequences of 256. The paper searches rates and numbers of layers by task.

    Source: the script of the release (LMFlow, 03736b9) of Pan et al. (2024), arXiv:2403.17919, not
    the paper. It leaves betas, eps and decay to transformers, whose defaults are (0.9, 0.999), 1e-8
    and 0.

    Raises:
        ValueError: nothing was published for ``model``.

    Example:
        >>> from lowrank_optim import presets
        >>> settings = presets.lisa_finetune("llama2-7b")
        >>> settings["lr"], settings["active_layers"], settings["update_proj_gap"]
        (1e-05, 1, 20)
    """
    one(("llama2-7b",), model, "model")
    own: Arguments = {"active_layers": 1, "update_proj_gap": 20, "block_order": "random"}
    return adamw(1e-5) | own | {"outside": "always"}


def badam_finetune(model: str) -> Arguments:
    """Arguments of ``BAdamW`` for Alpaca-GPT4; models are llama2-7b and llama3-8b.

    3 epochs, batches of 16, cosine. The release trains neither embedding nor head: freeze them
    first, or they have turns of their own.

    Source: the README of the release (BAdam, 05c52af) of Luo et al. (2024), arXiv:2404.02827, which
    says that its command is not the paper's setting. It leaves betas, eps and decay to
    transformers, whose defaults are (0.9, 0.999), 1e-8 and 0.

    Raises:
        ValueError: nothing was published for ``model``.

    Example:
        >>> from lowrank_optim import presets
        >>> settings = presets.badam_finetune("llama3-8b")
        >>> settings["lr"], settings["active_layers"], settings["update_proj_gap"]
        (1e-06, 1, 100)
    """
    lr = one(_BADAM, model, "model")
    own: Arguments = {"active_layers": 1, "update_proj_gap": 100, "block_order": "shuffled"}
    return adamw(lr) | own
