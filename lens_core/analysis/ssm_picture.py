"""Effective attention as a picture that says what it is not."""

from collections.abc import Sequence

from lens_core import view
from lens_core._arguments import checks_arguments
from lens_core._decomposition import sliced
from lens_core.analysis.ssm_attention import EffectiveAttention
from lens_core.errors import ArgumentError
from lens_core.view import Picture

__all__ = ["attention_picture"]

NOTE = (
    "Effective attention of a state-space layer: how much of the column's input is in the row's output. "
    "It is not a softmax: rows do not sum to 1, and entries may be negative."
)


@checks_arguments
def attention_picture(
    tokens: Sequence[str],
    attention: EffectiveAttention,
    *,
    row: int = 0,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    highlight: Sequence[str | int] = (),
) -> Picture:
    """Draw the maps of one batch row, with a colour scale that has two sides where entries are negative.

    Args:
        tokens: The text, one string per position.
        attention: For all targets and sources. Reduced over channels or heads it is one map; otherwise ask for the few
            that matter with `heads=`.
        row: The row of the batch.
        labels: A name per map; `channel 3`, `head 3` and so on if absent.
        title: Stands above the picture; names the layer if absent.
        highlight: Maps to outline, by label or by number.

    Raises:
        ArgumentError: Some targets or sources only; no such row; labels or tokens that do not fit.

    Example:
        >>> import torch, lens_core as lens
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
        >>> model = lens.load(MambaForCausalLM(config))
        >>> tokens = torch.tensor([[3, 14, 15, 9, 26, 5]])
        >>> _, cache = model.run_with_cache(tokens)
        >>> found = cache.effective_attention(0, heads=[0, 1])
        >>> picture = attention_picture(["a", "b", "c", "d", "e", "f"], found)
        >>> "rows do not sum to 1" in picture.html
        True
    """
    maps = attention.values
    if attention.axes[-2:] != ("target", "source") or maps.shape[-2:] != (len(tokens), len(tokens)):
        raise ArgumentError(
            f"a picture needs all targets and sources of the {len(tokens)} tokens; the attention is "
            f"{list(maps.shape)}, {' '.join(attention.axes)}"
        )
    if attention.axes[0] == "batch":
        maps = sliced(maps, 0, row)
    is_stack = attention.per in attention.axes
    names = [f"{attention.per} {head}" for head in attention.heads] if is_stack else [f"layer {attention.layer}"]
    return view.attention(
        tokens,
        maps.detach() if is_stack else maps.detach()[None],
        labels=names if labels is None else labels,
        title=f"Effective attention, layer {attention.layer}" if title is None else title,
        highlight=highlight,
        note=NOTE,
    )
