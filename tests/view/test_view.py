"""Pictures: what is escaped, what is embedded, what is refused."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lens_core import view
from lens_core.errors import ArgumentError

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<!--<script>",
    '" onmouseover="alert(1)',
    "'><img onerror=alert(1)>",
    "&lt;b&gt;",
    "\n",
    "\t",
    "",
    "\u202e",
    "\ud800",
    "\x00",
    "</style>",
    "]]>",
    "\u2028",
]
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Document(HTMLParser):
    """What a browser would find: elements, data blocks, text; fails on tags that do not match."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.data, self.scripts, self.texts, self.open = [], [], [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        """Note an element and what it carries."""
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        """Close the innermost element, which must be of that tag."""
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        """Sort text by the element it stands in."""
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag == "script":
            (self.data if attributes.get("type") == "application/json" else self.scripts).append(data)
        elif tag != "style":
            self.texts.append(data)

    @property
    def text(self):
        """All the text that is shown."""
        return " ".join(self.texts)


def causal(heads: int, size: int) -> torch.Tensor:
    """Return patterns as a model would give them."""
    scores = torch.randn(heads, size, size, generator=torch.Generator().manual_seed(0))
    return scores.masked_fill(torch.ones(size, size).triu(1).bool(), -math.inf).softmax(-1)


def every_picture(words: list[str]) -> list[view.Picture]:
    """Return one picture of each kind, with the words wherever a word can stand."""
    size = len(words)
    first = words[0] or "nothing"
    return [
        view.heading(first),
        view.code(first),
        view.attention(words, causal(size, size), labels=words, title=first, highlight=[0]),
        view.attention(words, dict(zip(words, causal(size, size), strict=True)), title=first),
        view.tokens(words, range_of(size), title=first, unit=first),
        view.bars(words, range_of(size), title=first, unit=first, highlight=[0]),
        view.grid(words, words, [range_of(size)] * size, title=first, unit=first),
        view.table([[word, i] for i, word in enumerate(words)], [first, "n"], title=first),
    ]


def range_of(size: int) -> list[float]:
    """Return values of both signs."""
    return [i - size / 2 for i in range(size)]


def data_of(picture: view.Picture) -> dict:
    """Return the picture's only data block."""
    (block,) = Document(picture.html).data
    return json.loads(block)


# Safety


@pytest.mark.parametrize("start", range(len(HOSTILE)))
def test_a_hostile_word_adds_no_element_attribute_or_script(start):
    """The elements and attribute names are those that harmless words give, and the words are shown as text."""
    words = HOSTILE[start:] + HOSTILE[:start]
    plain = [f"word{i}" for i in range(len(words))]
    for hostile, harmless in zip(every_picture(words), every_picture(plain), strict=True):
        for got, expected in [(hostile.html, harmless.html), (hostile._repr_html_(), harmless._repr_html_())]:
            found, wanted = Document(got), Document(expected)
            assert [tag for tag in found.tags if tag != "br"] == wanted.tags
            names = [
                sorted(attributes) for tag, attributes in zip(found.tags, found.attributes, strict=True) if tag != "br"
            ]
            assert names == [sorted(attributes) for attributes in wanted.attributes]
            assert found.scripts == wanted.scripts
            assert len(found.data) == len(wanted.data)


@given(st.lists(st.tuples(st.text(), st.none() | st.floats()), min_size=1, max_size=5))
def test_any_text_and_any_numbers_give_a_sound_document(pairs):
    """Whatever the words and numbers, tags match, data is JSON, and one script stands in the document."""
    words, values = [word for word, _ in pairs], [value for _, value in pairs]
    everything = [
        view.attention(words, [[values] * len(words)], title=words[0]),
        view.tokens(words, values, title=words[0], unit=words[0]),
        view.bars(words, values, title=words[0], unit=words[0]),
        view.grid(words, words, [values] * len(words), title=words[0], unit=words[0]),
        view.table([[word, value] for word, value in pairs], ["word", "value"], title=words[0]),
    ]
    source = view.page(words[0], everything, subtitle=words[-1]).html
    found = Document(source)
    assert len(found.scripts) == 1
    assert json.loads(found.data[0])["tokens"] == [view.visible(word) for word in words]
    source.encode("utf-8")


def test_a_page_escapes_its_own_text_too():
    """Title, subtitle and paragraphs are text."""
    found = Document(view.page(HOSTILE[0], [HOSTILE[1]], subtitle=HOSTILE[4]).html)
    assert len(found.scripts) == 1
    assert "img" not in found.tags
    assert HOSTILE[1] in found.text
    assert HOSTILE[4] in found.text


def test_a_document_names_no_address_and_loads_nothing():
    """No address and no source attribute stands anywhere, and the policy forbids loading."""
    for picture in [*every_picture(["a", "b", "c"]), view.page("Page", every_picture(["a", "b", "c"]))]:
        for source in (picture.html, picture._repr_html_()):
            assert not re.search(r"https?:|//\w+\.|\bsrc\s*=|@import|url\(|<link", source)
        assert "default-src 'none'" in picture.html


def test_the_policy_allows_exactly_the_script_of_the_document():
    """The digest in the policy is that of the script between the tags, so a browser runs it and no other."""
    source = view.tokens(["a"], [1.0]).html
    (digest,) = re.findall(r"script-src 'sha256-([^']+)'", source)
    (script,) = Document(source).scripts
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == digest
    assert "unsafe-eval" not in source


def test_every_document_can_be_written_and_read_back(tmp_path):
    """Lone surrogates and control characters do not break the file."""
    for picture in every_picture(HOSTILE):
        path = picture.save(tmp_path / "picture.html")
        assert path.read_text(encoding="utf-8") == picture.html
        assert "\x00" not in picture.html


def test_a_path_may_be_a_string(tmp_path):
    """`save` takes a string and returns a path."""
    assert view.heading("x").save(str(tmp_path / "x.html")).exists()


def test_invisible_characters_are_made_visible():
    """Spaces, newlines, tabs, nothing, and characters without a shape."""
    assert view.visible(" a b") == "·a·b"
    assert view.visible("\n\t") == "↵⇥"
    assert view.visible("") == "∅"
    assert view.visible("\u200b\xa0\u202e\ud800\x1b") == "\\u200b\\xa0\\u202e\\ud800\\x1b"
    assert view.visible("日本 é 😀") == "日本·é·😀"


def test_prose_keeps_its_spaces():
    """A paragraph is not a token: a no-break space or a space in it stays."""
    assert "two\xa0words here" in Document(view.page("x", ["two\xa0words here"]).html).text


# Notebooks


def test_fragments_in_one_notebook_have_different_ids():
    """Each showing, of the same picture too, has its own id, and no other id is used."""
    pictures = every_picture(["a", "b", "c"])
    notebook = "".join(picture._repr_html_() for picture in [*pictures, *pictures])
    ids = [attributes["id"] for attributes in Document(notebook).attributes if "id" in attributes]
    assert len(ids) == len(set(ids)) == 2 * len(pictures)


def test_a_fragment_is_no_document():
    """A fragment brings no document of its own, and its style touches nothing outside it."""
    fragment = view.table([["a", 1]], ["name", "n"])._repr_html_()
    assert not {"html", "head", "body", "title", "meta"} & set(Document(fragment).tags)
    style = re.sub(r"/\*.*?\*/", "", re.findall(r"<style>(.*?)</style>", fragment, re.DOTALL)[0], flags=re.DOTALL)
    selectors = [part.strip() for rule in re.findall(r"([^{}]+)\{", style) for part in rule.split(",")]
    outside = [one for one in selectors if "lens" not in one and not re.match(r"@media|\.[xy] \.lens|.*\)$", one)]
    assert outside == []


# Attention


def test_the_embedded_weights_are_the_patterns_to_four_digits():
    """Reading the data back as the script does gives every weight within half a unit."""
    patterns = causal(3, 17)
    data = data_of(view.attention([str(i) for i in range(17)], patterns))
    assert data["causal"]
    assert data["unit"] == 1e-4
    for head, pattern in zip(data["heads"], patterns.tolist(), strict=True):
        read = [[(row[k] if k < len(row) else 0) * data["unit"] for k in range(17)] for row in head["rows"]]
        assert torch.allclose(torch.tensor(read), torch.tensor(pattern), rtol=0, atol=0.51e-4)


def test_scores_keep_their_sign_and_their_scale():
    """Values outside 0..1 are counted in units of the largest; masked scores are no trouble."""
    scores = [[[-8.0, -math.inf], [2.0, 4.0]]]
    data = data_of(view.attention(["a", "b"], scores))
    assert data["causal"]
    assert data["heads"][0]["rows"] == [[-10000], [2500, 5000]]
    assert data["unit"] == pytest.approx(8e-4)


def test_a_value_that_is_not_finite_is_no_value():
    """Where a row is undefined the picture says so, in valid JSON."""
    data = data_of(view.attention(["a", "b"], [[[math.nan, 0.0], [0.5, 0.5]]]))
    assert data["heads"][0]["rows"] == [[None], [5000, 5000]]
    everything = data_of(view.attention(["a", "b"], [[[math.nan, math.nan], [math.nan, math.inf]]]))
    assert everything["heads"][0]["rows"] == [[None], [None, None]]


def test_patterns_that_look_ahead_are_not_called_causal():
    """One weight above the diagonal of one head is enough."""
    assert not data_of(view.attention(["a", "b"], [[[1.0, 0.0], [0.0, 1.0]], [[0.9, 0.1], [0.0, 1.0]]]))["causal"]


@pytest.mark.parametrize("form", ["tensor", "array", "lists", "list of tensors", "bfloat16", "gradient", "mapping"])
def test_patterns_may_come_in_any_usual_form(form):
    """A tensor of any floating type, an array, lists and mixtures give the same picture."""
    patterns = torch.tensor([[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]])
    forms = {
        "tensor": patterns,
        "array": patterns.numpy(),
        "lists": patterns.tolist(),
        "list of tensors": list(patterns),
        "bfloat16": patterns.bfloat16(),
        "gradient": patterns.clone().requires_grad_(),
        "mapping": {f"head {i}": pattern for i, pattern in enumerate(patterns)},
    }
    words = ["a", "b"]
    assert view.attention(words, forms[form]).html == view.attention(words, patterns).html


def test_each_head_is_described_in_words():
    """The text that stands for a heat map names the head and its strongest weight."""
    source = view.attention([" a", "b"], [[[1.0, 0.0], [0.25, 0.75]], [[0.0, 0.0], [0.9, 0.1]]], highlight=[1]).html
    names = [attributes["aria-label"] for attributes in Document(source).attributes if "aria-label" in attributes]
    assert "head 0, heat map of 2 by 2 tokens, strongest 1.000: ·a (0) to ·a (0)" in names
    assert "head 1, highlighted, heat map of 2 by 2 tokens, strongest 0.900: b (1) to ·a (0)" in names


def test_highlighted_heads_are_marked_and_the_first_is_shown_large():
    """Heads are named by label or by number."""
    patterns = causal(4, 3)
    for highlight in (["H2", "H3"], [2, 3], ("H2", 3)):
        picture = view.attention(["a", "b", "c"], patterns, labels=["H0", "H1", "H2", "H3"], highlight=highlight)
        marked = ["marked" in attributes.get("class", "") for attributes in Document(picture.html).attributes]
        assert sum(marked) == 2
        assert data_of(picture)["first"] == 2


@pytest.mark.parametrize(("count", "columns"), [(1, 4), (4, 4), (7, 7), (8, 8), (12, 6), (16, 8), (13, 8), (144, 8)])
def test_heads_stand_in_even_rows(count, columns):
    """As many in a row as divide the whole, where some number between five and eight does."""
    assert f"--columns:{columns}" in view.attention(["a"], [[[1.0]]] * count).html


def test_a_page_of_eight_heads_and_64_tokens_is_small():
    """Under 200 kB, and 12 heads of 128 tokens under 1 MB."""
    assert len(view.attention([f" word{i}" for i in range(64)], causal(8, 64)).html) < 200_000
    assert len(view.attention([f" word{i}" for i in range(128)], causal(12, 128)).html) < 1_000_000


# Tokens, bars, tables


def test_a_token_shows_its_value_with_the_unit():
    """The hint names token, position, value and unit; a missing value says so and has no unit."""
    found = Document(view.tokens([" a", "b", "c"], [None, 0.5, math.nan], unit="nats").html)
    hints = [
        attributes["title"].translate({0x2068: None, 0x2069: None})
        for attributes in found.attributes
        if "title" in attributes
    ]
    assert hints == ["·a (0): no value", "b (1): 0.500 nats", "c (2): no value"]
    assert "0.500 nats" in found.text


def test_colours_diverge_only_where_values_have_both_signs():
    """Without a negative value there is one hue, with one there are two."""
    shares = re.compile(r'class="lens-token (\w+)" style="--v:([\d.]+)"')
    assert shares.findall(view.tokens(["a", "b"], [1.0, 2.0]).html) == [("seq", "0.500"), ("seq", "1.000")]
    assert shares.findall(view.tokens(["a", "b"], [-1.0, 2.0]).html) == [("neg", "0.500"), ("pos", "1.000")]
    assert shares.findall(view.tokens(["a", "b"], [0.0, 0.0]).html) == [("seq", "0.000"), ("seq", "0.000")]


def test_two_texts_can_share_one_scale():
    """With `full`, the same value has the same colour in both; a greater one is as deep as can be."""
    assert "--v:0.250" in view.tokens(["a"], [1.0], full=4.0).html
    assert "--v:1.000" in view.tokens(["a"], [9.0], full=4.0).html


def test_a_newline_token_ends_the_line():
    """The text keeps its lines."""
    assert Document(view.tokens(["a\n", "b", "\n"], [1.0, 1.0, 1.0]).html).tags.count("br") == 2


def test_bars_start_at_zero():
    """A negative bar ends where a positive one starts, and widths are in proportion."""
    bar = re.compile(r'class="(neg|pos)" style="left:([\d.]+)%;width:([\d.]+)%"')
    found = bar.findall(view.bars(["a", "b", "c"], [-1.0, 3.0, 0.0], unit="logits").html)
    assert found == [("neg", "0.00", "25.00"), ("pos", "25.00", "75.00"), ("pos", "25.00", "0.00")]
    assert bar.findall(view.bars(["a"], [0.0]).html) == [("pos", "0.00", "0.00")]
    assert bar.findall(view.bars(["a"], [-2.0]).html) == [("neg", "0.00", "100.00")]


def test_bars_print_values_and_unit():
    """Each value is written out with its sign, once any is negative."""
    text = Document(view.bars(["a", "b", "c"], [-1.0, 3.0, None], unit="logits").html).text
    assert "logits" in text
    assert "−1.000" in text
    assert "+3.000" in text
    assert "no value" in text
    assert "+" not in Document(view.bars(["a"], [3.0]).html).text


def test_a_grid_shows_a_cell_for_each_row_and_column():
    """A cell says where it is and what it holds; too great a value is as deep as can be, a missing one is empty."""
    source = view.grid(["layer 0", "layer 1"], [" a", "b"], [[1.0, 2.0], [8.0, None]], unit="norm", full=4.0).html
    cells = [
        attributes for attributes in Document(source).attributes if attributes.get("class", "").startswith("lens-cell ")
    ]
    assert [(cell["class"].split()[1], cell["style"]) for cell in cells] == [
        ("seq", "--v:0.250"),
        ("seq", "--v:0.500"),
        ("seq", "--v:1.000"),
        ("none", "--v:0.000"),
    ]
    assert cells[1]["title"] == "layer 0, \u2068b\u2069 (1): 2.000"
    assert cells[3]["title"] == "layer 1, \u2068b\u2069 (1): no value"
    assert "4.000 norm" in Document(source).text


def test_a_grid_may_say_a_token_in_each_cell():
    """Visible and escaped; one for each cell."""
    values = [[1.0, 2.0], [8.0, None]]
    picture = view.grid(["L0", "L1"], ["a", "b"], values, texts=[["<x>", " y"], ["z", ""]])
    cells = re.findall(r'<td class="lens-cell [a-z]+ said"[^>]*>(.*?)</td>', picture.content)
    assert cells == ["&lt;x&gt;", "·y", "z", "∅"]
    with pytest.raises(ArgumentError, match="texts must be 2 x 2"):
        view.grid(["L0", "L1"], ["a", "b"], values, texts=[["x"], ["y", "z"]])


def test_numbers_in_a_column_share_one_format():
    """Columns of numbers are aligned right, others left; None is an empty cell."""
    picture = view.table([["x", 1, 0.5], [None, -20, 12.0], ["<y>", None, None]], ["name", "count", "loss"])
    cells = re.findall(r"<td( class=\"lens-number\")?>(.*?)</td>", picture.content)
    assert [value for _, value in cells] == ["x", "1", "0.50", "", "−20", "12.00", "&lt;y&gt;", "", ""]
    assert [bool(style) for style, _ in cells] == [False, True, True] * 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0], ["0"]),
        ([5.25, -0.0001], ["5.250", "0.000"]),
        ([123456.0, 1.5], ["123456", "2"]),
        ([0.00123], ["0.001230"]),
        ([1e-9], ["1.000e−09"]),
        ([2.5e12], ["2.500e+12"]),
        ([5e-324, 1.7e308], ["4.941e−324", "1.700e+308"]),
    ],
)
def test_numbers_are_written_so_that_they_can_be_read(values, expected):
    """Few digits, a real minus sign, no negative zero, powers of ten only at the extremes."""
    picture = view.table([[value] for value in values], ["n"])
    shown = re.findall(r"<td class=\"lens-number\">(.*?)</td>", picture.content)
    assert shown == [one if one != "0" else "0.000" for one in expected]


def test_extreme_values_are_drawn():
    """The largest and the smallest floats break neither data nor text."""
    for value in (1.7e308, -1.7e308, 5e-324):
        assert 0 <= data_of(view.attention(["a"], [[[value]]]))["decimals"] <= 100
        view.tokens(["a", "b"], [value, 1.0])
        view.bars(["a", "b"], [value, 1.0])


# Pages


def test_a_page_holds_its_sections_in_order():
    """Headings, paragraphs and pictures come one after another."""
    picture = view.page(
        "Title", [view.heading("One"), "second", view.table([[1]], ["third"]), "last"], subtitle="below"
    )
    assert isinstance(picture, view.Page)
    text = Document(picture.html).text
    places = [text.index(word) for word in ("Title", "below", "One", "second", "third", "last")]
    assert places == sorted(places)
    assert picture.html.count("<script>") == 1


def test_a_page_with_several_attention_pictures_keeps_their_data_apart():
    """Each picture has its own data block inside its figure."""
    found = Document(view.page("x", [view.attention(["a"], [[[1.0]]]), view.attention(["b"], [[[1.0]]])]).html)
    assert [json.loads(block)["tokens"] for block in found.data] == [["a"], ["b"]]


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: view.attention(["a", "b"], [[[1.0]]]),
            "must be 2 x 2 (query, key), as there are 2 tokens; it is 1 x 1.",
        ),
        (lambda: view.attention(["a", "b"], [[[1.0, 0.0], [1.0]]]), "it is 2 x uneven"),
        (
            lambda: view.attention(["a"], torch.ones(1, 1)),
            "must be 1 x 1 (query, key), as there are 1 tokens; it is 1.",
        ),
        (lambda: view.attention(["a"], torch.ones(1, 1, 1, 1)), "it is 1 x 1 x 1"),
        (lambda: view.attention(["a"], torch.tensor(1.0)), "must be a sequence"),
        (lambda: view.attention(["a"], [1.0]), "a single value"),
        (lambda: view.attention(["a"], []), "no patterns"),
        (lambda: view.attention(["a"], {}), "attention: there are no patterns"),
        (lambda: view.attention(["a"], [[["x"]]]), "must hold numbers, not 'x'"),
        (lambda: view.attention(["a"], [[[1.0]]], labels=["x", "y"]), "2 labels for 1 patterns"),
        (lambda: view.attention(["a"], {"x": [[1.0]]}, labels=["x"]), "leave labels out"),
        (lambda: view.attention(["a"], [[[1.0]]], highlight=["L9H9"]), "'L9H9'"),
        (lambda: view.attention(["a"], [[[1.0]]], highlight=[1]), "highlight names 1"),
        (lambda: view.attention(["a"], [[[1.0]]], highlight=[-1]), "highlight names -1"),
        (lambda: view.attention([], []), "attention: tokens must be a non-empty sequence"),
        (lambda: view.attention("ab", [[[1.0]]]), "not 'ab'"),
        (lambda: view.tokens(["a", "b"], [1.0]), "1 values where 2"),
        (lambda: view.tokens(["a"], 1.0), "must be a sequence of numbers"),
        (lambda: view.tokens(["a"], [[1.0]]), "tokens: values must hold numbers"),
        (lambda: view.tokens(["a"], [1.0], full=0.0), "above 0, not 0.0"),
        (lambda: view.tokens(["a"], [1.0], full=math.nan), "above 0, not nan"),
        (lambda: view.tokens(["a"], [1.0], full=math.inf), "finite"),
        (lambda: view.grid(["r"], ["a"], [[1.0]], full=0.0), "grid: full must be a finite number above 0"),
        (lambda: view.grid(["r", "s"], ["a"], [[1.0]]), "grid: values has 1 rows where there are 2 names"),
        (lambda: view.grid(["r"], ["a"], [[1.0, 2.0]]), "grid: row r has 2 values where 1 are needed"),
        (lambda: view.bars(["a"], [1.0, 2.0]), "2 values where 1"),
        (lambda: view.bars(["a"], [1.0], highlight=["b"]), "'b'"),
        (lambda: view.bars([], []), "bars: labels must be a non-empty sequence"),
        (lambda: view.table([[1, 2]], ["n"]), "row 0 has 2 cells"),
        (lambda: view.table([], []), "table: columns must be a non-empty sequence"),
        (lambda: view.page("x", "one string"), "give a list"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(call, message):
    """The message says what was given and what is needed."""
    with pytest.raises(ArgumentError, match=re.escape(message)):
        call()


def test_pictures_need_no_torch():
    """Importing and drawing from lists loads neither torch nor transformers."""
    program = (
        "import sys; from lens_core import view; view.attention(['a'], [[[1.0]]]).html;"
        "import lens_core._commands._demo_page;"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("section", ["3", "None", "view.page('inner', [])"])
def test_a_section_of_another_kind_is_refused(section):
    """As users meet it: in a process where nothing checks annotations."""
    program = (
        "from lens_core import view; from lens_core.errors import ArgumentError\n"
        f"try: view.page('x', ['text', {section}])\n"
        "except ArgumentError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "a section must be a picture or a string, not" in done.stdout
