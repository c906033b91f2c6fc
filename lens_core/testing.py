"""What the tests of a plugin need."""

from collections.abc import Generator
from contextlib import contextmanager

from lens_core import _registry
from lens_core._registry import Registry

__all__ = ["isolated_registry"]


@contextmanager
def isolated_registry(*plugins: object, discover: bool = False) -> Generator[Registry, None, None]:
    """Replace the registry, until the block ends, by one that knows only the given plugins.

    The replacement holds for every thread. Blocks nest; blocks in several threads wait for each other.

    Args:
        *plugins: Modules, classes or instances that implement `lens_architectures`.
        discover: Whether the installed plugins are there too.

    Yields:
        The registry: its `records` tell what became of each plugin, `resolve` finds an architecture.

    Example:
        >>> import lens_gpt2
        >>> with isolated_registry(lens_gpt2) as registry:
        ...     registry.resolve("gpt2").name
        'GPT-2'
    """
    with _registry.swapped(Registry(plugins, discover=discover)) as registry:
        yield registry
