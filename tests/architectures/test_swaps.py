"""Units of whole models change places: nothing changes, or the table says what ties them to their place."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from tests.architectures.runnable import runnable
from tests.architectures.swaps import swapped_output, unit_blocks

EXACT = "llama gpt2 qwen3_moe bart gemma3n_text"
TIED = {
    "bloom": {"alibi"},
    "t5": {"position_bias relative_attention_bias"},
    "gpt_oss": {"sinks"},
    "olmo2": {"k_norm q_norm"},
    "bitnet": {"attn_sub_norm", "ffn_sub_norm"},
    "segformer": {"dwconv.dwconv"},
}


@pytest.mark.parametrize("model_type", [*EXACT.split(), *TIED])
def test_two_units_change_places_unheard_unless_the_table_says_what_ties_them(model_type: str) -> None:
    transformers.logging.set_verbosity_error()
    case = runnable(model_type)
    model, inputs = case.model, case.inputs
    assert inputs is not None
    blocks = unit_blocks(model)
    assert {tensor.tied for block in blocks for tensor in block} - {""} == TIED.get(model_type, set())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        base = model(**inputs)[0]
    heard = []
    for block in blocks:
        moved, part = (
            (swapped_output(model, some, inputs) - base).abs().max() for some in (block, block[:1])
        )
        heard.append(float(part) > 0)
        assert block[0].tied or moved <= 1e-3 * part + 1e-6 * base.abs().max(), block[0].info.name
    assert sum(heard) > 1
