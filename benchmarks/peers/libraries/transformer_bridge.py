"""TransformerLens 4.3: `TransformerBridge`, which wraps HF's modules."""

from collections.abc import Sequence

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.peers.libraries.transformerlens import Shared

__all__ = ["IMPORT", "LOAD", "Model"]

IMPORT = "from transformer_lens.model_bridge import TransformerBridge"
LOAD = "model = TransformerBridge.boot_transformers(folder)"


class Model(Shared):
    """A `TransformerBridge`."""

    def __init__(self, folder: str) -> None:
        self.model = TransformerBridge.boot_transformers(folder)
        self.model.eval()

    def state(self, tokens: Tensor) -> Sequence[Tensor]:
        return [value[:, -1] for value in self.states(tokens)]

    def states(self, tokens: Tensor) -> Sequence[Tensor]:
        names = [f"blocks.{layer}.mixer.hook_ssm_state" for layer in range(self.model.cfg.n_layers)]
        for block in self.model.blocks:
            block.mixer.eager_scan = True  # its own scan: HF's has no place for the hook
        # Without `use_cache=False` HF's own scan runs and the hook does not fire.
        _, cache = self.model.run_with_cache(tokens, names_filter=names, use_cache=False)
        return [cache[name].transpose(1, 2) for name in names]  # channel first
