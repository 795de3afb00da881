"""What the three scripts share: their options, the model, its tokenizer, and text as tokens."""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lowrank_optim.memory.models import MODELS

STDLIB = sysconfig.get_paths()["stdlib"]
WEIGHTS = ("*.safetensors", "*.bin")


def options(about: str | None) -> argparse.ArgumentParser:
    """Defaults are those of a 7B model on a 24 GB card; docs/memory.md has other cards."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="of the hub, a folder, a config.json, or such as llama-7b: "
        "without weights they are random")  # fmt: skip
    add("--data", default=STDLIB, help="a file or a folder (default: Python's own library)")
    add("--output", type=Path, default=Path("runs/7b"), help="checkpoints; run again to go on")
    add("--rank", type=int, default=1024, help="512 leaves 3.9 GiB more to longer sequences")
    add("--tokens", type=int, default=1024, help="of a sequence; a micro-batch is one of them")
    add("--micro-batches", type=int, default=16, help="of a step: they need no more memory")
    add("--steps", type=int, default=1000)
    add("--warmup", type=int, default=100, help="steps in which the learning rate rises")
    # The learning rate of the dense parameters (embeddings, norms), as for AdamW. That of the
    # matrices is scale times it. From random weights: GaLore's paper has 5e-3 and 0.25 for a 7B.
    add("--lr", type=float, default=2e-5)
    add("--scale", type=float, default=1.0)
    add("--gap", type=int, default=200, help="steps from one basis of a matrix to its next")
    add("--save-every", type=int, default=100, help="a checkpoint of a 7B takes 19 GB")
    add("--seed", type=int, default=0)
    return parser


def load_model(name: str, seed: int, device: str = "cpu") -> Any:
    """In bfloat16: the weights of a 7B take 12.6 GiB, and there is no float32 copy of them."""
    path, known = Path(name), MODELS.get(name)
    file = path / "config.json" if path.is_dir() else path
    if known is None and not (
        file.is_file() and not any(any(file.parent.glob(x)) for x in WEIGHTS)
    ):
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device)
    config = (
        AutoConfig.from_pretrained(file) if known is None else AutoConfig.for_model(**known.config)
    )
    torch.manual_seed(seed)
    with torch.device(device):  # 7B random numbers are made where they will be
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def checkpoint_layers(model: Any) -> None:
    """Every layer; transformers before 5.20 had another name for it."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model.config.use_cache = False


def load_tokenizer(name: str) -> Any:
    """The model's own; bytes for a model without one, such as a configuration."""
    path = Path(name)
    local = path.exists() or name in MODELS
    if not local or (path / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    end, alphabet = "<eof>", sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate([end, *alphabet])}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=end, pad_token=end)


def read_files(data: str, pattern: str = "*") -> list[str]:
    """The text of a file, or of those in a folder that match, in an order that stays."""
    path = Path(data)
    if not path.exists():
        raise SystemExit(f"--data: there is no {path}")
    if path.is_dir() and data == STDLIB:  # not other people's packages, nor test suites
        skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings"}
        files = [f for f in path.rglob("*.py") if not skipped & set(f.relative_to(path).parts)]
    else:
        files = [f for f in path.rglob(pattern) if f.is_file()] if path.is_dir() else [path]
    return [f.read_text(encoding="utf-8", errors="replace") for f in sorted(files)]


def windows(texts: list[str], tokenizer: Any, length: int) -> torch.Tensor:
    """All text end to end, cut into `(count, length)` tokens: no padding, nothing wasted."""
    ids = [i for x in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
           for i in (*x, tokenizer.eos_token_id)]  # fmt: skip
    count = len(ids) // length
    if count == 0:
        raise SystemExit(f"--data: {len(ids)} tokens are less than one sequence of {length}")
    return torch.tensor(ids[: count * length]).view(count, length)


def last_checkpoint(folder: Path) -> str | None:
    """The last that Trainer finished: its state is what it writes last."""
    whole = [f.parent for f in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda f: int(f.name.rpartition("-")[2]))) if whole else None
