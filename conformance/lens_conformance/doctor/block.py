"""One block: what its branches add to the stream, through which norms, tried as equations of recorded values."""

from collections.abc import Iterator, Sequence
from itertools import combinations

import attrs
from torch import Tensor

from lens_conformance.doctor.norms import is_norm
from lens_conformance.doctor.trace import Call, Trace, Unfit, coefficients, same

__all__ = ["Block", "read_block"]


@attrs.frozen(kw_only=True)
class Block:
    """Paths below the block."""

    attn: str
    dispatches: bool
    attn_added: str | None
    mlp: str
    """Empty where its projections are the block's own."""
    mlp_added: str | None
    beside: str | None = None
    ln1: str | None
    ln1_post: str | None
    ln2: str | None
    ln2_post: str | None
    is_parallel: bool
    scale: float
    in_training: bool
    """Whether the equations hold with dropouts on, too."""


def read_block(path: str, trace: Trace, dropped: Trace) -> Block:
    """Find the equations of a block; in training first, where a dropout shows what is added.

    Raises:
        Unfit: None holds.
    """
    reason: Unfit | None = None
    for one, in_training in ((dropped, True), (trace, False)):
        try:
            return _Reader(path, one).read(in_training=in_training)
        except Unfit as unfit:
            reason = unfit
    assert reason is not None
    raise reason


class _Reader:
    """The calls of one block, and what is found among them."""

    def __init__(self, path: str, trace: Trace) -> None:
        self.path, self.trace = path, trace
        self.call = trace.of(path)[0]
        self.r, self.post = self.call.inputs[0], self.call.outputs[0]
        self.inside = trace.below(path)
        self.attn, self.dispatches = self._attention()

    def name(self, call: Call) -> str:
        """Give a path below the block."""
        return call.path.removeprefix(f"{self.path}.")

    def _attention(self) -> tuple[Call, bool]:
        """Find attention: what calls HF's interface, or what is named so."""
        kernels = {kernel.path for kernel in self.trace.kernels if kernel.path.startswith(f"{self.path}.")}
        if len(kernels) > 1:
            raise Unfit(f"{self.path} has several attention modules: {', '.join(sorted(kernels))}")
        calls = [call for call in self.inside if call.path in kernels]
        if calls:
            return calls[0], True
        named = [c for c in self.inside if "attention" in type(c.module).__name__.lower() and "norm" not in c.name]
        named = [call for call in named if call.output_like(self.r) is not None]
        if named:
            return max(named, key=lambda call: call.path.count(".")), False
        children = [self.name(c) for c in self.inside if "." not in self.name(c) and c.output_like(self.r) is not None]
        raise Unfit(
            f"{self.path} has no attention; its modules are {', '.join(children)}; a mixer needs points of its own"
        )

    def within(self, call: Call, outer: Call) -> bool:
        """Whether a call is of a module or below it."""
        return call.path == outer.path or call.path.startswith(f"{outer.path}.")

    def outputs(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Tensor]]:
        """Give what calls returned that may be added: the shallowest modules first, of those the last."""
        for call in sorted(calls, key=lambda call: (call.path.count("."), -call.end)):
            if (found := call.output_like(self.r)) is not None and not same(found, self.r):
                yield call, found

    # ------------------------------------------------------------------ equations

    def read(self, *, in_training: bool) -> Block:
        """Try one branch after the other, then both at once."""
        found = self._sequential() or self._parallel()
        if found is None:
            raise Unfit(self._explained())
        a, m, beside, mid, scale = found
        self._check_once(a, m)
        ln1, ln1_post, attn_added = self._around_attention(a)
        ln2, mlp = self._mlp(m, mid, beside)
        ln2_post = mlp_added = None
        if beside is None and not self._is_own(m, mlp):
            ln2_post, mlp_added = (self.name(m), None) if is_norm(m) else (None, self.name(m))
        return Block(
            attn=self.name(self.attn),
            dispatches=self.dispatches,
            attn_added=attn_added,
            mlp=mlp,
            mlp_added=mlp_added,
            beside=None if beside is None else self.name(beside),
            ln1=ln1,
            ln1_post=ln1_post,
            ln2=ln2,
            ln2_post=ln2_post,
            is_parallel=mid is None,
            scale=round(scale, 9),
            in_training=in_training,
        )

    def _sequential(self) -> tuple[Call, Call, Call | None, Tensor, float] | None:
        """`mid = r + c a`, where some module reads mid; `post = mid + c m`."""
        for reader in self.inside:
            mid = reader.input_like(self.r)
            if mid is None or reader.start < self.attn.end or same(mid, self.r):
                continue
            before = [c for c in self.inside if self.attn.start <= c.start and c.end < reader.start]
            for a, added in self.outputs(before):
                factor = coefficients(mid - self.r, [added])
                if factor is None:
                    continue
                after = [call for call in self.inside if call.start >= reader.start]
                m, beside = self._second(after, mid, factor[0])
                if m is not None:
                    return a, m, beside, mid, factor[0]
        return None

    def _second(self, after: Sequence[Call], mid: Tensor, scale: float) -> tuple[Call | None, Call | None]:
        """Find what gives `post - mid`: one module's output, or the sum of two."""
        outputs = list(self.outputs(after))
        for m, added in outputs:
            if _is(coefficients(self.post - mid, [added]), [scale]):
                return m, None
        for (m, x), (n, y) in combinations(outputs, 2):
            apart = not self.within(m, n) and not self.within(n, m)
            if apart and _is(coefficients(self.post - mid, [x, y]), [scale, scale]):
                return (m, n) if _has_experts(m) else (n, m)
        return None, None

    def _parallel(self) -> tuple[Call, Call, None, None, float] | None:
        """`post = r + c (a + m)`."""
        own, given = [c for c in self.inside if self.within(c, self.attn)], [self.attn.output_like(self.r)]
        for call in self.inside:  # dropouts and norms of what attention returned
            if call.start > self.attn.end and any(same(call.input_like(self.r), one) for one in given):
                own.append(call)
                given.append(call.output_like(self.r))
        other = [c for c in self.inside if c not in own and not self.within(self.attn, c)]
        for a, x in self.outputs(own):
            for m, y in self.outputs(other):
                factors = coefficients(self.post - self.r, [x, y]) if m is not a else None
                if factors is not None and _is(factors, [factors[0]] * 2) and abs(factors[0]) > 1e-6:
                    return a, m, None, None, factors[0]
        return None

    def _explained(self) -> str:
        """Say which sums the block does compute, of at most three of its values."""
        told = f"{self.path}: neither resid_post = (resid_pre + attn_out) + mlp_out nor the parallel sum holds"
        values = [("resid_pre", self.r), *self._weighted()]
        values += [(self.name(c), x) for c, x in self.outputs([c for c in self.inside if c.end <= self.attn.end + 8])]
        readers = [c.input_like(self.r) for c in self.inside if c.start > self.attn.end]
        mids = [x for x in readers if x is not None and not any(same(x, value) for _, value in values)]
        if mids and (found := _sum(mids[0], values[:20])) is not None:
            return f"{told}; what holds is resid_mid = {found}"
        values = [("resid_pre", self.r), *((self.name(c), x) for c, x in self.outputs(self.inside))]
        if (found := _sum(self.post, values[:20])) is not None:
            return f"{told}; what holds is resid_post = {found}"
        return f"{told}; nor is it a sum of three outputs of its modules"

    def _weighted(self) -> Iterator[tuple[str, Tensor]]:
        """Give the stream times each vector that the block itself holds."""
        for name, parameter in self.call.module.named_parameters(recurse=False):
            if parameter.shape == self.r.shape[-1:]:
                yield f"{name} * resid_pre", parameter.detach() * self.r

    def _check_once(self, *calls: Call) -> None:
        for call in calls:
            if len(self.trace.of(call.path)) > 1:
                raise Unfit(f"{call.path} ends both branches, or is called twice: two names would be one place")

    # ------------------------------------------------------------------ norms and modules

    def _around_attention(self, a: Call) -> tuple[str | None, str | None, str | None]:
        """Find the norm before attention, and the norm or dropout after it."""
        read = self.attn.input_like(self.r)
        ln1 = self._norm_to(read, self.r)
        if read is not None and ln1 is None and not same(read, self.r):
            raise Unfit(f"{self.attn.path} reads neither the stream nor a norm of it")
        if self.within(a, self.attn):
            inner = None if a is self.attn or same(a.outputs[0], self.attn.outputs[0]) else self.name(a)
            return ln1, None, inner
        return (ln1, self.name(a), None) if is_norm(a) else (ln1, None, self.name(a))

    def _norm_to(self, read: Tensor | None, source: Tensor) -> str | None:
        """Find the norm of the block that makes one value of another."""
        found = [c for c in self.inside if same(c.input_like(source), source) and same(c.output_like(source), read)]
        return next((self.name(call) for call in found if is_norm(call) and not same(source, read)), None)

    def _mlp(self, m: Call, mid: Tensor | None, beside: Call | None) -> tuple[str | None, str]:
        """Find the MLP: what reads the stream, or a norm of it, outside of attention."""
        source = self.r if mid is None else mid
        outside = [c for c in self.inside if not self.within(c, self.attn) and not self.within(self.attn, c)]
        if mid is not None:
            outside = [call for call in outside if call.start > self.attn.end]
        norms = [call for call in outside if same(call.input_like(source), source) and is_norm(call)]
        reads: list[tuple[str | None, Tensor]] = [(self.name(n), n.output_like(source)) for n in norms
                                                  if n.output_like(source) is not None]  # fmt: skip
        shared = self.attn.input_like(self.r) if mid is None else None
        for ln2, read in [*reads, *([(None, shared)] if shared is not None else []), (None, source)]:
            known = [c for c in outside if same(c.input_like(source), read) and not is_norm(c)]
            known = [c for c in known if any(True for _ in c.module.parameters())]
            if not known:
                continue
            if beside is not None and any(c.path == m.path for c in known):
                return ln2, self.name(m)
            module = min(known, key=lambda call: call.path.count("."))
            is_leaf = not any(True for _ in module.module.children())
            is_shared = mid is None and same(read, shared)
            return (None if is_shared else ln2), "" if is_leaf else self.name(module)
        raise Unfit(f"{self.path}: no module reads the stream, or a norm of it, and gives {self.name(m)} its input")

    def _is_own(self, m: Call, mlp: str) -> bool:
        """Whether what is added is the MLP's own output; of one whose projections are the block's, the last one's."""
        if mlp == "":
            return isinstance(getattr(m.module, "weight", None), Tensor) and not is_norm(m)
        own = self.trace.of(f"{self.path}.{mlp}")[0]
        return m is own or (self.within(m, own) and same(m.output_like(self.r), own.output_like(self.r)))


def _is(found: list[float] | None, wanted: list[float]) -> bool:
    return found is not None and all(abs(a - b) < 1e-9 * max(1.0, abs(b)) for a, b in zip(found, wanted, strict=True))


def _sum(target: Tensor, values: Sequence[tuple[str, Tensor]]) -> str | None:
    """Write a value as the sum of the fewest of others, times factors."""
    for count in (1, 2, 3):
        for some in combinations(values, count):
            factors = coefficients(target, [x for _, x in some])
            if factors is not None and all(abs(factor) > 1e-9 for factor in factors):
                terms = zip(factors, (name for name, _ in some), strict=True)
                return " + ".join(name if abs(f - 1) < 1e-9 else f"{f:.4g} {name}" for f, name in terms)
    return None


def _has_experts(call: Call) -> bool:
    return any(parameter.ndim == 3 for parameter in call.module.parameters())
