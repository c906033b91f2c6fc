"""Calls that HF's Mamba would compute wrongly, and the mask that it is given.

HF zeroes padding before in_proj and after the convolution. On the left that is exact (the state stays zero), unless
in_proj has a bias. What HF does not get right, refused here by name:

* several positions on top of a cache: the scan starts from zero again, silently (`mamba_selective_scan` takes no
  state), though the convolution goes on;
* padding on the right of a prompt that a cache goes on from: at padding the state decays, and zeros enter the window;
* padding with `use_bias`: the bias enters the convolution of real positions.
"""

from typing import Any

from torch import Tensor

from lens_core.errors import InputError
from lens_core.plugin import CallInput


def read_call(call: CallInput, *, has_bias: bool) -> Tensor | None:
    """Check one call, and give the mask of its own positions, which is what HF's Mamba multiplies with.

    Raises:
        InputError: HF would compute this call wrongly.
    """
    check_call(call, has_bias=has_bias)
    mask = None if call.mask is None else call.mask[:, -call.n_pos :]
    return None if mask is None or bool(mask.bool().all()) else mask


def check_call(call: CallInput, *, has_bias: bool) -> None:
    """See that HF's Mamba mixers compute one call right.

    Raises:
        InputError: HF would compute this call wrongly.
    """
    if call.past and call.n_pos > 1:
        raise InputError(
            f"HF's Mamba starts its scan from zero when {call.n_pos} positions continue a cache of {call.past}: give "
            "one position at a time, or the whole sequence without a cache"
        )
    if call.mask is None:
        return
    mask: Any = call.mask[:, -call.n_pos :].bool()
    if not bool(mask.all()) and has_bias:
        raise InputError(
            "this checkpoint's in_proj has a bias (use_bias), which HF lets into the convolution at padding: "
            "run rows of one length, or one row at a time"
        )
    if call.continues and not bool(mask[:, -1].all()):
        raise InputError(
            "padding on the right changes the state that HF's cache goes on from: pad on the left, or run without "
            "a cache"
        )
