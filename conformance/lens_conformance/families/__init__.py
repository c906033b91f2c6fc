"""The families that the kit knows: its own, and those that distributions announce.

A third party announces a `Family`, or a list of them, by an entry point of the group `lens_conformance.families`.
"""

import warnings
from importlib.metadata import entry_points

from lens_conformance.family import Family
from lens_core.errors import PluginWarning

__all__ = ["GROUP", "known_families"]

GROUP = "lens_conformance.families"


def known_families() -> dict[str, Family]:
    """Give every known family by model type; a distribution's own goes before the kit's."""
    from lens_conformance.families import gpt2, hybrid, kin, llama, mamba

    found = {family.model_type: family for module in (gpt2, llama, kin, mamba, hybrid) for family in module.FAMILIES}
    for point in entry_points(group=GROUP):
        try:
            given = point.load()
        except Exception as error:  # one distribution's mistake is not the others'
            told = f"{type(error).__name__}: {error}"
            where = f"{point.name!r} ({point.value})"
            warnings.warn(f"the conformance family {where} cannot be loaded: {told}", PluginWarning, stacklevel=2)
            continue
        found |= {family.model_type: family for family in ([given] if isinstance(given, Family) else given)}
    return found
