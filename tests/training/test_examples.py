"""Training examples: which tokens have a loss, what is held back, and what the digest covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipes_support import tokenizer

import neftsurgery as ns
from neftsurgery.training.examples import Encoder, Examples, collate, read_examples
from neftsurgery.training.raw_examples import read_raw_examples
from neftsurgery.training.recipe_reader import read_recipe

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}.{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def rows(tmp_path: Path, *contents: Any) -> Any:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(content) + "\n" for content in contents))
    return read_raw_examples(str(path), "train")


def learned(tmp_path: Path, row: Any, template: str = CHAT, **options: Any) -> tuple[str, str]:
    """The whole text of an example, and the part that is learned."""
    letters = tokenizer()
    letters.chat_template = template
    encoder = Encoder(letters, **({"loss_on": "completions", "max_length": 100} | options))
    (example,) = encoder.encode(rows(tmp_path, row))
    ids, labels = example["input_ids"], example["labels"]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return letters.decode(ids), letters.decode([label for label in labels if label >= 0])


def test_the_completion_is_learned(tmp_path: Path) -> None:
    row = {"prompt": "copy ab:", "completion": " ab"}
    assert learned(tmp_path, row) == ("copy ab: ab</s>", " ab</s>")
    assert learned(tmp_path, row, loss_on="all") == ("copy ab: ab</s>",) * 2
    assert learned(tmp_path, row, max_length=10) == ("copy ab: a", " a")
    assert learned(tmp_path, {"text": "ab"}) == ("ab</s>", "ab</s>")


def test_answers_are_learned(tmp_path: Path) -> None:
    talk = [("user", "x"), ("assistant", "yes"), ("user", "z"), ("assistant", "no")]
    row = {"messages": [{"role": role, "content": content} for role, content in talk]}
    assert learned(tmp_path, row) == ("u:x.a:yes.u:z.a:no.", "yes.no.")


def test_an_answer_of_weight_0_is_not_learned_and_tools_reach_the_template(tmp_path: Path) -> None:
    talk = [("user", "x", 1), ("assistant", "yes", 0), ("user", "z", 1), ("assistant", "no", 1)]
    row = {
        "messages": [{"role": role, "content": content, "weight": weight} for role, content, weight in talk],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    template = "{% for t in tools %}{{ t['function']['name'] }}!{% endfor %}" + CHAT
    assert learned(tmp_path, row, template=template) == ("f!u:x.a:yes.u:z.a:no.", "no.")


def test_long_examples_are_split_by_choice(tmp_path: Path) -> None:
    encoder = Encoder(tokenizer(), loss_on="completions", max_length=4, splits=True)
    made = encoder.encode(rows(tmp_path, {"prompt": "copy a:", "completion": " bcdef"}, {"text": "xyz"}))
    texts = [tokenizer().decode(one["input_ids"]) for one in made]
    assert texts == [" a: ", "bcde", "f</s>", "xyz</s>"]  # "copy" has nothing to learn
    assert [len([label for label in one["labels"] if label >= 0]) for one in made] == [1, 4, 2, 4]
    assert (encoder.long, encoder.dropped) == (1, 1)


def test_sets_are_joined_or_mixed_by_weight(tmp_path: Path) -> None:
    """By weight, until the first is exhausted: as datasets.interleave_datasets draws them."""
    for letter, count in (("a", 40), ("b", 400)):
        text = "".join(json.dumps({"text": letter * (1 + n % 9)}) + "\n" for n in range(count))
        (tmp_path / f"{letter}.jsonl").write_text(text)
    recipe = {"model": "m", "out": "o", "select": {"neurons": 1}, "data": {"train": "", "eval_share": 0}}
    files = [str(tmp_path / f"{letter}.jsonl") for letter in "ab"]
    letters = tokenizer()

    def mixed(train: Any, seed: int = 0) -> list[str]:
        made = read_examples(read_recipe(recipe, {"data.train": train, "train.seed": seed}), letters)
        assert bool(made.warnings) == isinstance(train, dict)
        return [letters.decode(one["input_ids"])[0] for one in made.train]

    assert mixed(files) == ["a"] * 40 + ["b"] * 400
    three_to_one = mixed({files[0]: 3, files[1]: 1})
    assert three_to_one.count("a") == 40
    assert 5 < three_to_one.count("b") < 25
    assert three_to_one == mixed({files[0]: 6, files[1]: 2}) != mixed({files[0]: 3, files[1]: 1}, seed=1)


def test_a_batch_is_padded(tmp_path: Path) -> None:
    short = {"input_ids": [5, 6], "labels": [-100, 6]}
    batch = collate([short, {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, -100], [7, 8, 9]]


def test_what_cannot_be_encoded(tmp_path: Path) -> None:
    letters = tokenizer()
    letters.chat_template = None
    encoder = Encoder(letters, loss_on="completions", max_length=3)
    with pytest.raises(ns.UsageError, match="no example has a token to learn"):
        encoder.encode(rows(tmp_path, {"prompt": "abcd", "completion": "e"}))
    with pytest.raises(ns.UsageError, match="need a chat template"):
        encoder.encode(rows(tmp_path, {"messages": [{"role": "assistant", "content": "x"}]}))


def test_a_share_is_held_back(tmp_path: Path) -> None:
    rows(tmp_path, *({"prompt": letter, "completion": "yes"} for letter in "abcdefghij"), {"text": "x" * 9})
    recipe = {
        "model": "m", "out": "o", "select": {"neurons": 1},
        "data": {"train": tmp_path / "data.jsonl", "eval_share": 0.3, "max_length": 8},
    }  # fmt: skip
    examples = read_examples(read_recipe(recipe), tokenizer())
    assert (len(examples.train), len(examples.dev)) == (8, 3)
    assert examples.warnings == ("1 examples are longer than data.max_length and were truncated",)
    again = read_examples(read_recipe(recipe, {"train.seed": 1}), tokenizer())
    assert again.digest() != examples.digest() == read_examples(read_recipe(recipe), tokenizer()).digest()
    few = read_examples(read_recipe(recipe, {"data": {"limit": 1}}), tokenizer())
    assert (few.dev, "too few examples" in few.warnings[0]) == ([], True)


def test_the_digest_tells_training_from_dev_examples() -> None:
    one, two = ({"input_ids": [n, 2], "labels": [-100, 2]} for n in (1, 3))
    both = Examples([one], [two])
    assert len({both.digest(), Examples([two], [one]).digest(), Examples([one, two], []).digest()}) == 3
    assert (both.tokens, both.learned) == (2, 1)
