"""`lens store`: what a store holds, whether it is whole, and several made one."""

import json

import pytest

import lens_core as lens


@pytest.fixture
def stores(run, tiny):
    """Harvest two stores into the working folder."""
    model = lens.load(tiny)
    for name, rows in (("a", [[1, 2, 3, 4], [5, 6]]), ("b", [[7, 8, 9]])):
        lens.store.harvest(model, rows, name, ["resid_post", ("z", 1)], pack=False, unit_documents=2)
    return ["a", "b"]


def test_info_says_what_a_store_holds(run, stores):
    """As a table, or as JSON."""
    done = run("store", "info", "a")
    assert (done.code, done.err) == (0, "")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "blocks.1.attn.hook_z n_heads d_head 3 × 7 float32" in lines
    assert "entries 6, of 6 tokens in 2 rows" in lines
    assert "units 1, complete" in lines
    assert "source 0 list, 2 documents" in lines
    found = json.loads(run("store", "info", "a", "--json").out)
    assert (found["entries"], found["is_complete"], found["missing"]) == (6, True, [])
    assert [point["name"] for point in found["manifest"]["points"]] == list(lens.store.ActivationStore("a").names)


def test_verify_names_what_is_wrong(run, stores):
    """With exit code 1; --repair takes it out."""
    done = run("store", "verify", "a")
    assert (done.code, done.err) == (0, "")
    assert done.out == "every shard is what it was when it was written, and none is missing\n"
    with open("a/00-000000-0000.safetensors", "r+b") as file:  # noqa: PTH123
        file.seek(-1, 2)
        file.write(b"\x77")
    done = run("store", "verify", "a")
    assert done.code == 1
    damaged, missing, todo = done.out.splitlines()
    assert damaged.startswith("damaged: 00-000000-0000.safetensors: its SHA-256 is")
    assert missing == "missing: 00-000000: documents 0 to 1 of 'list' are not all in it"
    assert "--repair" in todo
    assert run("store", "verify", "a", "--repair").code == 1
    done = run("store", "verify", "a")
    assert (done.code, done.out) == (1, f"{missing}\n")


def test_merge_makes_one_store(run, stores):
    """And says how large it is."""
    done = run("store", "merge", "a", "b", "--out", "both", "--link")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0].startswith("9 entries, 0.0 MiB, of 2 sources")
    assert done.out.splitlines()[1] == "both"
    assert run("store", "verify", "both").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "none"], "there is no folder 'none'"),
        (["verify", "."], "no activation store"),
        (["merge", "a", "--out", "c"], "at least two stores"),
        (["merge", "a", "none", "--out", "c"], "there is no folder 'none'"),
        (["merge", "a", "b", "--out", "b"], "'b' is one of the stores to merge"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, stores, arguments, message):
    """The line names what was wrong."""
    done = run("store", *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
