"""The model card: front matter that reads back, a text that hostile files cannot leave their place in."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser

import pytest
from hub_support import patch_of
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support import process

from neftsurgery.errors import MismatchError
from neftsurgery.hub.base import Base, base_of
from neftsurgery.hub.card import BEGIN, END, write_card
from neftsurgery.hub.markdown import bar, code
from neftsurgery.hub.picture import picture_of

KNOWN = Base("org/base", "1f" * 20, "base", "xxh3-128:" + "0" * 32)
#: As the Hub shows READMEs: tables, bare addresses made links, and HTML let through.
RENDER = MarkdownIt("gfm-like", {"html": True, "linkify": False})


class Tags(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.addresses, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not any(key.startswith("on") for key, _ in attrs), attrs
        self.addresses |= {value for key, value in attrs if key in ("href", "src")}

    def handle_data(self, data):
        self.text += data


PLAIN = {
    *("h1", "h2", "p", "a", "img", "strong", "code", "pre"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}


def rendered(card):
    return Tags(RENDER.render(ModelCard(card).text))


LLAMA = {
    f"model.layers.{layer}.{kind}.weight": layer + number + 1
    for layer in range(3)
    for number, kind in enumerate(("mlp.up_proj", "mlp.down_proj"))
}


@pytest.fixture
def llama(tmp_path):
    training = {"data": "mine.jsonl", "steps": 30, "learning_rate": 2e-5, "dev_loss": 1.25}
    selection = {"score": "cosine", "budget": {"neurons": "3%"}, "captured": 0.6687, "captured_scored": 0.731}
    return patch_of(
        tmp_path / "llama.safetensors",
        LLAMA,
        selection=selection,
        training=training,
        created_by="neftsurgery",
    )


def test_the_front_matter_reads_back(llama):
    licence = {"license": "other", "license_name": "llama", "license_link": "https://x/LICENSE"}
    card = ModelCard(write_card(llama, "me/french", KNOWN, licence))
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "neftsurgery",
        **licence,
        "tags": ["neftsurgery", "neuron-patch", "neft"],
        "model-index": card.data.to_dict()["model-index"],
    }
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", 1.25)
    assert card.data.model_name == "french"


def test_what_a_person_reads(llama):
    page = rendered(write_card(llama, "me/french", KNOWN, {}, picture="neurons.png"))
    assert page.tags <= PLAIN
    for words in (
        "new values for 15 neurons of 6 tensors, 45 parameters",
        f"neftsurgery apply org/base@{'1f' * 20} me/french -o patched",
        'ns.attach(model, "me/french")',
        "66.9%",
        "73.1%",
        "mine.jsonl",
        "2e-05",
        "neurons 3%",
    ):
        assert words in page.text, words
    assert "neurons.png" in page.addresses


def test_a_picture_where_there_is_something_to_draw_with(llama, monkeypatch):
    pytest.importorskip("neftsurgery.reporting")
    png = picture_of(llama)
    assert png.startswith(b"\x89PNG")
    assert picture_of(llama) == png  # else no push would ever find that nothing is new
    monkeypatch.setattr("neftsurgery.hub.picture.find_spec", lambda name: None)
    assert picture_of(llama) is None
    assert "![" not in write_card(llama, "me/x", KNOWN, {})


def test_the_table_counts_what_the_patch_has(llama):
    text = ModelCard(write_card(llama, "me/french", KNOWN, {})).text
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if "█" in line or "all |" in line
    ]
    assert [[row[1], *row[3:]] for row in rows] == [
        ["3", "2", "1"],
        ["5", "3", "2"],
        ["7", "4", "3"],
        ["15", "9", "6"],
    ]
    assert [row[2].count("█") for row in rows] == [round(12 * total / 7) for total in (3, 5, 7)] + [0]


def test_many_layers_and_kinds_stay_a_table(tmp_path):
    counts = {f"h.{layer}.kind{kind}.weight": 1 + kind for layer in range(100) for kind in range(12)}
    counts["wte.weight"] = 3
    text = ModelCard(write_card(patch_of(tmp_path / "p.safetensors", counts), "me/x", KNOWN, {})).text
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.count("|") > 6]
    assert len(rows) < 50
    assert len({len(row) for row in rows}) == 1
    assert len(rows[0]) < 14
    every = [int(row[1].replace(",", "")) for row in rows[2:]]
    assert sum(every[:-1]) == every[-1] == sum(counts.values())


def test_a_base_that_nobody_knows(tmp_path):
    patch = patch_of(tmp_path / "p.safetensors", {"w": 1}, base={"name": "my-base"})
    card = ModelCard(write_card(patch, "me/x", base_of(patch, None), {}))
    assert "base_model" not in card.data.to_dict()
    assert "base_model_relation" not in card.data.to_dict()
    assert "neftsurgery apply BASE me/x" in card.text
    assert "`my-base`" in card.text


# Hostile files.

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "` <b>out of the span</b> `",
    "``` \n\n# A heading\n",
    "a | b | c",
    "\n\n---\nlicense: mit\n---\n",
    "---\n",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/track.png)",
    "https://evil.example",
    "&lt;script&gt;",
    "\u202egnp.exe",
    "\x1b[2J\x07",
    END,
    BEGIN,
    "-->",
    "$$\\href{javascript:x}{y}$$",
    "\ud800",
    "x" * 5000,
    "",
    " ",
    "\\`",
    "a\u2028b",
]


def hostile(path, text):
    """A patch that says ``text`` wherever a patch may say something."""
    return patch_of(
        path,
        {f"model.layers.0.{text or 'x'}.weight": 2, f"{text or 'y'}.1.b": 1},
        base={"name": text, "repo": text, "revision": text, "fingerprint": text},
        selection={
            "score": text,
            "anatomy": {"a": text},
            "policy": [text],
            "budget": {text: text},
            "captured": text,
            "merged": {"patches": [{"name": text}]},
            "seed": 10**400,
        },
        created_by=text,
        training={"data": text, text: text, "dev_loss": text, "train_loss": 10**400},
    )


def check_harmless(card, text):
    read = ModelCard(card)
    assert set(read.data.to_dict()) == {"library_name", "tags"}
    assert card.count(BEGIN) == card.count(END) == 1
    assert card.isprintable() or all(c.isprintable() or c == "\n" for c in card)
    page = rendered(card)
    assert page.tags <= PLAIN
    known = ("https://github.com/neftsurgery/", "https://huggingface.co/org/")
    assert all(address.startswith(known) for address in page.addresses)
    # With addresses made links wherever they stand, there are no more of them.
    linked = Tags(MarkdownIt("gfm-like", {"html": True}).render(read.text))
    assert linked.addresses == page.addresses
    headings = re.findall(r"<h\d>(.*?)</h\d>", RENDER.render(read.text))
    assert [html.unescape(one) for one in headings] == [
        "x",
        "How to use it",
        "What is in it",
        "Where its neurons lie",
        "How its neurons were chosen",
        "How they were trained",
    ]
    for line in read.text.splitlines():
        if line.startswith("|"):
            assert len(line) < 5000


@pytest.mark.parametrize("text", ATTACKS, ids=lambda text: ascii(text)[:24])
def test_what_a_hostile_patch_says_stays_in_its_place(tmp_path, text):
    writable = text.encode("utf-8", "replace").decode()  # a header is UTF-8, its JSON may have anything
    patch = hostile(tmp_path / "p.safetensors", writable)
    patch.manifest["created_by"] = text
    card = write_card(patch, "me/x", base_of(patch, None), {})
    check_harmless(card, text)
    # And again over that card, as a second push has it: marks in names are not taken for ours.
    assert write_card(patch, "me/x", base_of(patch, None), {}, existing=card) == card


@settings(max_examples=60)
@given(st.text(max_size=30))
def test_a_code_span_is_never_left(text):
    (paragraph,) = re.findall(r"<p>(.*?)</p>", RENDER.render(f"a {code(text)} b"), re.DOTALL)
    assert re.fullmatch(r"a <code>[^<]*</code> b", paragraph)
    cells = RENDER.render(f"|x|y|\n|---|---|\n| {code(text)} | b |").count("<td>")
    assert cells == 2


def test_bars():
    assert [len(bar(value, 100)) for value in (0, 0.1, 50, 100)] == [0, 1, 6, 12]


# A card that is there already.


def test_text_of_the_owner_between_two_pushes(llama):
    first = write_card(llama, "me/x", KNOWN, {}, existing="---\nlanguage: fr\n---\nHello.\n")
    assert ModelCard(first).data.language == "fr"
    assert "Hello." in first
    second = write_card(llama, "me/x", KNOWN, {}, existing=first + "\nBye.\n")
    assert second.count(BEGIN) == 1
    assert second.index("Hello.") < second.index(BEGIN) < second.index(END) < second.index("Bye.")


def test_other_results_of_the_owner_stay(llama):
    mine = {
        "model-index": [
            {
                "name": "mine",
                "results": [
                    {
                        "task": {"type": "translation"},
                        "dataset": {"type": "wmt", "name": "WMT"},
                        "metrics": [{"type": "bleu", "value": 28.7}],
                    }
                ],
            }
        ]
    }
    card = write_card(llama, "me/x", KNOWN, {}, existing=f"---\n{json.dumps(mine)}\n---\nHello.\n")
    again = write_card(llama, "me/x", KNOWN, {}, existing=card)
    assert again == card
    results = ModelCard(card).data.eval_results
    assert sorted((result.metric_type, result.metric_value) for result in results) == [
        ("bleu", 28.7),
        ("loss", 1.25),
    ]


def test_a_loss_of_an_earlier_push_goes_with_it(llama, tmp_path):
    card = write_card(llama, "me/x", KNOWN, {})
    other = patch_of(tmp_path / "other.safetensors", LLAMA)
    data = ModelCard(write_card(other, "me/x", KNOWN, {}, existing=card)).data.to_dict()
    assert "model-index" not in data
    assert set(data) == {"base_model", "base_model_relation", "library_name", "tags"}


@pytest.mark.parametrize(
    "existing",
    [
        "---\n- a list\n---\n",
        "---\n{: [\n---\n",
        f"---\ntags: []\n---\n{BEGIN}\n",
        f"---\ntags: []\n---\n{END}\n",
        f"---\ntags: []\n---\n{END}\n{BEGIN}\n",
        f"---\ntags: []\n---\n{BEGIN}\n{BEGIN}\n{END}\n{END}\n",
        "---\nmodel-index: 3\n---\n",
    ],
)
def test_a_card_that_cannot_be_told_apart_is_refused(llama, existing):
    with pytest.raises(MismatchError, match="README"):
        write_card(llama, "me/x", KNOWN, {}, existing=existing)


def test_a_dry_run_shows_the_card_to_anybody(patch_file, tmp_path, monkeypatch):
    """Without a token or a network it is the card of a new repository, and that is said."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    shown = process("push", patch_file, "me/new", "--dry-run", "--json", cwd=tmp_path, HF_HOME=str(tmp_path))
    assert shown.code == 0, shown.err
    assert "neuron patch" in shown.json["card"]
    assert any("nobody is logged in" in warning for warning in shown.json["warnings"])
    assert process("push", patch_file, "me/new", cwd=tmp_path, HF_HOME=str(tmp_path)).code == 5
