"""Tests of the ready-made hook functions."""

import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lens_core import edits
from lens_core.errors import ArgumentError

RESID = "blocks.1.hook_resid_post"
Z = "blocks.1.attn.hook_z"
PATTERN = "blocks.1.attn.hook_pattern"
SCORES = "blocks.1.attn.hook_attn_scores"

SHAPES = {  # two rows, positions 3 to 6 of a sequence, three heads
    RESID: (2, 4, 5),
    Z: (2, 4, 3, 5),
    PATTERN: (2, 3, 4, 7),
    SCORES: (2, 3, 4, 7),
}
MAKERS = {
    "zero": edits.zero,
    "mean": lambda **where: edits.mean(torch.tensor(3.0), **where),
    "replace": lambda **where: edits.replace(torch.tensor(3.0), **where),
    "add": lambda **where: edits.add(torch.tensor(3.0), **where),
    "scale": lambda **where: edits.scale(2.0, **where),
}


def hook_at(name, first=3, length=4):
    """Make what a hook function is told, for positions from `first` on."""
    return SimpleNamespace(name=name, positions=torch.arange(first, first + length))


def value_at(name, seed=0):
    """Make this call's activation of that name."""
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def source_at(name, length=7, batch=2, seed=1):
    """Make a whole run's activation of that name, positions 0 to `length` - 1."""
    shape = list(SHAPES[name])
    shape[0] = batch
    shape[2 if name in (PATTERN, SCORES) else 1] = length
    if name in (PATTERN, SCORES):
        shape[3] = length
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("maker", MAKERS)
def test_an_edit_without_limits_changes_everything(maker, name):
    """With no heads and no positions every element is edited, and the function's name tells which edit it is."""
    fn, before = MAKERS[maker](), value_at(name)
    after = fn(before, hook=hook_at(name))
    expected = {"zero": before * 0, "add": before + 3, "scale": before * 2}.get(maker, torch.full_like(before, 3))
    assert torch.equal(after, expected)
    assert fn.__name__ == maker


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("maker", [*MAKERS, "detach"])
def test_the_argument_is_never_written_nor_kept(maker, name):
    """The tensor that was given holds the same bits afterwards, and a source is not handed out itself."""
    before = value_at(name)
    kept = before.clone()
    ({**MAKERS, "detach": edits.detach}[maker])()(before, hook=hook_at(name))
    assert torch.equal(before, kept)
    source = value_at(name, seed=1)
    after = edits.replace(source)(before, hook=hook_at(name, first=0))
    after.add_(1)
    assert torch.equal(source, value_at(name, seed=1))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("maker", MAKERS)
def test_positions_are_absolute(maker, name):
    """Only the positions of this call that are named are edited; those of other calls are left alone."""
    before, hook = value_at(name), hook_at(name)
    axis = 2 if name in (PATTERN, SCORES) else 1
    for pos, local in [(4, [1]), ([0, 4, 6, 9], [1, 3]), (slice(5, None), [2, 3]), (range(3), []), (-1, [3])]:
        after = MAKERS[maker](pos=pos)(before, hook=hook)
        changed = (after != before).transpose(0, axis).flatten(1).all(1)
        untouched = (after == before).transpose(0, axis).flatten(1).all(1)
        assert changed.nonzero().flatten().tolist() == local
        assert untouched.sum() == 4 - len(local)


@pytest.mark.parametrize("name", [Z, PATTERN, SCORES])
@pytest.mark.parametrize("maker", MAKERS)
def test_heads_index_the_axis_of_heads(maker, name):
    """The head axis is that of the hook point: 1 for scores and patterns, 2 for the rest."""
    before, hook = value_at(name), hook_at(name)
    axis = 1 if name in (PATTERN, SCORES) else 2
    for heads, chosen in [(1, [1]), ([0, 2], [0, 2]), (-1, [2]), (torch.tensor([1, 2]), [1, 2]), (slice(2), [0, 1])]:
        after = MAKERS[maker](heads=heads)(before, hook=hook)
        changed = (after != before).transpose(0, axis).flatten(1)
        assert changed.all(1).nonzero().flatten().tolist() == chosen
        assert changed.any(1).sum() == len(chosen)


@given(st.sets(st.integers(0, 2), min_size=1), st.sets(st.integers(0, 8), min_size=1))
def test_heads_and_positions_combine(heads, pos):
    """With both named, the cells of a named head at a named position are edited and no others."""
    for name in (Z, PATTERN):
        before = value_at(name)
        after = edits.add(torch.tensor(1.0), heads=list(heads), pos=list(pos))(before, hook=hook_at(name))
        expected = torch.zeros(3, 4)
        for head in heads:
            for p in pos & set(range(3, 7)):
                expected[head, p - 3] = 1
        difference = after - before if name == PATTERN else (after - before).transpose(1, 2)
        assert torch.allclose(difference, expected[None, :, :, None].expand_as(difference), atol=1e-6)


def test_replace_reads_the_source_at_the_calls_positions():
    """Position p of a run takes row p of the source, in a prompt and in a later step."""
    for name in (RESID, Z):
        source = source_at(name)
        for cache in (source, {name: source}):
            after = edits.replace(cache)(value_at(name), hook=hook_at(name))
            assert torch.equal(after, source[:, 3:7])
    step = edits.replace(source_at(RESID), pos=range(7))
    unseen = torch.randn(2, 1, 5)
    assert torch.equal(step(unseen, hook=hook_at(RESID, first=7, length=1)), unseen)
    assert torch.equal(step(unseen, hook=hook_at(RESID, first=6, length=1)), source_at(RESID)[:, 6:7])


def test_replace_takes_rows_and_keys_of_a_pattern():
    """A pattern of a longer run gives the queries of this call and the keys that they see."""
    source = source_at(PATTERN, length=9)
    after = edits.replace({PATTERN: source}, heads=2)(value_at(PATTERN), hook=hook_at(PATTERN))
    assert torch.equal(after[:, 2], source[:, 2, 3:7, :7])
    assert torch.equal(after[:, :2], value_at(PATTERN)[:, :2])


@pytest.mark.parametrize(
    "source",
    [torch.ones(2, 7, 5), torch.ones(1, 7, 5), torch.ones(7, 5), torch.ones(5), torch.ones(2, 1, 5), torch.tensor(1.0)],
    ids=lambda source: str(list(source.shape)),
)
def test_a_source_may_leave_out_leading_axes(source):
    """Batch, or batch and position, may be absent or 1."""
    assert torch.equal(edits.replace(source)(value_at(RESID), hook=hook_at(RESID)), torch.ones(2, 4, 5))


def test_an_entry_that_names_positions_shows_only_those():
    """Positions need not be contiguous: an edit sees what its entry shows it."""
    hook = SimpleNamespace(name=RESID, positions=torch.tensor([1, 5]))
    source = source_at(RESID)
    assert torch.equal(edits.replace(source)(torch.zeros(2, 2, 5), hook=hook), source[:, [1, 5]])


def test_a_source_that_ends_too_early_is_refused_only_where_it_is_needed():
    """A position beyond the source is an error that names it, unless pos leaves it out."""
    before = value_at(RESID)
    with pytest.raises(ArgumentError, match=r"hook_resid_post.*before position 5.*position 6.*range\(5\)"):
        edits.replace(source_at(RESID, length=5))(before, hook=hook_at(RESID))
    after = edits.replace(source_at(RESID, length=5), pos=range(5))(before, hook=hook_at(RESID))
    assert torch.equal(after[:, :2], source_at(RESID, length=5)[:, 3:])
    assert torch.equal(after[:, 2:], before[:, 2:])


def test_mean_is_over_batch_and_positions():
    """The mean of the cached activation stands at every position of every row; other heads keep theirs."""
    source = source_at(Z, length=9, batch=4)
    after = edits.mean({Z: source}, heads=[1])(value_at(Z), hook=hook_at(Z))
    assert torch.allclose(after[:, :, 1], source.mean((0, 1))[1].expand(2, 4, 5))
    assert torch.equal(after[:, :, [0, 2]], value_at(Z)[:, :, [0, 2]])
    for given_axes in (source[0], source[0].mean(0)):
        after = edits.mean(given_axes)(value_at(Z), hook=hook_at(Z))
        assert torch.allclose(after, source[0].mean(0).expand(2, 4, 3, 5))


def test_mean_of_a_pattern_is_over_the_batch_alone():
    """Averaging a causal pattern over queries would let them see the future, so each query keeps its own row."""
    causal = torch.softmax(source_at(PATTERN, length=9, batch=4).masked_fill(~torch.ones(9, 9).tril().bool(), -1e9), -1)
    after = edits.mean(causal)(value_at(PATTERN), hook=hook_at(PATTERN))
    assert torch.allclose(after, causal.mean(0)[:, 3:7, :7].expand(2, 3, 4, 7))
    assert after[0, 0, 0, 4:].abs().sum() == 0
    few = edits.mean(causal[:, :, :5, :5], pos=[3])
    with pytest.raises(ArgumentError, match="does not fit"):
        few(value_at(PATTERN), hook=hook_at(PATTERN))  # keys 5 and 6 have no mean


@pytest.mark.parametrize("maker", MAKERS)
def test_masked_scores_stay_masked(maker):
    """No ready-made edit turns a score of -inf into something else, nor into NaN."""
    before = value_at(SCORES).masked_fill(~torch.ones(4, 7).tril(3).bool(), -torch.inf)
    before.requires_grad_()
    fn = edits.scale(0.0) if maker == "scale" else MAKERS[maker]()
    after = fn(before, hook=hook_at(SCORES))
    assert torch.equal(after == -torch.inf, before == -torch.inf)
    assert not after.isnan().any()
    after.masked_fill(after == -torch.inf, 0).sum().backward()
    assert before.grad.isfinite().all()


def test_add_takes_a_coefficient_and_a_steering_matrix():
    """A vector goes to every position, a matrix to its own positions."""
    before, hook = torch.zeros(2, 4, 5), hook_at(RESID)
    assert torch.equal(edits.add(torch.ones(5), coefficient=-2.0)(before, hook=hook), torch.full((2, 4, 5), -2.0))
    matrix = torch.arange(20.0).reshape(1, 4, 5)
    after = edits.add(matrix, pos=range(4))(before, hook=hook)
    assert torch.equal(after[:, 0], matrix[:, 3].expand(2, 5))
    assert not after[:, 1:].any()


def test_the_dtype_is_the_places():
    """A float32 source in a bfloat16 run gives bfloat16."""
    before = value_at(RESID).bfloat16()
    for fn in (edits.add(torch.ones(5)), edits.replace(torch.ones(5)), edits.mean(torch.ones(2, 7, 5)), edits.zero()):
        assert fn(before, hook=hook_at(RESID)).dtype == torch.bfloat16


def test_gradients_flow_where_they_should():
    """Edited places pass on no gradient (zeros, not None), others all of it; a source that has a graph gets its own."""
    before, vector = value_at(Z).requires_grad_(), torch.ones(5, requires_grad=True)
    edits.replace(vector, heads=0)(before, hook=hook_at(Z)).sum().backward()
    assert not before.grad[:, :, 0].any()
    assert (before.grad[:, :, 1:] == 1).all()
    assert (vector.grad == 8).all()


def test_detach_stops_the_gradient_and_keeps_every_bit():
    """All of the value, or the named heads and positions of it, are cut from the graph."""
    before = value_at(Z).requires_grad_()
    whole = edits.detach()(before, hook=hook_at(Z))
    assert not whole.requires_grad
    part = edits.detach(heads=1, pos=4)(before, hook=hook_at(Z))
    assert torch.equal(part, before)
    part.sum().backward()
    expected = torch.ones_like(before)
    expected[:, 1, 1] = 0
    assert torch.equal(before.grad, expected)


@pytest.mark.parametrize(
    ("make", "name", "match"),
    [
        (lambda: edits.zero(heads=0), RESID, "hook_resid_post' has no axis of heads"),
        (lambda: edits.zero(heads=[0, 3]), Z, r"\[2, 4, 3, 5\], has no heads \[3\]; it has 3"),
        (lambda: edits.zero(heads=-4), PATTERN, r"no heads \[-4\]"),
        (
            lambda: edits.replace(torch.ones(6)),
            RESID,
            r"shape \[6\] does not fit 'blocks.1.hook_resid_post', shape \[2",
        ),
        (lambda: edits.replace(torch.ones(3, 7, 5)), RESID, r"\[3, 7, 5\] does not fit"),
        (lambda: edits.add(torch.ones(1, 1, 1, 5)), RESID, r"\[1, 1, 1, 5\] does not fit"),
        (lambda: edits.mean(torch.ones(2, 7, 4)), RESID, r"\[2, 7, 4\] does not fit|\[1, 1, 4\] does not fit"),
        (lambda: edits.replace({"hook_embed": torch.ones(5)}), RESID, "holds no 'blocks.1.hook_resid_post'"),
    ],
    ids=["no-heads", "heads", "negative-head", "width", "batch", "axes", "mean", "name"],
)
def test_what_does_not_fit_is_refused_at_the_hook(make, name, match):
    """The message names the hook point and the shapes."""
    with pytest.raises(ArgumentError, match=match):
        make()(value_at(name), hook=hook_at(name))


def test_a_value_without_that_position_axis_is_refused():
    """Positions can only be found where the value has an axis of this call's positions."""
    hook = SimpleNamespace(name="hf.some.module.output", positions=torch.arange(4))
    with pytest.raises(ArgumentError, match=r"hf.some.module.output'.*\[8, 5\].*no axis 1 of 4"):
        edits.zero(pos=1)(torch.zeros(8, 5), hook=hook)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (edits.zero, {"heads": "all"}),
        (edits.zero, {"pos": 1.5}),
        (edits.detach, {"heads": []}),
        (edits.replace, {"source": [1.0, 2.0]}),
        (edits.mean, {"source": None}),
        (edits.add, {"vector": 3.0}),
    ],
    ids=["heads", "pos", "no-heads", "list", "none", "number"],
)
def test_arguments_of_the_wrong_kind_are_refused_at_once(make, arguments):
    """They are errors where the edit is made, not first when it is used."""
    with pytest.raises(ArgumentError, match=re.escape(repr(next(iter(arguments.values()))))):
        make(**arguments)
