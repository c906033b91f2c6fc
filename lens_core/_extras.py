"""Packages that only some functions need, of the extras `analysis` and `store`."""

from importlib import import_module
from typing import Any

from lens_core.errors import MissingPackageError

__all__ = ["need"]


def need(module: str, what: str, *, extra: str = "analysis") -> Any:
    """Import a module of a package that lens does not require.

    Args:
        module: `pandas`, `scipy.stats`, ...
        what: What it is needed for, as the message says: "a data frame".
        extra: The extra of lens-core that brings it.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the package is there, and something that it needs itself is not
        raise MissingPackageError(
            f"{what} needs {package}, which is not installed: pip install 'lens-core[{extra}]'"
        ) from error
