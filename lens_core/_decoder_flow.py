"""What reads each norm of a decoder, and what writes to its residual stream: what passes over weights go by."""

from collections.abc import Iterator

from lens_core._declaration import LensConfig, NormPlace, NormReaders, WritingWeight
from lens_core._decoder import Decoder
from lens_core._decoder_points import projections

__all__ = ["decoder_readers", "decoder_writing"]


def decoder_readers(decoder: Decoder, cfg: LensConfig) -> Iterator[NormReaders]:
    """Give each norm before a branch, and the final one, with what reads it."""
    for layer in range(cfg.n_layers):
        yield from _Flow(decoder, cfg, layer).norms()
    final = NormPlace(path=f"{decoder.base}.{decoder.final_norm}", kind=decoder.norm)
    yield NormReaders(norm=final, readers=(decoder.head,))


def decoder_writing(decoder: Decoder, cfg: LensConfig) -> Iterator[WritingWeight]:
    """Give the embeddings, and the last weights of each branch."""
    for embedding in filter(None, (decoder.embed, decoder.pos_embed)):
        yield WritingWeight(path=f"{decoder.base}.{embedding}")
    for layer in range(cfg.n_layers):
        yield from (WritingWeight(path=path, layer=layer) for path in _Flow(decoder, cfg, layer).writing())


class _Flow:
    """The weights of one block at the ends of its branches."""

    def __init__(self, decoder: Decoder, cfg: LensConfig, layer: int) -> None:
        self.decoder, self.cfg, self.layer = decoder, cfg, layer
        self.hf, self.branches = decoder.block.format(layer=layer), decoder.branches(layer)
        self.moe = decoder.moe if "mlp" in self.branches and decoder.is_sparse(layer) else None
        self.has_dense = "mlp" in self.branches and (
            self.moe is None or (self.moe.beside is not None and self.moe.beside == decoder.mlp.path)
        )

    def norms(self) -> Iterator[NormReaders]:
        """Give the block's norms that something reads, and what reads the stream without one."""
        decoder, mixer, mlp = self.decoder, self.decoder.mixer, list(self.mlp_reads())
        is_shared = decoder.ln2 is None and decoder.is_parallel
        yield from self._norm(decoder.ln1, [*self.mixer_reads(), *self.attention_reads(), *(mlp if is_shared else ())])
        if "mixer" in self.branches and mixer is not None and mixer.inner is not None:
            path = f"{self.hf}.{mixer.path}"
            norm = NormPlace(path=f"{path}.norm", kind=mixer.inner)
            yield NormReaders(norm=norm, readers=tuple(f"{path}.{name}" for name in mixer.writes), layer=self.layer)
        if not is_shared:
            yield from self._norm(decoder.ln2, mlp)

    def _norm(self, name: str | None, readers: list[str]) -> Iterator[NormReaders]:
        if readers:
            norm = None if name is None else NormPlace(path=f"{self.hf}.{name}", kind=self.decoder.norm)
            yield NormReaders(norm=norm, readers=tuple(readers), layer=self.layer)

    def mixer_reads(self) -> Iterator[str]:
        """Give what of a mixer reads the stream."""
        mixer = self.decoder.mixer
        if "mixer" in self.branches and mixer is not None:
            yield from (f"{self.hf}.{mixer.path}.{name}" for name in mixer.reads)

    def attention_reads(self) -> Iterator[str]:
        """Give the projections to queries, keys and values."""
        if "attn" in self.branches:
            attn = self.decoder.attn
            places = projections(attn, self.cfg, f"{self.hf}.{attn.path}").values()
            yield from dict.fromkeys(place.path for place in places)

    def mlp_reads(self) -> Iterator[str]:
        """Give a dense MLP's first weights, or a mixture's: the router and what is beside it."""
        moe, mlp = self.moe, self.decoder.mlp
        if moe is not None:
            names = (moe.router, moe.router_linear) if moe.router_linear else (moe.router,)
            yield ".".join((self.hf, moe.path, *names))
            yield from (f"{self.hf}.{moe.path}.{name}" for name in moe.reads)
        if self.has_dense:
            yield from (self._mlp(name) for name in ((mlp.gate, mlp.up) if mlp.kind == "gated" else (mlp.up,)))

    def writing(self) -> Iterator[str]:
        """Give what writes to the stream."""
        decoder, mixer = self.decoder, self.decoder.mixer
        if "mixer" in self.branches and mixer is not None:
            yield from (f"{self.hf}.{mixer.path}.{name}" for name in mixer.writes)
        if "attn" in self.branches:
            yield f"{self.hf}.{decoder.attn.path}.{decoder.attn.out}"
        if self.moe is not None:
            yield from (f"{self.hf}.{self.moe.path}.{name}" for name in self.moe.writes)
        if self.has_dense:
            yield self._mlp(decoder.mlp.down)

    def _mlp(self, name: str) -> str:
        return ".".join(part for part in (self.hf, self.decoder.mlp.path, name) if part)
