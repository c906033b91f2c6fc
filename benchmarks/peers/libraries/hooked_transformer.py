"""TransformerLens 3.1: `HookedTransformer`, its own implementation of each model, with the weights as they are."""

from collections.abc import Sequence

from torch import Tensor
from transformer_lens import HookedTransformer, loading_from_pretrained

from benchmarks.peers.adapter import Cannot
from benchmarks.peers.libraries.transformerlens import Shared

__all__ = ["IMPORT", "LOAD", "Model"]

IMPORT = "from transformer_lens import HookedTransformer, loading_from_pretrained"
# It loads by names from a list. What comes after takes a folder, so the folder is put on the list.
LOAD = """
loading_from_pretrained.OFFICIAL_MODEL_NAMES.append(folder)
model = HookedTransformer.from_pretrained_no_processing(folder)
"""
_NO_SSM = "`HookedTransformer` has no state-space models, and 3.1's `TransformerBridge` no hook on their states"


class Model(Shared):
    """A `HookedTransformer`."""

    def __init__(self, folder: str) -> None:
        if "mamba" in folder:
            raise Cannot(_NO_SSM)
        loading_from_pretrained.OFFICIAL_MODEL_NAMES.append(folder)
        self.model = HookedTransformer.from_pretrained_no_processing(folder)

    def state(self, tokens: Tensor) -> Sequence[Tensor]:
        raise Cannot(_NO_SSM)

    def states(self, tokens: Tensor) -> Sequence[Tensor]:
        raise Cannot(_NO_SSM)
