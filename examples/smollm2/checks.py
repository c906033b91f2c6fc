"""lens against HuggingFace on real weights: logits, greedy text, every hook point, edits.

The reference is always a model that HF loaded afresh and lens never saw. What HF computes itself must be equal bit for
bit. What it does not must be as near to the equation in float64 as plain float32 torch is, up to `SLACK`, since the
order of a sum is free.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from examples.smollm2.equations import captured, equations, explicit_attention, weights_of

__all__ = [
    "EDITS",
    "Check",
    "PointError",
    "check_edits",
    "check_equations",
    "check_greedy",
    "check_logits",
    "check_points",
]

SLACK = 4.0  # times the rounding of float32
LAYER, HEAD, KV_HEAD = 10, 4, 1  # where the edits are


@attrs.frozen(kw_only=True)
class Check:
    """What was compared, the figures, and whether it holds."""

    name: str
    figures: str
    holds: bool


@attrs.frozen(kw_only=True)
class PointError:
    """The worst of a hook point over all layers.

    Attributes:
        name: With `blocks.L.` for any layer.
        unequal: Elements that differ from HF's own tensor; None where HF has none.
        error: Largest difference from the float64 equation, over the largest value.
        rounding: The same for plain float32 torch; where HF has the tensor itself, HF's.
    """

    name: str
    unequal: int | None
    error: float
    rounding: float

    @property
    def holds(self) -> bool:
        """Whether the value is HF's bit for bit, or else as exact as float32 allows."""
        return self.unequal == 0 if self.unequal is not None else self.error <= self.bound

    @property
    def bound(self) -> float:
        """The most that the error may be, where HF has no tensor of its own to be equal to."""
        return SLACK * max(self.rounding, torch.finfo(torch.float32).eps)


@torch.no_grad()
def check_logits(model: Any, reference: Any, texts: Sequence[str]) -> list[Check]:
    """Compare logits bit for bit: plain, with everything cached, and for a padded batch."""
    checks = []
    every_name = [point.name for point in model.hook_points() if not point.name.startswith("hf.")]
    for text in texts:
        tokens = model.tokenizer(text, return_tensors="pt").input_ids
        expected = reference(tokens).logits
        cached, _ = model.run_with_cache(text, names_filter=every_name)
        unequal = [int((logits != expected).sum()) for logits in (model(text), cached)]
        figures = f"{unequal[0]} of {expected.numel()} logits differ from HF's, {unequal[1]} with every name cached"
        checks.append(Check(name=f"logits of {text!r}", figures=figures, holds=not any(unequal)))
    batch = model.tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left")
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    expected = reference(**batch, position_ids=positions).logits
    real = batch.attention_mask.bool()
    ours = model(batch.input_ids, attention_mask=batch.attention_mask)
    unequal = int((ours != expected)[real].sum())
    figures = f"{unequal} of {expected[real].numel()} logits differ from HF's"
    return [*checks, Check(name=f"logits of all {len(texts)} texts, left-padded", figures=figures, holds=unequal == 0)]


@torch.no_grad()
def check_greedy(model: Any, reference: Any, texts: Sequence[str], new_tokens: int) -> list[Check]:
    """Compare greedy continuations while every default name is read, one by one and in a left-padded batch."""
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    checks = []
    for batch in (*([text] for text in texts), list(texts)):
        inputs = model.tokenizer(batch, return_tensors="pt", padding=True, padding_side="left")
        expected = reference.generate(**inputs, **options)
        with model.caching():
            ours = model.hf_model.generate(**inputs, **options)
        text = model.tokenizer.decode(expected[0, inputs.input_ids.shape[1] :])
        what = f"{batch[0]!r}" if len(batch) == 1 else f"all {len(batch)} texts, left-padded"
        figures = f"{expected.shape[1] - inputs.input_ids.shape[1]} tokens, {text!r}"
        checks.append(Check(name=f"greedy text of {what}", figures=figures, holds=torch.equal(ours, expected)))
    return checks


def check_points(model: Any, reference: Any, tokens: Tensor) -> list[PointError]:
    """Compare every hook point that lens gives with HF's own tensor and with its equation in float64.

    Raises:
        KeyError: lens has a hook point without an equation here, or lacks one that the equations have.
    """
    config, names = reference.config, [point.name for point in model.hook_points() if not point.name.startswith("hf.")]
    own = captured(reference, tokens)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names)
    exact = equations(weights_of(reference), config, tokens, own)
    plain = equations(weights_of(reference, torch.float32), config, tokens, own)
    if different := set(names) ^ set(exact):
        raise KeyError(f"hook points of lens or of the equations only: {sorted(different)}")
    worst: dict[str, PointError] = {}
    for name in names:
        short = re.sub(r"blocks\.\d+\.", "blocks.L.", name)
        unequal = int((cache[name] != own[name]).sum()) if name in own else None
        rounding = _relative(own.get(name, plain[name]), exact[name])
        found = PointError(name=short, unequal=unequal, error=_relative(cache[name], exact[name]), rounding=rounding)
        worst[short] = _worse(worst[short], found) if short in worst else found
    return list(worst.values())


def _relative(value: Tensor, exact: Tensor) -> float:
    """Give the largest difference over the largest value; infinite where a shape, or what is -inf, differs."""
    if value.shape != exact.shape or not torch.equal(value.isneginf(), exact.isneginf()):
        return torch.inf
    seen = ~exact.isneginf()
    return float((value.double() - exact.double())[seen].abs().max() / exact.double()[seen].abs().max())


def _worse(one: PointError, other: PointError) -> PointError:
    unequal = None if one.unequal is None or other.unequal is None else one.unequal + other.unequal
    error, rounding = max(one.error, other.error), max(one.rounding, other.rounding)
    return PointError(name=one.name, unequal=unequal, error=error, rounding=rounding)


@torch.no_grad()
def check_equations(reference: Any, tokens: Tensor) -> tuple[Check, float]:
    """Compare HF's float32 logits with the whole forward in float64: the equations are the model's.

    A layer rounds the stream twice, so the bound is that many roundings of the largest logit.

    Returns:
        The check, and the largest difference in logits: the rounding that any two float32 ways may show.
    """
    exact = equations(weights_of(reference), reference.config, tokens)["hook_logits"]
    error = float((reference(tokens).logits - exact).abs().max())
    roundings = 2 * reference.config.num_hidden_layers * torch.finfo(torch.float32).eps
    bound = SLACK * roundings * float(exact.abs().max())
    figures = f"differ by {error:.1e} at most (bound {bound:.1e})"
    return Check(name="HF's logits and the whole forward in float64", figures=figures, holds=error <= bound), error


# ------------------------------------------------------------------ edits, by lens and by torch hooks on HF's modules


def _dampen(x: Tensor, hook: Any = None) -> Tensor:
    return x * 0.7 + 0.1


def _square(x: Tensor, hook: Any = None) -> Tensor:
    return x * x


def _on_head(edit: Callable[[Tensor], Tensor], head: int, axis: int) -> Callable[..., Tensor]:
    def edited(x: Tensor, hook: Any = None) -> Tensor:
        x = x.clone()
        x.select(axis, head).copy_(edit(x.select(axis, head)))
        return x

    return edited


def _resid_mid(block: Any, config: Any) -> list[Any]:
    def write(_: Any, args: Any) -> None:  # in place: HF keeps the same tensor for the sum
        args[0].copy_(_dampen(args[0]))

    return [block.post_attention_layernorm.register_forward_pre_hook(write)]


def _mlp_in(block: Any, config: Any) -> list[Any]:
    return [block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: (_dampen(args[0]),))]


def _scale(block: Any, config: Any) -> list[Any]:
    return [block.post_attention_layernorm.register_forward_hook(lambda _, args, output: output / 1.5)]


def _z(block: Any, config: Any) -> list[Any]:
    zeroed = _on_head(torch.zeros_like, HEAD, 2)
    heads = config.num_attention_heads
    edit = lambda _, args: (zeroed(args[0].unflatten(-1, (heads, -1))).flatten(-2),)  # noqa: E731
    return [block.self_attn.o_proj.register_forward_pre_hook(edit)]


def _key(block: Any, config: Any) -> list[Any]:
    edited = _on_head(_dampen, KV_HEAD, 2)
    heads = config.num_key_value_heads
    edit = lambda _, args, output: edited(output.unflatten(-1, (heads, -1))).flatten(-2)  # noqa: E731
    return [block.self_attn.k_proj.register_forward_hook(edit)]


def _pattern(block: Any, config: Any) -> list[Any]:
    attn, seen = block.self_attn, {}
    counts = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args, output: seen.__setitem__(name, output.unflatten(-1, (counts[name], -1)))

    def write(_: Any, args: Any) -> tuple[Tensor]:
        z = explicit_attention(seen["q"], seen["k"], seen["v"], config, edit=_square)
        ours = args[0].unflatten(-1, (counts["q"], -1)).clone()
        ours[:, :, HEAD] = z[:, :, HEAD]
        return (ours.flatten(-2),)

    projections = [getattr(attn, f"{name}_proj").register_forward_hook(keep(name)) for name in counts]
    return [*projections, attn.o_proj.register_forward_pre_hook(write)]


def _q_input(block: Any, config: Any) -> list[Any]:
    seen, heads = {}, config.num_attention_heads

    def keep(_: Any, args: Any) -> None:
        seen["x"] = args[0]

    def write(module: Any, args: Any, output: Tensor) -> Tensor:
        # The class's forward, not the module itself, whose hooks would run again.
        x = type(block.input_layernorm).forward(block.input_layernorm, _square(seen["x"]))
        other = torch.nn.functional.linear(x, module.weight).unflatten(-1, (heads, -1))
        q = output.unflatten(-1, (heads, -1)).clone()
        q[:, :, HEAD] = other[:, :, HEAD]
        return q.flatten(-2)

    norm, projection = block.input_layernorm, block.self_attn.q_proj
    return [norm.register_forward_pre_hook(keep), projection.register_forward_hook(write)]


def _mlp_post(block: Any, config: Any) -> list[Any]:
    return [block.mlp.down_proj.register_forward_pre_hook(lambda _, args: (_dampen(args[0]),))]


EDITS: dict[str, tuple[Callable[..., Any], Callable[[Any, Any], list[Any]]]] = {
    "hook_resid_mid": (_dampen, _resid_mid),
    "hook_mlp_in": (_dampen, _mlp_in),
    "ln2.hook_scale": (lambda scale, hook: scale * 1.5, _scale),
    "hook_q_input": (_on_head(_square, HEAD, 2), _q_input),
    "attn.hook_k": (_on_head(_dampen, KV_HEAD, 2), _key),
    "attn.hook_pattern": (_on_head(_square, HEAD, 1), _pattern),
    "attn.hook_z": (_on_head(torch.zeros_like, HEAD, 2), _z),
    "mlp.hook_post": (_dampen, _mlp_post),
}


@contextmanager
def _hooked(handles: list[Any]) -> Any:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def check_edits(model: Any, reference: Any, tokens: Tensor, error: float, layer: int = LAYER) -> list[Check]:
    """Compare edits by lens with the same edits by torch hooks on HF's modules.

    Args:
        model: The lens model.
        reference: A fresh HF model.
        tokens: Ids `[batch, pos]`.
        error: The rounding of HF's logits; two ways to the same edit may differ by `SLACK` times it.
        layer: Where.
    """
    plain, block, checks = reference(tokens).logits, reference.model.layers[layer], []
    for name, (edit, install) in EDITS.items():
        ours = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.{name}", edit)])
        with _hooked(install(block, reference.config)):
            theirs = reference(tokens).logits
        difference, effect = float((ours - theirs).abs().max()), float((theirs - plain).abs().max())
        figures = (
            f"differs by {difference:.1e} from HF with torch hooks (bound {SLACK * error:.1e}), moves {effect:.1e}"
        )
        holds = difference <= SLACK * error < effect / 100
        checks.append(Check(name=f"edit of blocks.{layer}.{name}", figures=figures, holds=holds))
    return checks
