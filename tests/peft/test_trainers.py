"""TRL's trainers with ``peft_config=NeftConfig(...)``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from recipes_support import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from neftsurgery.peft.config import NeftConfig

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")

COMMON: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none",
    "disable_tqdm": True, "use_cpu": True, "bf16": False, "logging_steps": 1, "dataloader_pin_memory": False,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=260))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


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
