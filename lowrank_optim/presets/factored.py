"""Presets of methods that train factors of the weights, or layers that are made of them."""

from __future__ import annotations

from lowrank_optim.presets.tables import Arguments, adamw, one

_SST = dict.fromkeys(("opt-125m", "opt-350m", "opt-1.3b", "llama-130m"), 64) | {"llama-1.3b": 128}

_SWITCHLORA = {"350m": 256, "1.3b": 512}

_SLTRAIN = {"60m": (128, 32.0), "130m": (256, 16.0), "350m": (256, 16.0), "1b": (512, 8.0)}


def sst_pretrain(model: str) -> Arguments:
    """Arguments of ``SSTAdamW`` for OPT and LLaMA on OpenWebText.

    Models are opt-125m, opt-350m, opt-1.3b, llama-130m and llama-1.3b. The linear layers of all
    blocks are trained through their factors, embeddings and norms densely.
    A round is as many iterations as it takes to see every vector once, which is d/r. 200 steps for
    an iteration and 20 of warm-up are those of the paper's translation; of the language models no
    source that was read has them, nor any learning rate or decay: give ``lr`` and
    ``weight_decay``.

    Source: summaries and reviews of Zhao et al. (2024), arXiv:2405.15481, and a copy of appendix
    F.2, not the whole paper and not the release.

    Raises:
        ValueError: nothing was published for ``model``.

    Example:
        >>> from lowrank_optim import presets
        >>> settings = presets.sst_pretrain("llama-1.3b")
        >>> settings["rank"], settings["steps_per_iteration"], settings["sampling"]
        (128, 200, 'mixed')
    """
    found: Arguments = {"rank": one(_SST, model, "model"), "factors": "exact", "enhanced": True}
    found |= {"steps_per_iteration": 200, "iterations_per_round": None, "warmup_steps": 20}
    found |= {"sampling": "mixed", "negative": "clamp", "on_refresh": "reset", "stagger": False}
    return found


def switchlora_pretrain(size: str) -> Arguments:
    """Arguments of ``SwitchLoRAAdamW`` for LLaMA on C4; sizes are 350m and 1.3b.

    The same rate serves dense parameters. Sequences of 512, batches of 1152, 40 thousand steps, 100
    of them warm-up and a cosine, clipping at 1.0, all in bfloat16. The paper has half of each rank
    as well.

    Source: the defaults of the release (f9a174e) of Zhou et al. (2024), arXiv:2406.06564, and ranks
    as reviews quote tables 2 and 3, not the paper itself.

    Raises:
        ValueError: nothing was published for ``size``.

    Example:
        >>> from lowrank_optim import presets
        >>> settings = presets.switchlora_pretrain("1.3b")
        >>> settings["rank"], settings["lr"], settings["interval"], settings["total_steps"]
        (512, 0.02, 40, 40000)
    """
    found = adamw(0.02, rank=one(_SWITCHLORA, size, "size"), scale=1.0, total_steps=40_000)
    found |= {"interval": 40, "descent_ratio": 0.1, "descent": "exponential", "order": "fifo"}
    return found | {"freeze_steps": 5, "freeze_step_counter": False, "decay_on": "factors"}


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
    rank, scale = one(_SLTRAIN, size, "size")
    return {"rank": rank, "density": 0.03, "scale": scale}


def lost_pretrain(size: str) -> Arguments:
    """Arguments of ``convert(model, "lost")`` for LLaMA on C4, of which reviews quote 130m.

    **They are not complete.** γ is one value of an ablation, which need not be that of the main
    runs. No source that was read has ranks, shares of columns, learning rates or steps: give
    ``rank`` and ``density`` beside these, or ours are 128 and 0.03.

    Source: reviews of Li et al. (2025), arXiv:2508.02668, that quote its table 9, not the paper
    itself nor the release: neither was read.

    Raises:
        ValueError: nothing was published for ``size``.

    Example:
        >>> from lowrank_optim import presets
        >>> presets.lost_pretrain("130m")
        {'gamma': 0.9, 'activation': 'silu'}
    """
    one(("130m",), size, "size")
    return {"gamma": 0.9, "activation": "silu"}
