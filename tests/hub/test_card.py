"""The model card: front matter that reads back, and a text that hostile files cannot break out of."""

from __future__ import annotations

import html
import json
import re

import pytest
from card_support import KNOWN, LLAMA, PLAIN_TAGS, RENDER, Tags, rendered
from hub_support import patch_of
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from neftsurgery.errors import MismatchError
from neftsurgery.hub.card import BEGIN, END, base_of, card_figure, write_card


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
    """A patch that has ``text`` wherever a patch can have text."""
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
    assert page.tags <= PLAIN_TAGS
    known = ("https://github.com/neftsurgery/", "https://huggingface.co/org/")
    assert all(address.startswith(known) for address in page.addresses)
    # A renderer that turns bare addresses into links finds no others.
    linked = Tags(MarkdownIt("gfm-like", {"html": True}).render(read.text))
    assert linked.addresses == page.addresses
    headings = re.findall(r"<h\d>(.*?)</h\d>", RENDER.render(read.text))
    assert [html.unescape(one) for one in headings] == [
        "x",
        "How to use it",
        "What is in it",
        "Where the neurons are",
        "How the neurons were chosen",
        "How the neurons were trained",
    ]
    for line in read.text.splitlines():
        if line.startswith("|"):
            assert len(line) < 5000


@pytest.mark.parametrize("text", ATTACKS, ids=lambda text: ascii(text)[:24])
def test_a_hostile_patch_cannot_break_out_of_its_code_spans(tmp_path, text):
    writable = text.encode("utf-8", "replace").decode()  # a header is UTF-8; its JSON may escape anything
    patch = hostile(tmp_path / "p.safetensors", writable)
    patch.manifest["created_by"] = text
    card = write_card(patch, "me/x", base_of(patch, None), {})
    check_harmless(card, text)
    # And again over that card, as in a second push: marks in names do not count as marks.
    assert write_card(patch, "me/x", base_of(patch, None), {}, existing=card) == card


# An existing card.


def test_the_text_of_the_owner_is_kept(llama):
    first = write_card(llama, "me/x", KNOWN, {}, existing="---\nlanguage: fr\n---\nHello.\n")
    assert ModelCard(first).data.language == "fr"
    assert "Hello." in first
    second = write_card(llama, "me/x", KNOWN, {}, existing=first + "\nBye.\n")
    assert second.count(BEGIN) == 1
    assert second.index("Hello.") < second.index(BEGIN) < second.index(END) < second.index("Bye.")


def test_other_results_of_the_owner_are_kept(llama):
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


def test_the_loss_of_an_earlier_push_is_removed(llama, tmp_path):
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
def test_an_unclear_card_is_refused(llama, existing):
    with pytest.raises(MismatchError, match="README"):
        write_card(llama, "me/x", KNOWN, {}, existing=existing)


def test_a_figure_needs_matplotlib(llama, monkeypatch):
    pytest.importorskip("matplotlib")
    png = card_figure(llama)
    assert png.startswith(b"\x89PNG")
    assert card_figure(llama) == png  # otherwise every push would find a change
    monkeypatch.setattr("neftsurgery.hub.card.find_spec", lambda name: None)
    assert card_figure(llama) is None
    assert "![" not in write_card(llama, "me/x", KNOWN, {})
