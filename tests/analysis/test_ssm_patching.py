"""State patching against golden forwards in which the state is replaced by another golden run's."""

import pytest
import torch
from analysis.ssm_subject import TOKENS, Subject
from golden.tiny_ssm import KINDS
from lens_conformance.float64 import true_float64
from transformers import DynamicCache

from lens_core.analysis.ssm_patching import patch_state, sweep_states
from lens_core.errors import ArgumentError, CacheError

OTHER = (TOKENS + torch.tensor([0, 0, 3, 0, 5, 0, 0, 0])) % 28
STATE = "blocks.{}.mixer.hook_ssm_state"


@pytest.fixture(scope="module", params=KINDS)
def subject(request):
    """Give a tiny model of each kind."""
    return Subject(request.param)


@pytest.fixture(scope="module")
def other(subject):
    """Give the golden states of the other text."""
    _, values = subject.golden(tokens=OTHER)
    return {name: value.detach() for name, value in values.items() if name.endswith("hook_ssm_state")}


@pytest.fixture(scope="module")
def source(subject):
    """Give lens' cache of the other text."""
    return subject.run(OTHER, names_filter="ssm_state")[1]


def golden_patch(subject, other, layer, positions, heads=slice(None)):
    """Give the golden logits with the states replaced at the positions."""
    name = STATE.format(layer)

    def edit(state, hook):
        t = int(hook.positions[0])
        if t in positions:
            state[:, 0, heads] = other[name][:, t, heads]

    return subject.golden({name: edit})[0].detach()


def close(found, expected):
    """Compare logits, float64."""
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_a_patched_state_is_what_the_next_position_starts_from(subject, other, source):
    """At one position, and at several."""
    for positions in ([4], [2, 5]):
        expected = golden_patch(subject, other, 1, positions)
        found = subject.hooked(patch_state(subject.model, source, positions, layers=1))
        close(found, expected)
        assert (found[:, -1] - subject.logits[:, -1]).abs().max() > 1e-6


def test_some_heads_and_a_tensor_as_source(subject, other):
    """One layer's states `[batch, pos, ...]`; the rest stays."""
    expected = golden_patch(subject, other, 1, [4], heads=[0, 3])
    close(subject.hooked(patch_state(subject.model, other[STATE.format(1)], 4, layers=1, heads=[0, 3])), expected)
    one = other[STATE.format(1)][:, 4:5]  # one state, for whatever position it is put at
    close(subject.hooked(patch_state(subject.model, one, 4, layers=1)), golden_patch(subject, other, 1, [4]))


def test_all_layers_at_once(subject, source):
    """All states after the last position and the convolution's window are the past: the next tokens see the other."""
    found = subject.hooked(patch_state(subject.model, source, 4))
    assert (found - subject.logits).abs().max() > 1e-6


def test_a_sweep_is_a_table_of_single_patches(subject, other, source):
    """Each cell by a golden run of its own, row by row of the batch."""

    def metric(logits):
        return logits[:, -1, 3] - logits[:, -1, 5]

    with true_float64():
        table = sweep_states(subject.model, TOKENS, source, metric, layers=[0, 2], positions=[1, 4, -1])
    assert (table.layers, table.positions) == ((0, 2), (1, 4, 7))
    assert table.values.shape == (2, 3, 2)
    close(table.baseline, metric(subject.logits.detach()))
    for i, layer in enumerate(table.layers):
        for j, position in enumerate(table.positions):
            close(table.values[i, j], metric(golden_patch(subject, other, layer, [position])))
    assert table.effect[:, 0].abs().max() < 1e-12  # both texts begin alike
    assert table.effect[:, 1].abs().min() > 0


def test_a_patch_in_the_prompt_holds_while_decoding(subject, source):
    """The state that generation goes on from is the patched one."""
    model, entries = subject.model, patch_state(subject.model, source, 4, layers=1)
    with true_float64(), model.hooks(fwd_hooks=entries), model.caching("hook_logits") as cache:
        tokens = model.generate(TOKENS, max_new_tokens=3, do_sample=False, return_type="tokens", verbose=False)
    whole = subject.hooked(entries, tokens[:, :-1])
    torch.testing.assert_close(cache["hook_logits"], whole, rtol=1e-7, atol=1e-8)


def test_mistakes_are_named(subject, source, other):
    """Sources that do not hold the states, and metrics that are not one number a row."""
    model = subject.model
    with pytest.raises(CacheError, match="'blocks.0.mixer.hook_ssm_state'.*names_filter='ssm_state'"):
        patch_state(model, subject.run(names_filter="delta")[1], 2)
    with pytest.raises(ArgumentError, match="holds one layer's states"):
        patch_state(model, other[STATE.format(0)], 2)
    with pytest.raises(ArgumentError, match=r"each of the 2 rows; got \[\]"):
        sweep_states(model, TOKENS, source, lambda logits: logits.sum())
    with pytest.raises(ArgumentError, match="has positions 0 to 7; got 9"):
        sweep_states(model, TOKENS, source, lambda logits: logits[:, -1, 0], positions=9)


def test_a_sweep_goes_on_from_a_state(subject, source):
    """Columns are positions of the whole sequence; each cell is the patched run that goes on from the state."""
    model, entries = subject.model, [patch_state(subject.model, source, 7, layers=layer) for layer in (0, 1)]

    def metric(logits):
        return logits[:, -1, 3] - logits[:, -1, 5]

    with true_float64(), torch.no_grad():
        _, state = model(TOKENS[:, :7], return_state=True)
        table = sweep_states(model, TOKENS[:, 7:], source, metric, layers=[0, 1], past_key_values=state)
        cells = [
            metric(model.run_with_hooks(TOKENS[:, 7:], fwd_hooks=one, past_key_values=state.fork())) for one in entries
        ]
    assert table.positions == (7,)
    close(table.values[:, 0], torch.stack(cells))
    assert table.effect.abs().min() > 0


def test_what_a_sweep_cannot_hand_to_the_metric_is_refused(subject, source):
    """Outputs that are not logits, and a cache that every cell would extend."""

    def metric(logits):
        return logits[:, -1, 0]

    for option in ({"return_state": True}, {"return_type": "loss"}):
        with pytest.raises(ArgumentError, match="hands the logits to the metric"):
            sweep_states(subject.model, TOKENS, source, metric, **option)
    with pytest.raises(ArgumentError, match="would extend this DynamicCache"):
        sweep_states(subject.model, TOKENS, source, metric, past_key_values=DynamicCache(config=subject.hf.config))
    with pytest.raises(ArgumentError, match="no layer is named"):
        sweep_states(subject.model, TOKENS, source, metric, layers=[])
