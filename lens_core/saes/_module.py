"""Sparse autoencoders as modules: the computation of SAELens' architectures, without hooks and without hidden state."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_core.errors import ArgumentError
from lens_core.saes._config import SaeConfig

__all__ = ["SparseAutoencoder"]

LAYER_NORM_EPS = 1e-5


class SparseAutoencoder(nn.Module):
    r"""A sparse autoencoder, or a transcoder: `decode(encode(x), x)`.

    With `x` `[..., d_in]` the input, normalised where the config says so:

    - pre-activations: `(x - b_dec) W_enc + b_enc` (`b_dec` if `apply_b_dec_to_input`); gated:
      `(x - b_dec) (W_enc exp(r_mag)) + b_mag`;
    - activations: `standard` relu(pre) or tanh(relu(pre)); `jumprelu` relu(pre) where pre > threshold; `topk` the `k`
      largest of relu(pre); `gated` relu(pre) where `(x - b_dec) W_enc + b_gate` > 0;
    - reconstruction: `acts W_dec + b_dec`, `+ x W_skip^T` in a skip transcoder, the normalisation undone.

    Sources: SAELens; Cunningham et al. 2023 and Bricken et al. 2023 (standard), Rajamanoharan et al. 2024 (gated,
    jumprelu), Gao et al. 2024 (topk), Dunefsky et al. 2024 (transcoders), Paulo et al. 2025 (skip transcoders). Which
    features are on has no gradient: a threshold is not trained by backpropagation through this module.

    Attributes:
        cfg: Sizes, computation, and what it was trained on.

    Example:
        >>> from lens_core.saes import SaeConfig
        >>> sae = SparseAutoencoder(SaeConfig(d_in=16, d_sae=64))
        >>> acts = sae.encode(torch.randn(2, 5, 16))
        >>> acts.shape, sae.decode(acts).shape
        (torch.Size([2, 5, 64]), torch.Size([2, 5, 16]))
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor
    threshold: Tensor
    W_skip: Tensor
    finetuning_scaling_factor: Tensor | None

    def __init__(self, cfg: SaeConfig, weights: Mapping[str, Tensor] | None = None, *, seed: int = 0) -> None:
        """Make an SAE of given weights, or one to be trained.

        Args:
            cfg: Sizes and computation.
            weights: By SAELens' names, of the shapes of `cfg.weight_shapes()`; they become the parameters. None draws
                unit decoder rows, makes the encoder their transpose, and everything else zero.
            seed: What is drawn.

        Raises:
            ArgumentError: A computation that needs the scale of a training (`expected_average_only_in`), or weights
                missing, unknown or of another shape.
        """
        super().__init__()
        if cfg.normalize_activations == "expected_average_only_in":
            raise ArgumentError(
                "normalize_activations='expected_average_only_in' says that the weights are to be rescaled by a factor "
                "of the training: fold it in (load_sae does, by norm_scaling_factor=), and say 'none'"
            )
        self.cfg = cfg
        shapes = cfg.weight_shapes()
        given = _drawn(cfg, seed) if weights is None else dict(weights)
        factor = given.pop("finetuning_scaling_factor", None)
        wrong = [name for name in {*shapes, *given} if name not in shapes or name not in given]
        wrong += [name for name in shapes if name in given and tuple(given[name].shape) != shapes[name]]
        if wrong:
            found = tuple(given[wrong[0]].shape) if wrong[0] in given else "missing"
            raise ArgumentError(f"weight {wrong[0]!r} is {found}; this SAE has {shapes}")
        for name in shapes:
            self.register_parameter(name, nn.Parameter(given[name].to(cfg.dtype)))
        self.register_parameter("finetuning_scaling_factor", None if factor is None else nn.Parameter(factor))

    @property
    def hook_name(self) -> str | None:
        """The hook point that it reads, as its config says."""
        return self.cfg.hook_name

    @property
    def hook_name_out(self) -> str | None:
        """The hook point that it writes, in a transcoder."""
        return self.cfg.hook_name_out

    def extra_repr(self) -> str:
        """Show what it is."""
        cfg = self.cfg
        return f"{cfg.architecture}, d_in={cfg.d_in}, d_sae={cfg.d_sae}, at {cfg.hook_name!r}"

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Reconstruct."""
        return self.decode(self.encode(x), x)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Give the features' activations."""
        return self.activate(self.pre_acts(x), x)

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Give what the activation function is applied to (gated: the magnitudes)."""
        read = self._read(x)
        if self.cfg.gate == "gated":
            return read @ (self.W_enc * self.r_mag.exp()) + self.b_mag
        return read @ self.W_enc + self.b_enc

    def activate(
        self, pre: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_sae"]:
        """Give the activations of pre-activations; `x` decides which features a gated SAE has on."""
        cfg = self.cfg
        if cfg.rescale_acts_by_decoder_norm:
            pre = pre * _norm(self.W_dec)[:, 0]
        acts = pre.relu()
        if cfg.activation == "tanh-relu":
            return acts.tanh()
        if cfg.gate == "gated":
            return acts * (self._read(x) @ self.W_enc + self.b_gate > 0)
        if cfg.gate == "threshold":
            return acts * (pre > self.threshold)
        if cfg.gate == "topk":
            kept: Any = pre.topk(cfg.k or 0, dim=-1)
            return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())
        return acts

    def decode(
        self, acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Give the reconstruction.

        Args:
            acts: The features' activations.
            x: The input. Only an SAE that normalises each input vector, and a skip transcoder, need it.

        Raises:
            ArgumentError: `x` is needed and was not given.
        """
        if self.finetuning_scaling_factor is not None:
            acts = acts * self.finetuning_scaling_factor
        if self.cfg.rescale_acts_by_decoder_norm:
            acts = acts / _norm(self.W_dec)[:, 0]
        made = acts @ self.W_dec + self.b_dec
        needs_input = "skip" in self.cfg.architecture or self.cfg.normalize_activations != "none"
        if not needs_input:
            return made
        if x is None:
            raise ArgumentError(
                "this SAE restores its input's scale, or reads past its features: decode(acts, x) needs x"
            )
        if "skip" in self.cfg.architecture:
            made = made + x.to(made.dtype) @ self.W_skip.T
        return made if self.cfg.is_transcoder else self._denormalised(made, x.to(made.dtype))

    def _read(self, x: Tensor) -> Tensor:
        """Give what the encoder multiplies: the input in the SAE's dtype, normalised, and without `b_dec`."""
        x = x.to(self.W_enc.dtype)
        kind = self.cfg.normalize_activations
        if kind == "constant_norm_rescale":
            x = x * (self.cfg.d_in**0.5 / _norm(x))
        elif kind == "layer_norm":
            x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + LAYER_NORM_EPS)
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    def _denormalised(self, made: Tensor, x: Tensor) -> Tensor:
        kind = self.cfg.normalize_activations
        if kind == "constant_norm_rescale":
            return made / (self.cfg.d_in**0.5 / _norm(x))
        if kind == "layer_norm":
            return made * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
        return made


def _norm(vectors: Tensor) -> Tensor:
    linalg: Any = torch.linalg
    return linalg.vector_norm(vectors, dim=-1, keepdim=True)


def _drawn(cfg: SaeConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(cfg.d_sae, cfg.d_out, generator=generator)
    rows = rows / _norm(rows)
    weights = {name: torch.zeros(shape) for name, shape in cfg.weight_shapes().items()}
    if cfg.d_in == cfg.d_out:
        encoder: Tensor = rows.mT.clone()
    else:
        encoder = torch.randn(cfg.d_in, cfg.d_sae, generator=generator) / cfg.d_in**0.5
    return {**weights, "W_dec": rows, "W_enc": encoder}
