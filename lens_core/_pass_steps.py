"""What each pass does to the weights, block by block: each step gives the block that it changed, None for the ends.

Glossary: g and b a norm's gain and bias; W a weight whose rows are `[out, in]`; n = normalized input, so that the norm
hands on n * g + b. Sources: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; TransformerLens'
`weight_processing.py` for what is folded where.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from lens_core._declaration import NormPlace
from lens_core._pass_log import Editor, row_pieces
from lens_core._pass_rules import attention_layers, bias_path, matrix_of
from lens_core._pass_weights import Matrix, find_matrix, wide
from lens_core.factored import FactoredMatrix

__all__ = ["center_embeddings_and_branches", "center_vocabulary", "fold_norms", "fold_values", "refactor_heads"]

Steps = Iterator[int | None]


def fold_norms(editor: Editor) -> Steps:
    """W (n g + b) = (W g) n + W b; and, since a LayerNorm's n has no mean, W g less its mean over the inputs."""
    editor.untie()
    for entry in editor.model.declaration.readers:
        if entry.norm is not None and fold_norm(editor, entry.norm, entry.readers):
            yield entry.layer


def fold_norm(editor: Editor, norm: NormPlace, readers: tuple[str, ...]) -> bool:
    """Fold one norm into its readers; tells whether there was anything to fold."""
    gain, bias = _affine(editor, norm)
    for path in readers:
        matrix = find_matrix(editor.root, path)
        if bias is not None:
            editor.add_to_bias(matrix, times(editor, matrix, bias))
        if gain is not None or norm.kind.centres:
            editor.map_rows(matrix.weight, matrix.reads, lambda rows: _folded(rows, gain, norm.kind.centres))
    neutralise(editor, norm)
    return gain is not None or bias is not None or norm.kind.centres


def _folded(rows: Tensor, gain: Tensor | None, centres: bool) -> Tensor:
    rows = rows if gain is None else rows * gain.to(rows.device)
    return rows - rows.mean(-1, keepdim=True) if centres else rows


def _affine(editor: Editor, norm: NormPlace) -> tuple[Tensor | None, Tensor | None]:
    """Give a norm's gain and bias, each None where it is 1 or 0 already."""
    kind = norm.kind.gain
    assert kind is not None
    weight = None if kind.weight is None else editor.parameter(f"{norm.path}.{kind.weight}")
    bias = None if kind.bias is None else editor.parameter(f"{norm.path}.{kind.bias}")
    gain = None if weight is None else wide(weight).clone() + kind.offset
    shift = None if bias is None else wide(bias).clone()
    return (
        None if gain is None or bool((gain == 1).all()) else gain,
        None if shift is None or not bool(shift.any()) else shift,
    )


def neutralise(editor: Editor, norm: NormPlace) -> None:
    """Let a norm hand on its normalized input."""
    kind = norm.kind.gain
    assert kind is not None
    gain, bias = _affine(editor, norm)
    if gain is not None:
        editor.fill(f"{norm.path}.{kind.weight}", 1.0 - kind.offset)
    if bias is not None:
        editor.fill(f"{norm.path}.{kind.bias}", 0.0)


def times(editor: Editor, matrix: Matrix, vector: Tensor) -> Tensor:
    """Give W b, of stacked experts for each."""
    weight = editor.parameter(matrix.weight)
    assert weight is not None
    vector = vector.to(weight.device)
    products = [wide(rows) @ vector for rows in row_pieces(weight, matrix.reads)]
    return torch.cat(products).view(weight.movedim(matrix.reads, -1).shape[:-1])


def center_embeddings_and_branches(editor: Editor) -> Steps:
    """Take the mean over d_model out of all that is added to the stream: every LayerNorm would."""
    editor.untie()
    for writer in editor.model.declaration.writing_weights:
        matrix = find_matrix(editor.root, writer.path)
        editor.map_rows(matrix.weight, matrix.writes, _centred)
        if matrix.bias is not None and editor.parameter(matrix.bias) is not None:
            editor.map_rows(matrix.bias, -1, _centred)
        yield writer.layer


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)


def center_vocabulary(editor: Editor) -> Steps:
    """Take the mean over the vocabulary out of W_U and b_U: it adds the same to all logits of a position."""
    editor.untie()
    unembed = find_matrix(editor.root, editor.model.declaration.unembed)
    weight = editor.parameter(unembed.weight)
    assert weight is not None
    mean = wide(weight.detach().mean(unembed.writes, dtype=torch.promote_types(weight.dtype, torch.float32)))
    editor.map_rows(unembed.weight, unembed.reads, lambda rows: rows - mean)
    if unembed.bias is not None and editor.parameter(unembed.bias) is not None:
        editor.map_rows(unembed.bias, -1, _centred)
    yield None


# ---------------------------------------------------------------------- attention


def fold_values(editor: Editor) -> Steps:
    """Move b_V into b_O: rows of the pattern sum to 1, so that it arrives whole."""
    for layer in attention_layers(editor.model):
        if fold_value(editor, layer):
            yield layer


def fold_value(editor: Editor, layer: int) -> bool:
    """Move one block's b_V into its b_O; tells whether there was any."""
    model = editor.model
    path = bias_path(model, "b_V", layer)
    bias = editor.parameter(path)
    if bias is None:
        return False
    b_V, W_O = wide(model.weight("b_V", layer)), wide(model.weight("W_O", layer))  # [kv head, e], [head, e, d_model]
    if not bool(b_V.any()):
        return False
    each = b_V.repeat_interleave(len(W_O) // len(b_V), dim=0).to(W_O.device)
    editor.add_to_bias(matrix_of(model, "W_O", layer), torch.einsum("he,hed->d", each, W_O))
    _put(editor, "b_V", layer, torch.zeros_like(b_V))
    return True


def refactor_heads(editor: Editor) -> Steps:
    """Write each head's W_Q W_K^T and W_V W_O in their singular bases."""
    for layer in attention_layers(editor.model):
        fold_value(editor, layer)
        _refactor_queries_and_keys(editor, layer)
        _refactor_values_and_outputs(editor, layer)
        yield layer


def _refactor_queries_and_keys(editor: Editor, layer: int) -> None:
    """[W_Q; b_Q] [W_K; b_K]^T = U S V^T: queries become U sqrt(S), keys V sqrt(S), biases their last rows."""
    model = editor.model
    has_bias = any(editor.parameter(bias_path(model, f"b_{part}", layer)) is not None for part in "QK")
    both = [_augmented(editor, part, layer, has_bias=has_bias) for part in "QK"]
    left, singular, right = _singular(*both)
    for part, basis in (("Q", left), ("K", right)):
        new = basis * singular.sqrt()[:, None, :]
        _put(editor, f"W_{part}", layer, new[:, : model.cfg.d_model])
        if has_bias:
            _put(editor, f"b_{part}", layer, new[:, -1])


def _augmented(editor: Editor, part: str, layer: int, *, has_bias: bool) -> Tensor:
    """Give `[W; b]` of queries or keys, `[head, d_model + 1, e]`, or W alone where neither has a bias."""
    model = editor.model
    weight = wide(model.weight(f"W_{part}", layer))
    bias = wide(model.weight(f"b_{part}", layer)).to(weight)
    return torch.cat([weight, bias[:, None]], dim=1) if has_bias else weight


def _refactor_values_and_outputs(editor: Editor, layer: int) -> None:
    """W_V W_O = U S V^T: values become U S, and outputs V^T, whose rows are orthonormal."""
    model = editor.model
    W_V, W_O = wide(model.weight("W_V", layer)), wide(model.weight("W_O", layer))
    left, singular, right = _singular(W_V, W_O.mT)
    _put(editor, "W_V", layer, left * singular[:, None, :])
    output = matrix_of(model, "W_O", layer)
    columns = right.mT.flatten(0, 1)  # [(head e), d_model]
    weight = editor.touched(output.weight)
    weight.copy_(columns if output.reads == -2 else columns.T)


def _singular(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give U, S and V of `a b^T` for each head, `[head, n, e]`, filled up with zeros where n is less than e."""
    left, values, right = FactoredMatrix(a, b.mT).svd()
    rest = (0, a.shape[-1] - values.shape[-1])
    return pad(left, rest), pad(values, rest), pad(right.mT, rest)


def _put(editor: Editor, name: str, layer: int, value: Tensor) -> None:
    """Write one head's-worth of a projection: W `[head, d_model, e]` or b `[head, e]`, where its view reads it."""
    view = next(view for view in editor.model.declaration.weights if view.name == name)
    assert view.columns is not None
    matrix = matrix_of(editor.model, name, layer)
    path = matrix.weight if view.part == "weight" else matrix.bias
    assert path is not None
    value = value.movedim(0, 1) if view.part == "weight" else value
    parameter = editor.parameter(path)
    if parameter is None:
        weight = editor.parameter(matrix.weight)
        assert weight is not None
        zeros = weight.new_zeros(weight.shape[matrix.writes])
        editor.make(path, zeros, requires_grad=weight.requires_grad)
    parameter = editor.touched(path)
    is_turned = view.part == "weight" and matrix.reads == -1
    own = parameter.detach().T if is_turned else parameter.detach()
    new = view.columns.write(wide(own), value)
    parameter.copy_(new.T if is_turned else new)
