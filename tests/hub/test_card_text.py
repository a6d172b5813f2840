"""What a card tells people."""

from __future__ import annotations

from card_support import COMMIT, KNOWN, PLAIN_TAGS, rendered
from hub_support import patch_of
from huggingface_hub import ModelCard

from neftsurgery.hub.card import base_of, write_card
from neftsurgery.hub.card_text import layer_counts


def test_what_a_person_reads(llama):
    page = rendered(write_card(llama, "me/french", KNOWN, {}, figure="neurons.png"))
    assert page.tags <= PLAIN_TAGS
    for words in (
        "new values for 15 neurons of 6 tensors (45 parameters",
        f"neftsurgery apply org/base@{COMMIT} me/french -o patched",
        'ns.attach(model, "me/french")',
        "66.9% of the squared difference",
        "73.1% of the squared difference",
        "mine.jsonl",
        "2\u00d710\u207b\u2075",
        "neurons 3%",
    ):
        assert words in page.text, words
    assert "neurons.png" in page.addresses


def test_a_card_says_what_a_patch_is_worth(tmp_path):
    """In bold, before anything else: what share it holds, or how the loss fell. No raw values follow."""
    counts, chosen = {"h.0.w": 2}, {"score": "cosine", "captured": 0.0312}
    partial = patch_of(tmp_path / "partial.safetensors", counts, selection=chosen)
    assert "\n**Partial: holds 3.12% of the change.** " in write_card(partial, "me/x", KNOWN, {})
    whole = patch_of(tmp_path / "whole.safetensors", counts, selection={**chosen, "captured": 1.0})
    assert "Partial" not in write_card(whole, "me/x", KNOWN, {})
    curve = [{"step": 0, "dev_loss": 1.37123456}, {"step": 1, "train_loss": 1.2}]
    training = {"steps": 4000, "dev_loss": 1.04865, "curve": curve, "more": {}, "examples_digest": "b115"}
    trained = patch_of(tmp_path / "trained.safetensors", counts, selection=chosen, training=training)
    text = write_card(trained, "me/x", KNOWN, {})
    assert "**1.371 before training, 1.049 after**" in text
    assert "| steps | `4,000` |" in text
    for raw in ("Partial", "curve", "more", "digest", "1.37123"):
        assert raw not in text.partition("\n---\n")[2]


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


def test_an_unknown_base(tmp_path):
    patch = patch_of(tmp_path / "p.safetensors", {"w": 1}, base={"name": "my-base", "fingerprint": "f9"})
    card = ModelCard(write_card(patch, "me/x", base_of(patch, None), {}))
    assert "base_model" not in card.data.to_dict()
    assert "base_model_relation" not in card.data.to_dict()
    assert "neftsurgery apply BASE me/x" in card.text
    assert "| local name of the base | `my-base` |" in card.text
    assert "| fingerprint of the base | `f9` |" in card.text


def test_layers_in_order_and_the_most_frequent_kind_first(llama):
    kinds, layers, found = layer_counts(llama)
    assert kinds == ["mlp.down_proj", "mlp.up_proj"]
    assert layers == [(f"model.layers.{layer}",) * 2 for layer in range(3)]
    assert found == [[2, 1], [3, 2], [4, 3]]


def test_neighbouring_layers_and_rare_kinds_are_put_together(tmp_path):
    counts = {f"h.{layer}.kind{kind}.weight": 1 + kind for layer in range(100) for kind in range(12)}
    patch = patch_of(tmp_path / "p.safetensors", counts | {"wte.weight": 3})
    kinds, layers, found = layer_counts(patch)
    assert kinds == [*(f"kind{kind}" for kind in range(11, 4, -1)), None]
    assert layers[:2] == [("h.0", "h.2"), ("h.3", "h.5")]
    assert layers[-2:] == [("h.99", "h.99"), ("", "")]
    assert found[0] == [3 * (1 + kind) for kind in range(11, 4, -1)] + [3 * 15]
    assert sum(map(sum, found)) == sum(counts.values()) + 3
