"""A Trainer that saves patches: what is saved, what is resumed, and which save counts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from trainer_support import PICKS, arguments, examples, trainer_of
from tuning_support import bits, llama, others, own_state, rows_of, saved, select, vectors

import neftsurgery as ns
from neftsurgery.tuning.trainer import last_save

HERE = Path(__file__).parent


def values(trainer: Any) -> dict[str, tuple[Any, bytes]]:
    return bits(trainer.attached.state_dict())


def test_a_save_holds_the_patch_and_nothing_of_the_model(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    before = bits(own_state(trainer.model))
    trainer.train()
    saves = sorted(path.name for path in tmp_path.iterdir())
    assert saves == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    rows = sum(p.numel() for p in trainer.attached.parameters())
    assert rows < 0.1 * sum(p.numel() for p in trainer.model.parameters())
    for path in tmp_path.rglob("*"):
        assert not path.name.startswith(("model", "pytorch_model", "adapter", "config", "training_args"))
        if path.suffix == ".safetensors":
            assert path.stat().st_size < 6 * 4 * rows + 8000
            loaded = load_file(path)
            assert sum(t.numel() for n, t in loaded.items() if t.is_floating_point()) == rows
    with ns.Patch.load(tmp_path / "checkpoint-6" / "neuron_patch.safetensors") as patch:
        assert sorted(patch.tensors) == sorted(PICKS)
    with pytest.raises(OSError):
        type(trainer.model).from_pretrained(tmp_path / "checkpoint-6")
    trainer.attached.detach()
    assert bits(trainer.model.state_dict()) == before


@pytest.mark.parametrize("resume", [True, "checkpoint-2"])
def test_resuming_is_going_on(tmp_path: Path, resume: Any) -> None:
    whole = trainer_of(tmp_path / "a")
    whole.train()
    trainer_of(tmp_path / "b", max_steps=6, save_steps=2).train()
    for step in (6, 4) if resume is True else ():
        shutil.rmtree(tmp_path / "b" / f"checkpoint-{step}")
    again = trainer_of(tmp_path / "b")
    again.train(resume_from_checkpoint=resume if resume is True else str(tmp_path / "b" / resume))
    assert again.state.global_step == 6
    assert values(again) == values(whole)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, again)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_is_done_makes_no_more_steps(tmp_path: Path, best: bool) -> None:
    more: dict[str, Any] = {"max_steps": 5, "lr_scheduler_type": "constant"}
    if best:
        more |= {
            "dev": examples(3),
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
        }
        more["learning_rate"] = 3.0
    whole = trainer_of(tmp_path, **more)
    whole.train()
    again = trainer_of(tmp_path, **more)
    assert again.train(resume_from_checkpoint=True).global_step == 5
    assert again.state.log_history == [e for e in whole.state.log_history if "train_runtime" not in e]
    assert values(again) == values(whole)


def kill_after_the_first_save(out: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "trainer_support.py"), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate()
    assert process.returncode == -9


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_complete_save(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process: sums depend on it
    try:
        whole = trainer_of(tmp_path / "a")
        whole.train()
        kill_after_the_first_save(tmp_path / "b")
        assert [path.name for path in (tmp_path / "b").iterdir()] == ["checkpoint-2"]
        half = shutil.copytree(tmp_path / "b" / "checkpoint-2", tmp_path / "b" / "checkpoint-4")
        (half / "neuron_save.json").unlink()  # as if killed while it was written
        again = trainer_of(tmp_path / "b", save_total_limit=1)
        again.train(resume_from_checkpoint=True)
        assert values(again) == values(whole)
        assert [path.name for path in (tmp_path / "b").iterdir()] == ["checkpoint-6"]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("damage", ["mark", "cut", "gone", "nonsense"])
def test_a_half_written_save_is_never_picked_up(tmp_path: Path, damage: str) -> None:
    trainer_of(tmp_path).train()
    half = tmp_path / "checkpoint-6"
    mark = half / "neuron_save.json"
    if damage == "mark":
        mark.unlink()
    elif damage == "cut":
        with open(half / "optimizer.pt", "r+b") as file:
            file.truncate(100)
    elif damage == "gone":
        (half / "neuron_state.safetensors").unlink()
    else:
        mark.write_text("[]")
    assert last_save(tmp_path) == tmp_path / "checkpoint-4"
    trainer = trainer_of(tmp_path)
    with pytest.raises(ns.UsageError, match="not complete"):
        trainer.train(resume_from_checkpoint=str(half))
    trainer.train(resume_from_checkpoint=True)
    assert last_save(tmp_path) == half


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert last_save(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ns.UsageError, match="no complete save"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_the_best_save_is_loaded_and_kept(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, dev=examples(4), max_steps=8, learning_rate=3.0, lr_scheduler_type="constant",
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, save_total_limit=2,
    )  # fmt: skip
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(losses, key=lambda step: losses[step])
    assert best != 8, losses  # so large a step makes it worse
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"checkpoint-{best}", "checkpoint-8"])
    state = load_file(tmp_path / f"checkpoint-{best}" / "neuron_state.safetensors")
    assert bits(dict(sorted(state.items()))) == dict(sorted(values(trainer).items()))
    assert trainer.evaluate()["eval_loss"] == losses[best]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_accumulated_batches_are_one_step(tmp_path: Path, dtype: Any, tolerance: float) -> None:
    """Against a loop by hand: every step sees all examples. The values are float32, the base is not."""
    data = examples(4)
    together = {key: torch.stack([one[key] for one in data]) for key in data[0]}
    model = saved(llama().to(dtype), tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_of(
        tmp_path / "run", model, train=data, per_device_train_batch_size=1, gradient_accumulation_steps=4,
        lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0,
    )  # fmt: skip
    trainer.train()
    twin = saved(llama().to(dtype), tmp_path / "twin")
    attached = ns.attach(twin, select(twin, PICKS))
    optimizer = torch.optim.AdamW(attached.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(6):
        optimizer.zero_grad()
        twin(**together).loss.backward()
        optimizer.step()
    for name, (axes, index) in PICKS.items():
        rows = rows_of(trainer.attached, name)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, rows_of(attached, name), rtol=tolerance, atol=tolerance)
        now = model.get_parameter(name).detach()
        assert torch.equal(others(now, axes, index), others(before[name], axes, index))
        assert not torch.equal(vectors(now, axes, index), vectors(before[name], axes, index))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    plain = trainer_of(tmp_path / "a", llama())
    plain.train()
    model = llama()
    trainer = trainer_of(
        tmp_path / "b", model, activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    trainer.train()
    for name in PICKS:
        torch.testing.assert_close(rows_of(trainer.attached, name), rows_of(plain.attached, name))


def test_what_it_refuses(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run")
    trainer.train()
    model = llama()
    other = trainer_of(tmp_path / "run", model)
    with pytest.raises(ns.UsageError, match="attached to another model"):
        type(other)(llama(), attached=other.attached, args=arguments(tmp_path))
    patch = other.attached.patch()
    other.attached.detach()
    with pytest.raises(ns.UsageError, match="no neuron is trainable"):
        type(other)(attached=ns.attach(model, patch), args=arguments(tmp_path))

    picks = dict(list(PICKS.items())[:1])
    attached = ns.attach(fresh := llama(), select(fresh, picks), base=False)
    narrow = type(other)(attached=attached, args=arguments(tmp_path / "run"), train_dataset=examples())
    with pytest.raises(ns.MismatchError, match="another selection"):
        narrow.train(resume_from_checkpoint=True)


def test_a_save_of_another_base_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        model = llama()
        with torch.no_grad():
            model.model.norm.weight.mul_(1 + number)
        saved(model, tmp_path / f"base {number}")
    trainers = []
    for number in range(2):
        model = type(model).from_pretrained(tmp_path / f"base {number}")
        attached = ns.attach(model, select(model, PICKS))
        args = arguments(tmp_path / "run", max_steps=2)
        trainers.append(type(trainer_of(tmp_path))(attached=attached, args=args, train_dataset=examples()))
    trainers[0].train()
    with pytest.raises(ns.MismatchError, match="another base"):
        trainers[1].train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_two_processes_save_and_resume_one_run(tmp_path: Path) -> None:
    """Half of every batch in each of two processes is one process with all of it; and it resumes."""
    alone = trainer_of(tmp_path / "alone", llama(), weight_decay=0.0)
    alone.train()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1",
         "--nproc_per_node", "2", str(HERE / "trainer_script.py"), str(tmp_path / "two")],
        capture_output=True, text=True, timeout=1800, check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    save = tmp_path / "two" / "checkpoint-2"
    marked = json.loads((save / "neuron_save.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= marked.keys()
    whole, resumed = (
        load_file(tmp_path / "two" / name / "neuron_state.safetensors") for name in ("whole", "resumed")
    )
    for name, tensor in alone.attached.state_dict().items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-4, atol=1e-5)
    assert bits(resumed) == bits(whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from neftsurgery.tuning.trainer import PatchSaving

    class PatchTrainer(PatchSaving, trl.SFTTrainer):  # type: ignore[name-defined,misc]
        pass

    from recipes_support import tokenizer

    def make(out: str) -> Any:
        model: nn.Module = llama(vocab_size=260, attention_dropout=0.1)
        args = trl.SFTConfig(
            output_dir=str(tmp_path / out), max_steps=4, save_steps=2, per_device_train_batch_size=2,
            learning_rate=1e-2, report_to="none", disable_tqdm=True, use_cpu=True, bf16=False,
            dataloader_pin_memory=False,
        )  # fmt: skip
        import datasets

        data = datasets.Dataset.from_list([{"prompt": "ab", "completion": "cd" + "e" * n} for n in range(8)])
        attached = ns.attach(model, select(model, PICKS), base=False)
        return PatchTrainer(attached=attached, args=args, train_dataset=data, processing_class=tokenizer())

    whole = make("a")
    whole.train()
    part = make("b")
    part.train()
    shutil.rmtree(tmp_path / "b" / "checkpoint-4")
    again = make("b")
    again.train(resume_from_checkpoint=True)
    assert values(again) == values(whole)
    files = {path.name for path in (tmp_path / "a" / "checkpoint-4").iterdir()}
    assert not any(name.startswith(("model", "adapter")) for name in files)
    assert json.loads((tmp_path / "a" / "checkpoint-4" / "neuron_save.json").read_text())["version"] == 1
