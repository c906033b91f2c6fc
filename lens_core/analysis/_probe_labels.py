"""Labels of a probe's examples, and labels without meaning."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from lens_core.analysis.activations import Activations
from lens_core.errors import ArgumentError

__all__ = ["control_labels", "read_labels"]


def read_labels(activations: Activations, labels: Any) -> tuple[Int[Tensor, " example"], tuple[Any, ...]]:
    """Give each example's class as an index, and the classes, sorted.

    Raises:
        ArgumentError: Not one for each example or text, numbers of a scale, or one class.
    """
    given = _plain(labels)
    n_texts = len(activations.ids)
    if any(isinstance(one, list) for one in given):
        if len(given) != n_texts or not all(isinstance(one, list) for one in given):
            raise ArgumentError(f"labels are {len(given)} lists for {n_texts} texts; give a list for each")
        for text, (own, ids) in enumerate(zip(given, activations.ids, strict=True)):
            if len(own) != len(ids):
                raise ArgumentError(f"text {text} has {len(ids)} tokens and {len(own)} labels")
        given = [label for own in given for label in own]
    elif len(given) == n_texts != len(activations):
        given = [given[text] for text in cast("Any", activations.texts).tolist()]
    if len(given) != len(activations):
        raise ArgumentError(f"there are {len(given)} labels for {len(activations)} examples of {n_texts} texts")
    if any(isinstance(label, float) for label in given):
        raise ArgumentError("labels are classes (strings, ints, bools), not numbers of a scale; put those into bins")
    try:
        classes = tuple(sorted(set(given)))
    except TypeError as error:
        raise ArgumentError(f"labels are of one kind, strings or ints or bools: {error}") from error
    if len(classes) < 2:
        raise ArgumentError(f"there is one class only, {classes}; a probe tells classes apart")
    index = {label: place for place, label in enumerate(classes)}
    return torch.tensor([index[label] for label in given]), classes


def _plain(labels: Any) -> list[Any]:
    if hasattr(labels, "tolist"):
        labels = labels.tolist()
    if isinstance(labels, str | bytes) or not isinstance(labels, Iterable):
        raise ArgumentError(f"labels are a list, one for each example; got {labels!r}")

    def plain(one: Any) -> Any:
        one = one.tolist() if hasattr(one, "tolist") else one
        return list(cast("Sequence[Any]", one)) if isinstance(one, list | tuple) else one

    return [plain(one) for one in cast("Iterable[Any]", labels)]


def control_labels(
    activations: Activations, y: Int[Tensor, " example"], column: int, control: str, generator: torch.Generator
) -> Int[Tensor, " example"]:
    """Give labels that mean nothing, as frequent as the true ones.

    Shuffled labels stay the same within a text where the true ones do.

    Raises:
        ArgumentError: Another control; `"tokens"` at a position where tokens cannot carry two labels.
    """
    if control == "shuffled":
        owners: Any = activations.texts
        texts, owner = cast("tuple[Tensor, Tensor]", owners.unique(return_inverse=True))
        first = torch.stack([y[owner == one][0] for one in range(len(texts))])
        if torch.equal(first[owner], y):
            return first[torch.randperm(len(first), generator=generator)][owner]
        return y[torch.randperm(len(y), generator=generator)]
    if control != "tokens":
        raise ArgumentError(f"control is 'shuffled' or 'tokens'; got {control!r}")
    column_ids: Any = activations.tokens[:, column]
    ids, which = cast("tuple[Tensor, Tensor]", column_ids.unique(return_inverse=True))
    drawn = y[torch.randint(len(y), (len(ids),), generator=generator)]
    if bool((drawn == drawn[0]).all()):
        raise ArgumentError(
            f"at position {activations.positions[column]!r} there are {len(ids)} different tokens, too few for "
            "labels by token; use control='shuffled'"
        )
    return drawn[which]
