"""Which parameters are linear maps, whose gradients have a subspace worth finding."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lowrank_optim.groups.names import bare
from lowrank_optim.tensors.matrix import matrix_view

EMBEDDING = re.compile(
    r"(^|\.)(\w*embed\w*|\w*_emb|emb|wte|wpe|shared|relative_attention_bias)\.weight$"
)
"""Names of embeddings, for want of their modules: what holds the weight itself, and no ancestor."""

HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|unembed\w*|output_projection|classifier|score|head)\."
    r"|^(output|decoder)\.weight$|predictions\.decoder\."
)
"""Names of output heads, which stay dense unless a group asks for them."""

TABLE = re.compile(
    r"bias|embed|(^|_)emb(_|$)|token|table|(^|_)(rel_)?pos(_|$)|position|encoding|quer(y|ies)$"
    r"|latents?$|codebook|codevector|prompt|probe|mask|A_log$|^D$|scale|gamma|norm|decay"
    r"|(^|_)mix(_|$)"
)
"""Names of parameters that are looked up, added or multiplied by, and are no linear maps."""

MAP = re.compile(r"(proj|projection)(_weight)?$")
"""Names that settle it the other way: ``token_proj`` is a map."""

VOCABULARY = 16384
"""Rows from which on a matrix of its own shape is taken for an embedding or a head."""


def names_linear_map(name: str) -> bool:
    """Whether the last part of a parameter's name is that of a linear map."""
    last = name.rpartition(".")[2]
    return MAP.search(last) is not None or TABLE.search(last) is None


def is_batch(shape: Sequence[int]) -> bool:
    """Whether a 3-d parameter can be a batch of matrices, such as experts.

    No more of them than either side has entries: else it is a kernel ``(out, in, k)``, or one map
    of several dimensions.
    """
    return 2 <= shape[0] <= min(shape[1:])


def is_depthwise(shape: Sequence[int]) -> bool:
    """Whether a kernel ``(out, in, ...)`` is a filter for each channel, which mixes none."""
    return shape[1] == 1


def is_linear_map(name: str | None, shape: Sequence[int], flatten: bool) -> bool:
    """What is known without the model: by its name, if it has one, and by its shape."""
    if len(shape) < 2 or (len(shape) > 3 and is_depthwise(shape)):
        return False
    if len(shape) == 3 and (is_depthwise(shape) if flatten else not is_batch(shape)):
        return False
    if name is None:
        return True
    name = bare(name)
    if EMBEDDING.search(name) or HEAD.search(name):
        return False
    return names_linear_map(name)


def looks_like_vocabulary(shape: Sequence[int], others: Sequence[Sequence[int]]) -> bool:
    """Whether a matrix without a name has a row for each of many tokens.

    A tall matrix of many rows, of which there are at most two (embedding and head), and whose rows
    no other takes as its columns, as the second matrix of an MLP does.
    """
    if len(shape) != 2 or shape[0] < VOCABULARY or shape[0] < 3 * shape[1]:
        return False
    alike = sum(tuple(other) == tuple(shape) for other in others)
    return alike <= 2 and not any(other and other[-1] == shape[0] for other in others)


def kernels(model: nn.Module) -> set[int]:
    """Ids of kernels ``(out, in, k)``: one matrix each, and no batch of them."""
    convs = [m.weight for m in model.modules() if isinstance(m, _ConvNd)]
    return {id(weight) for weight in convs if weight.dim() == 3}


def linear_maps(model: nn.Module) -> set[int]:
    """Ids of the parameters of a model that are linear maps.

    ================================== ==================================================
    module                             linear maps
    ================================== ==================================================
    ``nn.Linear``, GPT-2's ``Conv1D``  the weight
    ``nn.Conv1d`` … ``ConvTranspose3d`` the weight; not if depthwise
    any other                          bare parameters of two dimensions, and of three
                                       that are experts, whose names are not those of
                                       tables (:data:`TABLE`): packed attention weights,
                                       recurrent cells, ``nn.Bilinear``
    ``*Embedding*``, ``*Norm*``,       none
    ``*Router*``
    ================================== ==================================================

    Embeddings and output heads are left out: by module type, by transformers' accessors and ties,
    and heads by their name.
    """
    kept_dense = _vocabulary_parameters(model)
    found: set[int] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(recurse=False):
            full = bare(f"{path}.{name}" if path else name)
            if id(param) in kept_dense or HEAD.search(full):
                kept_dense.add(id(param))
            elif _is_map(module, name, param):
                found.add(id(param))
    return found - kept_dense


def _is_map(module: nn.Module, name: str, param: Tensor) -> bool:
    """Whether a module's own parameter is a linear map."""
    kind, shape = type(module).__name__, param.shape
    if matrix_view(shape, flatten=isinstance(module, _ConvNd)) is None:
        return False
    if isinstance(module, nn.Linear) or kind == "Conv1D":
        return name == "weight"
    if isinstance(module, _ConvNd):
        return name == "weight" and not is_depthwise(shape)
    if is_embedding(module) or "Norm" in kind or "Router" in kind or len(shape) > 3:
        return False
    return names_linear_map(name) and (len(shape) == 2 or is_batch(shape))


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks rows up: by its type, or by the name of its class."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return True
    return "Embedding" in type(module).__name__ and not _is_stem(module)


def _vocabulary_parameters(model: nn.Module) -> set[int]:
    """Parameters of embeddings and output heads, by module type and transformers' accessors."""
    tables = [m for m in model.modules() if is_embedding(m)]
    tables += [m for m in _found(model, "get_input_embeddings") if not _is_stem(m)]
    dense = {id(p) for m in tables for p in m.parameters(recurse=False)}
    heads = _found(model, "get_output_embeddings")
    return dense | {id(p) for m in heads for p in m.parameters()}


def _found(model: nn.Module, accessor: str) -> list[nn.Module]:
    """What transformers' accessor returns, of the model and of all in it."""
    found = []
    for module in model.modules():
        get = getattr(module, accessor, None)
        try:
            part = get() if callable(get) else None
        except (NotImplementedError, AttributeError):  # how transformers says that it has none
            continue
        if isinstance(part, nn.Module):
            found.append(part)
    return found


def _is_stem(module: nn.Module) -> bool:
    """Whether a model's input is a convolution or a map: of patches, or of sound."""
    return isinstance(module, nn.Linear | _ConvNd)
