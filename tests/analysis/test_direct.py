"""Direct logit attribution, against runs in which one part is taken away and everything else is held still."""

import pytest
import torch
from analysis.lens_subjects import FAMILIES, SPECIAL, TOKENS, hf_model, loaded
from golden.tiny_llama import tiny_llama
from lens_conformance.families import known_families
from lens_conformance.float64 import true_float64
from transformers import AutoConfig, AutoModelForCausalLM

import lens_core as lens
from lens_core import edits
from lens_core.analysis.direct import direct_logit_attribution
from lens_core.analysis.ssm_tokens import token_attribution
from lens_core.errors import ArgumentError, CacheError, TokenIdError, TokenizerError

MIXTURES = ("flex_olmo", "granitemoeshared")
HYBRIDS = ("jamba", "falcon_h1")
UNITS = ("component", "layer", "head", "neuron", "expert", "source")
RIGHT, WRONG, TARGET = 3, 7, 4


def built(kind):
    """Build one of any family, in float64."""
    if kind in MIXTURES:
        with true_float64():
            return lens.load(tiny_llama(kind, attn="eager"))
    if kind not in HYBRIDS:
        return loaded(kind)
    family = known_families()[kind]
    with true_float64():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **family.config))
        if hasattr(model.config, "num_experts_per_tok"):
            model.set_experts_implementation("eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(family.noise(name, parameter))
    return lens.load(model.eval())


def has(model, unit):
    """Say whether a model has what a unit is about."""
    part = {"head": "attn.hook_z", "neuron": "mlp.hook_post", "expert": "mlp.hook_expert_out"}.get(unit)
    return part is None or any(point.part == part for point in model.table.values())


class Subject:
    """A model with a cache of everything, whose logit difference can be measured with one part taken away."""

    def __init__(self, kind):
        torch.manual_seed(0)
        self.kind, self.model = kind, built(kind)
        names = [name for name, point in self.model.table.items() if point.default or "expert_out" in name]
        with true_float64(), torch.no_grad():
            self.logits, self.cache = self.model.run_with_cache(TOKENS, names_filter=names)
        self.uncapped = self.cache["unembed.hook_out"] * self.model.declaration.logit_factor
        scales = ("ln_final.hook_scale", "ln1_post.hook_scale", "ln2_post.hook_scale")
        self.writers = [
            name for name, point in self.model.table.items() if point.part in self.model.declaration.writers
        ]
        self.frozen = [name for name in self.model.table if name.endswith(scales)] + self.writers

    def attribute(self, unit, **options):
        """Attribute by the code under test."""
        options = {"answer_tokens": RIGHT, "incorrect_tokens": WRONG, "pos": TARGET, **options}
        with true_float64():
            return direct_logit_attribution(self.model, cache=self.cache, unit=unit, **options)

    def without(self, name, fn, writer=None):
        """Measure what an edit takes away from the difference when all other writers and scales stay as they were."""
        held = [(other, edits.replace(self.cache)) for other in self.frozen if other not in (writer, name)]
        with true_float64(), torch.no_grad():
            seen = {}
            keep = ("unembed.hook_out", lambda value, hook: seen.update(out=value.clone()))
            self.model.run_with_hooks(TOKENS, fwd_hooks=[*held, (name, fn), keep])
        after = seen["out"] * self.model.declaration.logit_factor
        change = self.uncapped - after
        return (change[..., RIGHT] - change[..., WRONG])[:, TARGET]


@pytest.fixture(scope="module")
def subject():
    """Give subjects by kind, built when asked for."""
    known = {}

    def get(kind):
        if kind not in known:
            known[kind] = Subject(kind)
        return known[kind]

    return get


def close(ours, expected, tolerance=1e-9):
    """Compare to a tolerance relative to the largest value, or to 1."""
    torch.testing.assert_close(ours, expected, atol=tolerance * max(1.0, float(expected.abs().max())), rtol=0)


def zeroed(*index):
    """Give a hook function that sets a place to zero."""

    def fn(value, hook):
        value = value.clone()
        value[index] = 0.0
        return value

    return fn


# ---------------------------------------------------------------------- sums


@pytest.mark.parametrize("kind", [*FAMILIES, *SPECIAL, *MIXTURES, *HYBRIDS])
def test_every_unit_sums_to_the_logit_that_hf_gives(subject, kind):
    """To float64's rounding, on raw weights, biases, factors and all; before a soft cap."""
    model, logits = subject(kind).model, subject(kind).logits
    tried = 0
    for unit in UNITS:
        if not has(subject(kind).model, unit):
            with pytest.raises(ArgumentError, match=r"no block of .* has .*; take unit="):
                subject(kind).attribute(unit)
            continue
        found = subject(kind).attribute(unit)
        tried += 1
        assert found.error < 1e-9
        close(found.total, found.logit)
        own = subject(kind).uncapped[:, TARGET]
        close(found.logit, own[:, RIGHT] - own[:, WRONG])
        if kind == "gemma2":
            cap = model.hf_model.config.final_logit_softcapping
            assert not torch.allclose(logits, subject(kind).uncapped, atol=1e-3)
            close((subject(kind).uncapped / cap).tanh() * cap, logits)
        else:
            close(own, logits[:, TARGET])
    assert tried >= 3


@pytest.mark.parametrize("kind", ["gpt2", "granite", "mamba2"])
def test_one_token_and_all_positions_sum_too(subject, kind):
    """The logit itself, whose bias counts; every position at once; tokens of their own."""
    for unit in ("component", "layer"):
        found = subject(kind).attribute(unit, incorrect_tokens=None, pos=None)
        close(found.total, subject(kind).logits[..., RIGHT])
        assert found.error < 1e-9
        following = subject(kind).attribute(unit, answer_tokens=TOKENS[:, 1:], incorrect_tokens=None, pos=slice(-1))
        expected = subject(kind).logits[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]
        close(following.total, expected)
        assert following.error < 1e-9


# ---------------------------------------------------------------------- each entry


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "stablelm-parallel", "mamba", "jamba"])
def test_a_component_is_what_is_lost_without_it(subject, kind):
    """One forward for each; embeddings aside."""
    one = subject(kind)
    found = one.attribute("component")
    values = dict(zip(found.labels, found.values, strict=True))
    for name in one.writers:
        layer, writer = one.model.table[name].layer, one.model.table[name].part
        close(values[f"{layer}_{writer.removeprefix('hook_')}"], one.without(name, zeroed(...)))
    summed = one.attribute("layer")
    for label, value in zip(summed.labels, summed.values, strict=True):
        own = [v for name, v in values.items() if name == label or name.startswith(f"{label[1:]}_")]
        close(value, sum(own))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "falcon_h1"])
def test_a_head_is_what_is_lost_without_its_z_and_a_source_without_its_weight(subject, kind):
    """One forward for each head, and for each head and position: grouped queries, post-norms and factors included."""
    one = subject(kind)
    heads, sources = one.attribute("head"), one.attribute("source")
    by_head = dict(zip(heads.labels, heads.values, strict=True))
    by_source = dict(zip(sources.labels, sources.values, strict=True))
    for layer, head in ((0, 0), (1, one.model.cfg.n_heads - 1)):
        prefix, writer = f"blocks.{layer}.attn.hook_", f"blocks.{layer}.hook_attn_out"
        label = f"L{layer}H{head}"
        close(by_head[label], one.without(f"{prefix}z", zeroed(..., head, slice(None)), writer))
        for source in (0, 2, TARGET):
            taken = zeroed(slice(None), head, TARGET, source)
            close(by_source[label][:, source], one.without(f"{prefix}pattern", taken, writer))
        assert not by_source[label][:, TARGET + 1 :].any()
        close(by_source[label].sum(-1), by_head[label])


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "granite"])
def test_a_neuron_is_what_is_lost_without_it(subject, kind):
    """One forward for each of some."""
    one = subject(kind)
    found = one.attribute("neuron")
    values = dict(zip(found.labels, found.values, strict=True))
    for layer, neuron in ((0, 0), (2, 36)):
        name, writer = f"blocks.{layer}.mlp.hook_post", f"blocks.{layer}.hook_mlp_out"
        close(values[f"L{layer}N{neuron}"], one.without(name, zeroed(..., neuron), writer))


@pytest.mark.parametrize("kind", MIXTURES)
def test_an_expert_is_what_is_lost_without_its_weight(subject, kind):
    """One forward for each; one that no token chose has exactly 0."""
    one = subject(kind)
    found = one.attribute("expert")
    values = dict(zip(found.labels, found.values, strict=True))
    unchosen = 0
    for layer, expert in ((2, expert) for expert in range(one.model.cfg.n_experts)):
        prefix = f"blocks.{layer}.mlp.hook_expert_"
        if f"{prefix}out" not in one.model.table:
            assert f"{layer}_mlp_out" in values
            continue
        mine = one.cache[f"{prefix}indices"] == expert

        def fn(value, hook, mine=mine):
            return value.masked_fill(mine, 0.0)

        close(values[f"L{layer}E{expert}"], one.without(f"{prefix}weights", fn, f"blocks.{layer}.hook_mlp_out"))
        absent = ~mine[:, TARGET].any(-1)
        unchosen += int(absent.sum())
        assert not values[f"L{layer}E{expert}"][absent].any()
        rest = values[f"{layer}_mlp_rest"].abs().max()
        assert (rest > 1e-3) == (kind == "granitemoeshared")
    assert unchosen


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "jamba"])
def test_a_mixers_sources_are_its_tokens(subject, kind):
    """As `token_attribution` gives them, at the same target."""
    one = subject(kind)
    with true_float64():
        expected = token_attribution(one.cache, RIGHT, WRONG, target=TARGET)
    found = one.attribute("source")
    values = dict(zip(found.labels, found.values, strict=True))
    for row, layer in enumerate(expected.layers):
        close(values[f"L{layer}"], expected.values[row])
        close(values[f"{layer}_mixer_bias"][:, TARGET], expected.constant[row])
    rest = [label not in {f"L{layer}" for layer in expected.layers} for label in found.labels]
    close(found.values[rest].sum((0, 2)), expected.other + expected.constant.sum(0))


# ---------------------------------------------------------------------- ways to ask


@pytest.mark.parametrize("unit", UNITS[:4] + UNITS[5:])
def test_each_row_may_have_its_own_tokens(subject, unit):
    """What a batch of one row with its tokens gives."""
    one = subject("gpt2")
    right, wrong = torch.tensor([3, 5]), torch.tensor([7, 1])
    found = one.attribute(unit, answer_tokens=right, incorrect_tokens=wrong)
    for row in range(2):
        options = {"answer_tokens": int(right[row]), "incorrect_tokens": int(wrong[row]), "unit": unit, "pos": TARGET}
        for cache in (one.cache.apply_slice_to_batch_dim([row]), one.cache.apply_slice_to_batch_dim(row)):
            alone = direct_logit_attribution(cache, **options)
            close(found.values[:, row], alone.values[:, 0])
            close(found.bias[row], alone.bias[0])
    repeated = one.cache.apply_slice_to_batch_dim([0, 1, 0])
    mixed = direct_logit_attribution(
        repeated, answer_tokens=right[[0, 1, 0]], incorrect_tokens=wrong[[0, 1, 0]], unit=unit, pos=TARGET
    )
    close(mixed.values, found.values[:, [0, 1, 0]])


@pytest.mark.parametrize("kind", ["flex_olmo", "mamba"])
def test_a_run_caches_what_its_unit_needs(subject, kind):
    """And gives what the whole cache gives; the default names do too, but for experts."""
    one = subject(kind)
    for unit in UNITS:
        if not has(one.model, unit):
            continue
        with true_float64():
            found = direct_logit_attribution(one.model, TOKENS, RIGHT, WRONG, unit=unit, pos=TARGET)
            close(found.values, one.attribute(unit).values)
            assert found.labels == one.attribute(unit).labels
            _, default = one.model.run_with_cache(TOKENS)
            if unit == "expert":
                with pytest.raises(CacheError, match="hook_expert_out"):
                    direct_logit_attribution(default, answer_tokens=RIGHT, unit=unit)
                continue
            again = direct_logit_attribution(
                default, answer_tokens=RIGHT, incorrect_tokens=WRONG, unit=unit, pos=TARGET
            )
        close(again.values, found.values)


def test_an_edit_that_the_entries_do_not_see_shows_in_the_error(subject):
    """An edited stream is in no entry; an edited pattern is in its head's."""
    model = subject("gpt2").model
    for name, is_seen in (("blocks.1.hook_resid_post", False), ("blocks.1.attn.hook_pattern", True)):
        with model.hooks(fwd_hooks=[(name, lambda value, hook: value * 1.5)]):
            _, cache = model.run_with_cache(TOKENS)
        for unit in ("component", "head", "source"):
            error = direct_logit_attribution(cache, answer_tokens=RIGHT, unit=unit).error
            assert (error < 1e-9) is is_seen


def test_half_precision_works():
    """In float32, to the rounding of the stream."""
    model = lens.load(hf_model("gpt2").to(torch.bfloat16))
    found = direct_logit_attribution(model, TOKENS, RIGHT, WRONG, unit="neuron")
    assert found.values.dtype == torch.float32
    assert found.error < 0.05


# ---------------------------------------------------------------------- what is shown


def test_the_data_frame_sums_to_the_logit(subject):
    """With its constant, for each row and position, or over sources."""
    one = subject("gpt2")
    frame = one.attribute("head", pos=[1, 4]).to_dataframe()
    sums = frame.groupby(["batch", "pos"]).logits.sum()
    expected = one.uncapped[:, [1, 4], RIGHT] - one.uncapped[:, [1, 4], WRONG]
    assert list(sums.index) == [(0, 1), (0, 4), (1, 1), (1, 4)]
    assert sums.tolist() == pytest.approx(expected.flatten().tolist())
    assert set(frame[frame.pos == 4].token) == {f"w{int(token)}" for token in TOKENS[:, 4]}
    frame = one.attribute("source").to_dataframe()
    assert frame.groupby("batch").logits.sum().tolist() == pytest.approx(expected[:, 1].tolist())
    assert frame[(frame.batch == 1) & (frame.source == 2)].token.unique().tolist() == [f"w{int(TOKENS[1, 2])}"]


def test_the_top_entries_are_the_largest_means(subject):
    """Highest first, or lowest; by source with the position."""
    found = subject("gpt2").attribute("head", pos=None)
    means = dict(zip(found.labels, found.values.mean((1, 2)).tolist(), strict=True))
    order = sorted(means, key=means.__getitem__)
    assert found.top(2) == [(name, pytest.approx(means[name])) for name in order[:-3:-1]]
    assert [name for name, _ in found.top(2, lowest=True)] == order[:2]
    found = subject("gpt2").attribute("source")
    label, value = found.top(1)[0]
    entry, _, source = label.partition(" from ")
    mean = found.values.mean(1)
    assert value == pytest.approx(float(mean.max())) == float(mean[found.labels.index(entry), int(source)])


def test_pictures_show_entries_and_tokens(subject):
    """Bars with their values; sources as a grid under the text."""
    bars = subject("gpt2").attribute("component")
    assert "0_attn_out" in bars._repr_html_()
    assert "Direct logit attribution by source" in subject("gpt2").attribute("source").picture().html
    row = subject("gpt2").attribute("source").picture(1, title="mine").html
    assert f"w{int(TOKENS[1, 0])}" in row
    assert "mine" in row
    many = subject("gpt2").attribute("neuron").picture().html
    assert many.count("<tr>") <= 41


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"unit": "heads"}, ArgumentError, "unit is one of 'component'"),
        ({"answer_tokens": None}, ArgumentError, "give answer_tokens"),
        ({"pos": 6}, ArgumentError, "outside an axis of length 6"),
        ({"pos": []}, ArgumentError, "positions are"),
        ({"pos": slice(6, 9)}, ArgumentError, "leaves none of 6 positions"),
        ({"unit": "source", "pos": None}, ArgumentError, "at one position, an int"),
        ({"answer_tokens": 99}, TokenIdError, "vocabulary of 29"),
        ({"answer_tokens": "w3 w4"}, TokenizerError, "w3 w4"),
        ({"answer_tokens": torch.tensor([1, 2, 3])}, ArgumentError, r"or ids \[2\]; got shape \[3\]"),
        ({"input": TOKENS}, ArgumentError, "one of them"),
        ({"unit": "expert"}, ArgumentError, "no block of GPT-2 has experts"),
    ],
)
def test_a_wrong_argument_says_what_is_right(subject, options, error, match):
    """By name and value."""
    options = {"answer_tokens": RIGHT, "cache": subject("gpt2").cache, **options}
    with pytest.raises(error, match=match):
        direct_logit_attribution(subject("gpt2").model, **options)


def test_what_is_not_cached_is_named(subject):
    """The hook point, or the positions."""
    model = subject("gpt2").model
    _, cache = model.run_with_cache(TOKENS, names_filter=["resid_post"])
    with pytest.raises(CacheError, match="ln_final.hook_out"):
        direct_logit_attribution(cache, answer_tokens=RIGHT)
    _, cache = model.run_with_cache(TOKENS, pos_slice=[4, 5])
    assert direct_logit_attribution(cache, answer_tokens=RIGHT, unit="head").error < 1e-9
    with pytest.raises(CacheError, match="must hold all positions"):
        direct_logit_attribution(cache, answer_tokens=RIGHT, unit="source")
    with pytest.raises(ArgumentError, match="no block of Mamba has attention heads; take unit='source'"):
        direct_logit_attribution(subject("mamba").cache, answer_tokens=RIGHT, unit="head")
