"""The torch hooks of a run: one at each side of each module that it goes through, put in and taken out again."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import attrs

from lens_core._call import ModuleCall
from lens_core._context import active_run
from lens_core.errors import UnsupportedHookError

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["Site", "Taps", "is_checkpointed", "put_tap"]

Site: TypeAlias = tuple[str, str]
"""A module's path, and `pre` or `post`: before or after its forward."""


class Taps:
    """The taps of one run."""

    def __init__(self, run: "Run", sites: Mapping[Site, Sequence[Callable[[ModuleCall], None]]]) -> None:
        self._run = run
        self._sites = sites
        self._handles: list[Any] = []

    def install(self, put: Callable[[str, str, Sequence[Callable[[ModuleCall], None]]], Any]) -> None:
        """Put in one torch hook for all that is done at one side of a module, by `put`, which gives its handle."""
        for (path, when), acts in self._sites.items():
            self._handles.append(put(path, when, acts))

    def remove(self) -> None:
        """Take out what was put in; may be called anew after an interrupt, wherever that came."""
        for handle in self._handles:
            handle.remove()
        if len(self._handles) != len(self._sites):  # interrupted: a tap may be in whose handle nobody has
            for path, _ in self._sites:
                self._search(self._run.module(path))

    def _search(self, module: Any) -> None:
        for hooks, others in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key, hook in list(hooks.items()):
                tap = getattr(hook, "__self__", None)
                if isinstance(tap, _Tap) and tap.run is self._run:
                    others.pop(key, None)
                    hooks.pop(key, None)


def put_tap(run: "Run", path: str, when: str, acts: Sequence[Callable[[ModuleCall], None]]) -> Any:
    """Register one torch hook, and give its handle.

    The functions take whatever arguments come: torch's registration is not atomic, and a forward of another thread may
    call them without keyword arguments. There they do nothing, since the run is not live in that thread. Nor do they
    when somebody calls a part of the model by itself.
    """
    module, is_inner = run.module(path), path not in ("", run.base)
    tap = _Tap(run=run, acts=acts, is_inner=is_inner)
    if when == "pre":
        return module.register_forward_pre_hook(tap.before, prepend=True, with_kwargs=True)
    return module.register_forward_hook(tap.after, prepend=True, with_kwargs=True)


@attrs.frozen(kw_only=True, eq=False)
class _Tap:
    """The torch hook that does all steps at one side of a module.

    Its methods are no inner functions: a type checker that watches the tests would compile those anew for every run.
    """

    run: "Run"
    acts: Sequence[Callable[[ModuleCall], None]]
    is_inner: bool

    @property
    def is_live(self) -> bool:
        run = self.run
        return active_run(run.hf_model) is run and (run.call is not None or not self.is_inner)

    def before(self, module: Any, args: Any, *rest: Any) -> Any:
        if not self.is_live:
            return None
        call = ModuleCall(self.run, module, args, rest[0] if rest else {}, None)
        for act in self.acts:
            act(call)
        return (call.args, call.kwargs) if call.input_changed else None

    def after(self, module: Any, args: Any, *rest: Any) -> Any:
        if not self.is_live:
            return None
        call = ModuleCall(self.run, module, args, rest[0] if len(rest) == 2 else {}, rest[-1])
        for act in self.acts:
            act(call)
        return call.output if call.output_changed else None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse: a copy of the model would carry the hook for good, and nobody would take it out."""
        raise UnsupportedHookError(
            "the model has hooks on it, which a copy or a pickle would keep for good: copy or pickle it outside of "
            "hooks() and caching() blocks and of hook functions; its state_dict() has none"
        )


def is_checkpointed(hf_model: Any, paths: frozenset[str]) -> bool:
    """Whether HF will run any of these modules again in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    hooks_inside = "__call__" in vars(GradientCheckpointingLayer)  # older releases checkpoint a layer's hooks too
    modules: list[tuple[str, Any]] = list(hf_model.named_modules())
    for name, layer in modules:
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training:
            inside = any(path.startswith(f"{name}.") for path in paths)
            if inside or (hooks_inside and name in paths):
                return True
    return False
