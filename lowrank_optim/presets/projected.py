"""Presets of methods that project gradients: pre-training, and a release's defaults."""

from __future__ import annotations

from lowrank_optim.presets.tables import Arguments, adamw, galore, golore, one

_GALORE = {"60m": (128, 200, 0.01), "130m": (256, 200, 0.01), "350m": (256, 200, 0.01)}
_GALORE |= {"1b": (512, 200, 0.01), "7b": (1024, 500, 0.005)}

_FIRA = {"60m": (128, 200, 0.25, 0.01), "130m": (256, 200, 0.25, 0.01)}
_FIRA |= {"350m": (256, 200, 0.25, 0.01), "1b": (512, 200, 0.0625, 0.01)}
_FIRA |= {"7b": (64, 500, 0.0625, 0.005)}

_APOLLO = {False: {"60m": (128, 1.0), "1b": (256, 1.0), "7b": (256, 1.0)}}
_APOLLO |= {True: {"60m": (1, 128.0), "130m": (1, 192.0), "7b": (1, 128.0)}}

_FRUGAL = ("60m", "130m", "350m", "1b", "7b")

_LDADAM = {True: 8, False: 256}


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
    rank, gap, lr = one(_GALORE, size, "size")
    return galore(lr, rank, gap, scale=0.25)


def golore_pretrain(size: str, *, total_steps: int = 10_000) -> Arguments:
    """Arguments of ``GaLoreAdamW`` for LLaMA on C4 as GoLore, of which the README has 60m.

    Bases are singular vectors for 80 % of the steps and random for the rest (GoLore@20%). Sequences
    of 256, batches of 512, 10 thousand steps, a tenth of them warm-up. The README gives no factor
    of the update, no eps and no decay: neither does this, and ours are 0.25, 1e-8 and 0.01.

    Args:
        size: of the model, 60m.
        total_steps: of the run, of which the switch is at 80 % (default: 10_000).

    Source: the README of the release (62b8183) of He et al. (2024), arXiv:2410.11289, not the
    paper's tables, whose run of 60m has 30 thousand steps. Neither was the code read.

    Raises:
        ValueError: nothing was published for ``size``, or ``total_steps`` is no number of steps.

    Example:
        >>> from lowrank_optim import presets
        >>> settings = presets.golore_pretrain("60m")
        >>> settings["rank"], settings["random_from"], settings["total_steps"], settings["lr"]
        (128, 0.8, 10000, 0.001)
    """
    one(("60m",), size, "size")
    return golore(total_steps, lr=1e-3, rank=128, update_proj_gap=200)


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
    rank, gap, scale, lr = one(_FIRA, size, "size")
    own: Arguments = {"alpha_mode": "release", "scaling": "column", "limiter": 1.01}
    return galore(lr, rank, gap, scale) | own


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
    rank, scale = one(one(_APOLLO, mini, "value of mini"), size, "size")
    own: Arguments = {"scale_type": "tensor" if mini else "channel", "limiter": 1.01}
    return galore(0.01, rank, 200, scale) | own | {"projector": "random"}


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
    large = one(_FRUGAL, size, "size") == "7b"
    found = adamw(5e-4 if large else 1e-3)
    found |= {"density": 0.0 if large else 0.25, "projector": "block"}
    found |= {"block_order": "descending", "update_proj_gap": 500 if large else 200}
    found |= {"free_rule": "sign", "free_lr_scale": 1.0, "on_refresh": "reset"}
    return found | {"proj_params_lr_scale": 0.3 if large else 1.0}


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
    one(("350m",), size, "size")
    rank = one(_LDADAM, error_feedback, "value of error_feedback")
    found = adamw(1e-3, betas=(0.908, 0.99), rank=rank, rho=0.908, update_proj_gap=1, scale=1.0)
    return found | {"error_feedback": "bfloat16" if error_feedback else None}


def dct_release() -> Arguments:
    """Arguments of ``DCTAdamW`` with which it does what the release's defaults do.

    Columns of the inverse transform are chosen by their l1 norm at every step, moments stay in
    their slots, and errors are dropped. Rate, decay and rank have no default there: give them. The
    run of LLaMA of 800M that the paper reports has sequences and batches of 512 and 100 tokens for
    each parameter; no source that was read has its rate or its rank.

    Source: the release of DCT-AdamW (ISTA-DASLab-Optimizers 1.1.15, 4c98e6e; Modoranu et al.,
    2025, arXiv:2505.17967), not the paper.

    Example:
        >>> from lowrank_optim import presets
        >>> settings = presets.dct_release()
        >>> settings["basis"], settings["ranking"], settings["on_refresh"]
        ('dct3', 'l1', 'keep')
    """
    found: Arguments = {"betas": (0.9, 0.999), "eps": 1e-8, "projector": "dct", "basis": "dct3"}
    found |= {"ranking": "l1", "update_proj_gap": 1, "scale": 1.0, "on_refresh": "keep"}
    return found | {"slot_bias_correction": False, "error_feedback": None, "stagger": False}
