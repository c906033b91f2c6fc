"""OPT and BioGPT as descriptions of a decoder.

Sources: transformers `models/opt/modeling_opt.py`, `models/biogpt/modeling_biogpt.py`. Glossary: `self_attn_layer_norm`
is ln1, `final_layer_norm` of a block ln2; `fc1` is W_in, `fc2` W_out, both modules of the block. Positions are embedded
two rows further down. OPT's blocks flatten batch and positions before ln2.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
from torch import Tensor

from lens_core.errors import UnsupportedConfigError
from lens_core.plugin import (
    LAYER_NORM,
    Attn,
    Declaration,
    Decoder,
    HookPoint,
    Mlp,
    ModuleInput,
    ModuleOutput,
    NormPlace,
    declare,
    norm_points,
    point,
)
from lens_opt._seams import Flat, Undropped


def OPT(config: Any) -> Declaration:
    """Declare OPT at one HF `OPTConfig`.

    Raises:
        UnsupportedConfigError: Embeddings of another width than the stream, which are projected into it.
    """
    if config.word_embed_proj_dim != config.hidden_size:
        raise UnsupportedConfigError(
            f"word_embed_proj_dim={config.word_embed_proj_dim}: embeddings that are projected into a stream of width "
            f"{config.hidden_size} are not served"
        )

    def own(layer: int) -> Iterator[HookPoint]:
        block = f"model.decoder.layers.{layer}"
        yield from _dropped(block, layer, config.dropout, Flat)
        yield from map(_flat, _flattened(block, layer))

    base = "model.decoder"
    return _declared(_decoder(base, final_norm="final_layer_norm", head="lm_head", out="out_proj", own=own), config)


def BioGPT(config: Any) -> Declaration:
    """Declare BioGPT at one HF `BioGptConfig`."""

    def own(layer: int) -> Iterator[HookPoint]:
        yield from _dropped(f"biogpt.layers.{layer}", layer, config.hidden_dropout_prob, lambda seam: seam)

    head = "output_projection"
    return _declared(_decoder("biogpt", final_norm="layer_norm", head=head, out="out_proj", own=own), config)


def _decoder(base: str, *, final_norm: str, head: str, out: str, own: Callable[[int], Iterator[HookPoint]]) -> Decoder:
    return Decoder(
        base=base,
        pos_embed="embed_positions",
        final_norm=final_norm,
        head=head,
        norm=LAYER_NORM,
        ln1="self_attn_layer_norm",
        ln2="final_layer_norm",
        attn=Attn(out=out, rotary=()),
        mlp=Mlp(path="", kind="plain", up="fc1", down="fc2"),
        own=own,
        sizes={"eps": 1e-5},  # torch's default, whatever the config says
    )


def _declared(decoder: Decoder, config: Any) -> Declaration:
    found = declare(decoder, config)
    offset = partial(attrs.evolve, function=_without_offset)
    return attrs.evolve(found, weights=tuple(offset(view) if view.name == "W_pos" else view for view in found.weights))


def _without_offset(embedded: Tensor) -> Tensor:
    return embedded[2:]


def _dropped(block: str, layer: int, p: float, shown: Any) -> Iterator[HookPoint]:
    """Give what the branches add: in training a dropout stands between, outside of any module."""
    yield point("hook_attn_out", Undropped(seam=ModuleOutput(path=f"{block}.self_attn"), p=p), layer=layer)
    yield point("hook_mlp_out", shown(Undropped(seam=ModuleOutput(path=f"{block}.fc2"), p=p)), layer=layer)


def _flattened(block: str, layer: int) -> Iterator[HookPoint]:
    """Give the places of a block that see batch and positions as one axis."""
    norm, here = f"{block}.final_layer_norm", partial(point, layer=layer)
    yield here("hook_resid_mid", ModuleInput(path=norm, reaches="all"))
    yield here("hook_mlp_in", ModuleInput(path=norm, is_copy=True))
    yield from norm_points("ln2", NormPlace(path=norm, kind=LAYER_NORM), layer=layer)
    yield here("mlp.hook_in", ModuleInput(path=f"{block}.fc1"))
    yield here("mlp.hook_pre", ModuleOutput(path=f"{block}.fc1"))
    yield here("mlp.hook_post", ModuleInput(path=f"{block}.fc2"))
    yield here("mlp.hook_out", ModuleOutput(path=f"{block}.fc2"))


def _flat(one: HookPoint) -> HookPoint:
    return attrs.evolve(one, seam=Flat(one.seam))
