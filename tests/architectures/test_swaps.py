"""Units of whole models change places: nothing changes, or the table says what ties them to their place."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from neftsurgery.neurons.tensor_names import name_pattern
from tests.architectures.swaps import first_inputs, swapped_output, tied_blocks, unit_blocks
from tests.architectures.test_oracle import tiny_model

TYPES = "llama gpt2 phi3 gpt_neox qwen3_moe vit segformer bart gemma3n_text"
TIED = {"bloom": "alibi", "t5": "position_bias", "gpt_oss": "sinks", "olmo2": "q_norm", "bitnet": "norm"}


@pytest.mark.parametrize("model_type", [*TYPES.split(), *TIED])
def test_two_units_change_places_unheard_unless_the_table_says_what_ties_them(model_type: str) -> None:
    transformers.logging.set_verbosity_error()
    model = tiny_model(model_type)
    inputs = first_inputs(model)
    rows, blocks = unit_blocks(model)
    ties = tied_blocks(model, rows)
    assert len(blocks) > 1
    with torch.no_grad():
        base = model(**inputs)[0]
    broken = {}
    for first, tensors in blocks.items():
        tied = ties[".".join(name_pattern(first.split(".")))]
        moved = (swapped_output(model, tensors, inputs) - base).abs().max()
        part = (swapped_output(model, tensors[:1], inputs) - base).abs().max()
        if not tied and moved > 1e-3 * part + 1e-6 * base.abs().max():
            broken[first] = float(moved), float(part)
    assert not broken
    told = {tied for tied in ties.values() if tied}
    assert any(TIED[model_type] in tied for tied in told) if model_type in TIED else told <= {"dwconv.dwconv"}
