"""Tests of text to tokens and back, over tokenizers of each kind that are built here."""

import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lens_core import tokens as lens_tokens
from lens_core.errors import (
    ArgumentError,
    ContextLengthError,
    EmptyInputError,
    LensError,
    LensWarning,
    PaddingError,
    TokenIdError,
    TokenizerError,
)
from lens_core.tokens import (
    check_mask,
    check_tokens,
    find_tokenizer,
    get_token_position,
    position_ids,
    to_single_str_token,
    to_single_token,
    to_str_tokens,
    to_string,
    to_tokens,
)

WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran"]
TEXT = "the cat sat on the mat. the dog ran, naïve 🙂 and sat.\n" * 3
CHAT = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant {% endif %}"
HELLO = [{"role": "user", "content": "the cat"}]


def word_level(template=None, *, words=(), **special):
    """Build a word-level tokenizer; `template` is what its post-processor makes of a text."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS, "user", "assistant", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        added = [(token, vocab[token]) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=added)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in special.items() if v is not None})


def byte_level(**special):
    """Build a byte-level BPE like GPT-2's: one special token, for everything but padding."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"bos_token": end, "eos_token": end, "unk_token": end, **special}
    )


def metaspace():
    """Build one like Llama's: a space goes before the text and belongs to the word; the decoder drops the first."""
    vocab = {"<unk>": 0, "<s>": 1, "▁": 2, "▁the": 3, "▁cat": 4, "s": 5, "▁a": 6}
    backend = Tokenizer(models.Unigram([(token, 0.0 if i < 2 else -1.0) for token, i in vocab.items()], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", pad_token="<unk>")


TOKENIZERS = {
    "adds_bos": word_level("<s> $A"),
    "adds_nothing": word_level(),
    "adds_eos": word_level("$A </s>"),
    "adds_both": word_level("<s> $A </s>", padding_side="left"),
    "bos_is_eos_appended": word_level("$A </s>", bos_token="</s>"),
    "no_bos": word_level(bos_token=None),
    "byte_level": byte_level(pad_token="<|endoftext|>"),
    "metaspace": metaspace(),
}
NO_PAD = byte_level()
CHATTY = word_level("<s> $A", chat_template=CHAT)
with_bos = pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "no_bos"])
every = pytest.mark.parametrize("name", TOKENIZERS)
texts = st.lists(
    st.lists(st.sampled_from([*WORDS, "zebra", "<s>", "</s>"]), min_size=1, max_size=5).map(" ".join),
    min_size=1,
    max_size=4,
)
free_texts = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4)
sides = st.sampled_from([None, "left", "right"])
QUIET = settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))


def state(tokenizer):
    """Give all that a tokenizer remembers."""
    attributes = {k: repr(v) for k, v in vars(tokenizer).items() if k != "_tokenizer"}
    return attributes, tokenizer.backend_tokenizer.to_str(), repr(tokenizer), tokenizer.pad_token_id


def rows_of(encoded):
    """Give the real ids of each row."""
    pairs = zip(encoded.tokens, encoded.attention_mask, strict=True)
    return [row[mask.bool()].tolist() for row, mask in pairs]


# The BOS rule


@every
@QUIET
@given(given_texts=texts, side=sides)
def test_none_is_what_the_tokenizer_does_when_called_plainly(name, given_texts, side):
    """The real tokens of a row are exactly tokenizer(text)'s."""
    tokenizer = TOKENIZERS[name]
    encoded = to_tokens(tokenizer, given_texts, padding_side=side)
    assert rows_of(encoded) == tokenizer(given_texts)["input_ids"]


@with_bos
@QUIET
@given(given_texts=texts, side=sides)
def test_true_gives_exactly_one_leading_bos(name, given_texts, side):
    """After padding each row starts with one BOS, whatever the tokenizer adds and the user typed."""
    tokenizer = TOKENIZERS[name]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = to_tokens(tokenizer, given_texts, prepend_bos=True, padding_side=side)
    for row, text in zip(rows_of(encoded), given_texts, strict=True):
        assert row[0] == bos
        typed = tokenizer(text, add_special_tokens=False)["input_ids"]
        while typed[:1] == [bos]:
            typed = typed[1:]
        assert row[1:] in (typed, [*typed, eos])


@every
@QUIET
@given(given_texts=texts)
def test_false_removes_the_tokenizers_bos_only(name, given_texts):
    """What the user typed and what else the tokenizer adds stay."""
    tokenizer = TOKENIZERS[name]
    encoded = to_tokens(tokenizer, given_texts, prepend_bos=False)
    adds_eos = name in ("adds_eos", "adds_both", "bos_is_eos_appended")
    for row, text in zip(rows_of(encoded), given_texts, strict=True):
        typed = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row == ([*typed, tokenizer.eos_token_id] if adds_eos else typed)


def test_a_typed_bos_counts_only_when_one_is_asked_for():
    """True makes one of a typed and an added BOS; None and False leave the typed one as the tokenizer has it."""
    adds_bos, plain = TOKENIZERS["adds_bos"], TOKENIZERS["adds_nothing"]
    bos, cat = 1, to_single_token(plain, "cat")
    assert rows_of(to_tokens(adds_bos, "<s> cat")) == [[bos, bos, cat]]
    assert rows_of(to_tokens(adds_bos, "<s> cat", prepend_bos=True)) == [[bos, cat]]
    assert rows_of(to_tokens(adds_bos, "<s> cat", prepend_bos=False)) == [[bos, cat]]
    assert rows_of(to_tokens(adds_bos, "cat", prepend_bos=False)) == [[cat]]
    assert rows_of(to_tokens(plain, "cat <s>", prepend_bos=True)) == [[bos, cat, bos]]


def test_sides_are_told_apart_for_texts_of_special_tokens():
    """With BOS = EOS, appended, a text of that token alone keeps its appended one."""
    tokenizer = TOKENIZERS["bos_is_eos_appended"]
    assert rows_of(to_tokens(tokenizer, "</s>", prepend_bos=False)) == [[2, 2]]
    assert rows_of(to_tokens(tokenizer, "cat", prepend_bos=False)) == [[5, 2]]
    assert rows_of(to_tokens(tokenizer, "cat", prepend_bos=True)) == [[2, 5, 2]]


def test_a_vocabulary_without_the_probes_still_obeys():
    """A tokenizer that encodes no probe at all (no unknown token, other words) still has its BOS found."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, "x1": 1, "</s>": 2}, unk_token="<none>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    added = [("<s>", 0), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=added)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    for text in ("x1", "<s>", ""):
        typed = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert rows_of(to_tokens(tokenizer, text, prepend_bos=False)) == [[*typed, 2]]
    assert rows_of(to_tokens(tokenizer, "x1", prepend_bos=True)) == [[0, 1, 2]]
    with pytest.raises(TokenizerError, match="cannot encode"):
        to_tokens(tokenizer, "x2")


def test_a_tokenizer_without_bos_refuses_true():
    """There is nothing to prepend, and None and False work."""
    with pytest.raises(TokenizerError, match=r"no BOS token.*bos_token"):
        to_tokens(TOKENIZERS["no_bos"], "the cat", prepend_bos=True)
    for prepend_bos in (None, False):
        assert to_tokens(TOKENIZERS["no_bos"], "the cat", prepend_bos=prepend_bos).tokens.tolist() == [[4, 5]]


# Chat messages


def test_messages_get_one_bos_at_most():
    """The template writes a BOS and the tokenizer would add another: None and True give one, False none."""
    user, assistant, the, cat = (to_single_token(CHATTY, word) for word in ("user", "assistant", "the", "cat"))
    body = [user, the, cat, assistant]
    assert rows_of(to_tokens(CHATTY, HELLO)) == [[1, *body]]
    assert rows_of(to_tokens(CHATTY, HELLO, prepend_bos=True)) == [[1, *body]]
    assert rows_of(to_tokens(CHATTY, HELLO, prepend_bos=False)) == [body]


def test_true_adds_the_bos_that_a_template_lacks():
    """A template without a BOS gives none, and True one."""
    tokenizer = word_level("<s> $A", chat_template=CHAT.replace("{{ bos_token }}", ""))
    assert rows_of(to_tokens(tokenizer, HELLO))[0][0] != 1
    assert rows_of(to_tokens(tokenizer, HELLO, prepend_bos=True))[0][:2] == [1, to_single_token(tokenizer, "user")]


def test_a_batch_of_conversations_is_padded():
    """Lists of messages of unequal length make one batch; each row is what it is alone."""
    longer = [*HELLO, {"role": "assistant", "content": "sat on the mat"}]
    encoded = to_tokens(CHATTY, [HELLO, longer], padding_side="left")
    alone = [rows_of(to_tokens(CHATTY, one))[0] for one in (HELLO, longer)]
    assert rows_of(encoded) == alone
    assert encoded.attention_mask[0, 0] == 0
    assert to_str_tokens(CHATTY, HELLO)[1].strip() == "user"
    assert [len(row) for row in to_str_tokens(CHATTY, [HELLO, longer])] == [len(row) for row in alone]


def test_messages_need_a_chat_template():
    """The error says that there is none, or what the template said."""
    with pytest.raises(TokenizerError, match="no chat_template"):
        to_tokens(TOKENIZERS["adds_bos"], HELLO)
    refusing = word_level(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TokenizerError, match="roles must alternate"):
        to_tokens(refusing, HELLO)


# Padding, masks, truncation


@every
@QUIET
@given(given_texts=texts, side=sides, prepend_bos=st.sampled_from([None, False]))
def test_padding_is_where_the_mask_says(name, given_texts, side, prepend_bos):
    """Each row is its own length, padded on the one side asked for, with the tokenizer's side as default."""
    tokenizer = TOKENIZERS[name]
    encoded = to_tokens(tokenizer, given_texts, prepend_bos=prepend_bos, padding_side=side)
    alone = [to_tokens(tokenizer, text, prepend_bos=prepend_bos).tokens[0] for text in given_texts]
    longest = max(map(len, alone))
    assert encoded.tokens.shape == encoded.attention_mask.shape == (len(given_texts), longest)
    assert encoded.tokens.dtype == encoded.attention_mask.dtype == torch.int64
    for row, mask, ids in zip(encoded.tokens, encoded.attention_mask, alone, strict=True):
        gap = longest - len(ids)
        real = slice(gap, None) if (side or tokenizer.padding_side) == "left" else slice(0, len(ids))
        assert torch.equal(row[real], ids)
        assert mask[real].all()
        assert mask.sum() == len(ids)
        assert (row[mask == 0] == tokenizer.pad_token_id).all()


def test_unequal_lengths_need_a_pad_token():
    """Without one the error says what to do; equal lengths and single texts need none."""
    with pytest.raises(PaddingError, match=r"1 to 3 tokens.*pad_token = tokenizer.eos_token.*equal length"):
        to_tokens(NO_PAD, ["the", "the the the"])
    assert to_tokens(NO_PAD, ["the the", "cat cat"]).attention_mask.all()
    assert to_tokens(NO_PAD, ["the the the"]).tokens.shape == (1, 3)


@every
def test_the_tokenizer_is_never_changed(name):
    """Its attributes and its backend are as before after every function, and after every error."""
    tokenizer = TOKENIZERS[name]
    tokenizer.model_max_length, kept = 4, tokenizer.model_max_length  # HF would note that a text is longer
    before = state(tokenizer)
    for prepend_bos in (None, True, False):
        for side in ("left", "right", "middle"):
            for text in (["the cat", "the"], "the cat sat on the mat", HELLO, "", [], 5, "\ud800"):
                try:
                    to_tokens(tokenizer, text, prepend_bos=prepend_bos, padding_side=side)
                    to_str_tokens(tokenizer, text, prepend_bos=prepend_bos, padding_side=side)
                    get_token_position(tokenizer, "the", text, prepend_bos=prepend_bos)
                except LensError:
                    assert state(tokenizer) == before
    assert state(tokenizer) == before
    tokenizer.model_max_length = kept


def test_several_threads_may_share_a_tokenizer():
    """Each thread gets its own padding side."""
    tokenizer, wrong = TOKENIZERS["adds_both"], []

    def work(side):
        for _ in range(100):
            mask = to_tokens(tokenizer, ["the", "the cat sat"], padding_side=side).attention_mask
            if mask[0].tolist() != ([0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0]):
                wrong.append(side)

    threads = [threading.Thread(target=work, args=(side,)) for side in ("left", "right") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_truncation_keeps_the_start_of_each_row():
    """A BOS is kept; padding is reckoned afterwards."""
    encoded = to_tokens(TOKENIZERS["adds_bos"], ["the cat sat on", "the"], truncate_to=3)
    assert rows_of(encoded) == [[1, 4, 5], [1, 4]]
    with pytest.raises(ArgumentError, match="truncate_to=0"):
        to_tokens(TOKENIZERS["adds_bos"], "the", truncate_to=0)


def test_tensors_go_to_the_device():
    """Tokens and mask are on the device that was asked for."""
    encoded = to_tokens(TOKENIZERS["adds_bos"], "the cat", device="meta")
    assert encoded.tokens.device.type == encoded.attention_mask.device.type == "meta"


@QUIET
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.booleans())
def test_positions_count_real_tokens(lengths, is_left):
    """Real tokens are numbered from 0 and padding gets 0, on either side."""
    longest = max(lengths)
    rows = [[0] * (longest - n) + [1] * n if is_left else [1] * n + [0] * (longest - n) for n in lengths]
    mask = torch.tensor(rows)
    positions = position_ids(mask)
    for row, real, n in zip(positions, mask.bool(), lengths, strict=True):
        assert row[real].tolist() == list(range(n))
        assert not row[~real].any()


def test_left_padded_gpt2_equals_unpadded():
    """With the mask and the positions made from it, HF's GPT-2 gives each row its own logits."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=0)
    model, tokenizer = GPT2LMHeadModel(config).eval().double(), TOKENIZERS["byte_level"]
    given_texts = ["the cat sat on the mat", "the dog"]
    encoded = to_tokens(tokenizer, given_texts, padding_side="left")
    mask = encoded.attention_mask
    with torch.no_grad():
        padded = model(encoded.tokens, attention_mask=mask, position_ids=position_ids(mask)).logits
        for row, text in enumerate(given_texts):
            alone = model(to_tokens(tokenizer, text).tokens).logits[0]
            assert torch.allclose(padded[row][mask[row].bool()], alone, atol=1e-12)


# Input that is not text, or none


@pytest.mark.parametrize("text", [[], (), "", ["the", ""], [[]]], ids=repr)
def test_empty_text_is_refused(text):
    """Nothing, or a row of nothing, is an EmptyInputError where no BOS stands for it."""
    with pytest.raises(EmptyInputError):
        to_tokens(TOKENIZERS["adds_nothing"], text)


def test_an_empty_string_is_its_bos():
    """With a BOS, from the tokenizer or asked for, an empty text is that token."""
    assert to_tokens(TOKENIZERS["adds_bos"], "").tokens.tolist() == [[1]]
    assert to_tokens(TOKENIZERS["adds_nothing"], "", prepend_bos=True).tokens.tolist() == [[1]]


@pytest.mark.parametrize(
    "text",
    [
        5,
        None,
        b"the",
        {"role": "user"},
        ["the", 5],
        ["the", HELLO],
        [HELLO, "the"],
        [HELLO[0], "the"],
        [{"content": "x"}],
    ],
    ids=repr,
)
def test_what_is_not_text_is_refused(text):
    """Neither text nor messages, or both mixed."""
    with pytest.raises(ArgumentError):
        to_tokens(CHATTY, text)


def test_text_that_is_no_unicode_is_refused():
    """Half of a surrogate pair gives an error of ours."""
    with pytest.raises(TokenizerError, match="cannot encode"):
        to_tokens(TOKENIZERS["byte_level"], "a\ud800")


def test_a_bad_side_is_refused():
    """Only left and right are sides."""
    with pytest.raises(ArgumentError, match="'middle'"):
        to_tokens(TOKENIZERS["adds_bos"], "the", padding_side="middle")


@pytest.mark.parametrize(
    "call",
    [
        lambda: to_tokens(None, "the"),
        lambda: to_string(None, [1]),
        lambda: to_str_tokens(None, "the"),
        lambda: to_single_token(None, "the"),
        lambda: to_single_str_token(None, 1),
        lambda: get_token_position(None, 1, "the"),
        lambda: get_token_position(None, "the", [1]),
    ],
    ids=["to_tokens", "to_string", "to_str_tokens", "to_single_token", "to_single_str_token", "position", "token"],
)
def test_text_without_a_tokenizer_says_what_to_do(call):
    """The error names both ways out."""
    with pytest.raises(TokenizerError, match=r"tokenizer= to lens.load, or give token ids"):
        call()


# Token ids


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([[1, 2]]),
        torch.tensor([1, 2], dtype=torch.uint8),
        [1, 2],
        [[1, 2]],
        (1, 2),
        range(1, 3),
        np.array([1, 2]),
        np.array([[1, 2]], dtype=np.uint16),
        [np.int64(1), np.int32(2)],
        [torch.tensor(1), torch.tensor(2)],
        [torch.tensor([1, 2])],
    ],
    ids=lambda ids: f"{type(ids).__name__}-{ids}".replace("\n", ""),
)
def test_ids_come_in_many_forms(ids):
    """Each becomes a batch of int64 rows."""
    checked = check_tokens(ids, d_vocab=3, n_ctx=2)
    assert checked.dtype == torch.int64
    assert checked.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        (torch.tensor([[0.0]]), ArgumentError, "torch.float32"),
        (torch.tensor([True]), ArgumentError, "torch.bool"),
        (torch.tensor(3), ArgumentError, r"\[\]"),
        (torch.zeros(1, 1, 1, dtype=torch.long), ArgumentError, r"\[1, 1, 1\]"),
        ([1, True], ArgumentError, "True, a bool"),
        (np.array([1.5]), ArgumentError, "1.5, a float"),
        ([1, [2]], ArgumentError, "one depth"),
        (["a"], ArgumentError, "'a', a str"),
        ({"input_ids": [1]}, ArgumentError, "a dict"),
        (None, ArgumentError, "NoneType"),
        ([[1], [1, 2]], PaddingError, "unequal lengths.*attention_mask"),
        ([], EmptyInputError, r"\[1, 0\]"),
        ([[], []], EmptyInputError, r"\[2, 0\]"),
        (torch.zeros(0, 4, dtype=torch.long), EmptyInputError, r"\[0, 4\]"),
        ([[0, 1], [2, 10]], TokenIdError, r"id 10 at row 1, position 1 .*vocabulary of 10 ids \(0 to 9\)"),
        ([0, -100], TokenIdError, "id -100 at row 0, position 1"),
        ([2**70], TokenIdError, "64 bits"),
        ([0] * 6, ContextLengthError, r"6 tokens, .*context holds 5.*truncate_to=5"),
    ],
    ids=lambda value: repr(value)[:40] if not isinstance(value, type) else value.__name__,
)
def test_bad_ids_are_refused(ids, error, match):
    """One clear error each, with the offending value."""
    with pytest.raises(error, match=match):
        check_tokens(ids, d_vocab=10, n_ctx=5)


def test_the_cache_counts_towards_the_context():
    """Positions in the key/value cache are taken; no limit takes any length."""
    assert check_tokens([0], d_vocab=10, n_ctx=5, n_past=4).shape == (1, 1)
    with pytest.raises(ContextLengthError, match="1 tokens after 5 in the cache"):
        check_tokens([0], d_vocab=10, n_ctx=5, n_past=5)
    assert check_tokens([0] * 100, d_vocab=10).shape == (1, 100)
    assert check_tokens(torch.zeros(1, 3, dtype=torch.long, device="meta"), d_vocab=10).is_meta


nested = st.recursive(
    st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3), st.integers(0, 9)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)


@QUIET
@given(nested)
def test_anything_gives_ids_or_an_error_of_ours(value):
    """Whatever is given as ids, no other exception comes out."""
    try:
        ids = check_tokens(value, d_vocab=10, n_ctx=5)
    except LensError:
        return
    assert ids.ndim == 2
    assert 0 <= int(ids.min()) <= int(ids.max()) < 10


@QUIET
@given(nested)
def test_anything_gives_tokens_or_an_error_of_ours(value):
    """Whatever is given as text, no other exception comes out."""
    try:
        encoded = to_tokens(CHATTY, value)
    except LensError:
        return
    assert encoded.tokens.numel()


def test_a_mask_must_fit():
    """Shape, values and rows without tokens are checked; booleans become integers."""
    mask = torch.tensor([[False, True], [True, True]])
    assert check_mask(mask, batch=2, length=2).tolist() == [[0, 1], [1, 1]]
    for bad, error, match in [
        (torch.ones(2, 3), ArgumentError, r"\[2, 3\].*\[2, 2\]"),
        (torch.tensor([[1, 2], [1, 1]]), ArgumentError, "other than 0"),
        (torch.tensor([[0, 0], [1, 1]]), EmptyInputError, "nothing but padding"),
    ]:
        with pytest.raises(error, match=match):
            check_mask(bad, batch=2, length=2)
    assert check_mask(torch.ones(1, 2, device="meta"), batch=1, length=2).is_meta


# Back to text


@QUIET
@given(free_texts)
def test_byte_level_round_trip(given_texts):
    """to_string undoes to_tokens, for any text and any batch."""
    tokenizer = TOKENIZERS["byte_level"]
    for text in given_texts:
        if text:
            assert to_string(tokenizer, to_tokens(tokenizer, text).tokens[0]) == text
    if all(given_texts):
        assert [to_string(tokenizer, row) for row in rows_of(to_tokens(tokenizer, given_texts))] == given_texts


@every
@QUIET
@given(given_texts=texts, prepend_bos=st.sampled_from([None, False]))
def test_joined_tokens_are_the_string(name, given_texts, prepend_bos):
    """The texts of a row's tokens join to to_string of the row, spaces included."""
    tokenizer = TOKENIZERS[name]
    for text in given_texts:
        ids = to_tokens(tokenizer, text, prepend_bos=prepend_bos).tokens
        pieces = to_str_tokens(tokenizer, text, prepend_bos=prepend_bos)
        assert len(pieces) == ids.shape[1]
        assert "".join(pieces) == to_string(tokenizer, ids[0])
        assert to_str_tokens(tokenizer, ids) == pieces


def test_to_string_follows_the_axes():
    """None or one axis is a string, two are a list, three an error."""
    tokenizer = TOKENIZERS["adds_bos"]
    assert to_string(tokenizer, torch.tensor([[1, 4], [1, 5]])) == ["<s> the", "<s> cat"]
    assert to_string(tokenizer, [[1, 4]]) == ["<s> the"]
    assert to_string(tokenizer, [4, 5]) == to_string(tokenizer, np.array([4, 5])) == "the cat"
    assert to_string(tokenizer, torch.tensor(4)) == to_string(tokenizer, 4) == "the"
    assert to_string(tokenizer, []) == ""
    with pytest.raises(ArgumentError, match=r"\[1, 1, 1\]"):
        to_string(tokenizer, [[[1]]])
    for bad in (-1, 2**40):
        with pytest.raises(TokenIdError, match=str(bad)):
            to_string(tokenizer, [4, bad])


def test_to_str_tokens_follows_the_input():
    """One text or row gives a list, a batch a list of lists, unpadded unless a side is given."""
    tokenizer = TOKENIZERS["byte_level"]
    assert to_str_tokens(tokenizer, "the cat") == ["the", " cat"]
    assert to_str_tokens(tokenizer, "the cat", prepend_bos=True) == ["<|endoftext|>", "the", " cat"]
    ids = to_tokens(tokenizer, "the cat").tokens
    for form in (ids, ids[0], ids[0].tolist(), ids.numpy()):
        assert to_str_tokens(tokenizer, form) == ["the", " cat"]
    assert to_str_tokens(tokenizer, ids.tolist()) == to_str_tokens(tokenizer, ["the cat"]) == [["the", " cat"]]
    batch = ["the cat", "the"]
    assert to_str_tokens(NO_PAD, batch) == [["the", " cat"], ["the"]]
    assert to_str_tokens(tokenizer, batch, padding_side="left") == [["the", " cat"], ["<|endoftext|>", "the"]]
    assert to_str_tokens(tokenizer, torch.cat([ids, ids])) == [["the", " cat"]] * 2
    assert to_str_tokens(tokenizer, []) == []
    with pytest.raises(ArgumentError, match=r"\[1, 1, 1\]"):
        to_str_tokens(tokenizer, torch.zeros(1, 1, 1, dtype=torch.long))


@pytest.mark.parametrize("given_arguments", [{"prepend_bos": False}, {"padding_side": "left"}], ids=str)
def test_text_arguments_with_ids_are_refused(given_arguments):
    """Ids are taken as they are, so an argument about text is a mistake."""
    for call in (
        lambda **kw: to_str_tokens(NO_PAD, [1, 2], **kw),
        lambda **kw: get_token_position(NO_PAD, 1, [1], **kw),
    ):
        with pytest.raises(ArgumentError, match=f"{next(iter(given_arguments))}=.*token ids"):
            call(**given_arguments)


def test_a_character_spread_over_tokens_gives_one_piece_each():
    """Half characters read as replacement characters, one string per token still."""
    tokenizer = TOKENIZERS["byte_level"]
    ids = to_tokens(tokenizer, "漢字").tokens[0]
    assert len(to_str_tokens(tokenizer, "漢字")) == len(ids) > 2


def test_single_tokens():
    """Exactly one token gives its id; anything else says what it is."""
    tokenizer = TOKENIZERS["byte_level"]
    assert to_single_str_token(tokenizer, to_single_token(tokenizer, " cat")) == " cat"
    assert to_single_token(tokenizer, "<|endoftext|>") == tokenizer.eos_token_id
    with pytest.raises(TokenizerError, match=r"' cat sat' is 2 tokens, not one: \[' cat', ' sat'\]"):
        to_single_token(tokenizer, " cat sat")
    with pytest.raises(TokenizerError, match="is 0 tokens"):
        to_single_token(tokenizer, "")
    words = TOKENIZERS["adds_both"]
    assert to_single_token(words, "cat") == 5  # what the tokenizer adds is not counted
    assert to_single_token(words, "<unk>") == 3
    with pytest.raises(TokenizerError, match="'zebra' is not in the vocabulary"):
        to_single_token(words, "zebra")
    for bad in (-1, len(words)):
        with pytest.raises(TokenIdError, match=f"no id {bad}"):
            to_single_str_token(words, bad)


def test_a_leading_space_that_the_tokenizer_puts_itself():
    """Llama's kind puts the space there, so ' cat' and 'cat' are one token; a bare piece is not ' s'."""
    tokenizer = TOKENIZERS["metaspace"]
    assert to_single_token(tokenizer, " cat") == to_single_token(tokenizer, "cat") == 4
    assert to_str_tokens(tokenizer, "the cat") == ["<s>", " the", " cat"]
    assert to_str_tokens(tokenizer, "the cat", prepend_bos=False) == ["the", " cat"]
    for other, string in [(tokenizer, " s"), (TOKENIZERS["byte_level"], " q")]:
        with pytest.raises(TokenizerError, match=f"{string!r} is"):
            to_single_token(other, string)


def test_token_positions():
    """First or last place of a token given as text or id, in text or ids, BOS counted."""
    tokenizer = TOKENIZERS["adds_bos"]
    text = "the cat sat on the mat"
    assert get_token_position(tokenizer, "the", text) == 1
    assert get_token_position(tokenizer, "the", text, prepend_bos=False) == 0
    assert get_token_position(tokenizer, "the", text, mode="last") == 5
    assert get_token_position(tokenizer, 4, to_tokens(tokenizer, text).tokens) == 1
    assert get_token_position(None, 4, [3, 4]) == 1
    assert get_token_position(tokenizer, "the", [text]) == 1
    with pytest.raises(TokenizerError, match=r"'dog' \(id 9\) is not in the input of 7 tokens"):
        get_token_position(tokenizer, "dog", text)
    with pytest.raises(ArgumentError, match="mode='second'"):
        get_token_position(tokenizer, "the", text, mode="second")
    with pytest.raises(ArgumentError, match="2 were given"):
        get_token_position(tokenizer, "the", ["the", "the"])


# Finding a tokenizer


@pytest.fixture
def model_folder(tmp_path):
    """Give the folder of a saved model without a tokenizer."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=30, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_given_tokenizer_wins(model_folder):
    """An object is taken as it is; what cannot be a tokenizer is refused."""
    tokenizer = TOKENIZERS["adds_bos"]
    assert find_tokenizer(str(model_folder), tokenizer) is tokenizer
    with pytest.raises(ArgumentError, match="tokenizer=5"):
        find_tokenizer(str(model_folder), 5)


def test_a_folder_with_a_tokenizer(model_folder):
    """It is found beside the model, by the folder, by the model in memory, and by name for another model."""
    TOKENIZERS["adds_bos"].save_pretrained(model_folder)
    model = GPT2LMHeadModel.from_pretrained(model_folder)
    for found in (
        find_tokenizer(str(model_folder)),
        find_tokenizer(model_folder),
        find_tokenizer(model),
        find_tokenizer("toy:gpt2", str(model_folder)),
    ):
        assert rows_of(to_tokens(found, "the cat")) == [[1, 4, 5]]


def test_a_folder_without_a_tokenizer_has_none(model_folder):
    """HF would make up a tokenizer without words from the model type; None is the truth, and no warning."""
    assert find_tokenizer(str(model_folder)) is None
    assert find_tokenizer(GPT2LMHeadModel.from_pretrained(model_folder)) is None
    with pytest.raises(TokenizerError, match="no tokenizer in"):
        find_tokenizer(str(model_folder), str(model_folder))


def test_a_model_made_in_memory_has_none():
    """Its config names no origin, or one that is gone."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=30, bos_token_id=0, eos_token_id=0))
    assert find_tokenizer(model) is None
    model.config._name_or_path = "/a/folder/that/is/gone"
    assert find_tokenizer(model) is None
    assert find_tokenizer(object()) is None


def test_a_broken_tokenizer_warns_with_the_reason(model_folder):
    """Token ids still work, so a damaged file is a warning; for a tokenizer that was named it is an error."""
    (model_folder / "tokenizer.json").write_text("{damaged")
    with pytest.warns(LensWarning, match=r"cannot be loaded \(JSONDecodeError.*token ids still work"):
        assert find_tokenizer(str(model_folder)) is None
    with pytest.raises(TokenizerError, match="JSONDecodeError"):
        find_tokenizer("toy:gpt2", str(model_folder))


def test_an_empty_tokenizer_is_none(model_folder):
    """A tokenizer's config without a vocabulary makes HF invent one of special tokens only."""
    (model_folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.warns(LensWarning, match="special tokens only"):
        assert find_tokenizer(str(model_folder)) is None


def test_a_hub_out_of_reach_is_asked_once(monkeypatch):
    """Being offline costs one question, not HF's minute of retries, and gives None with a warning."""
    asked = []

    def refuse(self, name, **options):
        asked.append((name, options["revision"]))
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.warns(LensWarning, match="no route to the hub"):
        assert find_tokenizer("no-such-owner/no-such-model", revision="abc") is None
    assert asked == [("no-such-owner/no-such-model", "abc")]
    with pytest.raises(TokenizerError, match="no route"):
        find_tokenizer("toy:gpt2", "no-such-owner/no-such-model")
    asked.clear()
    with pytest.warns(LensWarning, match="cannot be loaded"):
        assert find_tokenizer("no-such-owner/no-such-model", local_files_only=True) is None
    assert not asked


def test_the_public_names_are_sorted_and_exist():
    """`__all__` is what the module offers."""
    assert lens_tokens.__all__ == sorted(lens_tokens.__all__)
    with warnings.catch_warnings():
        assert all(hasattr(lens_tokens, name) for name in lens_tokens.__all__)
