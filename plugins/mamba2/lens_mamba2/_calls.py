"""Calls that HF's Mamba-2 would compute wrongly, refused by name.

HF zeroes padding before in_proj and after the convolution. On the left that is exact (the state stays zero), unless
in_proj has a bias. What HF does not get right:

* padding on the right of a prompt that a cache goes on from: at padding the state decays, and zeros enter the window;
* padding with `use_bias`: the bias enters the convolution of real positions;
* padding in a call of one position: HF drops its mask;
* a step of decoding with `time_step_limit`: HF leaves the limits out there.
"""

from torch import Tensor

from lens_core.errors import InputError
from lens_core.plugin import CallInput


def read_call(call: CallInput, *, has_bias: bool, limit: tuple[float, float]) -> Tensor | None:
    """Check one call; the mask is handed on, since HF's Mamba-2 takes its own positions of it.

    Raises:
        InputError: HF would compute this call wrongly.
    """
    check_call(call, has_bias=has_bias, limit=limit)
    return None if call.mask is None or bool(call.mask[:, -call.n_pos :].bool().all()) else call.mask


def check_call(call: CallInput, *, has_bias: bool, limit: tuple[float, float]) -> None:
    """See that HF's Mamba-2 mixers compute one call right.

    Args:
        call: The call.
        has_bias: Whether in_proj has a bias.
        limit: Of the step size.

    Raises:
        InputError: HF would compute this call wrongly.
    """
    if (call.continues or call.past) and limit != (0.0, float("inf")):
        raise InputError(
            f"HF's Mamba-2 ignores this checkpoint's time_step_limit={limit} when it decodes; run without a cache "
            "(use_cache=False, use_past_kv_cache=False)"
        )
    if call.mask is None:
        return
    mask = call.mask[:, -call.n_pos :].bool()
    if bool(mask.all()):
        return
    if has_bias:
        raise InputError(
            "this checkpoint's in_proj has a bias (use_bias), which HF lets into the convolution at padding: "
            "run rows of one length, or one row at a time"
        )
    if call.continues and not bool(mask[:, -1].all()):
        what = "HF drops the mask of a single position" if call.n_pos == 1 else "padding on the right changes the state"
        raise InputError(f"{what}, and HF's cache goes on from it: pad on the left, or run without a cache")
