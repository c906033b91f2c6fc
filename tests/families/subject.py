"""The record of one kind of model that the laws are held against, and a built pair of it.

To add a family, write `tests/families/<family>.py` with a list SUBJECTS of these records and add it to `ALL` in
`subjects.py`. Nothing here knows an architecture; what a record leaves out has the default of an attention model.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from lens_conformance import edits as common
from lens_conformance.float64 import true_float64
from torch import Tensor

import lens_core as lens

Golden = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def never(name: str) -> bool:
    """Hold for no name."""
    return False


@attrs.frozen(kw_only=True)
class Subject:
    """One model type: how to build a tiny one, its golden forward, and what its names can bear."""

    name: str
    """Test id, HF's model type or a variant of it: `gemma2`, `stablelm-parallel`."""
    plugin: str
    """Import name of the plugin that serves it; the subject's tests are skipped while it cannot be imported."""
    build: Callable[..., Any]
    """`build(attn=..., seed=0, **config)`: an HF model in eval mode, float32, noise in every parameter, sizes pairwise
    different, 3 layers or more where types of layers are mixed. Vocabulary 29 (`lens_conformance.edits.VOCAB`)."""
    golden: Golden
    """`golden(state_dict, config, tokens, attention_mask=None, position_ids=None, edits=None, record=True,
    through=()) -> (logits, values)` in float64, as `lens_conformance.golden.gpt2.golden`."""
    names: Callable[[Any], list[str]]
    """All canonical names for a config."""
    is_starred: Callable[[str], bool]
    """Whether the contract keeps a name out of the default cache."""
    sizes: Callable[[Any], Mapping[str, int]]
    """Axis name (of `lens_core.shapes.AXES`) to size, for a config; batch, pos, query and key are the test's."""
    implementations: tuple[str, ...] = ("sdpa", "eager")
    """What `attn_implementation` may be; ("eager",) where HF has one way only."""
    full: bool = False
    """Whether every law is tried on it in full; otherwise a sample."""
    light: bool = False
    """Whether only tables and values are tried: a variant that has no seam of its own."""
    layers: tuple[int, ...] = (1,)
    """Blocks where every name is edited; names of the other blocks are read only."""
    edit_at: Callable[..., Any] = common.edit_at
    """`edit_at(name, causal=False)`: a function for the name that moves the logits by more than 1e-3. A causal one
    may be repeated step by step."""
    decodes: Callable[[str], bool] = lambda name: not name.endswith(("k_rep", "v_rep", "input_rep"))
    """Whether prefill + decode with an edit at this name equals the whole run with it (law 3 and its exceptions)."""
    apart: Callable[[str], bool] = lambda name: name.endswith(
        ("attn_in", "q_input", "k_input", "v_input", "k_input_rep", "v_input_rep")
    )
    """Names of copies: their gradient is that of the run through them (`through` of golden), one name at a time."""
    per_position: Callable[[str], bool] = never
    """Names whose function is called once per position, with that position alone on the position axis."""
    head_axis: Callable[[str], int | None] = lambda name: None
    """The axis of heads (or channels), where an edit may be restricted to one of them."""
    pos_axis: Callable[[str], int | None] = common.pos_axis
    """Which axis is the positions of this call."""
    key_axis: Callable[[str], int | None] = lambda name: 3 if common.pos_axis(name) == 2 else None
    """Which axis is the keys (all real positions so far)."""
    gradient: Callable[[str], bool] = lambda name: name != "hook_tokens" and not name.endswith("indices")
    """Whether the value is floating, so that it has a gradient."""
    chunks: bool = True
    """Whether several positions may continue a cache; where HF computes that wrongly lens refuses it."""
    paddings: tuple[str, ...] = ("left", "right")
    """Sides that a batch may be padded on; where HF lets padding reach real positions lens refuses it."""
    dropout: Mapping[str, Any] = attrs.field(factory=dict)
    """Config overrides that switch on the dropouts of the type."""

    def __str__(self) -> str:
        return self.name

    def calls(self, *bounds: int) -> list[tuple[int, int]]:
        """Split positions into calls at the bounds: a prefill, then chunks, or steps of one where those are refused."""
        cuts = bounds if self.chunks else (bounds[0], *range(bounds[1], bounds[-1] + 1))
        return list(itertools.pairwise(cuts))


@attrs.frozen(kw_only=True, eq=False)
class Pair:
    """A lens model, the HF model inside it, and a twin that nothing of lens has touched."""

    subject: Subject
    model: Any
    hf: Any
    reference: Any
    known: dict[str, Tensor] = attrs.field(factory=dict, repr=False)

    @property
    def config(self) -> Any:
        """The untouched twin's config."""
        return self.reference.config

    def golden(self, tokens: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run golden on the twin's weights, without a graph."""
        with torch.no_grad():
            return self.subject.golden(self.reference.state_dict(), self.config, tokens, **options)

    def plain_logits(self, tokens: Tensor, **options: Any) -> Tensor:
        """Give golden's logits without an edit, computed once for the same input."""
        key = repr((tokens.tolist(), {name: value.tolist() for name, value in options.items()}))
        if key not in self.known:
            self.known[key] = self.golden(tokens, record=False, **options)[0]
        return self.known[key]

    def names(self) -> list[str]:
        """List every name of the contract for this model."""
        return self.subject.names(self.config)

    def edited_names(self) -> list[str]:
        """List the names outside the blocks and those of `subject.layers`."""
        wanted = tuple(f"blocks.{layer}." for layer in self.subject.layers)
        return [name for name in self.names() if not name.startswith("blocks.") or name.startswith(wanted)]


def build(subject: Subject, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Build the HF model in a dtype; a float64 one has float64 buffers too (run it inside `true_float64()`)."""
    if dtype == torch.float64:
        with true_float64():
            return subject.build(**options).to(dtype)
    return subject.build(**options).to(dtype)


def pair(subject: Subject, *, dtype: torch.dtype = torch.float32, **options: Any) -> Pair:
    """Build a new pair."""
    hf = build(subject, dtype=dtype, **options)
    reference = build(subject, dtype=dtype, **options)
    reference.load_state_dict(copy.deepcopy(hf.state_dict()))
    return Pair(subject=subject, model=lens.load(hf), hf=hf, reference=reference)


@functools.lru_cache(maxsize=64)
def shared_pair(subject_name: str, dtype: torch.dtype, attn: str) -> Pair:
    """Build a pair once for all tests that neither train it nor touch its parameters."""
    from families.subjects import BY_NAME

    return pair(BY_NAME[subject_name], dtype=dtype, attn=attn)
