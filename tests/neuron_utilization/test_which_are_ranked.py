"""Which neurons are ranked."""

from __future__ import annotations

from pathlib import Path

import neftsurgery as ns


def test_the_kinds_of_weight_that_the_patch_changes_are_ranked_too(tiny: Path, tmp_path: Path) -> None:
    patch = ns.extract(
        tiny / "base", tiny / "tuned", anatomy="rows", neurons=9, out=tmp_path / "rows.safetensors",
        only=["*gate_proj*", "*1.mlp.down_proj*"], per="tensor",
    )  # fmt: skip
    found = ns.utilization(tiny / "base", patch, tiny / "text.txt")
    assert found.kinds == ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
    gates = [tensor for tensor in found.tensors.values() if tensor.kind == "mlp.gate_proj"]
    assert len(gates) == 3
    inside = sum(int(tensor.trained.sum()) for tensor in gates)
    rows_of_down = patch.neurons - inside  # as wide as the feed-forward block: nothing to correlate them with
    assert 0 < rows_of_down == found.facts["patch"]["outside"]
    assert found.groups()["trained"].neurons == inside
    rows = ns.utilization(tiny / "base", patch, tiny / "text.txt", anatomy="rows")
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert set(rows.kinds) == attention | {"mlp.gate_proj", "mlp.up_proj"}
