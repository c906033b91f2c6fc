"""The graph of writers and readers: a reader's input is the sum of what was written before it, in every family."""

import pytest
import torch
from analysis.attribution_subject import shared
from golden.tiny import random_tokens, tiny_gpt2
from golden.tiny_llama import tiny_llama
from golden.tiny_ssm import tiny_ssm
from lens_conformance.float64 import true_float64
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import lens_core as lens
from lens_core.analysis.graph import contributions, graph, reader_input
from lens_core.errors import ArgumentError, CacheError, UnsupportedHookError
from lens_core.hook_points import HookTable

TOKENS = random_tokens(2, 6, vocab=24)
LLAMAS = ("llama-biases", "gemma3_text", "granite", "stablelm-parallel")
HYBRIDS = ("jamba", "nemotron_h", "falcon_h1")
OTHERS = ("gpt2", "mamba", "mamba2")


@pytest.fixture(scope="module", params=[*OTHERS, *LLAMAS, *HYBRIDS])
def float64_model(request):
    """Give a tiny model in float64."""
    return shared(request.param)


@pytest.mark.parametrize(("heads", "per_query_head"), [(True, True), (True, False), (False, False)])
def test_a_readers_input_is_the_sum_of_what_was_written_before_it(float64_model, heads, per_query_head):
    """In float64, for every reader of every block, behind factors and post-norms, in parallel blocks and hybrids."""
    found = graph(float64_model, heads, per_query_head=per_query_head)
    with true_float64(), torch.no_grad():
        _, cache = float64_model.run_with_cache(TOKENS, names_filter=[*found.writer_names, *found.reader_names])
        parts = dict(zip(found.writers, contributions(cache, found.writers), strict=True))
        if found.constants:
            parts |= dict(zip(found.constants, contributions(cache, found.constants), strict=True))
    for reader in found.readers:
        expected = reader_input(cache, reader)
        total = sum(parts[node] for node in found.before(reader, constants=True))
        torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9, msg=reader.label)


def nudged(node, n_heads):
    """Give a hook that changes what one writer computes, and nothing else."""

    def change(value, hook):
        new = value.clone()
        if node.head is None:
            new += torch.randn_like(new)
        elif node.hook.endswith("hook_gated"):
            new.unflatten(-1, (n_heads, -1))[..., node.head, :] += 1.0
        else:
            new[:, :, node.head] += torch.randn_like(new[:, :, node.head])
        return new

    return (node.hook, change)


@torch.no_grad()
def test_edges_are_where_a_change_of_the_writer_reaches_the_reader(float64_model):
    """Changed one by one in runs of the model: all readers with an edge from it hear of it, and no other does."""
    found = graph(float64_model)
    n_heads = float64_model.cfg.ssm_heads or float64_model.cfg.n_heads
    torch.manual_seed(0)
    with true_float64():
        _, plain = float64_model.run_with_cache(TOKENS, names_filter=found.reader_names)
        for writer in found.writers:
            with float64_model.hooks([nudged(writer, n_heads)]):
                _, cache = float64_model.run_with_cache(TOKENS, names_filter=found.reader_names)
            heard = {
                reader.label
                for reader in found.readers
                if not torch.equal(reader_input(cache, reader), reader_input(plain, reader))
            }
            assert heard == {reader.label for reader in found.after(writer)}, writer.label


def test_gpt2_smalls_graph_is_the_one_of_the_papers():
    """158 components and 32,491 edges: 144 heads, 12 MLPs, the embeddings and the logits (Conmy et al. 2023)."""
    small = lens.load(GPT2LMHeadModel(GPT2Config(n_embd=24, n_head=12, n_layer=12, vocab_size=30, n_positions=8)))
    found = graph(small, merge_embeddings=True)
    assert (len(found.components), len(found), len(found.edges)) == (158, 32491, 32491)
    assert len(graph(small)) == 32491 + len(found.readers)  # positions are a writer more, which all read
    assert found.mask.sum() == 32491
    cells = found.mask.T.nonzero().tolist()
    assert [(found.readers[r], found.writers[w]) for r, w in cells] == [(e.target, e.source) for e in found.edges]


def test_a_parallel_block_reads_the_stream_once():
    """In GPT-NeoX' form the MLP does not read its own block's attention; in the sequential form it does."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 29}
    for parallel in (True, False):
        config = AutoConfig.for_model("stablelm", **sizes, use_parallel_residual=parallel, intermediate_size=20)
        found = graph(lens.load(AutoModelForCausalLM.from_config(config)))
        own = ["L1H0", "L1H1"]
        earlier = ["embed", "L0H0", "L0H1", "L0.mlp"]
        assert [node.label for node in found.before("L1.mlp")] == earlier + ([] if parallel else own)
        assert [node.label for node in found.before("logits")] == [*earlier, *own, "L1.mlp"]


def test_grouped_heads_read_together_or_apart():
    """Two key-value heads of four queries each read once, unless each query head is to have its own edge."""
    model = lens.load(tiny_llama())
    found = graph(model)
    keys = [reader for reader in found.readers if reader.part == "k" and reader.layer == 1]
    assert [reader.label for reader in keys] == ["L1KV0.k", "L1KV1.k"]
    assert [reader.component for reader in keys] == ["L1KV0", "L1KV1"]
    apart = graph(model, per_query_head=True).reader("L1H3.k")
    assert (apart.hook, apart.head) == ("blocks.1.hook_k_input_rep", 3)
    whole = graph(model, heads=False)
    assert [node.label for node in whole.writers[:3]] == ["embed", "L0.attn", "L0.mlp"]
    assert whole.constants == ()
    assert whole.reader("L1.attn.k").head is None


def test_a_mixers_heads_write_where_it_has_heads():
    """Mamba-2's do; a channel of Mamba is no node."""
    dual = graph(lens.load(tiny_ssm("mamba2")))
    assert [node.label for node in dual.writers[1:7]] == [f"L0H{head}" for head in range(6)]
    assert [node.label for node in dual.readers] == ["L0.mixer", "L1.mixer", "L2.mixer", "logits"]
    selective = graph(lens.load(tiny_ssm("mamba")))
    assert [node.label for node in selective.writers] == ["embed", "L0.mixer", "L1.mixer", "L2.mixer"]
    assert len(selective) == 1 + 2 + 3 + 4


def test_an_edited_result_is_what_the_head_contributes():
    """Where `hook_result` is in the cache, edits of it count; z alone does not know of them."""
    model = lens.load(tiny_gpt2())
    found = graph(model)
    entry = ("blocks.1.attn.hook_result", lens.edits.zero(heads=[2]))
    with model.hooks([entry]):
        _, cache = model.run_with_cache(TOKENS, names_filter=[*found.writer_names, "result"])
    writers = [found.writer("L1H1"), found.writer("L1H2"), found.writer("L2H0")]
    parts = contributions(cache, writers)
    assert not parts[1].any()
    torch.testing.assert_close(parts[0], cache["result", 1][:, :, 1])
    torch.testing.assert_close(parts[2], cache["result", 2][:, :, 0])


def test_a_cache_of_some_positions_or_without_batch_gives_the_same_rows():
    """And contributions on the graph have gradients."""
    model = lens.load(tiny_gpt2())
    found = graph(model)
    _, cache = model.run_with_cache(TOKENS[:1], names_filter=found.writer_names)
    nodes = [*found.writers, *found.constants]
    whole = contributions(cache, nodes)
    torch.testing.assert_close(contributions(cache.slice_pos([1, 4]), nodes), whole[:, :, [1, 4]])
    torch.testing.assert_close(contributions(cache.remove_batch_dim(), nodes), whole[:, 0])
    with model.caching(found.writer_names, detach=False) as kept:
        model(TOKENS[:1])
    assert contributions(kept, found.writers).requires_grad
    assert not whole.requires_grad


def test_half_precision_is_contributed_in_single():
    """Sums over a hundred writers would drown in bfloat16."""
    model = lens.load(tiny_gpt2(dtype=torch.bfloat16))
    found = graph(model)
    _, cache = model.run_with_cache(TOKENS, names_filter=found.writer_names)
    assert contributions(cache, found.writers).dtype == torch.float32


def test_mistakes_are_named():
    """Labels, roles, and what a cache lacks."""
    model = lens.load(tiny_gpt2())
    found = graph(model)
    with pytest.raises(ArgumentError, match=r"no writer 'L0H7'; did you mean L0H"):
        found.writer("L0H7")
    with pytest.raises(ArgumentError, match=r"no reader 'L1H0'; did you mean L1H0\."):
        found.edge("embed -> L1H0")
    with pytest.raises(ArgumentError, match=r"'L1H0 -> L0H0.q' is no edge: L1H0 is not written before L0H0.q reads"):
        found.edge("L1H0 -> L0H0.q")
    _, cache = model.run_with_cache(TOKENS, names_filter="resid_post")
    with pytest.raises(CacheError, match=r"'hook_embed'.*names_filter"):
        contributions(cache, found.writers)
    with pytest.raises(CacheError, match=r"'blocks.1.hook_q_input'.*names_filter"):
        reader_input(cache, found.reader("L1H0.q"))
    with pytest.raises(ArgumentError, match=r"L0H0.q reads, and contributes nothing"):
        contributions(cache, found.readers)
    with pytest.raises(ArgumentError, match="no nodes"):
        contributions(cache, [])
    with pytest.raises(ArgumentError, match="embed is a writer"):
        reader_input(cache, found.writers[0])


def test_a_branch_whose_input_has_no_name_is_refused():
    """Rather than left without edges."""
    model = lens.load(tiny_gpt2())
    without = [point for point in model.hook_points() if point.name != "blocks.1.hook_mlp_in"]
    model._table = HookTable(without)
    with pytest.raises(UnsupportedHookError, match=r"'blocks.1.hook_mlp_out' writes.*hook_mlp_in"):
        graph(model)
