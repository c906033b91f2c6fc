"""`lens cache` and `lens view`: a file of activations, and the page of one."""

import json
import re
from html import unescape
from pathlib import Path

import pytest
import torch

import lens_core as lens

from .conftest import TEXT


def text_of(path: str) -> str:
    """Return a page's text, without its tags, style and script."""
    body = re.sub(r"<(style|script)\b.*?</\1>", "", Path(path).read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def data_of(path: str) -> dict:
    """Return what the attention picture of a page is drawn from."""
    (block,) = re.findall(r'<script type="application/json">(.*?)</script>', Path(path).read_text())
    return json.loads(block)


def test_the_file_holds_what_a_run_gives(run, tiny):
    """Bit for bit, under the names that were asked for, and the tokens beside them."""
    done = run("cache", tiny, "--text", TEXT, "--names", "*hook_pattern", "--names", "z", "--out", "acts.safetensors")
    assert done.code == 0
    assert done.err == ""
    assert done.out == "7 entries, 0.0 MiB, of 10 tokens\nacts.safetensors\n"
    saved = lens.ActivationCache.load("acts.safetensors")
    model = lens.load(tiny)
    _, cache = model.run_with_cache(TEXT, names_filter=["pattern", "z", "hook_tokens"])
    assert list(saved) == list(cache)
    for name in cache:
        torch.testing.assert_close(saved[name], cache[name], rtol=0, atol=0)


def test_without_names_the_default_ones_are_kept(run, tiny):
    """Those without a star."""
    run("cache", tiny, "--text", TEXT, "--out", "acts.safetensors")
    default = [point.name for point in lens.load(tiny).hook_points() if point.default]
    assert list(lens.ActivationCache.load("acts.safetensors")) == default


@pytest.mark.filterwarnings("default::lens_core.errors.CostWarning")
def test_starred_names_warn_of_their_cost_in_one_line(run, tiny):
    """The warning of the library, as the command line says it."""
    done = run("cache", tiny, "--text", TEXT, "--names", "*hook_result", "--out", "acts.safetensors")
    assert done.code == 0
    assert done.err.startswith("lens: warning: ")
    assert done.err.count("\n") == 1


def test_the_options_reach_the_run(run, tiny):
    """A file as the text, its last newline aside; dtype, device and BOS."""
    Path("text.txt").write_text(f"{TEXT}\n")
    options = ["--dtype", "float64", "--device", "cpu", "--prepend-bos"]
    run("cache", tiny, "--file", "text.txt", "--names", "hook_embed", *options, "--out", "acts.safetensors")
    saved = lens.ActivationCache.load("acts.safetensors")
    assert saved["hook_embed"].dtype == torch.float64
    assert saved["hook_tokens"].tolist() == [[28, *([1, 2, 3, 4, 5] * 2)]]
    run("cache", tiny, "--text", "w1", "--no-prepend-bos", "--names", "hook_embed", "--out", "acts.safetensors")
    assert lens.ActivationCache.load("acts.safetensors")["hook_tokens"].tolist() == [[1]]


def test_the_page_shows_patterns_norms_and_entries(run, activations):
    """One file beside the other, which says nothing of a network."""
    done = run("view", activations)
    page = activations.with_suffix(".html")
    assert (done.code, done.out, done.err) == (0, f"{page}\n", "")
    source, text = page.read_text(), text_of(page)
    assert not re.search(r"https?:|\bsrc\s*=", source)
    saved = lens.ActivationCache.load(activations)
    data = data_of(page)
    assert [head["label"] for head in data["heads"]] == [f"L{layer}H{head}" for layer in range(3) for head in range(3)]
    shown = data["heads"][4]["rows"][9][3] * data["unit"]
    assert shown == pytest.approx(saved["pattern", 1][0, 1, 9, 3].item(), abs=1e-4)
    (norm,) = re.findall(r'title="L2 resid_post, \u20683\u2069 \(7\): ([\d.]+)"', source)
    assert float(norm) == pytest.approx(saved["resid_post", 2][0, 7].norm().item(), abs=0.01)
    for name in saved:
        assert name in text
    assert "blocks.0.attn.hook_z batch pos n_heads d_head 1 × 10 × 3 × 7 float32" in text
    assert "The file was written with lens-gpt2" in text


def test_what_leaves_a_block_is_not_drawn_again_as_what_enters_the_next(run, activations):
    """One row for each distinct place."""
    run("view", activations)
    source = activations.with_suffix(".html").read_text()
    rows = re.findall(r'<th scope="row">(L\d resid_\w+)</th>', source)
    assert rows == ["L0 resid_pre", *(f"L{layer} resid_{part}" for layer in range(3) for part in ("mid", "post"))]


def test_tokens_are_text_where_the_tokenizer_is_named(run, activations, tiny):
    """And ids where it is not."""
    run("view", activations, "--out", "ids.html")
    assert data_of("ids.html")["tokens"] == ["1", "2", "3", "4", "5"] * 2
    run("view", activations, "--out", "words.html", "--model", tiny)
    assert [token.strip("·") for token in data_of("words.html")["tokens"]] == TEXT.split()


def test_a_toys_tokens_are_text_at_once(run):
    """Its tokenizer is at hand, so nobody has to name it."""
    run("cache", "toy:gpt2", "--text", "The cat sat", "--out", "acts.safetensors")
    run("view", "acts.safetensors")
    assert [token.strip("·") for token in data_of("acts.html")["tokens"][1:]] == ["the", "cat", "sat"]
    assert "toy:gpt2 ·" in text_of("acts.html")


def test_names_choose_the_entries(run, activations):
    """By glob or short form; the rest is left out."""
    run("view", activations, "--names", "*.2.*pattern", "--names", "z", "--out", "some.html")
    text = text_of("some.html")
    assert f"4 of {len(lens.ActivationCache.load(activations))} entries" in text
    assert [head["label"] for head in data_of("some.html")["heads"]] == ["L2H0", "L2H1", "L2H2"]
    assert "hook_resid_post" not in text
    done = run("view", activations, "--names", "*nothing*")
    assert done.code == 2
    assert "--names '*nothing*' matches none of the" in done.err


def test_a_file_without_tokens_or_patterns_has_a_page_too(run, tiny):
    """Positions stand for the tokens."""
    _, cache = lens.load(tiny).run_with_cache(TEXT, names_filter="resid_post")
    cache.save("acts.safetensors")
    assert run("view", "acts.safetensors").code == 0
    text = text_of("acts.html")
    assert "Norms of the residual stream" in text
    assert "Attention patterns" not in text
    assert "(9): " in Path("acts.html").read_text()


def test_a_row_of_a_batch_is_shown_by_its_number(run, tiny):
    """The first if none is named; a row that is not there is refused."""
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    _, cache = lens.load(tiny).run_with_cache(tokens)
    cache.save("acts.safetensors")
    run("view", "acts.safetensors", "--row", "1")
    assert data_of("acts.html")["tokens"] == ["4", "5", "6"]
    assert "row 1 of 2" in text_of("acts.html")
    done = run("view", "acts.safetensors", "--row", "2")
    assert (done.code, done.err) == (2, "lens: --row 2 is not there: 'hook_tokens' has 2 (0 to 1)\n")


def test_a_cache_without_a_batch_axis_is_shown(run, tiny):
    """As `remove_batch_dim` leaves it."""
    _, cache = lens.load(tiny).run_with_cache(TEXT, remove_batch_dim=True)
    cache.save("acts.safetensors")
    assert run("view", "acts.safetensors").code == 0
    assert data_of("acts.html")["tokens"] == ["1", "2", "3", "4", "5"] * 2


def test_values_that_are_not_finite_are_no_values(run, tiny):
    """A run that went wrong is what one wants to look at."""
    _, cache = lens.load(tiny).run_with_cache(TEXT, names_filter="resid_post")
    cache["resid_post", 1][0, 3] = float("nan")
    cache.save("acts.safetensors")
    assert run("view", "acts.safetensors").code == 0
    assert "L1 resid_post, \u20683\u2069 (3): no value" in Path("acts.html").read_text()


def test_patterns_that_have_no_room_are_counted(run, activations, monkeypatch):
    """And can be named."""
    monkeypatch.setattr("lens_core._commands._view._PICTURED", 400)
    run("view", activations, "--out", "x.html")
    assert [head["label"] for head in data_of("x.html")["heads"]] == ["L0H0", "L0H1", "L0H2"]
    assert "Drawn are 1 of 3 layers; choose others by --names." in text_of("x.html")


def test_patterns_of_some_positions_are_not_drawn(run, tiny):
    """They are not square; the page says so, and shows the rest."""
    _, cache = lens.load(tiny).run_with_cache(TEXT, names_filter=["pattern", "resid_post"], pos_slice=slice(2, 5))
    cache.save("acts.safetensors")
    assert run("view", "acts.safetensors").code == 0
    assert "Not drawn, as they hold some of the positions only: 3 of 3 patterns." in text_of("acts.html")
    assert "Norms of the residual stream" in text_of("acts.html")
