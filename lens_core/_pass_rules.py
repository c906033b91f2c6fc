"""Why a pass does not hold for a model: each rule gives the reason, or None where the pass holds."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from lens_core._declaration import Declaration, NormPlace
from lens_core._pass_weights import Matrix, find_matrix, find_parameter, has_hidden_bias, has_matrix, problem

__all__ = [
    "attention_layers",
    "bias_path",
    "matrix_of",
    "no_fold_ln",
    "no_refactoring",
    "no_unembed_centring",
    "no_value_folding",
    "no_writing_centring",
]

AFTER = ("ln1_post", "ln2_post")
"""Norms between a branch and the sum."""
ENDS = (
    *("Q", "K", "V", "O", "in", "gate", "out", "router", "in_proj", "out_proj"),
    *("expert_in", "expert_gate", "expert_out"),
)
"""Weight views of what reads or writes the stream; the others are inside of a branch."""


def no_fold_ln(model: Any) -> str | None:
    """Say why gains cannot be folded into the weights that read them."""
    return next(_against_folding(model.bare_model, model.declaration), None)


def _against_folding(root: nn.Module, declaration: Declaration) -> Iterator[str]:
    yield from _unread(root, declaration)
    yield from _missing(root, [path for entry in declaration.readers for path in entry.readers])
    for entry in declaration.readers:
        if entry.norm is not None:
            yield from _against_norm(root, entry.norm, entry.readers)
    yield from _unknown(root, declaration)
    yield from _shared(root, _paths(declaration))


def _missing(root: nn.Module, paths: list[str]) -> Iterator[str]:
    """Name a path at which nothing is."""
    yield from (f"the architecture declares {path}, which is not there" for path in paths if not has_matrix(root, path))


def _paths(declaration: Declaration) -> list[str]:
    norms = [entry.norm.path for entry in declaration.readers if entry.norm is not None]
    return [*norms, *(path for entry in declaration.readers for path in entry.readers)]


def _unread(root: nn.Module, declaration: Declaration) -> Iterator[str]:
    """Name a norm of the declaration whose readers nobody says."""
    read = {entry.norm.path for entry in declaration.readers if entry.norm is not None}
    for name, place in declaration.norms.items():
        paths = {place.path.format(layer=layer) for layer in range(declaration.cfg.n_layers)}
        missing = sorted(path for path in paths - read if name not in AFTER and _exists(root, path))
        if missing:
            yield f"the architecture does not say what reads {missing[0]} (Declaration.readers)"


def _against_norm(root: nn.Module, norm: NormPlace, readers: tuple[str, ...]) -> Iterator[str]:
    gain = norm.kind.gain
    if gain is None:
        yield f"nobody says where {norm.path} keeps its gain (NormKind.gain)"
        return
    for name in (gain.weight, gain.bias):
        if name is not None and find_parameter(root, f"{norm.path}.{name}") is not None:
            yield from _against(problem(root, f"{norm.path}.{name}"))
    bias = None if gain.bias is None else find_parameter(root, f"{norm.path}.{gain.bias}")
    adds = bias is not None and not bias.is_meta and bool(bias.detach().any())
    for path in readers:
        matrix = find_matrix(root, path)
        yield from _against(problem(root, matrix.weight))
        if adds:
            yield from _against_bias(root, matrix, f"{norm.path} has a bias, and")


def _against_bias(root: nn.Module, matrix: Matrix, why: str) -> Iterator[str]:
    """Say that a linear map cannot take a bias."""
    if matrix.bias is None:
        yield f"{why} {matrix.weight}, which would take it on, can have none in HF's code"
    elif find_parameter(root, matrix.bias) is not None:
        yield from _against(problem(root, matrix.bias))


def _against(reason: str | None) -> Iterator[str]:
    if reason is not None:
        yield reason


def _unknown(root: nn.Module, declaration: Declaration) -> Iterator[str]:
    """Name a parameter of a block that has the stream's width, and that nobody declares: it may read or write it."""
    layers = range(declaration.cfg.n_layers)
    known = set(_paths(declaration))
    known |= {writer.path for writer in declaration.writing_weights}
    known |= {place.path.format(layer=layer) for place in declaration.norms.values() for layer in layers}
    inside = [view for view in declaration.weights if view.name[2:] not in ENDS]
    known |= {view.path.format(layer=layer) for view in inside for layer in layers}
    heads = ("attn.hook_q_normed", "attn.hook_k_normed")
    known |= {point.seam.path for point in declaration.points if point.name.endswith(heads)}
    blocks, width = root.get_submodule(declaration.blocks), declaration.cfg.d_model
    for name, parameter in blocks.named_parameters(prefix=declaration.blocks):
        if width in parameter.shape and not known & {name, name.removesuffix("_bias"), name.rpartition(".")[0]}:
            yield f"nobody declares {name}, which has the width of the residual stream and may read or write it"


def _shared(root: nn.Module, paths: list[str]) -> Iterator[str]:
    """Name a module or parameter that stands at two places: what is right for one is wrong for the other."""
    parameters = [
        parameter
        for path in paths
        for name in (path, f"{path}.weight")
        if _exists(root, name.rpartition(".")[0]) and (parameter := find_parameter(root, name)) is not None
    ]
    counts = Counter(id(parameter) for parameter in parameters)
    twice = next((parameter for parameter in parameters if counts[id(parameter)] > 1), None)
    if twice is not None:
        named = next(name for name, parameter in root.named_parameters() if parameter is twice)
        yield f"{named} is used at {counts[id(twice)]} places"


def _exists(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


# ---------------------------------------------------------------------- centring


def no_writing_centring(model: Any) -> str | None:
    """Say why the stream's mean matters to what reads it."""
    return next(_against_centring(model.bare_model, model.declaration), None)


def _against_centring(root: nn.Module, declaration: Declaration) -> Iterator[str]:
    for name, place in declaration.norms.items():
        if not place.kind.centres:
            yield f"{name} is an RMSNorm, which does not subtract the mean: without it, its output would differ"
    after = [name for name in AFTER if name in declaration.norms]
    if after:
        yield f"{after[0]} stands between a branch and the residual stream: what it hands on has a mean of its own"
    bare = [entry.readers[0] for entry in declaration.readers if entry.norm is None]
    if bare:
        yield f"{bare[0]} reads the residual stream without a norm before it"
    if not declaration.writing_weights:
        yield "the architecture does not say what writes to the stream (Declaration.writing_weights)"
    yield from _missing(root, [writer.path for writer in declaration.writing_weights])
    for writer in declaration.writing_weights:
        matrix = find_matrix(root, writer.path)
        yield from _against(problem(root, matrix.weight))
        if matrix.bias is not None and find_parameter(root, matrix.bias) is not None:
            yield from _against(problem(root, matrix.bias))
    yield from _unread(root, declaration)
    yield from _unknown(root, declaration)
    yield from _shared(root, [writer.path for writer in declaration.writing_weights])


def no_unembed_centring(model: Any) -> str | None:
    """Say why adding the same to all logits is not the same."""
    cap, unembed = model.declaration.logit_cap, f"{model.declaration.unembed}.weight"
    if cap is not None:
        return f"logits are soft-capped (cap * tanh(logits / cap), cap = {cap}): their common part matters"
    return problem(model.bare_model, unembed)


# ---------------------------------------------------------------------- attention


def no_value_folding(model: Any) -> str | None:
    """Say why a value bias is not a constant of what attention adds."""
    return next(_against_value_folding(model), None)


def _against_value_folding(model: Any) -> Iterator[str]:
    root, declaration = model.bare_model, model.declaration
    if "W_V" not in model.weight_names or "W_O" not in model.weight_names:
        yield f"{declaration.cfg.model_type} has no attention"
        return
    if not declaration.rows_sum_to_one:
        yield "rows of the pattern do not sum to 1 (attention sinks), so a value's bias arrives in part"
    for layer in attention_layers(model):
        path = bias_path(model, "b_V", layer)
        if find_parameter(root, path) is not None or has_hidden_bias(root, path):
            yield from _against(problem(root, path))
            yield from _against(problem(root, matrix_of(model, "W_O", layer).weight))
            yield from _against_bias(root, matrix_of(model, "W_O", layer), "values have a bias, and")


def attention_layers(model: Any) -> tuple[int, ...]:
    """List the blocks with attention."""
    view = next(view for view in model.declaration.weights if view.name == "W_V")
    return tuple(range(model.declaration.cfg.n_layers)) if view.layers is None else view.layers


def matrix_of(model: Any, name: str, layer: int) -> Matrix:
    """Find the matrix that a weight view is of."""
    view = next(view for view in model.declaration.weights if view.name == name)
    return find_matrix(model.bare_model, view.path.format(layer=layer))


def bias_path(model: Any, name: str, layer: int) -> str:
    """Give the path of the parameter that a bias view is of, whether it is there or not."""
    view = next(view for view in model.declaration.weights if view.name == name)
    return f"{view.path.format(layer=layer)}.{view.part}"


def no_refactoring(model: Any) -> str | None:
    """Say why queries and keys, or values and outputs, cannot be written in another basis."""
    return next(_against_refactoring(model), None)


def _against_refactoring(model: Any) -> Iterator[str]:
    declaration, root = model.declaration, model.bare_model
    yield from _against_value_folding(model)
    names = {point.name.rpartition(".")[2] for point in declaration.points}
    if "hook_rot_q" in names:
        yield "queries and keys are rotated by position: another basis of a head would rotate otherwise"
    if "hook_q_normed" in names:
        yield "queries and keys have norms of their own, whose gains belong to the basis"
    if declaration.cfg.n_key_value_heads not in (None, declaration.cfg.n_heads):
        yield "query heads share keys and values, which cannot be in each one's own basis"
    for layer in attention_layers(model):
        for name in ("W_Q", "W_K", "W_V", "W_O"):
            yield from _against(problem(root, matrix_of(model, name, layer).weight))
        paths = [bias_path(model, f"b_{part}", layer) for part in "QK"]
        if any(find_parameter(root, path) is not None for path in paths):
            for part in "QK":
                yield from _against_bias(root, matrix_of(model, f"W_{part}", layer), "queries or keys have a bias, and")
