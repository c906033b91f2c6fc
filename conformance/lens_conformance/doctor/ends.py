"""Both ends of a decoder: base, blocks, embeddings, last norm, unembedding, and what makes logits of its output."""

import math
import re
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from lens_conformance.doctor.norms import is_norm
from lens_conformance.doctor.tiny import Subject, config_fields
from lens_conformance.doctor.trace import Call, Trace, Unfit, coefficients, same

__all__ = ["Ends", "express", "read_ends"]


@attrs.frozen(kw_only=True)
class Ends:
    """What was found outside of the blocks; numbers as expressions of the config."""

    base: str
    layers: str
    embed: str
    pos_embed: str | None
    embed_scale: str | None
    embed_at: str
    final_norm: str
    head: str
    logit: dict[str, str]
    """`logit_scale`, `logit_divisor`, `logit_cap`, `logits_dtype`, where they are not the defaults."""

    @property
    def blocks(self) -> str:
        """The path of the list of blocks."""
        return f"{self.base}.{self.layers}"


def express(value: float, subject: Subject, names: str = "") -> str | None:
    """Give the expression of the config that has this value, its name matching a pattern; None where none has."""
    config = subject.tiny()
    for name in config_fields(config):
        found = getattr(config, name, None)
        if isinstance(found, int | float) and not isinstance(found, bool) and re.search(names, name):
            if found and math.isclose(found, value, rel_tol=1e-9):
                return f"config.{name}"
            root = math.sqrt(config.num_hidden_layers)
            if found and math.isclose(found / root, value, rel_tol=1e-9):
                return f"config.{name} / config.num_hidden_layers**0.5"
    if math.isclose(value, math.sqrt(config.hidden_size), rel_tol=1e-9):
        return "config.hidden_size**0.5"
    return None


def read_ends(subject: Subject, wide: Trace, dropped: Trace, half: Trace) -> Ends:
    """Find both ends.

    Raises:
        Unfit: A place that `Decoder` has no word for.
    """
    model: Any = wide.model
    embed, head = (_path(model, module) for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    if embed is None or head is None:
        raise Unfit("HF's model names no embedding, or no unembedding (get_input_embeddings, get_output_embeddings)")
    blocks = _blocks(wide)
    base = _common(embed, blocks)
    if not base:
        raise Unfit(f"embeddings ({embed}) and blocks ({blocks}) have no base model in common")
    first, last = wide.of(f"{blocks}.0")[0], wide.of(f"{blocks}.{_depth(model, blocks) - 1}")[0]
    given, gave = first.inputs[0], last.outputs[0]
    found = _embedding(subject, wide, embed, base, given)
    if found["embed_at"] == "module":
        found["embed_at"] = _place_in_training(dropped, embed, found["pos_embed"], f"{blocks}.0", base)
    read = wide.of(head)[0].inputs[0]
    norms = [call for call in wide.calls if same(call.input_like(gave), gave) and same(call.output_like(gave), read)]
    norms = [call for call in norms if is_norm(call) and not call.path.startswith(f"{blocks}.")]
    if not norms:
        raise Unfit(_of_last_norm(wide, blocks, gave, read, head))
    if not norms[0].path.startswith(f"{base}."):
        raise Unfit(f"the last norm, {norms[0].path}, is not below the base model {base}")
    if len(wide.of(norms[0].path)) > 1:
        raise Unfit(f"{norms[0].path} is called {len(wide.of(norms[0].path))} times, so that no place is its own")
    return Ends(
        base=base,
        layers=blocks.removeprefix(f"{base}."),
        embed=embed.removeprefix(f"{base}."),
        final_norm=norms[0].path.removeprefix(f"{base}."),
        head=head,
        logit=_logits(subject, wide, half, head),
        **found,
    )


def _path(model: nn.Module, module: nn.Module | None) -> str | None:
    return next((path for path, one in model.named_modules() if one is module), None)


def _depth(model: nn.Module, blocks: str) -> int:
    return len(list(model.get_submodule(blocks).children()))


def _blocks(trace: Trace) -> str:
    """Find the list of modules each of which takes what the one before gave."""
    depth = trace.model.config.num_hidden_layers
    lists = [(path, module) for path, module in trace.model.named_modules() if isinstance(module, nn.ModuleList)]
    sized = [path for path, module in lists if len(module) == depth]
    broken: str | None = None
    for path in sized:
        calls = [trace.of(f"{path}.{at}") for at in range(depth)]
        if not all(len(one) == 1 and one[0].inputs and one[0].outputs for one in calls):
            broken = broken or f"the modules of {path} are not called once each"
            continue
        chain = [one[0] for one in calls]
        breaks = [at for at in range(1, depth) if not same(chain[at].inputs[0], chain[at - 1].outputs[0])]
        if not breaks:
            return path
        broken = f"{path}.{breaks[0]} does not receive what {path}.{breaks[0] - 1} returns"
    shapes = ", ".join(f"{path} of {len(module)}" for path, module in lists) or "no list of modules"
    raise Unfit(f"no list of {depth} blocks, each fed by the one before: {broken or shapes}")


def _common(a: str, b: str) -> str:
    parts = []
    for x, y in zip(a.split(".")[:-1], b.split(".")[:-1], strict=False):
        if x != y:
            break
        parts.append(x)
    return ".".join(parts)


def _of_last_norm(trace: Trace, blocks: str, gave: Tensor, read: Tensor, head: str) -> str:
    """Say what stands between the last block and the unembedding."""
    after = [call for call in trace.calls if not call.path.startswith(f"{blocks}.")]
    reads = [call for call in after if same(call.input_like(gave), gave) and is_norm(call)]
    if reads and (factor := coefficients(read, [reads[-1].outputs[0]])) is not None:
        return f"{head} reads {factor[0]:.4g} times what {reads[-1].path} returns, which Decoder has no field for"
    return f"no norm gives {head} what it reads from the last block; between them are " + (
        ", ".join(call.path for call in after if call.start > trace.below(blocks)[-1].end and call.path != head)
        or "none"
    )


# ---------------------------------------------------------------------- embeddings


def _embedding(subject: Subject, trace: Trace, embed: str, base: str, given: Tensor) -> dict[str, Any]:
    """Say what the first block is given: the embedding, times a factor, plus positions, or through a module."""
    token = trace.of(embed)[0].outputs[0]
    found: dict[str, Any] = {"pos_embed": None, "embed_scale": None, "embed_at": "module"}
    if token.shape != given.shape:
        raise Unfit(f"{embed} gives {list(token.shape)}, and the first block receives {list(given.shape)}")
    if same(token, given):
        return found
    if (factor := coefficients(given, [token])) is not None:
        told = express(factor[0], subject)
        return {**found, "embed_scale": told or repr(factor[0]), "embed_at": "block"}
    for call in _positions(trace, embed, base):
        added = (
            call.outputs[0].expand_as(given) if call.outputs[0].ndim == 3 else call.outputs[0][None].expand_as(given)
        )
        factors = coefficients(given, [token, added])
        if factors is None or abs(factors[0]) < 1e-9:
            continue
        if abs(factors[1] - 1) > 1e-9:
            raise Unfit(f"positions ({call.path}) are added {factors[1]:.4g} times; Decoder adds them once")
        found["pos_embed"] = call.path.removeprefix(f"{base}.")
        if abs(factors[0] - 1) > 1e-9:
            found["embed_scale"] = express(factors[0], subject) or repr(factors[0])
        return found
    through = [c for c in trace.calls if same(c.output_like(given), given) and c.start < trace.of(embed)[0].end + 10]
    through = [c for c in through if same(c.input_like(given), token)]
    if through:
        return {**found, "embed_at": "block"}
    raise Unfit(f"the first block receives neither {embed}'s output, nor a multiple of it, nor a sum with positions")


def _positions(trace: Trace, embed: str, base: str) -> Iterator[Call]:
    """Give modules beside the token embedding whose output may be added to it."""
    width = trace.of(embed)[0].outputs[0].shape
    for call in trace.calls:
        is_near = call.path.startswith(f"{base}.") and call.path != embed and call.outputs
        weight = getattr(call.module, "weight", None)
        is_near = is_near and isinstance(weight, Tensor) and weight.ndim == 2
        if is_near and call.outputs[0].ndim in (2, 3) and tuple(call.outputs[0].shape[-2:]) == tuple(width[-2:]):
            yield call


def _place_in_training(trace: Trace, embed: str, pos: str | None, first: str, base: str) -> str:
    """Say where what the embeddings contribute is whole: with dropouts on, before the first block only."""
    token, given = trace.of(embed)[0].outputs[0], trace.of(first)[0].inputs[0]
    if pos is not None:
        return "module"  # the sum of two passes a dropout: no name holds a part of it
    return "module" if same(token, given) else "block"


# ---------------------------------------------------------------------- logits


def _logits(subject: Subject, trace: Trace, half: Trace, head: str) -> dict[str, str]:
    """Say what makes logits of the unembedding's output."""
    found: dict[str, str] = {}
    assert trace.logits is not None
    assert half.logits is not None
    if half.logits.dtype == torch.float32 and half.of(head)[0].outputs[0].dtype != torch.float32:
        found["logits_dtype"] = '"float32"'
    out, logits = trace.of(head)[0].outputs[0], trace.logits
    if same(out, logits):
        return found
    if (factor := coefficients(logits, [out])) is not None:
        return {**found, **_factor(factor[0], subject)}
    config = subject.tiny()
    for name in config_fields(config):
        cap = getattr(config, name, None)
        if not isinstance(cap, float | int) or isinstance(cap, bool) or cap <= 0:
            continue
        bound = logits.abs().max() < cap
        inner = torch.atanh((logits / cap).clamp(-1 + 1e-12, 1 - 1e-12)) * cap if bound else None
        if inner is None or (factor := _slope(inner, out, cap)) is None:
            continue
        more = {} if abs(factor - 1) < 1e-9 else _factor(factor, subject)
        return {**found, **more, "logit_cap": f"config.{name}"}
    raise Unfit(f"the logits are neither {head}'s output, nor a multiple of it, nor its tanh under a cap of the config")


def _slope(inner: Tensor, out: Tensor, cap: float) -> float | None:
    """Give the factor before a cap, from the values that it does not flatten."""
    is_bent = inner.abs() < 3 * cap
    x, y = out[is_bent].double(), inner[is_bent].double()
    factor = float((x * y).sum() / (x * x).sum())
    return factor if float((x * factor - y).abs().max()) < 1e-6 * float(y.abs().max()) else None


def _factor(value: float, subject: Subject) -> dict[str, str]:
    if (told := express(1 / value, subject)) is not None:
        return {"logit_divisor": told}
    return {"logit_scale": express(value, subject) or repr(value)}
