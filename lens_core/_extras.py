"""Packages that only some functions need, of the extra `analysis`."""

from importlib import import_module
from typing import Any

from lens_core.errors import MissingPackageError

__all__ = ["need"]


def need(module: str, what: str) -> Any:
    """Import a module of a package that lens does not require.

    Args:
        module: `pandas`, `scipy.stats`, ...
        what: What it is needed for, as the message says: "a data frame".

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
            f"{what} needs {package}, which is not installed: pip install 'lens-core[analysis]'"
        ) from error
