"""The call in progress: one forward of the HF model, and one forward of one of its modules."""

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lens_core.errors import UnsupportedHookError

if TYPE_CHECKING:
    from lens_core._plan import Run

__all__ = ["Call", "ModuleCall"]


class Call:
    """One forward of the HF model: where it stands in the sequence, and what has fired."""

    __slots__ = ("batch", "device", "fired", "n_pos", "past", "scratch", "sequences", "step", "thread")

    def __init__(self, *, batch: int, n_pos: int, past: int, device: torch.device) -> None:
        self.batch = batch
        self.n_pos = n_pos
        self.past = past
        """Positions before this call's, in the model's cache."""
        self.device = device
        self.thread = threading.get_ident()
        self.step = 0
        self.fired: dict[str, int] = {}
        self.scratch: dict[Any, Any] = {}
        """What one step of a seam leaves for a later one; empty when the call is over."""
        self.sequences: dict[Any, int] = {}
        """Which sequence of each cache this call belongs to."""

    @property
    def is_prefill(self) -> bool:
        """Whether this call starts a sequence."""
        return self.past == 0

    @property
    def total(self) -> int:
        """Real positions so far: the size of the key axis."""
        return self.past + self.n_pos

    def first_position(self, length: int) -> int:
        """Absolute position of the first of the last `length` positions (HF may compute the last logits only)."""
        return self.total - length


class ModuleCall:
    """One forward of one module, as the steps of a tap see it and change it."""

    __slots__ = (
        *("_stream", "_whole_input", "_whole_result", "args", "input_changed", "kwargs"),
        *("module", "output", "output_changed", "run"),
    )

    def __init__(
        self, run: "Run", module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.run = run
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.output: Any = output
        self.input_changed = False
        self.output_changed = False
        self._stream: Tensor | None = None
        self._whole_input: Tensor | None = None
        self._whole_result: Tensor | None = None

    @property
    def stream(self) -> Tensor:
        """The input, but for the copies that this module alone is given."""
        return self.input if self._stream is None else self._stream

    def give_copy(self, new: Tensor) -> None:
        """Replace the input for this module alone: what else reads the tensor goes on with `stream`."""
        stream = self.stream
        self.input = new
        self._stream = stream

    @property
    def input(self) -> Tensor:
        """The first tensor argument: positional, or by keyword as HF passes `hidden_states`.

        Where a linear module is given a part of it on each process, that is the whole, and so is what is set.
        """
        if self._whole_input is not None:
            return self._whole_input
        own = self._own_input
        whole = self._whole(own, "in_features")
        self._whole_input = None if whole is own else whole
        return whole

    @property
    def _own_input(self) -> Tensor:
        found = self._input_key()
        return self.args[found] if isinstance(found, int) else self.kwargs[found]

    def _whole(self, own: Tensor, which: str) -> Tensor:
        """Gather what HF has of a tensor here; what is whole already is given back itself."""
        shards = self.run.shards
        length = None if shards is None else shards.features(self.module, own, which)
        return own if shards is None or length is None else shards.whole(own, axis=-1, length=length)

    def _part(self, new: Tensor, own: Tensor, which: str) -> Tensor:
        """Give what HF is to have of a new tensor, in place of `own`; itself where that was whole."""
        shards = self.run.shards
        is_whole = shards is None or shards.features(self.module, own, which) is None
        return new if shards is None or is_whole else shards.part(new, axis=-1)

    @input.setter
    def input(self, new: Tensor) -> None:
        found = self._input_key()
        self._stream = None
        part = self._part(new, self._own_input, "in_features")
        self._whole_input, new = None if part is new else new, part
        if isinstance(found, int):
            self.args = (*self.args[:found], new, *self.args[found + 1 :])
        else:
            self.kwargs = {**self.kwargs, found: new}
        self.input_changed = True

    def _input_key(self) -> int | str:
        for index, value in enumerate(self.args):
            if isinstance(value, Tensor):
                return index
        if isinstance(self.kwargs.get("hidden_states"), Tensor):
            return "hidden_states"
        for key, value in self.kwargs.items():
            if isinstance(value, Tensor):
                return key
        raise UnsupportedHookError(
            f"{type(self.module).__name__} was called without any tensor; its input cannot be hooked"
        )

    @property
    def result(self) -> Tensor:
        """The module's output, or the first tensor of a tuple or an HF output record; whole, as `input`."""
        if self._whole_result is not None:
            return self._whole_result
        own = self._own_result
        whole = self._whole(own, "out_features")
        self._whole_result = None if whole is own else whole
        return whole

    @property
    def _own_result(self) -> Tensor:
        output: Any = self.output
        return output if isinstance(output, Tensor) else output[self._result_key()]

    @result.setter
    def result(self, new: Tensor) -> None:
        output: Any = self.output
        part = self._part(new, self._own_result, "out_features")
        self._whole_result, new = None if part is new else new, part
        if isinstance(output, Tensor):
            self.output = new
        elif type(output) is tuple:
            key = self._result_key()
            self.output = (*output[:key], new, *output[key + 1 :])
        else:
            self.output = type(output)(**{**output, self._result_key(): new})
        self.output_changed = True

    def _result_key(self) -> Any:
        output: Any = self.output
        for key, value in output.items() if hasattr(output, "items") else enumerate(output or ()):
            if isinstance(value, Tensor):
                return key
        raise UnsupportedHookError(f"{type(self.module).__name__} returned no tensor; its output cannot be hooked")
