"""TRL's trainers with ``peft_config=NeftConfig(...)``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from recipes_support import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from neftsurgery.peft.config import NeftConfig

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")

COMMON: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none",
    "disable_tqdm": True, "use_cpu": True, "bf16": False, "logging_steps": 1, "dataloader_pin_memory": False,
}  # fmt: skip


def llama(kind: Any = LlamaForCausalLM, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return kind(LlamaConfig(**sizes, vocab_size=260, **more))


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def losses(trainer: Any) -> list[float]:
    return logged(trainer, "loss")


def test_sft_trains_and_saves_the_adapter(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"prompt": "ab", "completion": "cd" + "e" * n} for n in range(8)])
    trainer = trl.SFTTrainer(
        llama(),
        args=trl.SFTConfig(output_dir=str(tmp_path), **COMMON),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=NeftConfig(task_type="CAUSAL_LM", neurons="10%"),
    )
    trainer.train()
    first, second = losses(trainer)
    assert second < first
    ids = torch.arange(9)[None]
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-2")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
        assert not torch.equal(loaded(ids).logits, llama()(ids).logits)


def test_dpo_starts_at_log_2_with_one_model_in_memory(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "chosen": "c" * (n + 1), "rejected": "d" * (n + 1)} for n in range(8)]
    trainer = trl.DPOTrainer(
        llama(),
        args=trl.DPOConfig(output_dir=str(tmp_path), **COMMON),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=NeftConfig(task_type="CAUSAL_LM", neurons="10%"),
    )
    assert trainer.ref_model is None
    trainer.train()
    first, second = losses(trainer)
    assert first == pytest.approx(math.log(2), abs=1e-6)
    assert second < first


def test_grpo_measures_its_divergence_from_the_base_with_one_model_in_memory(tmp_path: Path) -> None:
    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(one) / 260 for one in completion_ids]

    trainer = trl.GRPOTrainer(
        llama(),
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), num_generations=2, max_completion_length=4, beta=0.1, **COMMON
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a" * (n + 1)} for n in range(8)]),
        processing_class=tokenizer(),
        peft_config=NeftConfig(task_type="CAUSAL_LM", neurons="10%"),
    )
    assert trainer.ref_model is None
    trainer.train()
    ids = torch.arange(9)[None]
    model = trainer.model.eval()
    with torch.no_grad():
        tuned = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, llama()(ids).logits)  # the base, to the bit
        assert not torch.equal(tuned, llama()(ids).logits)
    first, second = logged(trainer, "kl")
    assert first == 0  # the policy starts as its reference
    assert second > 0


def test_a_reward_model_trains_a_new_head_whole(tmp_path: Path) -> None:
    def judge() -> Any:
        return llama(LlamaForSequenceClassification, num_labels=1, pad_token_id=0)

    rows = [{"chosen": "c" * (n + 1), "rejected": "d" * (n + 1)} for n in range(8)]
    trainer = trl.RewardTrainer(
        judge(),
        args=trl.RewardConfig(output_dir=str(tmp_path), **COMMON),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=NeftConfig(task_type="SEQ_CLS", neurons="10%", modules_to_save=["score"]),
    )
    trainer.train()
    first, second = losses(trainer)
    assert second < first
    bare = judge()
    bare.score.weight.data.zero_()  # another head, which the adapter's replaces
    loaded, ids = PeftModel.from_pretrained(bare, tmp_path / "checkpoint-2"), torch.arange(1, 9)[None]
    saved = loaded.base_model.model.score.modules_to_save["default"].weight
    assert not torch.equal(saved, judge().score.weight)
    assert torch.equal(saved, trainer.model.base_model.model.score.modules_to_save["default"].weight)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)
