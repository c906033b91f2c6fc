"""What a sweep's result makes of its values, and what an interrupted sweep leaves behind."""

import itertools

import numpy
import pytest
import torch
from analysis.patching_subject import CLEAN, CORRUPTED, N_POS, assert_close, difference, subject
from golden.tiny import random_tokens

import lens_core as lens
from lens_core.analysis import _sweep
from lens_core.analysis.patching import PatchingResult, patch_sweep
from lens_core.errors import AnalysisFileError, ArgumentError, MissingPackageError


def made(values, baseline, **changed):
    """Make a result of two layers and three positions by hand."""
    described = {
        "axes": ("layer", "position"),
        "indices": ((0, 2), (0, 1, 4)),
        "labels": (("0", "2"), ("a", "b", "c")),
        "name": "hook_resid_pre",
    }
    return PatchingResult(values=values, baseline=baseline, **{**described, **changed})


ROWS = 6
VALUES = torch.randn(2, 3, ROWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BASELINE = torch.arange(ROWS, dtype=torch.float64) / 10


def test_mean_effect_and_its_standard_error():
    """By hand, in numpy."""
    result = made(VALUES, BASELINE)
    effect = VALUES.numpy() - BASELINE.numpy()
    assert numpy.allclose(result.effect, effect)
    assert numpy.allclose(result.mean, VALUES.numpy().mean(-1))
    assert numpy.allclose(result.stderr, effect.std(-1, ddof=1) / numpy.sqrt(ROWS))


def test_normalised_from_corrupted_to_clean():
    """0 is nothing restored, 1 all."""
    clean = BASELINE + 2.0
    result = made(torch.stack([BASELINE, clean, clean + 2.0]).expand(2, 3, ROWS), BASELINE)
    for given in (clean, clean.tolist()):
        share = result.normalized(given)
        torch.testing.assert_close(share[0].mean(-1), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    uneven = BASELINE + torch.tensor([1.0, 2.0, 4.0, 1.0, 2.0, 4.0])
    result = made((BASELINE + 1.0).expand(2, 3, ROWS), BASELINE)
    torch.testing.assert_close(result.normalized(uneven, by_row=True)[0, 0], 1 / (uneven - BASELINE))
    with pytest.raises(ArgumentError, match="nothing to restore"):
        result.normalized(BASELINE)
    with pytest.raises(ArgumentError, match="each of the 6 rows"):
        result.normalized([1.0, 2.0])


def test_a_permutation_test_by_all_signs():
    """With six rows all 64 ways are tried; counted here one by one."""
    result = made(VALUES, BASELINE)
    effect = result.effect.reshape(6, ROWS)
    means = torch.stack(
        [(effect * torch.tensor(signs)).mean(-1) for signs in itertools.product([1.0, -1.0], repeat=ROWS)]
    )
    observed = effect.mean(-1)
    greater = (means >= observed - 1e-12).double().mean(0)
    less = (means <= observed + 1e-12).double().mean(0)
    found = result.permutation_pvalue()
    torch.testing.assert_close(found.flatten(), (2 * torch.minimum(greater, less)).clamp(max=1.0))
    torch.testing.assert_close(result.permutation_pvalue("greater").flatten(), greater)


def test_a_bootstrap_interval_is_that_of_redrawn_rows():
    """Against percentiles of means drawn here; many rows, so that both are near the normal one."""
    rows = 400
    draws = torch.Generator().manual_seed(1)
    values = torch.randn(2, 3, rows, generator=draws, dtype=torch.float64) + torch.arange(6.0).reshape(2, 3, 1)
    result = made(values, torch.zeros(rows, dtype=torch.float64))
    low, high = result.bootstrap_ci(0.9, n_resamples=4000)
    index = torch.randint(0, rows, (4000, rows), generator=draws)
    means = values.reshape(6, rows)[:, index].mean(-1)
    expected = torch.quantile(means, torch.tensor([0.05, 0.95], dtype=torch.float64), dim=1)
    torch.testing.assert_close(torch.stack([low.flatten(), high.flatten()]), expected, atol=0.01, rtol=0)
    again = result.bootstrap_ci(0.9, n_resamples=4000)
    assert torch.equal(again[0], low)
    with pytest.raises(ArgumentError, match="between 0 and 1; got 95"):
        result.bootstrap_ci(95)


def test_statistics_need_rows():
    """One prompt has no spread."""
    result = made(VALUES[..., :1], BASELINE[:1])
    assert result.stderr.isnan().all()
    for statistic in (result.bootstrap_ci, result.permutation_pvalue):
        with pytest.raises(ArgumentError, match="is over rows, and there is 1"):
            statistic()


def test_without_its_packages_a_result_says_what_to_install(monkeypatch):
    """Tensors and pictures need none."""
    import sys

    result = made(VALUES, BASELINE)
    for module in ("pandas", "scipy", "scipy.stats"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match="analysis"):
        result.to_dataframe()
    with pytest.raises(MissingPackageError, match="analysis"):
        result.permutation_pvalue()
    assert result.mean.shape == (2, 3)


def test_a_data_frame_has_a_line_for_each_cell_and_row():
    """With the model's own numbers."""
    result = made(VALUES, BASELINE)
    frame = result.to_dataframe()
    assert list(frame.columns) == ["layer", "position", "row", "value", "baseline", "effect"]
    assert len(frame) == 2 * 3 * ROWS
    line = frame[(frame.layer == 2) & (frame.position == 4) & (frame.row == 5)].iloc[0]
    assert line.value == VALUES[1, 2, 5].item()
    assert line.effect == pytest.approx(VALUES[1, 2, 5].item() - 0.5)


def test_the_strongest_cells():
    """By size, or from either end; cells without a value are not among them."""
    effect = torch.tensor([[0.5, -3.0, 1.0], [torch.nan, 2.0, 0.0]])[..., None]
    result = made(effect, torch.zeros(1))
    assert [(cell["layer"], cell["position"]) for cell in result.top(3)] == [(0, 1), (2, 1), (0, 4)]
    assert result.top(1, by="highest") == [{"layer": 2, "position": 1, "effect": 2.0, "value": 2.0}]
    assert result.top(1, by="lowest")[0]["effect"] == -3.0
    assert len(result.top(100)) == 5
    with pytest.raises(ArgumentError, match="1 or more; got 0"):
        result.top(0)
    with pytest.raises(ArgumentError, match="by is"):
        result.top(1, by="size")


def test_the_heat_map_names_layers_and_tokens():
    """And shows as many cells as there are."""
    html = made(VALUES, BASELINE)._repr_html_()
    assert "layer 2" in html
    assert html.count("<td class=") == 6
    three = made(VALUES.expand(4, 2, 3, ROWS), BASELINE, axes=("layer", "head", "position"))
    three = PatchingResult(
        values=VALUES.expand(4, 2, 3, ROWS),
        baseline=BASELINE,
        axes=("layer", "head", "position"),
        indices=(tuple(range(4)), (0, 1), (0, 1, 2)),
        labels=(tuple("0123"), ("0", "1"), ("x", "y", "z")),
        name="attn.hook_z",
    )
    assert "layer 3 head 1" in three._repr_html_()
    one = made(VALUES[0], BASELINE, axes=("position",), indices=((0, 1, 4),), labels=(("a", "b", "c"),))
    assert one._repr_html_().count("<td class=") == 3


def test_positions_are_called_by_their_tokens():
    """Where all rows have the same."""
    model = lens.load("toy:gpt2")
    _, clean = model.run_with_cache(["king apple river", "king moon river"], names_filter="resid_pre")
    result = patch_sweep(model, ["king apple door", "king moon door"], clean, lambda logits: logits[:, -1, 5])
    first = model.to_str_tokens("king apple door")
    assert result.labels[1] == tuple(word if at != first.index(" apple") else str(at) for at, word in enumerate(first))


# ---------------------------------------------------------------------- resuming


@pytest.fixture
def sweep(monkeypatch):
    """Give a sweep that is written often, and the number of runs of its metric."""
    monkeypatch.setattr(_sweep, "SAVES_EVERY", 3)
    model = subject("gpt2")
    _, clean = model.run_with_cache(CLEAN, names_filter=["resid_pre", "mlp_out"])
    calls = []

    def run(path=None, *, stop=None, corrupted=CORRUPTED, name="resid_pre", model=model, clean=clean, **options):
        def metric(logits):
            calls.append(1)
            if stop is not None and len(calls) > stop:
                raise KeyboardInterrupt
            return difference(logits)

        calls.clear()
        return patch_sweep(model, corrupted, clean, metric, name, resume=path, batch_size=2, **options)

    return run, calls


def test_an_interrupted_sweep_goes_on(sweep, tmp_path):
    """What was done is not done again; the values are those of a sweep in one go."""
    run, calls = sweep
    whole = run()
    path = tmp_path / "sweep.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(path, stop=10)
    assert path.exists()
    again = run(path)
    assert again.n_run == len(calls) - 1 < whole.n_run - 3
    assert_close(again.values, whole.values)
    assert run(path).n_run == 0
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.safetensors"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "mlp_out"}, "its hook points is"),
        ({"corrupted": random_tokens(2, N_POS, seed=9)}, "its input is"),
        ({"layers": [0, 1]}, "another sweep"),
        ({"positions": -1}, "its positions is"),
        ({"exact": True}, "its exact is"),
    ],
)
def test_the_file_of_another_sweep_is_refused(sweep, tmp_path, changed, message):
    """Which difference, stands in the message; the file stays."""
    run, _ = sweep
    path = tmp_path / "sweep.safetensors"
    run(path)
    before = path.read_bytes()
    with pytest.raises(AnalysisFileError, match=message):
        run(path, **changed)
    assert path.read_bytes() == before


def test_a_file_of_other_weights_or_of_something_else_is_refused(sweep, tmp_path):
    """The unpatched run tells."""
    run, _ = sweep
    path = tmp_path / "sweep.safetensors"
    run(path)
    other = subject("gpt2", seed=1)
    _, clean = other.run_with_cache(CLEAN, names_filter="resid_pre")
    with pytest.raises(AnalysisFileError, match="clean values|unpatched run"):
        run(path, model=other, clean=clean)
    path.write_bytes(b"nothing of ours")
    with pytest.raises(AnalysisFileError):
        run(path)
    with pytest.raises(AnalysisFileError, match="is a folder"):
        run(tmp_path)


def test_progress_is_shown_where_it_is_wanted(sweep, capsys):
    """On the error stream, and not by default in a test."""
    run, _ = sweep
    run()
    assert capsys.readouterr().err == ""
    run(progress=True)
    assert capsys.readouterr().out == ""
