"""The conformance kit of lens: holds an architecture plugin to the hook contract, and to equality with HuggingFace.

    from lens_conformance import conformance

    test_conformance = conformance("mamba2")

is the whole test file of a plugin. Without a file: `pytest --lens-conformance mamba2`; without pytest:
`lens_conformance.run("mamba2", level="fast")`; on a checkpoint of your own: `lens verify MODEL`.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Family", "KnownFailure", "Outcome", "Report", "__version__", "conformance", "run", "verify"]

if TYPE_CHECKING:
    from lens_conformance._pytest import conformance
    from lens_conformance.checkpoint import verify
    from lens_conformance.family import Family, KnownFailure
    from lens_conformance.report import Outcome, Report
    from lens_conformance.runner import run

_HOMES = {
    "Family": "lens_conformance.family",
    "KnownFailure": "lens_conformance.family",
    "Outcome": "lens_conformance.report",
    "Report": "lens_conformance.report",
    "conformance": "lens_conformance._pytest",
    "run": "lens_conformance.runner",
    "verify": "lens_conformance.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is asked for: pytest loads this package in every session."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
