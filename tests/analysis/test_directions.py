"""Edits along directions, by projections written out."""

from types import SimpleNamespace

import pytest
import torch
from analysis.four_families import FAMILIES, tiny
from golden.tiny import random_tokens

from lens_core.analysis import directions
from lens_core.errors import ArgumentError

TOKENS = random_tokens()
PLACE = ("resid_post", 1)


def draw(*shape, seed=0):
    """Draw with a generator of its own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projector(rows):
    """Write out the projector on the span of rows, in float64."""
    rows = rows.double().reshape(-1, rows.shape[-1])
    return rows.T @ torch.linalg.inv(rows @ rows.T) @ rows


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_in_the_span_is_removed_and_the_rest_stays(family):
    """One direction, and two that are not orthogonal, at one position."""
    model = tiny(family)
    _, plain = model.run_with_cache(TOKENS, names_filter=PLACE)
    for rows in (draw(model.cfg.d_model), draw(2, model.cfg.d_model)):
        with model.hooks([(PLACE, directions.project_out(rows), 2)]):
            _, cache = model.run_with_cache(TOKENS, names_filter=PLACE)
        x = plain[PLACE].double()
        expected = x.clone()
        expected[:, 2] = x[:, 2] - x[:, 2] @ projector(rows)
        assert torch.allclose(cache[PLACE].double(), expected, atol=1e-5)


def test_a_coordinate_is_set_and_the_rest_stays():
    """One value for all, and one for each row."""
    model, direction = tiny("gpt2"), 3 * draw(21)
    unit = (direction / direction.norm()).double()
    _, plain = model.run_with_cache(TOKENS, names_filter=PLACE)
    for value in (2.5, torch.tensor([1.0, -4.0])):
        with model.hooks([(PLACE, directions.set_coordinate(direction, value))]):
            _, cache = model.run_with_cache(TOKENS, names_filter=PLACE)
        found, before = cache[PLACE].double(), plain[PLACE].double()
        expected = torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1).expand(2, 5)
        assert torch.allclose(found @ unit, expected, atol=1e-5)
        assert torch.allclose(
            found - (found @ unit)[..., None] * unit, before - (before @ unit)[..., None] * unit, atol=1e-5
        )


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_an_interchange_takes_the_subspace_of_another_run(family):
    """And leaves the orthogonal part; the whole space is activation patching."""
    model, other = tiny(family), random_tokens(seed=1)
    rows = draw(3, model.cfg.d_model)
    _, here = model.run_with_cache(TOKENS, names_filter=PLACE)
    _, there = model.run_with_cache(other, names_filter=PLACE)
    with model.hooks([(PLACE, directions.interchange(rows, there))]):
        _, cache = model.run_with_cache(TOKENS, names_filter=PLACE)
    x, y = here[PLACE].double(), there[PLACE].double()
    assert torch.allclose(cache[PLACE].double(), x + (y - x) @ projector(rows), atol=1e-5)
    whole = directions.interchange(torch.eye(model.cfg.d_model), there)
    assert torch.allclose(model.run_with_hooks(TOKENS, fwd_hooks=[(PLACE, whole)]), model(other), atol=1e-3)


def test_dependent_directions_span_less_and_half_precision_is_projected_in_single():
    """Three rows in a plane; bfloat16 activations come back as bfloat16."""
    first, second = draw(2, 8)
    assert directions.orthonormal(torch.stack([first, second, first + 2 * second])).shape == (2, 8)
    hook, x = SimpleNamespace(name="hook_embed"), draw(1, 2, 8).bfloat16()
    found = directions.project_out(first)(x, hook=hook)
    assert found.dtype == torch.bfloat16
    exact = x.double() - x.double() @ projector(first)
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-6)  # rounded once, at the end


def test_gradients_flow_through_what_stays():
    """The gradient has no part along what was removed."""
    x, direction = draw(1, 2, 8).requires_grad_(), draw(8)
    directions.project_out(direction)(x, hook=SimpleNamespace(name="hook_embed")).pow(2).sum().backward()
    assert (x.grad @ direction).abs().max() < 1e-5


def test_what_cannot_be_is_refused():
    """By name, with the value."""
    model = tiny("gpt2")
    for given, message in [
        (torch.zeros(4), "not all zero"),
        (draw(2, 2, 2), r"\[2, 2, 2\]"),
        (torch.ones(3).long(), "floating"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            directions.project_out(given)
    with pytest.raises(ArgumentError, match="one direction"):
        directions.set_coordinate(draw(2, 21), 1.0)
    with pytest.raises(ArgumentError, match="a value is"):
        directions.set_coordinate(draw(21), draw(2, 5))
    with pytest.raises(ArgumentError, match="20 wide"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(PLACE, directions.project_out(draw(20)))])
    with pytest.raises(ArgumentError, match="3 values for a batch of 2"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(PLACE, directions.set_coordinate(draw(21), torch.ones(3)))])
