"""Each module has a test file of its name, or stands here with the file that tests it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Modules without a test file of their own, most often because they are seen only through another one.
ELSEWHERE = {
    "checkpoint/changes.py": "checkpoint/test_journal.py",
    "checkpoint/folder_files.py": "surgery/test_apply.py",
    "cli/commands/heal.py": "checkpoint/test_healing.py",
    "cli/commands/select.py": "cli/test_round.py",
    "cli/console.py": "cli/test_exit_codes.py",
    "cli/training_demo.py": "cli/test_demo.py",
    "cli/main.py": "cli/test_help.py",
    "coding/compression.py": "coding/test_tables.py",
    "neuron_utilization/result.py": "neuron_utilization/test_utilization_result.py",
    "patch/overlap.py": "surgery/test_merge.py",
    "patch/patch_file.py": "patch/test_lossless_patch.py",
    "patch/write.py": "patch/test_patch.py",
    "checkpoint/dequantized.py": "quantization/test_layouts.py",
    "peft/choosing.py": "peft/test_model.py",
    "peft/config.py": "peft/test_model.py",
    "progress.py": "surgery/test_verify.py",
    "quantization/weight.py": "quantization/test_layouts.py",
    "scoring/partial_sums.py": "scoring/test_engine.py",
    "scoring/scored_tensors.py": "scoring/test_scores.py",
    "storage/output_checks.py": "storage/test_output.py",
    "surgery/lora_modules.py": "surgery/test_export.py",
    "surgery/merge_checks.py": "surgery/test_merge.py",
    "surgery/model_files.py": "surgery/test_lossless.py",
    "surgery/pairing.py": "surgery/test_diff.py",
    "surgery/rewrite.py": "surgery/test_apply.py",
    "surgery/summary.py": "surgery/test_diff.py",
    "tensors/compiled.py": "scoring/test_kernels.py",
    "tensors/arrays.py": "scoring/test_kernels.py",
    "training/neuron_choice.py": "training/test_train_plan.py",
    "tuning/expert_weights.py": "tuning/test_neuron_weight.py",
    "version.py": "cli/test_help.py",
}


def modules() -> list[str]:
    package = ROOT / "neftsurgery"
    found = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    return sorted(one for one in found if not one.endswith(("__init__.py", "__main__.py")))


def test_every_module_has_a_test_file_of_its_name_or_a_reason() -> None:
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    without = {one for one in modules() if f"test_{Path(one).name}" not in names}
    assert without == ELSEWHERE.keys()


def test_the_files_that_test_them_are_there_and_hold_tests() -> None:
    for module, file in ELSEWHERE.items():
        tree = ast.parse((ROOT / "tests" / file).read_text())
        tests = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
        assert tests, module
