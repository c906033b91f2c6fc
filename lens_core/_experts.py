"""Mixtures of experts: the router's logits, what it chooses, and what each chosen expert returns.

HF's router module flattens batch and position, and returns `(logits, weights, indices)`, of which its block drops the
first. An edit of the logits therefore runs the router's own forward again with the edited logits in place of its one
linear map, so that the type's own rule reroutes. HF's experts are one module with stacked weights, called with
`(hidden, indices, weights)`; single outputs come from calling it for one choice at a time, with weights of one.
"""

from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_core._call import ModuleCall
from lens_core._graph import FunctionMode, during, explicit_where, gradients
from lens_core._plan import ModuleStep
from lens_core._watch import Watch
from lens_core.errors import HookValueError, UnsupportedHookError

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["ExpertOutput", "Router"]


@attrs.frozen(kw_only=True)
class Router:
    """What a router returns, batch and position first: logits over experts, and weights and indices of the chosen."""

    path: str
    part: Literal["logits", "weights", "indices"]

    @property
    def group(self) -> Hashable:
        """All of one router belong together."""
        return self.path

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Fire after the router's forward."""
        by_part = {watch.point.seam.part: watch for watch in watches}
        if "logits" in by_part:
            yield ModuleStep(path=self.path, when="pre", act=self._keep_random)
        yield ModuleStep(path=self.path, when="post", act=lambda call: self._fire(by_part, call))

    def _keep_random(self, call: ModuleCall) -> None:
        if call.module.training:  # some routers draw
            call.run.now.scratch[self.path] = _random_state(call.input.device)

    def _fire(self, watches: dict[str, Watch], call: ModuleCall) -> None:
        random = call.run.now.scratch.pop(self.path, None)
        output: tuple[Tensor, ...] = call.output
        if len(output) != 3:
            raise UnsupportedHookError(
                f"{type(call.module).__name__} did not return (logits, weights, indices); its routing cannot be reached"
            )
        logits, *chosen = output
        if "logits" in watches:
            value = _fire_flat(watches["logits"], logits, call)
            if value is not logits:
                with _again(random, call.input.device), during(_Substitute(value)):
                    logits, *chosen = call.module.forward(*call.args, **call.kwargs)
                logits = value
        for index, part in enumerate(("weights", "indices")):
            if part in watches:
                chosen[index] = _fire_flat(watches[part], chosen[index], call)
                if part == "indices" and chosen[index] is not output[2]:
                    _check_indices(watches[part].name, chosen[index], n_experts=logits.shape[-1])
        new = (logits, *chosen)
        if any(a is not b for a, b in zip(new, output, strict=True)):
            call.output, call.output_changed = new, True


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _again(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Generator[None, None, None]:
    """Draw in the block what was drawn from a state on, and go on after it as if nothing had been drawn."""
    if state is None:
        yield
        return
    random: Any = torch.random
    with random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield


def _check_indices(name: str, indices: Tensor, *, n_experts: int) -> None:
    outside = indices[(indices < 0) | (indices >= n_experts)]
    if outside.numel():
        raise HookValueError(
            f"a function at {name!r} chose expert {int(outside[0])}, and there are experts 0 to {n_experts - 1}; to "
            "drop one, set its weight to 0 at hook_expert_weights"
        )


def _fire_flat(watch: Watch, flat: Tensor, call: ModuleCall) -> Tensor:
    """Fire on `[batch, pos, ...]` where HF has `[batch * pos, ...]`."""
    now = call.run.now
    shown = flat.view(now.batch, now.n_pos, *flat.shape[1:])
    value = watch.fire(shown)
    return flat if value is shown else value.reshape(flat.shape)


class _Substitute(FunctionMode):
    """Give the router's one linear map another result."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.logits if func is nn.functional.linear and not self.is_over else func(*args, **(kwargs or {}))


@attrs.frozen(kw_only=True)
class ExpertOutput:
    """What each chosen expert returns, before its weight; the weighted sum is what the experts return.

    Costs one more pass through the chosen experts.
    """

    path: str

    @property
    def group(self) -> Hashable:
        """Each stands alone."""
        return self

    def steps(self, watches: Sequence[Watch], run: "Run") -> Iterator[ModuleStep]:
        """Fire after the experts' forward."""
        for watch in watches:
            yield ModuleStep(path=self.path, when="post", act=lambda call, w=watch: self._fire(w, call))

    def _fire(self, watch: Watch, call: ModuleCall) -> None:
        hidden, indices, weights = _expert_arguments(call)
        now = call.run.now
        with gradients(watch.needs_graph):
            outputs = _one_by_one(call.module, hidden, indices, weights)
            value = watch.fire(outputs.view(now.batch, now.n_pos, *outputs.shape[1:]), beside=True)
            if watch.edited or watch.rerouted:
                value = value.reshape(outputs.shape)
                explicit = torch.einsum("tkd,tk->td", value, weights.to(value.dtype))
                changed = (value != outputs).flatten(1).any(-1, keepdim=True)
                call.result = explicit_where(changed, explicit, call.result)


def _expert_arguments(call: ModuleCall) -> tuple[Tensor, Tensor, Tensor]:
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    return given["hidden_states"], given["top_k_index"], given["top_k_weights"]


def _one_by_one(
    module: nn.Module, hidden: Float[Tensor, "tokens d_model"], indices: Tensor, weights: Tensor
) -> Float[Tensor, "tokens k d_model"]:
    """Run the experts for one choice of every token at a time, unweighted."""
    ones = torch.ones_like(weights[:, :1])
    return torch.stack([module.forward(hidden, indices[:, j : j + 1], ones) for j in range(indices.shape[1])], dim=1)
