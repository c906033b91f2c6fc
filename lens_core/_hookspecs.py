"""The hooks that a plugin may implement, for pluggy."""

from collections.abc import Iterable

import pluggy

from lens_core._descriptor import Architecture

PROJECT_NAME = "lens_core"
hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def lens_architectures() -> Iterable[Architecture]:
    """Return a record for each architecture that the plugin provides.

    Called once, when plugins are discovered, and never while a model runs.
    """
    raise NotImplementedError
