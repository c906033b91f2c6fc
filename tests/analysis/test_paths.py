"""Path patching against Wang et al.'s algorithm written out on the golden forwards, in float64."""

import pytest
import torch
from analysis.circuit_subject import OTHER, TOKENS, close, metric, subject

import lens_core as lens
from lens_core.analysis import paths
from lens_core.analysis.graph import graph
from lens_core.errors import ArgumentError, CacheError


def put(value):
    """Give an edit that puts a value in place."""
    return lambda x, hook: value


def put_head(value, head):
    """Give an edit that puts one head's value in place."""

    def edit(x, hook):
        x[:, :, head] = value if value.ndim == 3 else value[:, :, head]
        return x

    return edit


def positions_of(new, old, at):
    """Take the new values at some positions, the old ones elsewhere."""
    out = old.clone()
    out[:, at] = new[:, at]
    return out


def wang(one, sender, receivers, *, live_mlps=False, at=slice(None)):
    """Write the algorithm out: hold everything in a run but the sender, record, put the receivers' inputs in place.

    `sender` is `(layer, head)` or the name of a hook point; `receivers` are `(layer, head, part)`, hook names, or None
    for the logits.
    """
    _, old = one.golden(TOKENS)
    _, new = one.golden(OTHER)
    layers = range(one.model.cfg.n_layers)
    held = {}
    for layer in layers:
        names = [f"blocks.{layer}.{name}" for name in ("attn.hook_result", "hook_mixer_out", "hook_mlp_out")]
        for name in names:
            if name in old and not (live_mlps and name.endswith("mlp_out")):
                held[name] = old[name]
    if isinstance(sender, tuple):
        name = f"blocks.{sender[0]}.attn.hook_result"
        held[name] = held[name].clone()
        held[name][:, :, sender[1]] = positions_of(new[name], old[name], at)[:, :, sender[1]]
    else:
        held[sender] = positions_of(new[sender], old[sender], at)
    _, recorded = one.golden(TOKENS, {name: put(value) for name, value in held.items()})
    edits = {}
    for receiver in receivers:
        if receiver is None:
            stream = recorded[f"blocks.{layers[-1]}.hook_resid_post"]
            shift = stream - old[f"blocks.{layers[-1]}.hook_resid_post"]
            edits[f"blocks.{layers[-1]}.hook_resid_post"] = lambda x, hook, by=shift: x + by
        elif isinstance(receiver, tuple):
            layer, head, part = receiver
            stream = recorded[f"blocks.{layer}.hook_resid_pre"]
            edits[f"blocks.{layer}.hook_{part}_input"] = put_head(stream, head)
        else:
            edits[receiver] = put(recorded[receiver])
    logits, _ = one.golden(TOKENS, edits)
    return metric(logits)


CASES = [
    ("gpt2", (0, 1), [(2, 2, "q")], "L0H1", "L2H2.q"),
    ("gpt2", (0, 0), [(1, 1, "k"), (2, 0, "v")], (0, 0), [(1, 1, "k"), "L2H0.v"]),
    ("gpt2", (1, 2), [None], "L1H2", "logits"),
    ("gpt2", (0, 2), [(1, 0, "v"), None], "L0H2", ["logits", (1, 0, "v")]),
    ("gpt2", (1, 0), ["blocks.1.hook_mlp_in"], "L1H0", "L1.mlp"),
    ("gpt2", "blocks.0.hook_mlp_out", ["blocks.2.hook_mlp_in", (2, 1, "q")], "L0.mlp", ["L2.mlp", "L2H1.q"]),
    ("gpt2", "hook_embed", [(2, 1, "k")], "embed", "L2H1.k"),
    ("gpt2", "hook_embed", ["blocks.2.hook_mlp_in"], ("embed", None), ("mlp_in", 2)),
    ("llama", (0, 3), [(2, 1, "k")], "L0H3", "L2KV1.k"),
    ("llama", (1, 2), [(2, 3, "q"), (2, 0, "v")], (1, 2), ["L2H3", "L2KV0.v"]),
    ("stablelm-parallel", (0, 1), ["blocks.1.hook_mlp_in"], "L0H1", "L1.mlp"),
    ("stablelm-parallel", "blocks.0.hook_mlp_out", [(2, 0, "k"), None], "L0.mlp", ["L2KV0.k", "logits"]),
    ("granite", "blocks.0.hook_mlp_out", [(1, 2, "q")], "L0.mlp", "L1H2.q"),
    ("granite", (0, 2), [None], "L0H2", "logits"),
    ("mamba", "blocks.0.hook_mixer_out", ["blocks.2.hook_mixer_in"], "L0.mixer", "L2.mixer"),
    ("mamba", "hook_embed", [None], "embed", "logits"),
    ("mamba2", "hook_embed", ["blocks.1.hook_mixer_in"], "embed", "L1.mixer"),
]


@pytest.mark.parametrize("live_mlps", [False, True])
@pytest.mark.parametrize(("name", "sender", "receivers", "senders", "labels"), CASES)
def test_a_patched_path_is_the_algorithm_of_the_paper(name, sender, receivers, senders, labels, live_mlps):
    """Heads, MLPs, mixers and embeddings; queries, keys, values, MLPs, mixers and logits; MLPs held or live."""
    one = subject(name)
    found = one(paths.path_patch, TOKENS, OTHER, senders, labels, metric, live_mlps=live_mlps)
    expected = wang(one, sender, receivers, live_mlps=live_mlps)
    close(found.values[0, 0], expected)
    close(found.baseline, metric(one.golden(TOKENS)[0]))
    assert (found.effect.abs() > 1e-6).all()


def test_live_mlps_matter():
    """The two kinds of run differ, so each of the tests above tells them apart."""
    one = subject("gpt2")
    frozen = one(paths.path_patch, TOKENS, OTHER, "L0H1", "L2H2.q", metric)
    live = one(paths.path_patch, TOKENS, OTHER, "L0H1", "L2H2.q", metric, live_mlps=True)
    assert (frozen.values - live.values).abs().max() > 1e-3


@pytest.mark.parametrize("live_mlps", [False, True])
def test_positions_restrict_what_is_sent(live_mlps):
    """To one, several, or each row's own."""
    one = subject("gpt2")
    found = one(paths.path_patch, TOKENS, OTHER, (0, 1), "L2H2.k", metric, positions=1, live_mlps=live_mlps)
    close(found.values[0, 0], wang(one, (0, 1), [(2, 2, "k")], at=[1], live_mlps=live_mlps))
    several = one(paths.path_patch, TOKENS, OTHER, (0, 1), "L2H2.k", metric, positions=[1, -2], live_mlps=live_mlps)
    close(several.values[0, 0], wang(one, (0, 1), [(2, 2, "k")], at=[1, 3], live_mlps=live_mlps))
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1], mask[1, [1, 3]] = True, True
    own = one(paths.path_patch, TOKENS, OTHER, (0, 1), "L2H2.k", metric, positions=mask, live_mlps=live_mlps)
    close(own.values[0, 0], torch.stack([found.values[0, 0, 0], several.values[0, 0, 1]]))


def test_several_senders_are_sent_together():
    """Two heads of one layer and an MLP."""
    one = subject("llama")
    found = one(paths.path_patch, TOKENS, OTHER, [(0, 1), (0, 3), "L1.mlp"], "L2H0.q", metric)
    assert found.senders == ("L0H1+L0H3+L1.mlp",)
    _, old = one.golden(TOKENS)
    _, new = one.golden(OTHER)
    stream = old["blocks.2.hook_resid_pre"] + new["blocks.1.hook_mlp_out"] - old["blocks.1.hook_mlp_out"]
    for head in (1, 3):
        stream = stream + (new["blocks.0.attn.hook_result"] - old["blocks.0.attn.hook_result"])[:, :, head]
    logits, _ = one.golden(TOKENS, {"blocks.2.hook_q_input": put_head(stream, 0)})
    close(found.values[0, 0], metric(logits))


def test_a_query_heads_own_keys_under_grouped_queries():
    """With a graph whose readers are query heads, the group's other head does not hear."""
    one = subject("llama")
    own = graph(one.model, per_query_head=True)
    found = one(paths.path_patch, TOKENS, OTHER, (0, 1), "L2H3.k", metric, graph=own)
    stream = wang_stream(one, (0, 1), 2)
    logits, _ = one.golden(TOKENS, {"blocks.2.hook_k_input_rep": put_head(stream, 3)})
    close(found.values[0, 0], metric(logits))


def wang_stream(one, sender, layer):
    """Give what enters a layer when one head, and nothing after it, is of the other run."""
    _, old = one.golden(TOKENS)
    _, new = one.golden(OTHER)
    name = f"blocks.{sender[0]}.attn.hook_result"
    return old[f"blocks.{layer}.hook_resid_pre"] + (new[name] - old[name])[:, :, sender[1]]


def test_a_head_of_mamba_2_sends_through_its_own_rows_of_the_projection():
    """The other heads' channels stay."""
    one = subject("mamba2")
    found = one(paths.path_patch, TOKENS, OTHER, "L0H2", "L2.mixer", metric)
    _, old = one.golden(TOKENS)
    _, new = one.golden(OTHER)
    gated = old["blocks.0.mixer.hook_gated"].clone()
    gated[..., 22:33] = new["blocks.0.mixer.hook_gated"][..., 22:33]  # heads of 11 channels
    held = {"blocks.0.mixer.hook_gated": put(gated), "blocks.1.hook_mixer_out": put(old["blocks.1.hook_mixer_out"])}
    _, recorded = one.golden(TOKENS, held)
    logits, _ = one.golden(TOKENS, {"blocks.2.hook_mixer_in": put(recorded["blocks.2.hook_mixer_in"])})
    close(found.values[0, 0], metric(logits))


def test_behind_a_post_norm_a_head_is_taken_at_its_runs_own_scale():
    """Gemma 2: gain times the head's result over the scale that the norm had in that run."""
    one = subject("gemma2")
    found = one(paths.path_patch, TOKENS, OTHER, (0, 1), "L1H2.q", metric)
    _, old = one.golden(TOKENS)
    _, new = one.golden(OTHER)
    gain = 1 + one.hf.state_dict()["model.layers.0.post_attention_layernorm.weight"]
    added = [v["blocks.0.attn.hook_result"][:, :, 1] / v["blocks.0.ln1_post.hook_scale"] * gain for v in (old, new)]
    stream = old["blocks.1.hook_resid_pre"] + added[1] - added[0]
    logits, _ = one.golden(TOKENS, {"blocks.1.hook_q_input": put_head(stream, 2)})
    close(found.values[0, 0], metric(logits))


@pytest.mark.parametrize(("name", "live_mlps"), [("gpt2", True), ("llama", False), ("mamba", True), ("mamba2", False)])
def test_a_sweep_is_each_sender_by_itself(name, live_mlps):
    """Batched in rows of any number, by position or not."""
    one = subject(name)
    last = graph(one.model).readers[-2].label
    sweep = one(paths.path_sweep, TOKENS, OTHER, last, metric, batch_size=5, live_mlps=live_mlps)
    assert sweep.senders == tuple(node.label for node in graph(one.model).before(last))
    for label, value in list(zip(sweep.senders, sweep.values, strict=True))[::4]:
        each = one(paths.path_patch, TOKENS, OTHER, label, last, metric, live_mlps=live_mlps)
        close(value, each.values[0])
    some = sweep.senders[:2]
    options = {"by_position": True, "live_mlps": live_mlps, "senders": some}
    by_position = one(paths.path_sweep, TOKENS, OTHER, last, metric, positions=[1, -1], **options)
    assert by_position.positions == (1, 4)
    for row, column in ((0, 1), (1, 0)):
        options = {"positions": (1, 4)[column], "live_mlps": live_mlps}
        each = one(paths.path_patch, TOKENS, OTHER, some[row], last, metric, **options)
        close(by_position.values[row, column], each.values[0, 0])


def test_a_cache_may_stand_for_the_other_input():
    """The default one holds what is needed; one of other rows, or without the values, is refused."""
    one = subject("gpt2")
    _, cache = one(lens.LensModel.run_with_cache, OTHER)
    found = one(paths.path_patch, TOKENS, cache, (0, 1), "L2H2.q", metric)
    close(found.values, one(paths.path_patch, TOKENS, OTHER, (0, 1), "L2H2.q", metric).values)
    _, short = one(lens.LensModel.run_with_cache, OTHER[:, :4])
    with pytest.raises(ArgumentError, match=r"\[2, 4\].*\[2, 5\]"):
        one(paths.path_patch, TOKENS, short, (0, 1), "L2H2.q", metric)
    _, other = one(lens.LensModel.run_with_cache, OTHER, names_filter="pattern")
    with pytest.raises(CacheError, match="hook_z"):
        one(paths.path_patch, TOKENS, other, (0, 1), "L2H2.q", metric)


def test_padding_changes_nothing():
    """A padded row has the values of the row by itself; the mask goes to both runs."""
    one = subject("gpt2")
    row, other = TOKENS[:1, :4], OTHER[:1, :4]
    alone = one(paths.path_patch, row, other, (0, 1), ["L2H2.q", "logits"], metric, live_mlps=True)
    pad = torch.full((1, 1), 28)
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    padded = one(
        paths.path_patch,
        torch.cat([pad, row], 1),
        torch.cat([pad, other], 1),
        (0, 1),
        ["L2H2.q", "logits"],
        metric,
        live_mlps=True,
        attention_mask=mask,
    )
    close(padded.values, alone.values)


def test_transformer_lens_direct_paths():
    """Each cell is one sender to one receiver; a head without a path holds the untouched metric."""
    one = subject("gpt2")
    _, cache = one(lens.LensModel.run_with_cache, OTHER)

    def scalar(logits):
        return metric(logits).mean()

    found = one(paths.get_act_patch_direct_path, TOKENS, cache, None, scalar, 0, 1, "k")
    assert found.shape == (3, 3)
    close(found[0], metric(one.golden(TOKENS)[0]).mean().expand(3))
    for layer in (1, 2):
        for head in range(3):
            close(found[layer, head], wang(one, (0, 1), [(layer, head, "k")]).mean())
    every = one(paths.get_act_patch_direct_path_all_sources, TOKENS, cache, None, scalar, "k", batch_size=6)
    assert every.shape == (3, 3, 3, 3)
    close(every[0, 1], found)
    with pytest.raises(ArgumentError, match="component is"):
        one(paths.get_act_patch_direct_path, TOKENS, cache, None, scalar, 0, 1, "x")
    grouped = subject("llama")
    _, cache = grouped(lens.LensModel.run_with_cache, OTHER)
    assert grouped(paths.get_act_patch_direct_path, TOKENS, cache, None, scalar, 0, 1, "k").shape == (3, 2)
    state_space = subject("mamba")
    with pytest.raises(ArgumentError, match="heads that read"):
        state_space(paths.get_act_patch_direct_path_all_sources, TOKENS, cache, None, scalar)


def test_what_makes_no_sense_is_refused():
    """By name, and the model stays usable."""
    one = subject("gpt2")
    with pytest.raises(ArgumentError, match="no path: L2H0 writes after L1H0"):
        one(paths.path_patch, TOKENS, OTHER, "L2H0", "L1H0", metric)
    with pytest.raises(ArgumentError, match="'L9H0' is none of the senders"):
        one(paths.path_patch, TOKENS, OTHER, "L9H0", "L1H0", metric)
    with pytest.raises(ArgumentError, match="'pattern' is none of the receivers"):
        one(paths.path_patch, TOKENS, OTHER, "L0H0", "pattern", metric)
    with pytest.raises(ArgumentError, match="no senders are given"):
        one(paths.path_patch, TOKENS, OTHER, [], "logits", metric)
    with pytest.raises(ArgumentError, match="one number for each of the 2 rows"):
        one(paths.path_patch, TOKENS, OTHER, "L0H0", "logits", lambda logits: logits.mean())
    with pytest.raises(ArgumentError, match="positions 0 to 4; got 7"):
        one(paths.path_patch, TOKENS, OTHER, "L0H0", "logits", metric, positions=7)
    with pytest.raises(ArgumentError, match=r"\[2, 4\]"):
        one(paths.path_patch, TOKENS, OTHER[:, :4], "L0H0", "logits", metric)
    with pytest.raises(ArgumentError, match="return_type"):
        one(paths.path_patch, TOKENS, OTHER, "L0H0", "logits", metric, return_type="loss")
    with pytest.raises(ArgumentError, match="batch_size"):
        one(paths.path_sweep, TOKENS, OTHER, "logits", metric, batch_size=0)
    assert torch.isfinite(one(paths.path_patch, TOKENS, OTHER, "L0H0", "logits", metric).values).all()


def test_results_say_what_they_hold():
    """Labels, the largest effects, a frame, a picture by layers or by positions."""
    one = subject("gpt2")
    sweep = one(paths.path_sweep, TOKENS, OTHER, ["L2H1.q", "logits"], metric)
    label, position, effect = sweep.top(1)[0]
    mean = sweep.effect[:, 0].mean(-1)
    assert (label, position) == (sweep.senders[int(mean.abs().argmax())], None)
    assert effect == pytest.approx(float(mean[mean.abs().argmax()]))
    frame = sweep.to_dataframe()
    assert len(frame) == len(sweep.senders) * 2
    line = frame[(frame.sender == "L0H1") & (frame.row == 1)].iloc[0]
    assert line.effect == pytest.approx(float(sweep.effect[sweep.senders.index("L0H1"), 0, 1]))
    assert "layer 1" in sweep._repr_html_()
    assert "pos_embed" in sweep._repr_html_()
    assert "Direct effect on L2H1.q, logits" in sweep._repr_html_()
    by_position = one(paths.path_sweep, TOKENS, OTHER, "logits", metric, by_position=True)
    assert by_position.top(1)[0][1] == 4  # the metric looks at the last position, and nothing is between
    assert "L2.mlp" in by_position._repr_html_()


def test_half_precision_runs():
    """In bfloat16, close to float32 on the scale of the effect."""
    model = lens.load("toy:gpt2")
    text, other = "king apple river moon book king apple", "king apple river moon book king moon"
    river = model.to_single_token("river")

    def river_logit(logits):
        return logits[:, -1, river]

    wide = paths.path_sweep(model, text, other, "logits", river_logit)
    half = paths.path_sweep(lens.load("toy:gpt2", dtype="bfloat16"), text, other, "logits", river_logit)
    assert half.values.dtype == torch.float32
    assert (half.values - wide.values).abs().max() < 0.02 * wide.values.abs().max()
