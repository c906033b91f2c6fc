"""How long and on what to measure."""

import attrs

__all__ = ["FULL", "QUICK", "Settings", "Size"]


@attrs.frozen(kw_only=True)
class Size:
    """The dimensions of one random model, and of the tokens it is run on."""

    n_layers: int
    d_model: int
    n_heads: int
    d_vocab: int
    n_ctx: int
    n_tokens: int


TINY = Size(n_layers=2, d_model=64, n_heads=4, d_vocab=64, n_ctx=64, n_tokens=16)


@attrs.frozen(kw_only=True)
class Settings:
    """What one run of the benchmarks may cost."""

    is_quick: bool
    threads: int
    large: Size
    """The model that ratios are measured on."""
    new_tokens: int
    """Tokens to generate."""
    share: float
    """Factor on every row's seconds."""
    at_least: int
    """Pairs that a row takes even when its time is over."""
    family: Size
    """The dimensions that families other than GPT-2 are measured at."""
    deep: Size
    """Of a long context, where attention is what costs memory."""
    wide: Size
    """The same, where the vocabulary does."""
    tiny: Size = TINY
    """The model that microseconds are measured on."""


FULL = Settings(
    is_quick=False,
    threads=2,
    large=Size(n_layers=12, d_model=768, n_heads=12, d_vocab=50257, n_ctx=1024, n_tokens=64),
    family=Size(n_layers=6, d_model=384, n_heads=6, d_vocab=8192, n_ctx=1024, n_tokens=128),
    deep=Size(n_layers=4, d_model=768, n_heads=12, d_vocab=1000, n_ctx=2048, n_tokens=2048),
    wide=Size(n_layers=1, d_model=768, n_heads=12, d_vocab=50257, n_ctx=2048, n_tokens=2048),
    new_tokens=20,
    share=1.0,
    at_least=5,
)
QUICK = Settings(
    is_quick=True, threads=1, large=TINY, family=TINY, deep=TINY, wide=TINY, new_tokens=3, share=0.0, at_least=1
)
