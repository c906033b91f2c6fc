"""A function that raises at any hook point, forward or backward: the error names it, and nothing is left."""

import pytest
import torch
from abuse.models import KINDS, TOKENS, victim

from lens_core.errors import HookFunctionError


def boom(x, hook):
    """Raise."""
    raise RuntimeError("boom")


def reads(x, hook):
    """Look and change nothing."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_raises_at_any_point_leaves_nothing(kind):
    """Forward at every point, with a cache and another function around it; the logits are the same bits."""
    one = victim(kind)
    for name in one.names:
        with pytest.raises(HookFunctionError, match=f"'boom' at '{name}' raised RuntimeError: boom") as caught:
            with one.model.hooks([(name, reads)]), one.model.caching("resid_pre"):
                one.model.run_with_hooks(TOKENS, fwd_hooks=[(name, boom)])
        assert isinstance(caught.value.__cause__, RuntimeError), name
        assert torch.equal(one.model(TOKENS), one.logits), name
    assert one.left() + one.generates_otherwise() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_function_that_raises_at_any_point_leaves_nothing(kind):
    """Backward at every point whose gradient there is; what reaches nothing has no gradient to show."""
    one, silent = victim(kind), []
    for name in [name for name in one.names if name != "hook_tokens"]:
        logits = one.model.run_with_hooks(TOKENS, bwd_hooks=[(name, boom)])
        try:
            logits.pow(2).sum().backward()
        except HookFunctionError as error:
            assert f"'boom' at '{name}' raised RuntimeError: boom" in str(error)  # noqa: PT017 - it may not raise
        else:
            silent.append(name)
        one.hf.zero_grad(set_to_none=True)
        assert torch.equal(one.model(TOKENS), one.logits), name
    assert silent == [], "no gradient came there"
    assert one.left() == []
