"""The plan of a training, and `neftsurgery.train`: a frozen plan, a typed result, and keywords.

These are also the tests of `neuron_choice` and `train`. `tests/cli/test_train.py` tests
what a run writes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipes_support import make
from safetensors.torch import load_file
from support import raw_folder, raw_read, snapshot
from torch.utils.flop_counter import FlopCounterMode
from tuning_support import llama

import neftsurgery as ns
from neftsurgery.training.neuron_choice import within_backward
from neftsurgery.training.recipe_reader import read_recipe
from neftsurgery.training.train_plan import plan_train

ROWS = [
    {"prompt": f"shout {w}:", "completion": f" {w.upper()}"} for w in ("bird", "fish", "lion", "frog", "toad")
]


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    return {
        "model": base,
        "out": tmp_path / "run",
        "data": {"train": tmp_path / "data.jsonl", "eval_share": 0.2},
        "probe": {"steps": 2},
        "select": {"neurons": "5%"},
        "train": {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "save_every": 2},
    }


def test_a_plan_writes_nothing_and_a_run_does_not_change_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    plan = plan_train(recipe, {"train.seed": 1})
    assert snapshot(tmp_path) == before
    described = json.dumps(plan.describe())
    values = {one.name: getattr(plan, one.name) for one in dataclasses.fields(plan)}
    result = plan.run()
    assert json.dumps(plan.describe()) == described
    assert all(getattr(plan, name) is value for name, value in values.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.force = True  # type: ignore[misc]
    assert result.describe().keys() - plan.describe().keys() == {
        "finished", "step", "resumed_from", "train_loss", "base_dev_loss", "dev_loss", "best_step", "out",
        "bytes", "pushed", "dev_losses", "control_dev_loss",
    }  # fmt: skip


def test_train_takes_the_keys_of_a_recipe(recipe: dict[str, Any], tmp_path: Path) -> None:
    result = ns.train(recipe, out=tmp_path / "other", train={"steps": 2}, **{"data.eval_share": 0})
    assert isinstance(result, ns.TrainResult)
    assert (result.finished, result.step, result.dev_loss) == (True, 2, None)
    assert result.patch == tmp_path / "other" / "neuron_patch.safetensors"
    assert result.patch_bytes == result.patch.stat().st_size
    assert str(result) == (
        f"{result.patch}: 2 steps, {result.selection.neurons:,} neurons, train loss {result.train_loss:.4f}"
    )
    with ns.Patch.load(result.patch) as patch:
        assert patch.selection.neurons == result.selection.neurons
    with pytest.raises(ns.UsageError, match="exists already"):
        ns.train(recipe, out=tmp_path / "other")
    again = ns.train(tmp_path / "other" / "recipe.yaml", out=str(tmp_path / "other"), force=True)
    assert again.train_loss == result.train_loss


def test_a_stopped_run_says_so_and_resumes(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ns.UsageError, match="there is no unfinished run to resume"):
        ns.train(recipe, resume=True)
    with pytest.raises(ns.UsageError, match="resume and restart do not go together"):
        ns.train(recipe, resume=True, restart=True)
    notes: list[str] = []
    asked = iter([False, False, True])  # two batches of the probe, and a step
    stopped = plan_train(recipe).run(stop=lambda: next(asked), note=notes.append)
    assert (stopped.finished, stopped.step, stopped.patch) == (False, 1, None)
    assert str(stopped).startswith(f"stopped at step 1 of 4, saved in {tmp_path / 'run.unfinished'}, ")
    assert any(note.startswith("chose ") for note in notes)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ns.UsageError, match=r"recipe\.train\.seed differ"):
        ns.train(recipe, **{"train.seed": 5})
    plan = plan_train(recipe, resume=True)
    assert (plan.resumes, plan.describe()["resumes_from"], plan.choice.anatomy) == (1, 1, None)
    resumed = plan.run()
    assert (resumed.resumed_from, resumed.finished) == (1, True)
    assert f"dev loss {resumed.dev_loss:.4f} at step {resumed.best_step}" in str(resumed)
    assert not resumed.run_directory.exists()


@pytest.mark.parametrize(
    ("select", "about"),
    [({"params": 3000}, 3000), ({"params": "2%"}, None), ({"threshold": 0}, 0), ({"neurons": 10}, None)],
)
def test_how_much_a_probe_will_choose_is_estimated(
    recipe: dict[str, Any], select: dict[str, Any], about: int | None
) -> None:
    plan = plan_train(recipe | {"select": select | {"anatomy": "rows"}})
    parameters = plan.describe()["parameters"]
    expected = {"2%": round(0.02 * parameters), 3000: 3000, None: None}
    if "params" in select:
        assert plan.trainable == expected[select["params"]]
    elif "threshold" in select:
        assert plan.trainable is None
    else:
        assert 10 * 64 <= plan.trainable <= 10 * 176
    assert plan.describe()["estimated"]
    assert plan.choice.selection is None


@pytest.mark.parametrize(
    ("probe", "select", "score"),
    [
        ({"by": "weights"}, {"score": "lowrank", "rank": 4}, "lowrank"),
        ({"by": "gradient_over_weight", "steps": 1}, {}, "gradient_over_weight"),
    ],
)
def test_the_weights_or_their_gradients_choose(
    recipe: dict[str, Any], base: Path, probe: dict[str, Any], select: dict[str, Any], score: str
) -> None:
    """With every layer a pool, and as many neurons of each."""
    allocated = {"neurons": 12, "per": "layer", "allocate": "equal", "anatomy": "rows"}
    result = ns.train(recipe, probe=probe, select=allocated | select, train={"steps": 1})
    with ns.Scores.load(result.out / "scores.safetensors") as scores:
        assert scores.score == score
        assert scores.select(**allocated_only(allocated)).counts == result.selection.counts
        layers = [scores.tensors[name].layer for name in result.selection.counts for _ in range(1)]
    assert len(set(layers)) == 2
    if score == "lowrank":
        expected = ns.diff(base, score="lowrank", rank=4).select(**allocated_only(allocated))
        assert expected.counts == result.selection.counts


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_budget_of_backward_flops_is_kept(tmp_path: Path, share: float) -> None:
    """As torch counts the FLOPs of a step, beside those of a choice over all layers."""
    model = llama(num_hidden_layers=6, hidden_size=64, intermediate_size=128)
    model.save_pretrained(tmp_path / "base")
    given = {"model": tmp_path / "base", "out": "o", "data": {"train": "d"}, "select": {"params": "2%"}}
    ids = torch.randint(0, 40, (4, 16))

    def flops(exclude: list[str]) -> tuple[int, set[str]]:
        scores = ns.diff(tmp_path / "base", score="random", exclude=exclude)
        selection = scores.select(params="2%", per="layer")
        with ns.attach(model, selection), FlopCounterMode(display=False) as counter:
            loss = model(input_ids=ids, labels=ids).loss
            forward = counter.get_total_flops()
            loss.backward()
            return counter.get_total_flops() - forward, {scores.tensors[n].layer for n in selection.counts}

    with closing(ns.Checkpoint.open(tmp_path / "base")) as base:
        narrowed = within_backward(read_recipe(given | {"schedule": {"backward": share}}), base)
        again = within_backward(read_recipe(narrowed.to_json()), base)
    assert again.select == narrowed.select  # as in OUT/recipe.yaml
    (whole, every), (spent, reached) = flops([]), flops(narrowed.select.exclude)
    assert len(every) == 6
    lowest = min(int(layer.rpartition(".")[2]) for layer in reached)
    assert len(reached) == 6 - lowest  # those from the lowest one to the last
    assert (
        share - 0.2 < spent / whole < share + 0.06
    )  # whole layers; with the rows' own gradients, and attention


def test_a_budget_of_backward_flops_below_one_layer_is_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(ns.UsageError, match=r"schedule\.backward does not reach a layer"):
        plan_train(recipe | {"schedule": {"backward": 0.05}})


def test_a_run_within_a_budget_of_backward_flops_resumes_exactly(recipe: dict[str, Any]) -> None:
    recipe |= {"schedule": {"backward": 0.8}}
    whole = ns.train(recipe)
    assert {name.split(".")[2] for name in whole.selection.counts} == {"1"}
    values = load_file(whole.out / "neuron_patch.safetensors")
    asked = iter([False, False, False, True])  # two batches of the probe, and two steps
    plan_train(recipe, force=True).run(stop=lambda: next(asked))
    ns.train(recipe, resume=True, force=True)
    again = load_file(whole.out / "neuron_patch.safetensors")
    assert all(torch.equal(again[name], value) for name, value in values.items())


def allocated_only(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "anatomy"}


def test_scores_of_another_base_are_refused(recipe: dict[str, Any], base: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", 1)
    ns.diff(tmp_path / "other", base, out=tmp_path / "scores").close()
    with pytest.raises(ns.MismatchError, match="the scores are of another base"):
        plan_train(recipe | {"probe": {"by": "scores", "path": tmp_path / "scores"}})


def test_a_fine_tune_under_another_prefix_is_read_with_the_keys_that_the_refusal_names(
    recipe: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    tuned = {  # another last bit, in some elements
        name: (kind, bits ^ (rng.random(bits.shape) < 0.1).astype(bits.dtype))
        for name, (kind, bits) in raw_read(base / "model.safetensors").items()
    }
    config = json.loads((base / "config.json").read_text())
    raw_folder(tmp_path / "plain", tuned, 1, config)
    raw_folder(tmp_path / "wrapped", {f"module.{name}": one for name, one in tuned.items()}, 1, config)
    probe = {"by": "tuned", "path": tmp_path / "wrapped"}
    with pytest.raises(ns.MismatchError, match=r"under another prefix") as error:
        plan_train({**recipe, "probe": probe})
    assert str(error.value).endswith("probe.strip_prefix: module.")
    found = plan_train({**recipe, "probe": {**probe, "strip_prefix": "module"}}).choice
    expected = plan_train({**recipe, "probe": {"by": "tuned", "path": tmp_path / "plain"}}).choice
    assert found.selection is not None
    assert expected.selection is not None
    assert found.selection.counts == expected.selection.counts


@pytest.mark.parametrize("by", ["gradients", "tuned", "scores"])
def test_a_number_that_may_be_meant_as_a_percentage_is_warned_of_by_its_key(
    recipe: dict[str, Any], base: Path, tmp_path: Path, by: str
) -> None:
    """``select.neurons: 3`` trains three neurons; who means percent must say so."""
    make(tmp_path / "tuned", 6)
    select = {"neurons": "3", "anatomy": "rows"}
    probe: dict[str, Any] = {"by": by}
    if by == "scores":
        ns.diff(base, tmp_path / "tuned", out=tmp_path / "scores").close()
        probe["path"], select = tmp_path / "scores", {"neurons": "3"}
    elif by == "tuned":
        probe["path"] = tmp_path / "tuned"
    said = [
        text for text in plan_train(recipe | {"probe": probe, "select": select}).warnings if "percent" in text
    ]
    assert len(said) == 1
    assert re.fullmatch(
        r"select\.neurons: 3 chooses 3 neurons of 1,\d{3}: 3 percent is select\.neurons: 3%", said[0]
    )
    few = recipe | {"probe": probe, "select": select | {"neurons": "3%"}}
    assert not any("percent" in text for text in plan_train(few).warnings)


def test_the_name_train_loads_no_torch() -> None:
    code = (
        "import sys, neftsurgery as ns\n"
        "assert ns.train and ns.TrainResult\n"
        "print(sorted({'torch', 'transformers', 'yaml'} & set(sys.modules)))\n"
        "sys.modules['transformers'] = None\n"
        "try:\n    ns.train('recipe.yaml')\n"
        "except ns.UsageError as error:\n    print(error.what, error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "[]\ntraining needs a package that is not installed: transformers "
        "in a clone of neftsurgery: pip install '.[train]'\n"
    )


def test_what_a_recipe_asks_of_the_model_is_refused_in_its_own_words(recipe: dict[str, Any]) -> None:
    recipe["select"]["include"] = ["no.such.*"]
    with pytest.raises(ns.UsageError) as error:
        plan_train(recipe)
    assert "select.include" in str(error.value)
    assert "--" not in str(error.value)


@pytest.mark.parametrize("by", ["gradients", "finetune"])
def test_a_probe_goes_on_where_it_stopped(recipe: dict[str, Any], tmp_path: Path, by: str) -> None:
    """Stopped after each batch in turn, it ends with the scores and the patch of an undisturbed run."""
    recipe["probe"] = {"by": by, "steps": 3} | ({"learning_rate": 1e-3} if by == "finetune" else {})
    whole = plan_train(recipe, {"out": tmp_path / "whole"}).run()
    reports: list[str] = []
    stopped = None
    for done in (1, 2):
        plan = plan_train(recipe, resume=done > 1)
        stopped = plan.run(stop=lambda: True, report=lambda where, text: reports.append(f"{where}: {text}"))
        assert (stopped.finished, stopped.step, stopped.selection.neurons) == (False, 0, 0)
        assert str(stopped).startswith("stopped at step 0 of 4, saved in ")
        assert not (tmp_path / "run").exists()
    with pytest.raises(ns.UsageError, match=r"recipe\.train\.seed differ"):
        plan_train(recipe, {"train.seed": 5})
    resumed = plan_train(recipe, resume=True).run()
    assert not resumed.run_directory.exists()
    for name in ("neuron_patch.safetensors", "scores.safetensors"):
        one, two = (load_file(result.out / name) for result in (whole, resumed))
        assert all(torch.equal(one[key], two[key]) for key in one.keys() | two.keys())
    assert len(reports) == 2
    assert re.match(r"(probe, batch|step) 2 of 3: loss \d\.\d{4}, .*[1-9]\d* tokens/s$", reports[1])


def test_losses_are_written_as_they_are_measured(recipe: dict[str, Any], tmp_path: Path) -> None:
    losses, reports = tmp_path / "run.unfinished" / "losses.jsonl", []

    def stop() -> bool:  # asked after each batch of the probe, and after each step
        if losses.exists():
            reports.append(losses.read_text())
        return len(reports) == 3

    def points(text: str) -> list[tuple[int, list[str]]]:
        return [(point.pop("step"), sorted(point)) for point in map(json.loads, text.splitlines())]

    learned = ["gradient_norm", "learning_rate", "train_loss"]
    expected = [(0, ["dev_loss"]), (1, learned), (2, learned), (2, ["dev_loss"]), (3, learned)]
    assert not plan_train(recipe).run(stop=stop).finished
    assert [points(text) for text in reports] == [expected[:1], expected[:2], expected[:4]]
    assert points(losses.read_text()) == expected
    result = plan_train(recipe).run()
    assert result.base_dev_loss == json.loads(reports[0])["dev_loss"]
    with ns.Patch.load(result.patch) as patch:
        assert patch.manifest["training"]["base_dev_loss"] == result.base_dev_loss > result.dev_loss


def test_early_stopping_is_a_finished_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    """On a dev set with other answers, whose loss falls and then rises; also if stopped in between."""
    dev = "".join(json.dumps(row | {"completion": f" {row['prompt']}"}) + "\n" for row in ROWS)
    (tmp_path / "dev.jsonl").write_text(dev)
    keys = {"steps": 12, "learning_rate": 0.3, "save_every": 1, "scheduler": "constant", "early_stopping": 2}
    overrides = {"data.eval": tmp_path / "dev.jsonl", "train": keys}
    asked = iter([False] * 8 + [True])  # two batches of the probe, and seven steps
    assert plan_train(recipe, overrides).run(stop=lambda: next(asked)).step == 7
    result = plan_train(recipe, overrides, resume=True).run()
    assert result.resumed_from == 7
    losses = {point.step: point.dev_loss for point in result.curve}
    assert result.finished
    assert result.step == result.best_step + 2 < 12
    assert losses[result.best_step] == min(losses[step] for step in range(1, result.step + 1))


def test_a_model_that_cannot_be_quantized_is_found_before_the_probe(recipe: dict[str, Any]) -> None:
    with pytest.raises(ns.UsageError, match="cannot quantize the model"):
        plan_train(recipe, {"train.quantization": {"load_in_4bt": True}})


def test_the_model_is_loaded_as_the_recipe_asks(recipe: dict[str, Any], tmp_path: Path) -> None:
    keys = {"dtype": "float32", "attn_implementation": "eager", "gradient_checkpointing": True}
    plan = plan_train(recipe, {"train": recipe["train"] | keys})
    model = plan.load_model()
    assert (str(model.dtype), model.config._attn_implementation) == ("torch.float32", "eager")
    assert plan_train(recipe).load_model().dtype == torch.bfloat16
    assert plan.run().finished


def test_a_repository_that_cannot_be_pushed_to_is_found_before_training(recipe: dict[str, Any]) -> None:
    with pytest.raises(ns.UsageError, match="push is not the name of a repository"):
        plan_train(recipe, {"push": "mine"})


def test_an_example_longer_than_the_models_positions_is_refused(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "a" * 3000}) + "\n")
    with pytest.raises(ns.UsageError, match=r"an example has [\d,]+ tokens, and the model \d+ positions"):
        plan_train(recipe, {"data": {"max_length": 5000, "eval_share": 0}})


def test_a_random_control_is_trained_beside(recipe: dict[str, Any], tmp_path: Path) -> None:
    """As many random units, of as many parameters; its curve and patch are those of a run of its own."""
    stops = iter([False] * 3 + [True] + [False] * 99)
    plan = plan_train(recipe, {"control": "random"})
    assert not plan.run(stop=lambda: next(stops)).finished  # stopped in the control
    result = ns.train(recipe, control="random", resume=True)
    out = tmp_path / "run"
    chosen = ns.Selection.load(out / "selection.safetensors")
    control = ns.Selection.load(out / "control" / "selection.safetensors")
    assert control.facts.policy == "random"
    widest = max(one.layout.width for one in chosen)
    assert 0 <= chosen.parameters - control.parameters < 4 * widest  # less than one more unit
    assert any(
        not np.array_equal(one.index, chosen.tensors[name].index)
        for name, one in control.tensors.items()
        if name in chosen.tensors
    )
    selected = str(out / "control" / "selection.safetensors")
    probe = {"by": "selection", "path": selected}
    alone = ns.train({**recipe, "out": tmp_path / "alone", "select": {}, "probe": probe})
    assert result.control_dev_loss == alone.dev_loss
    assert [one.control_loss for one in result.curve if one.dev_loss is not None] == [
        one.dev_loss for one in alone.curve if one.dev_loss is not None
    ]
    patches = (folder / "neuron_patch.safetensors" for folder in (out / "control", tmp_path / "alone"))
    got, want = map(load_file, patches)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in got)
    assert not (tmp_path / "run.unfinished").exists()
    with ns.Patch.load(out / "neuron_patch.safetensors") as patch:
        assert patch.training["control_dev_loss"] == result.control_dev_loss
    with pytest.raises(ns.UsageError, match="control needs a dev loss"):
        plan_train(recipe, {"control": "random", "data.eval_share": 0})


def test_the_dev_loss_of_each_set(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2] * 5))
    files = [str(tmp_path / "data.jsonl"), str(tmp_path / "more.jsonl")]
    result = ns.train(recipe, **{"data.train": files})
    assert result.dev_losses.keys() == {"data", "more"}
    assert result.dev_loss is not None
    mean = (4 * result.dev_losses["data"] + 2 * result.dev_losses["more"]) / 6
    assert result.dev_loss == pytest.approx(mean, rel=1e-6)
    with ns.Patch.load(result.patch or "") as patch:
        assert patch.training["dev_losses"] == dict(result.dev_losses)


def test_preferences_are_learned_by_trl(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The first loss is log 2: the reference is the base. A run that is stopped ends in the same bits."""
    pytest.importorskip("trl")
    rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["prompt"]} for r in ROWS * 4]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = ns.train(recipe, **{"train.method": "dpo", "out": tmp_path / "whole"})
    assert whole.base_dev_loss == pytest.approx(np.log(2), rel=1e-5)
    assert whole.dev_loss is not None
    assert whole.dev_loss < 0.69
    plan = plan_train(recipe, {"train.method": "dpo"})
    assert not plan.run(stop=lambda: True).finished
    result = ns.train(recipe, resume=True, **{"train.method": "dpo"})
    got, want = (load_file(one.patch or "") for one in (result, whole))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in got)
    for key, value in (("packing", True), ("loss_on", "all"), ("long", "split")):
        with pytest.raises(ns.UsageError, match=f"data.{key} does not go with train.method: dpo"):
            plan_train(recipe, {"train.method": "dpo", f"data.{key}": value})


def test_packed_training(recipe: dict[str, Any]) -> None:
    result = ns.train(recipe, **{"data.packing": True, "data.max_length": 64})
    assert result.finished
    assert result.train_loss is not None
