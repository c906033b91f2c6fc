"""Columns of a tensor: the layouts that fused projections have, read and written, as activations and as weights."""

import pytest
import torch

from lens_core.errors import ArgumentError
from lens_core.plugin import Columns, WeightView, weight_and_bias
from lens_core.weights import read_weight

HEADS, KEY_HEADS, WIDTH = 6, 2, 5
EACH = HEADS // KEY_HEADS  # queries of a key head
LAYOUTS = {  # what the columns are, in order, as (part, head); and the columns of each part
    "q k v": (
        [(part, head) for part in "qkv" for head in range(HEADS)],
        {
            part: Columns(start=index * HEADS * WIDTH, stop=(index + 1) * HEADS * WIDTH, heads=HEADS)
            for index, part in enumerate("qkv")
        },
    ),
    "for each head: q k v": (
        [(part, head) for head in range(HEADS) for part in "qkv"],
        {
            part: Columns(start=index * WIDTH, stop=(index + 1) * WIDTH, heads=HEADS, groups=HEADS)
            for index, part in enumerate("qkv")
        },
    ),
    "grouped: q k v": (
        [*(("q", head) for head in range(HEADS)), *((part, head) for part in "kv" for head in range(KEY_HEADS))],
        {
            "q": Columns(stop=HEADS * WIDTH, heads=HEADS),
            "k": Columns(start=HEADS * WIDTH, stop=(HEADS + KEY_HEADS) * WIDTH, heads=KEY_HEADS),
            "v": Columns(start=(HEADS + KEY_HEADS) * WIDTH, heads=KEY_HEADS),
        },
    ),
    "for each key head: its queries, k, v": (
        [
            one
            for key in range(KEY_HEADS)
            for one in [*(("q", key * EACH + own) for own in range(EACH)), ("k", key), ("v", key)]
        ],
        {
            "q": Columns(stop=EACH * WIDTH, heads=HEADS, groups=KEY_HEADS),
            "k": Columns(start=EACH * WIDTH, stop=(EACH + 1) * WIDTH, heads=KEY_HEADS, groups=KEY_HEADS),
            "v": Columns(start=(EACH + 1) * WIDTH, heads=KEY_HEADS, groups=KEY_HEADS),
        },
    ),
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    """Give what the columns are, and the views."""
    return LAYOUTS[request.param]


def fused(order, *, leading=(2, 3)):
    """Make random columns of each part and head, and lay them out."""
    pieces = {one: torch.randn(*leading, WIDTH) for one in order}
    return torch.cat([pieces[one] for one in order], dim=-1), pieces


def test_each_part_is_found_head_by_head(layout):
    """Whatever the layout, the value is `[..., head, width]`."""
    order, views = layout
    tensor, pieces = fused(order)
    for part, view in views.items():
        heads = sum(name == part for name, _ in order)
        expected = torch.stack([pieces[part, head] for head in range(heads)], dim=-2)
        assert torch.equal(view.pick(tensor), expected)


def test_what_is_written_is_found_again_and_nothing_else_moves(layout):
    """A new part stands where the old one did, in a new tensor."""
    order, views = layout
    tensor, _ = fused(order)
    before = tensor.clone()
    for part, view in views.items():
        value = torch.randn_like(view.pick(tensor))
        new = view.write(tensor, value)
        assert torch.equal(view.pick(new), value)
        for other in views.keys() - {part}:
            assert torch.equal(views[other].pick(new), views[other].pick(tensor))
    assert torch.equal(tensor, before)


def test_columns_without_heads_stay_flat():
    """Halves of a gated projection, of all columns or of each of several parts."""
    tensor = torch.arange(12.0).view(1, 12)
    assert Columns(start=6).pick(tensor).tolist() == [[6, 7, 8, 9, 10, 11]]
    each = Columns(stop=1, groups=4)
    assert each.pick(tensor).tolist() == [[0, 3, 6, 9]]
    assert each.write(tensor, -torch.ones(1, 4)).tolist() == [[-1, 1, 2, -1, 4, 5, -1, 7, 8, -1, 10, 11]]


def test_columns_that_are_no_whole_heads_are_an_error():
    """It names the numbers."""
    with pytest.raises(ArgumentError, match="8 columns cannot be cut into 3 equal parts"):
        Columns(stop=8, heads=3).pick(torch.zeros(2, 24))


def test_an_empty_batch_has_heads_too():
    """No row, and the same axes."""
    view = Columns(start=2, stop=4, heads=2, groups=2)
    assert view.pick(torch.zeros(0, 3, 12)).shape == (0, 3, 2, 2)
    assert view.write(torch.zeros(0, 3, 12), torch.zeros(0, 3, 2, 2)).shape == (0, 3, 12)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_fused_weight_is_seen_by_the_same_columns(layout, has_bias):
    """Weight and bias make what the projection makes; a bias that is not there is zeros of the same shape."""
    order, views = layout
    module = torch.nn.Linear(7, len(order) * WIDTH, bias=has_bias)
    inputs = torch.randn(3, 7)
    for part, columns in views.items():
        weight, bias = (read_weight(view, lambda _: module) for view in weight_and_bias(part, "", columns=columns))
        expected = columns.pick(module(inputs))
        ours = torch.einsum("pd,hde->phe", inputs, weight) + bias
        assert bias.shape == expected.shape[1:]
        torch.testing.assert_close(ours, expected)


def test_a_bias_that_is_not_there_goes_the_way_of_one_that_is():
    """Through columns, function and pattern."""
    view = WeightView(
        name="b",
        path="",
        part="bias",
        columns=Columns(stop=6),
        function=lambda x: x + 1,
        pattern="(h e) -> h e",
        sizes={"h": 2},
    )
    for module in (torch.nn.Linear(3, 8, bias=False), torch.nn.Conv1d(3, 8, 2, bias=False)):
        assert torch.equal(read_weight(view, lambda _, m=module: m), torch.ones(2, 3))
