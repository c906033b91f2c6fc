"""An SAE's own values over texts: a model that runs as it is, with the SAE beside."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import attrs
from torch import Tensor

from lens_core.errors import ArgumentError
from lens_core.saes._splice import SplicePart

if TYPE_CHECKING:
    from lens_core.model import LensModel

__all__ = ["Beside", "beside", "plain"]


@attrs.frozen(kw_only=True)
class Beside:
    """Where an SAE is while it stands beside the model."""

    name: str
    """The hook point that its output is for."""
    stop_at: int | None
    """`stop_at_layer` of a run that needs its values only."""

    def part(self, part: str) -> str:
        """Name one of its hook points."""
        return f"{self.name}.hook_sae_{part}"


@contextmanager
def beside(model: "LensModel", sae: Any, hook_name: Any, *, strict: bool) -> Generator[Beside, None, None]:
    """Make the SAE's values hook points of a model that stays bit for bit what it is."""
    if isinstance(sae, Mapping):
        named: Any = cast("Any", sae)
        if len(named) != 1 or hook_name is not None:
            raise ArgumentError(
                f"one SAE, as itself or as {{hook point: SAE}}; got {len(named)} and hook_name={hook_name!r}"
            )
        ((hook_name, sae),) = named.items()
    with model.saes(sae if hook_name is None else {hook_name: sae}, use_error_term=True, strict=strict):
        seams = [point.seam for point in model.hook_points()]
        name = next(seam.splice.place.name for seam in seams if isinstance(seam, SplicePart) and seam.splice.sae is sae)
        depth = model.table.depth(name)
        n_layers = model.cfg.n_layers
        yield Beside(name=name, stop_at=None if depth is None or depth >= n_layers else depth + 1)


def plain(tensor: Tensor) -> Any:
    """Give a tensor as nested lists of numbers."""
    return cast("Any", tensor).tolist()
