"""What each source token adds to an SSM mixer's output, exactly, and from there to a logit.

Given the gates that the run had, a mixer is linear in u, what its convolution reads. For target t and channel c of
head h (Mamba-1: h = c), with `share_s = x_s / v_s` (sigmoid(v_s), since x = SiLU(v)) and the convolution's kernel w:

    hidden_t[c] = gate_t[c] * ( sum over j of coef_j[c] u_j[c]  +  b_conv[c] * sum over s of m_s[c] )
    m_s[c]      = (alpha[h, t, s] + [s = t] D[h]) share_s[c]
    coef_j[c]   = sum over k of w[c, k] m_(j + K - 1 - k)[c]
    gate_t      = SiLU(z_t), and in Mamba-2 over the gated norm's scale, times its gain

and `mixer_out_t = hidden_t W_out + b_out`. In Mamba-2 B and C come out of the convolution too: they are held still, as
delta, B and C are everywhere here. So the terms `j` sum to the mixer's output, through convolution, scan, skip, gate
and output projection, with a constant for the biases. "Token j" is position j of the stream that enters the layer.

One target costs O(T E N) time and O(T E) memory, and nothing quadratic in the positions.
"""

import math
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lens_core._arguments import checks_arguments
from lens_core._decomposition import model_of, norm_at, read_values
from lens_core._positions import read_positions
from lens_core.analysis.ssm_attention import scan_attention
from lens_core.analysis.ssm_gradients import activation_of, frozen_share
from lens_core.analysis.ssm_scan import mixer_layers, read_layers, read_scan
from lens_core.errors import ArgumentError

if TYPE_CHECKING:
    from lens_core.cache import ActivationCache

__all__ = ["MixerTokens", "TokenAttribution", "mixer_tokens", "token_attribution"]


@attrs.frozen(kw_only=True, eq=False)
class MixerTokens:
    """One mixer's output at one target, by source token.

    Attributes:
        values: What each token adds, `[batch, source, d_model]`; projected, `[batch, source]`. Zero after the target.
        constant: What no token brings: the biases of the convolution (through scan and gate) and of the output
            projection. `[batch, d_model]`; projected, `[batch]`.
        error: The largest difference between what the formula gives and what the run had, as a share of the largest
            value there: at the convolution's output, at the scan's input, and at what the output projection read
            (`mixer.hook_gated`, if it was cached). About 1e-6 in float32; large where something inside was edited, so
            that it is not what these tokens brought, or where the cache lacks earlier positions.
    """

    values: Tensor = attrs.field(repr=False)
    constant: Tensor = attrs.field(repr=False)
    error: float


@attrs.frozen(kw_only=True, eq=False)
class TokenAttribution:
    """A logit, or a difference of two, at one target, by layer and source token.

    Attributes:
        values: What each token adds through each layer's mixer, in logits.
        constant: What the biases of each mixer add.
        other: What enters the final norm past the mixers: the embedding of the target itself, and in a hybrid what
            attention and MLPs added.
        bias: What no part of the stream adds: the final norm's bias, and `b_U`.
        layers: Rows of `values`.
        error: The largest `MixerTokens.error` of the layers; or, if that is larger, how far their terms are from what
            the stream that entered the final norm gives (where it was cached), as a share of the largest term: an edit
            of `hook_mixer_out` or of the residual stream is in no term.
    """

    values: Float[Tensor, "layer batch source"] = attrs.field(repr=False)
    constant: Float[Tensor, "layer batch"] = attrs.field(repr=False)
    other: Float[Tensor, " batch"] = attrs.field(repr=False)
    bias: Float[Tensor, "*batch"] = attrs.field(repr=False)
    layers: tuple[int, ...]
    error: float

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """The sum of everything: the logit, or difference, on the checkpoint's own weights."""
        return self.values.sum((0, 2)) + self.constant.sum(0) + self.other + self.bias


@checks_arguments
def mixer_tokens(
    cache: "ActivationCache", layer: int, target: int, *, project_output_onto: Tensor | None = None
) -> MixerTokens:
    """Give what each source token added to a mixer's output at one target; see the module for the formula.

    Args:
        cache: The default names of the layer, for all positions from the first on; with its model.
        layer: The layer; negative counts from the end.
        target: Position along the cached axis; negative counts from the end.
        project_output_onto: A direction `[d_model]`, or one for each row `[batch, d_model]`: only dot products with it
            are made.

    Raises:
        CacheError: A value that it needs was not cached, or the cache has no model.
        ArgumentError: No such layer or position; a direction of another shape.

    Example:
        >>> import torch, lens_core as lens
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
        >>> model = lens.load(MambaForCausalLM(config))
        >>> tokens = torch.tensor([[3, 14, 15, 9, 26, 5]])
        >>> _, cache = model.run_with_cache(tokens)
        >>> parts = mixer_tokens(cache, 0, target=-1)
        >>> whole = parts.values.sum(1) + parts.constant
        >>> bool(torch.allclose(whole, cache["mixer_out", 0][:, -1], atol=1e-4))
        True
    """
    (layer,) = read_layers(cache.table, layer)
    model = model_of(cache)
    scan = read_scan(cache, layer)
    target = _one_target(target, scan.n_pos)
    dtype, device = scan.delta.dtype, scan.delta.device

    def weight(name: str) -> Tensor:
        return model.weight(name, layer).detach().to(device, dtype)

    prefix = f"blocks.{layer}.mixer.hook_"
    x, v, u = (_rows(cache, prefix + name).to(device, dtype) for name in ("ssm_input", "conv", "conv_in"))
    x = x.flatten(2)  # batch pos d_inner
    width = x.shape[2]  # v and u may have the channels of B and C after those of x
    flow = scan_attention(scan, target=target, skip=True)  # batch head source
    per_channel = flow.repeat_interleave(width // scan.n_heads, dim=1).mT
    shared = per_channel * frozen_share(x, v[..., :width])  # m: batch source d_inner
    kernel = weight("W_conv")[:width]  # d_inner kernel
    reach = kernel.shape[1] - 1
    padded = F.pad(shared.mT, (0, reach))  # batch d_inner source
    coefficients = F.conv1d(padded, kernel.flip(-1)[:, None], groups=width).mT
    gate = _gate(cache, layer, target, width).to(device, dtype)
    hidden = coefficients * u[..., :width] * gate[:, None]
    constant = shared.sum(1) * weight("b_conv")[:width] * gate
    act = activation_of(model)
    convolved = F.conv1d(
        F.pad(u[..., :width].mT, (reach, 0)), kernel[:, None], weight("b_conv")[:width], groups=width
    ).mT
    read = torch.where(x == 0, x, act(v[..., :width]))  # zero is padding
    upto = slice(0, target + 1)
    error = max(
        _off(convolved[:, upto], v[:, upto, :width]),
        _off(read[:, upto], x[:, upto]),
        _gated_off(cache, layer, target, hidden.sum(1) + constant),
    )
    factor = model.declaration.factor_of("hook_mixer_out")
    out, bias = weight("W_out_proj") * factor, weight("b_out_proj") * factor
    if project_output_onto is None:
        values, constant = hidden @ out, constant @ out + bias
    else:
        onto = _directions(project_output_onto, model.cfg.d_model, len(u)).to(device, dtype)
        seen = onto @ out.T  # batch d_inner
        values = torch.einsum("bsc,bc->bs", hidden, seen)
        constant = (constant * seen).sum(-1) + onto @ bias
    batched = cache.has_batch_dim
    return MixerTokens(
        values=values if batched else values[0], constant=constant if batched else constant[0], error=error
    )


@checks_arguments
def token_attribution(
    cache: "ActivationCache", tokens: Any, incorrect_tokens: Any = None, *, target: int = -1
) -> TokenAttribution:
    """Attribute a token's logit at one target, or the difference of two tokens', to layers and source tokens.

    It is the direct effect: through each layer's convolution, scan, skip, gate, output projection and the final norm,
    with its gain and the scale that the run had. What a layer's source token owes to earlier layers is not followed.

    Args:
        cache: A cache of the default names with its model.
        tokens: One token as text or id, or ids `[batch]`, one for each row.
        incorrect_tokens: Tokens whose logits are subtracted, likewise.
        target: Position along the cached axis; negative counts from the end.

    Returns:
        Terms that sum to the logit (difference), before a soft cap. A cache without a batch axis gives
        a batch of one.

    Raises:
        CacheError: A value that it needs was not cached, or the cache has no model.
        ArgumentError: No such position; no layer with an SSM mixer.
        TokenizerError: Text that is not one token.
        TokenIdError: An id outside the vocabulary.

    Example:
        >>> import torch, lens_core as lens
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
        >>> model = lens.load(MambaForCausalLM(config))
        >>> tokens = torch.tensor([[3, 14, 15, 9, 26, 5]])
        >>> logits, cache = model.run_with_cache(tokens)
        >>> found = token_attribution(cache, tokens=7)
        >>> found.values.shape == (model.cfg.n_layers, 1, logits.shape[1])
        True
        >>> bool(torch.allclose(found.total, logits[:, -1, 7], atol=1e-3))
        True
    """
    layers = mixer_layers(cache.table)
    target = _one_target(target, read_scan(cache, layers[0]).n_pos)
    parts, labels = cache.decompose_resid(pos_slice=target, return_labels=True)
    attributed, bias = cache.logit_attrs(parts, tokens, incorrect_tokens, pos_slice=target, return_bias=True)
    others = [at for at, label in enumerate(labels) if label not in {f"{layer}_mixer_out" for layer in layers}]
    name, place = norm_at(cache, cache.table.n_layers, mlp_input=False)
    onto = cache.logit_directions(tokens, incorrect_tokens)
    if place.kind.centres:  # centring is symmetric: the same, done to the direction
        onto = onto - onto.mean(-1, keepdim=True)
    onto = onto / _rows(cache, f"{name}.hook_scale")[:, target]
    found = [mixer_tokens(cache, layer, target, project_output_onto=onto) for layer in layers]
    values, constants = (torch.stack([getattr(one, part) for one in found]) for part in ("values", "constant"))
    values = values if cache.has_batch_dim else values[:, None]
    constants = constants if cache.has_batch_dim else constants[:, None]
    other = attributed[others].sum(0).reshape(-1)
    errors = [one.error for one in found]
    stream = f"blocks.{cache.table.n_layers - 1}.hook_resid_post"
    if stream in cache:
        whole = (_rows(cache, stream)[:, target] * onto).sum(-1)
        sizes = torch.cat([values.abs().flatten(), constants.abs().flatten(), other.abs()])
        errors.append(float((values.sum((0, 2)) + constants.sum(0) + other - whole).abs().max() / sizes.max()))
    return TokenAttribution(
        values=values, constant=constants, other=other, bias=bias, layers=tuple(layers), error=max(errors)
    )


def _one_target(target: Any, n_pos: int) -> int:
    """Resolve a position along the cached axis."""
    chosen = read_positions(target)
    if not isinstance(chosen, int) or not -n_pos <= chosen < n_pos:
        raise ArgumentError(f"the target is one of {n_pos} positions, an int; got {target!r}")
    return chosen % n_pos


def _rows(cache: "ActivationCache", name: str) -> Tensor:
    """Give a cached value with its batch axis, in at least float32."""
    (value,) = read_values(cache, [name])
    value = value if cache.has_batch_dim else value[None]
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _gate(cache: "ActivationCache", layer: int, target: int, width: int) -> Float[Tensor, "batch d_inner"]:
    """Give what each channel is multiplied by on its way out: SiLU(z), and a gated norm's gain over its scale."""
    prefix = f"blocks.{layer}.mixer."
    gate = F.silu(_rows(cache, prefix + "hook_gate")[:, target])
    if f"{prefix}inner_norm.hook_scale" not in cache.table:
        return gate
    scale = _rows(cache, f"{prefix}inner_norm.hook_scale")[:, target]
    gain = model_of(cache).weight("W_inner_norm", layer).detach().to(gate)
    return gate / scale.repeat_interleave(width // scale.shape[-1], dim=-1) * gain


def _gated_off(cache: "ActivationCache", layer: int, target: int, hidden: Tensor) -> float:
    """Compare with what the output projection read in the run, if that is known."""
    name = f"blocks.{layer}.mixer.hook_gated"
    return _off(hidden, _rows(cache, name)[:, target].to(hidden)) if name in cache else 0.0


def _off(found: Tensor, own: Tensor) -> float:
    """Give the largest difference as a share of the largest value of the run."""
    off, largest = float((found - own).abs().max()), float(own.abs().max())
    return off / largest if largest else (0.0 if off == 0.0 else math.inf)


def _directions(given: Tensor, d_model: int, batch: int) -> Float[Tensor, "batch d_model"]:
    """Give one direction for each row."""
    got: Any = list(given.shape) if isinstance(given, Tensor) else repr(given)  # pyright: ignore[reportUnnecessaryIsInstance]
    if got not in ([d_model], [batch, d_model]):
        raise ArgumentError(f"a direction is [{d_model}] or [{batch}, {d_model}]; got {got}")
    return given.expand(batch, d_model)
