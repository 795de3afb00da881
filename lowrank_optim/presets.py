"""Published settings, as arguments of the optimizers: each with its source.

A preset is a plain dict, to be read and changed: ``GaLoreAdamW(groups, **galore_pretrain("60m"))``.
It holds what concerns the optimizer; schedule, batch and number of steps are in the docstrings.
Whatever a source leaves to a release's default that ours differs from is in the dict as well.
"""

from __future__ import annotations

from typing import Any

Arguments = dict[str, Any]

_PUBLISHED: Arguments = {"betas": (0.9, 0.999), "proj_type": "std", "projector": "svd"}
_PUBLISHED |= {"stagger": False, "on_refresh": "keep"}

_GALORE = {"60m": (128, 200, 0.01), "130m": (256, 200, 0.01), "350m": (256, 200, 0.01)}
_GALORE |= {"1b": (512, 200, 0.01), "7b": (1024, 500, 0.005)}

_FIRA = {"60m": (128, 200, 0.25, 0.01), "130m": (256, 200, 0.25, 0.01)}
_FIRA |= {"350m": (256, 200, 0.25, 0.01), "1b": (512, 200, 0.0625, 0.01)}
_FIRA |= {"7b": (64, 500, 0.0625, 0.005)}

_APOLLO = {False: {"60m": (128, 1.0), "1b": (256, 1.0), "7b": (256, 1.0)}}
_APOLLO |= {True: {"60m": (1, 128.0), "130m": (1, 192.0), "7b": (1, 128.0)}}

_FRUGAL = ("60m", "130m", "350m", "1b", "7b")

_SLTRAIN = {"60m": (128, 32.0), "130m": (256, 16.0), "350m": (256, 16.0), "1b": (512, 8.0)}

_BADAM = {"llama2-7b": 1e-5, "llama3-8b": 1e-6}

_LDADAM = {True: 8, False: 256}

_GALORE_GLUE = {
    4: {"cola": 3e-5, "mrpc": 3e-5} | dict.fromkeys(("mnli", "sst2", "qnli", "qqp"), 1e-5)
    | dict.fromkeys(("rte", "stsb"), 1e-5),
    8: dict.fromkeys(("mnli", "cola", "qnli"), 1e-5)
    | dict.fromkeys(("sst2", "mrpc", "qqp", "rte"), 2e-5) | {"stsb": 3e-5},
}  # fmt: skip

_FRUGAL_GLUE = {"cola": 5e-4, "mnli": 5e-5, "mrpc": 2e-4, "qnli": 1e-4}
_FRUGAL_GLUE |= {"qqp": 5e-5, "rte": 2e-4, "sst2": 5e-5, "stsb": 1e-4}


def _one(table: Any, key: Any, what: str) -> Any:
    """``table[key]``, or an error that says what there is."""
    for name in table:
        if type(key) is type(name) and _plain(key) == _plain(name):
            return table[name] if isinstance(table, dict) else name
    known = ", ".join(map(repr, table))
    raise ValueError(f"no published {what} {key!r}; there are {known}")


def _plain(key: Any) -> Any:
    """Without case and hyphens."""
    return key.lower().replace("-", "") if isinstance(key, str) else key


def galore_pretrain(size: str) -> Arguments:
    """Arguments of ``GaLoreAdamW`` for LLaMA on C4; sizes are 60m, 130m, 350m, 1b and 7b.

    The matrices of attention and MLP are projected, nothing else. Sequences of 256, batches of 512,
    10 % warm-up and a cosine to 10 %; 10, 20, 60, 100 and 150 thousand steps; 7B clips at 1.0. For
    1B the script says rank 1024, and the paper 512, which is taken.

    Source: Zhao et al. (2024), arXiv:2403.03507, table 2 and appendix C.1, and the release's
    scripts. eps is the release's 1e-6 (the paper says 1e-8), which acts before bias correction
    there and after it here.

    Raises:
        ValueError: nothing was published for ``size``.

    Example:
        >>> from lowrank_optim import presets
        >>> settings = presets.galore_pretrain("60m")
        >>> settings["rank"], settings["scale"], settings["lr"]
        (128, 0.25, 0.01)
    """
    rank, gap, lr = _one(_GALORE, size, "size")
    own = {"lr": lr, "eps": 1e-6, "weight_decay": 0.0, "rank": rank}
    return {**own, "update_proj_gap": gap, "scale": 0.25, **_PUBLISHED}


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
    lr = _one(_one(_GALORE_GLUE, rank, "rank"), task, "task")
    own = {"lr": lr, "eps": 1e-6, "weight_decay": 0.0, "rank": rank}
    return {**own, "update_proj_gap": 500, "scale": {4: 4.0, 8: 2.0}[rank], **_PUBLISHED}


def fira_pretrain(size: str) -> Arguments:
    """Arguments of ``FiraAdamW`` for LLaMA on C4; sizes are 60m, 130m, 350m, 1b and 7b.

    Sequences, batches, warm-up and schedule as GaLore's; 10, 20, 60, 100 and 10 thousand steps; 7B
    clips at 1.0.

    Source: the scripts of the release (fira 1.0.2), whose code is ``alpha_mode="release"``, not the
    tables of Chen et al. (2024), arXiv:2410.01623.

    Raises:
        ValueError: nothing was published for ``size``.

    Example:
        >>> from lowrank_optim import presets
        >>> settings = presets.fira_pretrain("1b")
        >>> settings["rank"], settings["scale"], settings["limiter"]
        (512, 0.0625, 1.01)
    """
    rank, gap, scale, lr = _one(_FIRA, size, "size")
    own = {"lr": lr, "eps": 1e-6, "weight_decay": 0.0, "rank": rank, "update_proj_gap": gap}
    own |= {"scale": scale, "alpha_mode": "release", "scaling": "column", "limiter": 1.01}
    return {**own, **_PUBLISHED}


def apollo_pretrain(size: str, *, mini: bool = False) -> Arguments:
    """Arguments of ``ApolloAdamW`` for LLaMA on C4; sizes are 60m, 1b and 7b, of Mini 130m too.

    Sequences, batches, warm-up and schedule as GaLore's.

    Args:
        size: of the model; Mini's are 60m, 130m and 7b.
        mini: whether of APOLLO-Mini, rank 1 and one factor for a matrix (default: False).

    Source: Zhu et al. (2025), arXiv:2412.05270, and the settings of the release's scripts
    (apollo-torch 1.0.3), whose text has a rank of a quarter of the hidden size.

    Raises:
        ValueError: nothing was published for ``size`` or ``mini``.

    Example:
        >>> from lowrank_optim import presets
        >>> settings = presets.apollo_pretrain("7b", mini=True)
        >>> settings["rank"], settings["scale"], settings["scale_type"]
        (1, 128.0, 'tensor')
    """
    rank, scale = _one(_one(_APOLLO, mini, "value of mini"), size, "size")
    own = {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.0, "rank": rank, "update_proj_gap": 200}
    own |= {"scale": scale, "scale_type": "tensor" if mini else "channel", "limiter": 1.01}
    return {**own, **_PUBLISHED, "projector": "random"}


def frugal_pretrain(size: str) -> Arguments:
    """Arguments of ``FrugalAdamW`` for LLaMA on C4; sizes are 60m, 130m, 350m, 1b and 7b.

    Whole tensors are state-full in turns, from the last to the first. Sequences of 256, batches of
    512, float32 weights under bfloat16 autocast, no clipping; cosine with restarts every 10, 20, 60
    and 100 thousand steps, each with 10 % of warm-up and a decay to 10 %. 7B is pure bfloat16, has
    no state-full blocks at all, one cycle of 150 thousand steps, and clips at 1.0.

    Source: the scripts of the release of FRUGAL (Zmushko et al., 2024, arXiv:2411.07837), not the
    paper's tables.

    Raises:
        ValueError: nothing was published for ``size``.

    Example:
        >>> from lowrank_optim import presets
        >>> settings = presets.frugal_pretrain("130m")
        >>> settings["density"], settings["projector"], settings["free_rule"]
        (0.25, 'block', 'sign')
    """
    large = _one(_FRUGAL, size, "size") == "7b"
    found: Arguments = {"lr": 5e-4 if large else 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    found |= {"weight_decay": 0.0, "density": 0.0 if large else 0.25, "projector": "block"}
    found |= {"block_order": "descending", "update_proj_gap": 500 if large else 200}
    found |= {"free_rule": "sign", "free_lr_scale": 1.0, "on_refresh": "reset"}
    return found | {"proj_params_lr_scale": 0.3 if large else 1.0}


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
    lr = _one(_FRUGAL_GLUE, task, "task")
    found: Arguments = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    found |= {"density": _one({8: 8 / 768, 0: 0.0}, rank, "rank"), "projector": "columns"}
    found |= {"update_proj_gap": 500, "free_rule": "sign", "free_lr_scale": 0.1}
    return found | {"on_refresh": "reset", "proj_params_lr_scale": 1.0}


def sltrain_pretrain(size: str) -> Arguments:
    """Arguments of ``convert(model, "sltrain")`` for LLaMA on C4; sizes are 60m, 130m, 350m and 1b.

    The matrices of attention and MLP are replaced. The optimizer is AdamW with ``lr=3e-3`` and
    ``weight_decay=0.0``; 11, 22, 65 and 140 thousand steps.

    Source: Han et al. (2024), arXiv:2406.02214, and the release's scripts.

    Raises:
        ValueError: nothing was published for ``size``.

    Example:
        >>> from lowrank_optim import presets
        >>> presets.sltrain_pretrain("60m")
        {'rank': 128, 'density': 0.03, 'scale': 32.0}
    """
    rank, scale = _one(_SLTRAIN, size, "size")
    return {"rank": rank, "density": 0.03, "scale": scale}


def ldadam_pretrain(size: str, *, error_feedback: bool = True) -> Arguments:
    """Arguments of ``LDAdamW`` for LLaMA on C4, of which the scripts have 350m.

    Sequences of 256, batches of 512, bfloat16 weights, 55 thousand steps, a tenth of them warm-up.

    Args:
        size: of the model, 350m.
        error_feedback: whether of the script that keeps errors, at rank 8, or of that which drops
            them, at rank 256 (default: True).

    Source: the scripts of the release of LDAdam (f3c5daf; Robert et al., 2024, arXiv:2410.16103),
    not the paper's table. It keeps the error in the gradients, and so in their dtype.

    Raises:
        ValueError: nothing was published for ``size`` or ``error_feedback``.

    Example:
        >>> from lowrank_optim import presets
        >>> settings = presets.ldadam_pretrain("350m", error_feedback=False)
        >>> settings["rank"], settings["lr"], settings["rho"], settings["error_feedback"]
        (256, 0.001, 0.908, None)
    """
    _one(("350m",), size, "size")
    rank = _one(_LDADAM, error_feedback, "value of error_feedback")
    found: Arguments = {"lr": 1e-3, "betas": (0.908, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    found |= {"rank": rank, "rho": 0.908, "update_proj_gap": 1, "scale": 1.0}
    return found | {"error_feedback": "bfloat16" if error_feedback else None}


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
    _one(("llama2-7b",), model, "model")
    found: Arguments = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    found |= {"active_layers": 1, "update_proj_gap": 20, "block_order": "random"}
    return found | {"outside": "always"}


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
    lr = _one(_BADAM, model, "model")
    found: Arguments = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    return found | {"active_layers": 1, "update_proj_gap": 100, "block_order": "shuffled"}
