"""Training examples: which tokens have a loss, what is held back, and what the digest covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes_support import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import neftsurgery as ns
from neftsurgery.training.examples import (
    Encoder,
    Example,
    Examples,
    collate,
    read_examples,
    require_separate,
)
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
    both = Examples([one], {"": [two]})
    assert len({both.digest(), Examples([two], {"": [one]}).digest(), Examples([one, two], {}).digest()}) == 3
    assert (both.tokens, both.learned) == (2, 1)


GENERATION = (
    "{% for m in messages %}{{ m['role'][0] }}:{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}."
    "{% endfor %}"
)


def test_what_the_template_marks_is_learned(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": role, "content": text} for role, text in (("user", "x"), ("assistant", "yes"))]
    }
    assert learned(tmp_path, row, GENERATION, loss_on="assistant_masks") == ("u:x.a:yes.", "yes")
    assert learned(tmp_path, row, GENERATION) == ("u:x.a:yes.", "a:yes.")
    with pytest.raises(ns.UsageError, match="the chat template marks no answer"):
        learned(tmp_path, row, loss_on="assistant_masks")


def test_packed_examples_are_the_same_examples(tmp_path: Path) -> None:
    """Each row is full of whole examples, and their losses are those of each alone."""
    texts = ["a" * n for n in (2, 7, 3, 5, 4, 6, 9)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = {"model": "m", "out": "o", "select": {"neurons": 1}}
    data = {"train": str(tmp_path / "t.jsonl"), "eval_share": 0, "max_length": 10}
    plain, packed = (
        read_examples(read_recipe({**recipe, "data": {**data, "packing": packing}}), tokenizer()).train
        for packing in (False, True)
    )
    cut = []
    for row in packed:
        assert len(row["input_ids"]) <= 10
        starts = [n for n, position in enumerate(row["position_ids"]) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:stop] == list(range(stop - start))
            assert row["labels"][start] == -100
            cut.append((row["input_ids"][start:stop], row["labels"][start + 1 : stop]))
    assert sorted(cut) == sorted((one["input_ids"], one["labels"][1:]) for one in plain)
    assert len(packed) == 5  # 10, 8, 7 + 3, 6 + 4, 5 tokens: no other way takes less
    batch = collate(packed[2:4], padding=0)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), **sizes))
    require_separate(model, packed)
    with torch.no_grad():
        together = [model(**collate([row], 0)).loss * _learned(row) for row in packed]
        alone = [model(**collate([row], 0)).loss * _learned(row) for row in plain]
    torch.testing.assert_close(sum(together), sum(alone))


def _learned(row: Any) -> int:
    return sum(label >= 0 for label in row["labels"][1:])


def test_a_model_that_reads_packed_examples_as_one_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=4))
    row: Example = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100] * 5, "position_ids": [0, 1, 2, 0, 1]}
    with pytest.raises(ns.UsageError, match="reads packed examples as one text"):
        require_separate(model, [row])
    require_separate(model, [{**row, "position_ids": [0, 1, 2, 3, 4]}])  # there is nothing to keep apart


def test_each_set_has_a_dev_set_of_its_own(tmp_path: Path) -> None:
    for letter, count in (("a", 20), ("b", 10)):
        text = "".join(json.dumps({"text": letter * (1 + n)}) + "\n" for n in range(count))
        (tmp_path / f"{letter}.jsonl").write_text(text)
    files = [str(tmp_path / f"{letter}.jsonl") for letter in "ab"]
    recipe = {"model": "m", "out": "o", "select": {"neurons": 1}}
    made = read_examples(read_recipe({**recipe, "data": {"train": files, "eval_share": 0.2}}), tokenizer())
    assert {name: len(one) for name, one in made.dev_sets.items()} == {"a": 4, "b": 2}
    assert len(made.train) == 24
    letters = {
        name: {tokenizer().decode(e["input_ids"])[0] for e in one} for name, one in made.dev_sets.items()
    }
    assert letters == {"a": {"a"}, "b": {"b"}}
    given = read_examples(read_recipe({**recipe, "data": {"train": files[0], "eval": files}}), tokenizer())
    assert {name: len(one) for name, one in given.dev_sets.items()} == {"a": 20, "b": 10}
    with pytest.raises(ns.UsageError, match=r"data\.train names a set twice"):
        read_recipe({**recipe, "data": {"train": [files[0]] * 2}})


def test_preferences_are_rows_of_their_own(tmp_path: Path) -> None:
    """The tokens are those of the chosen answer; the digest also covers the rejected one."""
    talk = [{"role": "user", "content": "x"}]
    rows = [
        {"prompt": "copy a:", "chosen": " a", "rejected": " b"},
        {"prompt": talk, "chosen": _said("yes"), "rejected": _said("no")},
        {"chosen": talk + _said("yes"), "rejected": talk + _said("no")},
    ]
    letters = tokenizer()
    letters.chat_template = CHAT

    def made(rows: list[Any], method: str = "dpo") -> Examples:
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"train": str(tmp_path / "p.jsonl"), "eval_share": 0}
        recipe = {
            "model": "m",
            "out": "o",
            "select": {"neurons": 1},
            "data": data,
            "train": {"method": method},
        }
        return read_examples(read_recipe(recipe), letters)

    examples = made(rows)
    assert [one["preference"] for one in examples.train] == rows
    answers = [letters.decode([i for i in one["labels"] if i >= 0]) for one in examples.train]
    assert answers == [" a</s>", "yes.", "yes."]
    other = [{**rows[0], "rejected": " c"}, *rows[1:]]
    assert made(other).digest() != examples.digest()
    for wrong, said in (
        ([{"prompt": "a", "chosen": "b"}], "must be texts, or lists of messages"),
        ([{"prompt": "a", "chosen": "b", "rejected": _said("c")}], "must be texts, or lists of messages"),
        (
            [{"prompt": "a", "completion": "b"}],
            "expected prompt, chosen and rejected; found",
        ),
    ):
        with pytest.raises(ns.MismatchError, match=said):
            made(wrong)
    with pytest.raises(ns.MismatchError, match="expected prompt and completion, or messages, or text"):
        made(rows, "sft")


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
