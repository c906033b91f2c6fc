"""The libraries, the models, the rows, and how long to measure."""

from collections.abc import Mapping

import attrs

__all__ = ["FULL", "LIBRARIES", "QUICK", "ROWS", "SIZED", "STARTUP", "Library", "Settings"]


@attrs.frozen(kw_only=True)
class Library:
    """A library as the table has it."""

    title: str
    module: str
    """Of `benchmarks.peers.libraries`."""
    package: str
    """The distribution whose version is noted."""
    environment: str | None = None
    """The folder in `.venv`; None is the environment of lens itself."""


LIBRARIES: Mapping[str, Library] = {
    "lens": Library(title="lens", module="lens", package="lens-core"),
    "transformer-lens-3": Library(
        title="transformer-lens 3.1.0",
        module="hooked_transformer",
        package="transformer-lens",
        environment="peer-transformer-lens-3.1.0",
    ),
    "transformer-lens-4": Library(
        title="transformer-lens 4.3.0",
        module="transformer_bridge",
        package="transformer-lens",
        environment="peer-transformer-lens-4.3.0",
    ),
    "nnsight": Library(title="nnsight 0.8.1", module="nnsight", package="nnsight", environment="peer-nnsight-0.8.1"),
}

# What a row is called in the table, in its order.
ROWS: Mapping[str, str] = {
    "import": "import",
    "ready": "import and load",
    "memory": "peak memory of loading",
    "forward": "plain forward",
    "hook": "one hook: the residual stream after the middle layer is read",
    "cache": "cache of everything, each library's default",
    "residuals": "cache of the residual stream after each layer",
    "generate": "generation of {new_tokens} tokens, the residual stream edited at each step",
    "sweep": "patching sweep, layer × position of the residual stream",
    "harvest": "three residual streams of many tokens written to disk",
    "state": "last SSM state of each layer",
    "states": "SSM state of each layer at every position",
}
STARTUP = ("import", "ready", "memory")
SIZED = ("forward", "hook", "cache", "residuals", "generate")


@attrs.frozen(kw_only=True)
class Settings:
    """What one run may cost."""

    is_quick: bool
    threads: int
    rows_of: Mapping[str, tuple[str, ...]]
    """The rows that are measured on each model."""
    sizes: tuple[tuple[int, int], ...]
    """Rows and positions of tokens."""
    seconds: tuple[float, ...]
    """For each row of `SIZED` at each of these sizes; the other rows have the last."""
    at_least: int
    """Pairs that a row takes even when its time is over."""
    starts: int
    """Pairs of fresh processes."""
    sweep_tokens: int
    state_tokens: int
    new_tokens: int
    harvest_tokens: int
    harvest_shape: tuple[int, int]
    """Rows and positions of one batch."""


_ALL = (*STARTUP, *SIZED, "sweep")
FULL = Settings(
    is_quick=False,
    threads=2,
    rows_of={"gpt2": (*_ALL, "harvest"), "smollm2": _ALL, "mamba": ("state", "states")},
    sizes=((1, 64), (4, 256)),
    seconds=(2.0, 3.0),
    at_least=3,
    starts=2,
    sweep_tokens=12,
    state_tokens=64,
    new_tokens=20,
    harvest_tokens=200_000,
    harvest_shape=(8, 256),
)
QUICK = attrs.evolve(
    FULL,
    is_quick=True,
    threads=1,
    sizes=((1, 8), (2, 8)),
    seconds=(0.0, 0.0),
    at_least=1,
    starts=1,
    sweep_tokens=4,
    state_tokens=8,
    new_tokens=3,
    harvest_tokens=64,
    harvest_shape=(2, 8),
)
