"""Text in and out of a model: the methods of `LensModel` over its tokenizer."""

from typing import Any, cast

from jaxtyping import Int
from torch import Tensor

from lens_core import tokens as _tokens
from lens_core._hooking import Hooked
from lens_core._inputs import is_text

__all__ = ["Texts"]


class Texts(Hooked):
    """What a model can do about text. Every method but the last two needs a tokenizer.

    Attributes:
        tokenizer: HF's tokenizer, or None.
        default_prepend_bos: What `prepend_bos=None` means for text, in every method: None does what the tokenizer does,
            True makes exactly one BOS, as TransformerLens does, False none.
    """

    tokenizer: Any
    default_prepend_bos: bool | None = None

    def _bos(self, input: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Give options with this model's rule for BOS, where text came without one."""
        if options.get("prepend_bos") is None and self.default_prepend_bos is not None and is_text(input):
            return {**options, "prepend_bos": self.default_prepend_bos}
        return options

    def weight(self, name: str, layer: int | None = None, *, dequantize: bool = False) -> Tensor:
        """Give one weight in TransformerLens' layout."""
        raise NotImplementedError

    def to_tokens(self, input: Any, **options: Any) -> Int[Tensor, "batch pos"]:
        """Turn text into token ids on the model's device; see `lens_core.tokens.to_tokens`."""
        return _tokens.to_tokens(self.tokenizer, input, device=self.input_device, **self._bos(input, options)).tokens

    def to_string(self, tokens: Any) -> str | list[str]:
        """Turn token ids into text: one string, or one for each row."""
        return _tokens.to_string(self.tokenizer, tokens)

    def to_str_tokens(self, input: Any, **options: Any) -> Any:
        """Give each token as text."""
        return _tokens.to_str_tokens(self.tokenizer, input, **self._bos(input, options))

    def to_single_token(self, string: str) -> int:
        """Give the id of a string that is one token.

        Raises:
            TokenizerError: It is not; the message says which tokens it is.
        """
        return _tokens.to_single_token(self.tokenizer, string)

    def to_single_str_token(self, token: int) -> str:
        """Give one token id as text."""
        return _tokens.to_single_str_token(self.tokenizer, token)

    def get_token_position(self, single_token: str | int, input: Any, **options: Any) -> int:
        """Find a token in text or ids: its first or last position."""
        return _tokens.get_token_position(self.tokenizer, single_token, input, **self._bos(input, options))

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """Give the direction whose dot product with the final norm's output is the token's logit (less `b_U`).

        Args:
            tokens: One token as text or id, a list of these, or a tensor of ids.

        Returns:
            `[d_model]` for one token, else the tokens' shape with `d_model` appended: columns of W_U. For parts of the
            residual stream before the final norm, `cache.logit_directions` has its gain in as well.

        Raises:
            TokenizerError: Text that is not one token.
            TokenIdError: An id outside the vocabulary.
        """
        ids = self.token_ids(tokens)
        directions = self.weight("W_U").T[ids]
        return directions.reshape(-1) if ids.numel() == 1 else directions

    def token_ids(self, tokens: Any) -> Tensor:
        """Give ids on the model's device: one token or several, each as its text or its id.

        Raises:
            TokenizerError: Text that is not one token.
            TokenIdError: An id outside the vocabulary.
        """
        from lens_core._logit_attrs import token_ids

        return token_ids(cast("Any", self), tokens, self.input_device)
