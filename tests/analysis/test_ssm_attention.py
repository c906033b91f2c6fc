"""Effective attention as a function of tensors, against sums and recurrences written here in float64."""

import time
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lens_core.analysis.ssm_attention import reconstruction_error, scan_attention
from lens_core.analysis.ssm_blocks import attention_blocks
from lens_core.analysis.ssm_scan import Scan, segment_sum
from lens_core.errors import ArgumentError

SHAPES = {"mamba": (5, 1, 4, 4, 1), "mamba2": (6, 3, 4, 1, 2)}  # heads, groups, states, decays a head, head_dim


def made(
    kind: str, *, batch: int = 2, pos: int = 9, seed: int = 0, with_decay: bool = False, speed: float = 1.0
) -> Scan:
    """Make a scan of random tensors in float64; `speed` multiplies the decay rates."""
    heads, groups, states, rates, width = SHAPES[kind]
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    delta, A = normal(batch, pos, heads).abs(), -normal(heads, rates).abs() * speed
    x, D = normal(batch, pos, heads, width), normal(heads)
    B, C = normal(batch, pos, groups, states), normal(batch, pos, groups, states)
    y = recurrence(delta, A, B, C, x)
    return Scan(
        delta=delta,
        A=None if with_decay else A,
        decay=(delta[..., None] * A).exp() if with_decay else None,
        B=B,
        C=C,
        x=x,
        D=D,
        y=y,
        output=y + D[:, None] * x,
    )


def recurrence(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> Tensor:
    """Run h_t = exp(delta A) h + delta x B and y = h C, one head and position after the other."""
    batch, pos, heads = delta.shape
    y = torch.zeros_like(x)
    for head in range(heads):
        group = head // (heads // B.shape[2])
        h = torch.zeros(batch, x.shape[3], B.shape[3], dtype=x.dtype)
        for t in range(pos):
            h = (delta[:, t, head, None] * A[head]).exp()[:, None] * h
            h = h + (delta[:, t, head, None] * x[:, t, head])[:, :, None] * B[:, t, group][:, None]
            y[:, t, head] = (h * C[:, t, group][:, None]).sum(-1)
    return y


def naive(scan: Scan, *, with_delta: bool = True) -> Tensor:
    """Sum over states for every target and source: the formula of Ali et al., term by term."""
    batch, pos, heads = scan.delta.shape
    rows = []
    for t in range(pos):
        for s in range(pos):
            if s > t:
                rows.append(torch.zeros(batch, heads, dtype=scan.delta.dtype))
                continue
            steps = scan.delta[:, s + 1 : t + 1].sum(1)  # batch head
            kept = (steps[..., None] * scan.A).exp() if scan.decay is None else scan.decay[:, s + 1 : t + 1].prod(1)
            group = [head // (heads // scan.B.shape[2]) for head in range(heads)]
            value = (scan.C[:, t, group] * kept * scan.B[:, s, group]).sum(-1)
            rows.append(value * scan.delta[:, s] if with_delta else value)
    return torch.stack(rows, dim=-1).unflatten(-1, (pos, pos))


@pytest.fixture(params=SHAPES)
def kind(request):
    """Name which of the two forms."""
    return request.param


@pytest.mark.parametrize("with_decay", [False, True], ids=["A", "decay"])
def test_the_whole_is_the_formula(kind, with_decay):
    """For every target and source, from A and from decays; zero above the diagonal."""
    scan = made(kind, with_decay=with_decay)
    torch.testing.assert_close(scan_attention(scan), naive(scan), rtol=1e-12, atol=1e-12)
    assert not scan_attention(scan).triu(1).any()


def test_it_gives_the_recurrence_back(kind):
    """With and without the skip connection; without the step size it does not."""
    scan = made(kind)
    whole = scan_attention(scan)
    assert reconstruction_error(whole, scan.x, scan.y) < 1e-14
    assert reconstruction_error(scan_attention(scan, skip=True), scan.x, scan.output) < 1e-14
    assert reconstruction_error(scan_attention(scan, with_delta=False), scan.x, scan.y) > 0.1
    assert reconstruction_error(whole, scan.x, scan.output) > 0.1


def test_rows_do_not_sum_to_1_and_entries_may_be_negative(kind):
    """As the documentation says."""
    whole = scan_attention(made(kind))
    assert (whole < 0).any()
    assert (whole.sum(-1) - 1).abs().min() > 1e-3


@pytest.mark.parametrize("with_decay", [False, True], ids=["A", "decay"])
@pytest.mark.parametrize("with_delta", [True, False], ids=["delta", "no_delta"])
def test_rows_columns_and_heads_are_parts_of_the_whole(kind, with_decay, with_delta):
    """Whichever way they are computed: backwards, forwards or as matrices."""
    scan = made(kind, with_decay=with_decay)
    whole = naive(scan, with_delta=with_delta)

    def check(expected: Tensor, **how):
        found = scan_attention(scan, with_delta=with_delta, **how)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    check(whole[:, :, -1], target=-1)
    check(whole[:, :, 3], target=3)
    check(whole[..., 2], source=2)
    check(whole[..., 0], source=0)
    check(whole[:, :, 6, 2], target=6, source=2)
    check(whole[:, 3], heads=3)
    check(whole[:, [4, 0]], heads=[-len(whole[0]) + 4, 0])
    check(whole[:, 1:4, 2:5], heads=slice(1, 4), target=slice(2, 5))
    check(whole[:, :, [7, 1]], target=[7, -8])
    check(whole[:, :, [7, 1, 7]], target=[7, 1, 7])
    check(whole[..., [5, 3]], source=[5, 3])
    check(whole[:, :, [7, 1]][..., [5, 0, 3]], target=[7, 1], source=[5, 0, 3])
    check(whole[:, :, [7, 1, 2, 3]][..., [5, 0]], target=[7, 1, 2, 3], source=[5, 0])
    check(whole[:, 2, 5, 3], heads=2, target=5, source=3)


def test_blocks_of_any_size_give_the_same(kind):
    """From one head at a time to all at once."""
    scan = made(kind)
    whole = naive(scan)
    for max_bytes in (1, 20_000, 2**40):
        blocks = [len(values[0]) for _, values in attention_blocks(scan, range(9), max_bytes=max_bytes)]
        assert sum(blocks) == scan.n_heads
        assert (len(blocks) == scan.n_heads) == (max_bytes == 1)
        torch.testing.assert_close(scan_attention(scan, max_bytes=max_bytes), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_bytes", [1, 2**30])
def test_reductions_over_heads(kind, max_bytes):
    """Block by block as at once."""
    scan = made(kind)
    whole = naive(scan)
    expected = {
        "sum": whole.sum(1),
        "mean": whole.mean(1),
        "mean_abs": whole.abs().mean(1),
        "norm": whole.norm(dim=1),
    }
    for reduce, value in expected.items():
        torch.testing.assert_close(scan_attention(scan, reduce=reduce, max_bytes=max_bytes), value)
        row = scan_attention(scan, reduce=reduce, max_bytes=max_bytes, target=4, heads=[0, 2])
        assert row.shape == (2, 9)
    two = scan_attention(scan, reduce="norm", heads=[0, 2])
    torch.testing.assert_close(two, whole[:, [0, 2]].norm(dim=1))


def test_the_skip_connection_is_on_the_diagonal(kind):
    """D of each head, where source and target are the same token."""
    scan = made(kind)
    whole = naive(scan)
    whole.diagonal(dim1=2, dim2=3).add_(scan.D[:, None])
    torch.testing.assert_close(scan_attention(scan, skip=True), whole)
    torch.testing.assert_close(scan_attention(scan, skip=True, target=4), whole[:, :, 4])
    torch.testing.assert_close(scan_attention(scan, skip=True, source=[4, 2]), whole[..., [4, 2]])


@pytest.mark.parametrize("with_decay", [False, True], ids=["A", "decay"])
def test_fast_forgetting_neither_overflows_nor_loses_gradients(kind, with_decay):
    """Sums of |delta A| far above 88, in float32: finite everywhere, and the gradients are those of float64."""
    exact = made(kind, speed=200.0, pos=7)
    assert (exact.delta[..., None] * exact.A).abs().sum(1).max() > 1000
    gradients = []
    for dtype, compute in ((torch.float32, scan_attention), (torch.float64, naive)):
        leaves = {name: getattr(exact, name).to(dtype).requires_grad_() for name in ("delta", "A", "B", "C")}
        given = dict(leaves)
        if with_decay:
            given["decay"] = (leaves["delta"][..., None] * given.pop("A")).exp()
        value = compute(Scan(**given))
        assert value.isfinite().all()
        value.square().sum().backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradient.double(), gradients[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reduce", ["sum", "mean_abs", "norm"])
def test_gradients_of_reductions_are_finite(kind, reduce):
    """Although a root has none at 0, and half of the entries are 0."""
    scan = made(kind)
    scan.delta.requires_grad_()
    scan_attention(scan, reduce=reduce, max_bytes=1).sum().backward()
    assert scan.delta.grad.isfinite().all()
    assert scan.delta.grad.abs().max() > 0


def test_decays_of_any_sign_are_products(kind):
    """An edit may put 0, negative numbers or more than 1 there."""
    scan = made(kind, with_decay=True)
    scan.decay[:, 3], scan.decay[:, 5], scan.decay[:, 6] = 0.0, -0.7, 1.5
    torch.testing.assert_close(scan_attention(scan), naive(scan), rtol=1e-12, atol=1e-12)
    assert not scan_attention(scan, target=7)[..., :3].any()


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors made inside, and how many were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made = self.alive = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                self._count(value.untyped_storage())
        return result

    def _count(self, storage) -> None:
        size = storage.nbytes()
        self.made, self.alive = self.made + size, self.alive + size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.alive -= size


def large(kind: str, pos: int, heads: int = 24) -> Scan:
    """Make a float32 scan in which the whole, with an axis of states, would be large."""
    rates = 8 if kind == "mamba" else 1
    one = torch.rand(1, pos, heads)
    return Scan(delta=one, A=-torch.rand(heads, rates), B=torch.randn(1, pos, 1, 8), C=torch.randn(1, pos, 1, 8))


def test_a_reduction_is_streamed_in_bounded_memory(kind):
    """Less than the limit and a few results, where all heads at once take more than three times as much."""
    pos = 64
    scan, limit = large(kind, pos), 2**18
    with Allocations() as count:
        scan_attention(scan, reduce="norm", max_bytes=limit)
    assert count.peak < limit + 4 * (pos * pos * 4)
    with Allocations() as whole:
        scan_attention(scan, reduce="norm", max_bytes=2**30)
    assert whole.peak > 3 * count.peak  # the limit is what kept it small


def test_one_row_costs_memory_and_work_that_grow_linearly(kind):
    """Twice the text, twice the bytes that are touched; and never an axis of states with one of positions."""
    work, peak = [], []
    for pos in (64, 128, 256):
        scan = large(kind, pos)
        with Allocations() as count:
            scan_attention(scan, target=-1)
        work.append(count.made)
        peak.append(count.peak)
    for less, more in ((0, 1), (1, 2)):
        assert 1.8 < work[more] / work[less] < 2.2
        assert peak[more] / peak[less] < 2.2
    assert peak[2] < 256 * 24 * 4 * 8  # a few rows of [head, source], not [head, state, source]


def test_one_row_of_a_long_text_is_quick():
    """Eight times the text is nowhere near 64 times the work, in python's own bookkeeping either."""

    def cost(pos: int) -> float:
        one = torch.rand(1, pos, 1)
        scan = Scan(delta=one, A=-torch.ones(1, 1), B=one[..., None], C=one[..., None])
        spent = []
        for _ in range(3):
            begin = time.process_time()
            scan_attention(scan, target=-1)
            spent.append(time.process_time() - begin)
        return min(spent)

    cost(100)
    assert cost(40_000) < 30 * cost(5_000)


def test_segment_sums_are_exact_where_differences_of_running_sums_are_not():
    """A large first term drowns the digits of the others in a running sum."""
    values = torch.tensor([1e8, 1.0, 2.0, 3.0])
    found = segment_sum(values)
    assert found[3, 1].item() == 5.0
    assert found[2, 0].item() == 3.0
    assert (values.cumsum(0)[3] - values.cumsum(0)[1]).item() != 5.0
    upper = torch.ones(4, 4, dtype=torch.bool).triu(1)
    assert (found[upper] == -torch.inf).all()
    assert not found.diagonal().any()


def test_segment_sums_have_finite_gradients():
    """Through exp, where the unmasked form has inf * 0."""
    rates = torch.full((60,), -10.0, requires_grad=True)
    segment_sum(rates).exp().sum().backward()
    assert rates.grad.isfinite().all()
    assert rates.grad.abs().max() > 0


def test_mistakes_are_named(kind):
    """What cannot be asked."""
    scan = made(kind)
    with pytest.raises(ArgumentError, match="'sum', 'mean', 'mean_abs', 'norm'; got 'max'"):
        scan_attention(scan, reduce="max")
    with pytest.raises(ArgumentError, match="9 is outside an axis of length 9"):
        scan_attention(scan, target=9)
    with pytest.raises(ArgumentError, match="outside an axis of length"):
        scan_attention(scan, heads=100)
    with pytest.raises(ArgumentError, match="above 0; got 0"):
        scan_attention(scan, max_bytes=0)
    bare = Scan(delta=scan.delta, A=scan.A, B=scan.B, C=scan.C)
    with pytest.raises(ArgumentError, match="skip=True needs D"):
        scan_attention(bare, skip=True)
    with pytest.raises(ArgumentError, match="needs A or decay"):
        Scan(delta=scan.delta, B=scan.B, C=scan.C)
