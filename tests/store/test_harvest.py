"""What a harvest stores: the values of rows run by themselves, and where each of them comes from."""

import json

import pytest
import torch
from golden.tiny import tiny_gpt2
from lens_conformance.float64 import true_float64
from store.subject import digests, id_rows, shards, texts, tiny, worded
from torch import nn

import lens_core as lens
from lens_core.errors import ArgumentError, EmptyInputError, StoreError, TokenizerError, UnsupportedHookError

NAMES = {
    "gpt2": ["blocks.0.hook_resid_mid", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"],
    "llama": ["hook_embed", "blocks.1.attn.hook_rot_k", "blocks.0.mlp.hook_post"],
    "mamba": ["blocks.0.mixer.hook_delta", "blocks.1.mixer.hook_conv", "blocks.1.hook_resid_pre"],
    "mamba2": ["blocks.1.mixer.hook_gated", "blocks.0.hook_resid_post", "ln_final.hook_normalized"],
}


def rows_of(shard):
    """Give the real ids of each row of a shard."""
    return [row[row >= 0].long() for row in shard["tokens"]]


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "a document a row"])
@pytest.mark.parametrize("family", NAMES)
def test_values_are_those_of_each_row_run_by_itself(family, pack, tmp_path):
    """In float64, whatever stands beside a row in its batch, on either side of a shard's end."""
    model, names = tiny(family, torch.float64), NAMES[family]
    with true_float64():
        store = lens.store.harvest(
            model, id_rows(), tmp_path, names, context=9, pack=pack, batch_size=3, unit_documents=23, shard_rows=7
        )
        caches = [
            [model.run_with_cache(ids[None], names_filter=names)[1] for ids in rows_of(shard)]
            for shard in shards(store)
        ]
    assert len(store.records) > 5
    for record, shard, rows in zip(store.records, shards(store), caches, strict=True):
        at = 0
        for ids, expected in zip(rows_of(shard), rows, strict=True):
            for name in names:
                found = shard[name][at : at + len(ids)]
                assert found.dtype == torch.float64
                assert torch.allclose(found, expected[name][0], rtol=1e-11, atol=1e-11), name
            at += len(ids)
        assert at == record.entries == int(shard["kept"].sum())


def test_the_model_is_plain_hf(tmp_path):
    """Against hidden states of a fresh HF model."""
    model = worded()
    store = lens.store.harvest(model, texts(), tmp_path, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"])
    (shard,) = shards(store)
    at = 0
    for ids in rows_of(shard):
        states = model.hf_model(ids[None], output_hidden_states=True).hidden_states
        for layer in (0, 1):
            found = shard[f"blocks.{layer}.hook_resid_post"][at : at + len(ids)]
            assert torch.allclose(found, states[layer + 1][0], rtol=1e-4, atol=1e-4)
        at += len(ids)


def test_packed_rows_hold_every_document_once_in_order(tmp_path):
    """EOS between two, BOS before each row; where each token is from can be looked up."""
    model, documents = worded(), texts()
    store = lens.store.harvest(
        model, documents, tmp_path, "hook_embed", context=10, unit_documents=17, prepend_bos=True, shard_rows=4
    )
    bos = eos = model.tokenizer.eos_token_id
    plain = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    found = [[] for _ in documents]
    for record, shard in zip(store.records, shards(store), strict=True):
        for tokens, owners, offsets in zip(shard["tokens"], shard["documents"], shard["offsets"], strict=True):
            real = tokens >= 0
            assert tokens[0] == bos
            assert owners[0] == offsets[0] == -1
            for token, owner, offset in zip(tokens[real], owners[real], offsets[real], strict=True):
                if owner < 0:
                    assert token in (bos, eos)
                    continue
                assert record.unit == int(owner) // 17
                assert len(found[owner]) == int(offset)
                found[owner].append(int(token))
        full = shard["tokens"][: -1 if record.is_last else None]
        assert (full >= 0).all(), "the last row of a unit alone may be short"
    assert found == plain


def test_a_document_a_row_is_what_the_tokenizer_gives(tmp_path):
    """Cut at the context, with the count of what was cut; empty ones have no row."""
    model, documents = worded(), texts()
    store = lens.store.harvest(model, documents, tmp_path, "hook_embed", context=6, pack=False)
    rows = {
        int(shard["documents"][i, 0]): row.tolist() for shard in shards(store) for i, row in enumerate(rows_of(shard))
    }
    expected = {i: model.to_tokens(text)[0].tolist() for i, text in enumerate(documents) if text}
    assert rows == {i: ids[:6] for i, ids in expected.items()}
    assert sum(record.cut for record in store.records) == sum(max(len(ids) - 6, 0) for ids in expected.values()) > 0


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (-1, lambda n: [n - 1]),
        ([0, 2, -2], lambda n: sorted({0, *([2] if n > 2 else []), *([n - 2] if n > 1 else [])})),
        (slice(1, None), lambda n: list(range(1, n))),
        (slice(None, None, 3), lambda n: list(range(0, n, 3))),
    ],
)
def test_chosen_positions_alone_are_kept(positions, expected, tmp_path):
    """Of each row, counted from its own end, padding or none."""
    store = lens.store.harvest(
        tiny("gpt2"), id_rows(), tmp_path, "hook_embed", pack=False, positions=positions, batch_size=4
    )
    for shard in shards(store):
        for ids, kept in zip(rows_of(shard), shard["kept"], strict=True):
            assert kept.nonzero().flatten().tolist() == expected(len(ids))
        assert len(shard["hook_embed"]) == int(shard["kept"].sum())


def test_special_tokens_are_run_and_not_kept(tmp_path):
    """Where asked for; the others see them all the same."""
    model = worded()
    store = lens.store.harvest(
        model, texts(), tmp_path, ("resid_post", 0), context=10, skip_special=True, prepend_bos=True
    )
    (shard,) = shards(store)
    assert not (shard["kept"] & (shard["tokens"] == model.tokenizer.eos_token_id)).any()
    ids = rows_of(shard)[0]
    _, cache = model.run_with_cache(ids[None])
    kept = shard["kept"][0]
    found = shard["blocks.0.hook_resid_post"][: int(kept.sum())]
    assert torch.allclose(found, cache["resid_post", 0][0][kept[: len(ids)]], rtol=1e-4, atol=1e-5)


def test_a_forward_ends_at_the_last_hook_point(tmp_path):
    """Blocks above, the rest of its own block, the final norm and the logits are not computed."""
    model, called = worded(), set()
    for name, module in model.hf_model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    lens.store.harvest(model, texts(), tmp_path, "blocks.1.hook_resid_mid")
    blocks = {name for name in called if name.startswith("transformer.h.")}
    assert {"transformer.h.0", "transformer.h.1.attn"} <= blocks
    assert (
        not {"transformer.h.1.mlp", "transformer.h.1", "transformer.h.2.ln_1", "transformer.ln_f", "lm_head"} & called
    )


def test_logits_are_stored_where_asked_for(tmp_path):
    """They are a hook point like any other."""
    model = worded()
    store = lens.store.harvest(model, texts(), tmp_path, ["hook_logits"])
    (shard,) = shards(store)
    ids = rows_of(shard)[0]
    assert torch.allclose(shard["hook_logits"][: len(ids)], model.hf_model(ids[None]).logits[0], rtol=1e-4, atol=1e-4)


def test_live_edits_are_stored(tmp_path):
    """A harvest in a block of hooks is one of the edited model."""
    model = worded()
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lens.edits.zero())]):
        store = lens.store.harvest(model, texts(), tmp_path, ["resid_post"])
    (shard,) = shards(store)
    assert not shard["blocks.0.hook_resid_post"].any()
    assert shard["blocks.1.hook_resid_post"].any()


def test_dtypes_are_cast_and_what_does_not_fit_is_refused(tmp_path):
    """float16 ends at 65504; nothing becomes infinite in silence."""
    model = worded()
    half = lens.store.harvest(model, texts(), tmp_path / "half", "hook_embed", dtype="bfloat16")
    whole = lens.store.harvest(model, texts(), tmp_path / "whole", "hook_embed")
    assert torch.equal(shards(half)[0]["hook_embed"], shards(whole)[0]["hook_embed"].bfloat16())
    loud = worded()
    with torch.no_grad():
        loud.hf_model.transformer.wte.weight.mul_(1e6)
    with pytest.raises(StoreError, match="beyond the 65504 of float16"):
        lens.store.harvest(loud, texts(), tmp_path / "loud", "hook_embed", dtype=torch.float16)
    assert {path.name for path in (tmp_path / "loud").iterdir()} == {"manifest.json", "lock-0"}


def test_the_manifest_says_what_is_needed_to_use_the_values(tmp_path):
    """Names, equations, shapes, model, weights, passes, versions, rules; nobody's folders."""
    model = lens.load("toy:llama", process="transformerlens")
    lens.store.harvest(model, texts(), tmp_path, ["resid_pre", ("z", 1)])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [point["name"] for point in manifest["points"]] == [
        "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z",
    ]  # fmt: skip
    assert manifest["points"][2]["axes"] == "n_heads d_head"
    assert manifest["points"][2]["equation"] == model.table["blocks.1.attn.hook_z"].equation
    origin = manifest["origin"]
    assert origin["model_type"] == "llama"
    assert "fold_ln" in origin["passes"]
    assert origin["transformers"]
    assert len(origin["weights"]) == 32
    assert str(tmp_path) not in (tmp_path / "manifest.json").read_text()
    record = json.loads(next(tmp_path.glob("00-*.json")).read_text())
    assert record["sha256"] == digests(tmp_path)[f"{record['source']:02d}-000000-0000.safetensors"]


def test_padding_is_no_token_and_moves_no_value(tmp_path):
    """Other batch sizes give the same, up to how matrices are multiplied."""
    model = tiny("llama", torch.float64)
    one, many = (
        shards(
            lens.store.harvest(model, id_rows(), tmp_path / str(size), ("resid_post", 1), pack=False, batch_size=size)
        )
        for size in (1, 16)
    )
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(one, many, strict=True))
    for a, b in zip(one, many, strict=True):
        assert torch.allclose(a["blocks.1.hook_resid_post"], b["blocks.1.hook_resid_post"], rtol=1e-11, atol=1e-11)


def test_mistakes_are_told_before_anything_is_written(tmp_path):
    """And leave no store behind."""
    ids, target = id_rows(), tmp_path / "new"
    model = lens.load(tiny_gpt2(), tokenizer=False)
    wrong = [
        (lambda: lens.store.harvest(model, ids, target, None), ArgumentError, "names are hook points"),
        (lambda: lens.store.harvest(model, ids, target, "pattern"), UnsupportedHookError, "for each position"),
        (lambda: lens.store.harvest(model, [], target, "z"), EmptyInputError, "no documents"),
        (lambda: lens.store.harvest(model, iter(ids), target, "z"), ArgumentError, "from_generator"),
        (lambda: lens.store.harvest(model, texts(), target, "z"), TokenizerError, "no tokenizer"),
        (lambda: lens.store.harvest(model, ids, target, "z", prepend_bos=True), ArgumentError, "for text"),
        (lambda: lens.store.harvest(model, ids, target, "z", context=9999), ArgumentError, "context is 1 to"),
        (lambda: lens.store.harvest(model, ids, target, "z", dtype="int8"), ArgumentError, "dtype is one of"),
        (lambda: lens.store.harvest(model, ids, target, "z", batch_size=0), ArgumentError, "batch_size"),
        (lambda: lens.store.harvest(model, [[1], ["a"]], target, "z"), ArgumentError, "document 1 is not"),
        (lambda: lens.store.harvest(model, tmp_path / "no.jsonl", target, "z"), StoreError, "there is no file"),
        (lambda: lens.store.harvest(model, __file__, target, "z"), ArgumentError, r"documents of a \.py file"),
        (lambda: lens.store.harvest(model.train(), ids, target, "z"), ArgumentError, "training mode"),
    ]
    for call, kind, message in wrong:
        with pytest.raises(kind, match=message):
            call()
        assert not target.exists(), message


def test_ids_beyond_the_vocabulary_name_their_document(tmp_path):
    """Found where the unit is read; nothing of it is stored."""
    rows = [[1, 2, 3]] * 200
    rows[150] = [1, 999]
    rows_seen = []
    with pytest.raises(ArgumentError, match="document 150 has the token id 999"):
        lens.store.harvest(tiny("gpt2"), rows, tmp_path, "hook_embed", report=rows_seen.append, unit_documents=20)
    assert all(int(name.split("-")[1]) < 7 for name in digests(tmp_path))


def test_modules_and_hooks_are_left_alone(tmp_path):
    """Also after a failure in the middle."""
    model = worded()
    before = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.hf_model.named_modules()}

    def fail(progress):
        raise RuntimeError("theirs")

    with pytest.raises(RuntimeError, match="theirs"):
        lens.store.harvest(model, texts(), tmp_path, ["z"], report=fail)
    after = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.hf_model.named_modules()}
    assert before == after
    assert isinstance(model.hf_model, nn.Module)
