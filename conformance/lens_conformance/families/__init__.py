"""The families that the kit knows: its own, and those that distributions announce.

A third party announces a `Family`, or a list of them, by an entry point of the group `lens_conformance.families`.
"""

from importlib.metadata import entry_points

from lens_conformance.family import Family

__all__ = ["GROUP", "known_families"]

GROUP = "lens_conformance.families"


def known_families() -> dict[str, Family]:
    """Give every known family by model type; a distribution's own goes before the kit's."""
    from lens_conformance.families import gpt2, llama, mamba

    found = {family.model_type: family for module in (gpt2, llama, mamba) for family in module.FAMILIES}
    for point in entry_points(group=GROUP):
        given = point.load()
        found |= {family.model_type: family for family in ([given] if isinstance(given, Family) else given)}
    return found
