"""The pieces of a model: embedding, final norm, unembedding, weights, and what it shares with `torch.nn.Module`."""

from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from lens_core._declaration import Declaration
from lens_core._text import Texts
from lens_core._weight_methods import view_of, whole_stack
from lens_core.errors import UnsupportedHookError, WeightError
from lens_core.weights import read_weight

__all__ = ["Pieces"]


_Model = TypeVar("_Model", bound="Pieces")  # beartype takes `Self` in decorated classes only


class Pieces(Texts):
    """What a model is made of, to be called or looked at apart.

    Attributes:
        architecture: The descriptor of the plugin that serves this model.
    """

    architecture: Any

    def __init__(self, hf_model: nn.Module, declaration: Declaration) -> None:
        super().__init__(hf_model, declaration)
        self._views = {view.name: view for view in declaration.weights}

    def embed(self, input: Any) -> Float[Tensor, "batch pos d_model"]:
        """Embed token ids or text: what `hook_embed` holds, positions left out and scale included.

        Where the scale is applied outside of the embedding (Granite), the model applies it again to embeddings that it
        is given as input.
        """
        tokens = self.to_tokens(input) if not isinstance(input, Tensor) else input
        embedded = self.bare_model.get_submodule(self.declaration.embed)(tokens)
        return embedded if self.declaration.embed_scale == 1 else embedded * self.declaration.embed_scale

    def ln_final(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Apply the final norm, gain and bias included."""
        return self.bare_model.get_submodule(self.declaration.norms["ln_final"].path)(residual)

    def unembed(self, normalized: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Apply the unembedding to what the final norm hands on."""
        return self.bare_model.get_submodule(self.declaration.unembed)(normalized)

    def finish_logits(self, unembedded: Float[Tensor, "*batch tokens"]) -> Float[Tensor, "*batch tokens"]:
        """Make logits of what the unembedding gives, for all tokens or some: HF's factor, soft cap and cast.

        Raises:
            UnsupportedHookError: The architecture does not say how.

        Example:
            >>> import torch, lens_core as lens
            >>> model = lens.load("toy:gpt2")
            >>> logits, cache = model.run_with_cache("the cat")
            >>> final = model.unembed(model.ln_final(cache["resid_post", -1]))
            >>> torch.allclose(model.finish_logits(final), logits, atol=1e-4)
            True
        """
        made, given = (self.table[name].seam for name in ("hook_logits", "unembed.hook_out"))
        if made == given:
            return unembedded
        if not hasattr(made, "finish"):
            raise UnsupportedHookError(
                f"{self.architecture.name} does not say how logits are made of the unembedding's output: its "
                "'hook_logits' is not one of unembedding_points(..., finish=)"
            )
        return unembedded if made.finish is None else made.finish(unembedded)

    def weight(self, name: str, layer: int | None = None, *, dequantize: bool = False) -> Tensor:
        """Give one weight in TransformerLens' layout; a view of the live parameter.

        Args:
            name: One of `weight_names`.
            layer: The block, 0-based, negative from the end; None for what is outside of the blocks.
            dequantize: Whether a quantised weight is turned into the full one that it stands for, by the library that
                quantised it: a copy. Plain weights stay views.

        Raises:
            WeightError: No such weight, no such layer, or a weight that cannot be shown (quantised, on meta).
        """
        n_layers = self.declaration.cfg.n_layers
        if layer is not None and not -n_layers <= layer < n_layers:
            raise WeightError(f"{name} of block {layer!r}: this model has blocks 0 to {n_layers - 1}")
        layer = None if layer is None else layer % n_layers
        return read_weight(view_of(self, name), self.bare_model.get_submodule, layer, dequantize=dequantize)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the weights that this model has.

        Example:
            >>> import lens_core as lens
            >>> lens.load("toy:mamba").weight_names[:4]
            ('W_E', 'W_U', 'b_U', 'W_in_proj')
        """
        return tuple(self._views)

    def __getattr__(self, name: str) -> Any:
        """Give a stacked weight (`W_Q`, `b_O`, ...), or an attribute of `torch.nn.Module` from the HF model."""
        views = self.__dict__.get("_views", {})
        if name in views:
            return whole_stack(self, name)
        if name in _MODULE_ATTRIBUTES:
            return getattr(self.hf_model, name)
        if name.startswith(("W_", "b_")):
            raise AttributeError(f"no weight {name!r} in {self.architecture.name}; there are {', '.join(views)}")
        raise AttributeError(f"LensModel has no attribute {name!r}; HF's own are on model.hf_model")

    def to(self: _Model, *args: Any, **kwargs: Any) -> _Model:
        """Move or cast the HF model in place; gives this object back."""
        self.hf_model.to(*args, **kwargs)
        return self

    def eval(self: _Model) -> _Model:
        """Put the HF model in evaluation mode."""
        self.hf_model.eval()
        return self

    def train(self: _Model, mode: bool = True) -> _Model:
        """Put the HF model in training mode."""
        self.hf_model.train(mode)
        return self


_MODULE_ATTRIBUTES = frozenset(
    (
        "parameters",
        "named_parameters",
        "state_dict",
        "load_state_dict",
        "zero_grad",
        "requires_grad_",
        "device",
        "dtype",
        "training",
        "config",
        "modules",
        "named_modules",
    )
)
