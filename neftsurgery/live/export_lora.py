"""export_lora: a patch as a LoRA adapter, for the live model of its base where that can be asked."""

from __future__ import annotations

from typing import Any, Unpack

from ..checkpoint.checkpoint import Checkpoint
from ..errors import UsageError, boundary
from ..options import ExportOptions, RunOptions, split
from ..patch.patch import Patch
from ..storage.output_checks import AnyPath
from ..surgery.export import ExportPlan, ExportResult, plan_export
from ..surgery.lora_modules import LivePlaces
from ..surgery.verb import running, warn
from ..version import install_command


class _Options(ExportOptions, RunOptions):
    """All of them."""


@boundary
def export_lora(
    patch: Patch | AnyPath,
    out: AnyPath,
    *,
    base: AnyPath | None = None,
    force: bool = False,
    **options: Unpack[_Options],
) -> ExportResult:
    """Write a patch as a LoRA adapter folder that PEFT loads.

    If the training extra is installed and the base has a config, modules are named as in the live model, and
    nothing is written unless PEFT takes all of it. Else they are named as in the files, with a warning.

    Args:
        patch: A patch of rows or columns of linear weights; with the live model also of embeddings,
            convolutions and stacked experts.
        out: The adapter folder, which is written atomically.
        base: The checkpoint the patch was made from; a reversible patch does not need it.
        rank: The rank that all modules are padded to; by default the next of vLLM's ranks.
        rank_pattern: Each module has the rank that it needs, by PEFT's ``rank_pattern``.
        dtype: Of the factors: ``f32``, ``bf16`` or ``f16``, which round the differences.
        prefix: Modules are named as in the files, with this in front: ``transformer.`` for a GPT-2 without
            its head.
        force: Replace ``out`` if it exists.
        threads, memory, progress: As in `diff`.

    Raises:
        UsageError: If ``out`` exists, or the patch does not hold the replaced values and ``base`` is not
            given.
        MismatchError: If a tensor of the patch has no LoRA form or needs a larger rank, PEFT does not take
            the adapter, or ``base`` is not the patch's base.
        CorruptFileError, MachineError: If the patch's hashes do not match its content; if something cannot be
            read or written.
    """
    form, rest = split("export_lora", options, ExportOptions, RunOptions)
    plan = plan_lora(patch, out, base=base, force=force, **form)
    warn(__name__, plan.warnings)
    return plan.run(**running(rest))


def plan_lora(patch: Patch | AnyPath, out: AnyPath, **options: Any) -> ExportPlan:
    """Check everything that `export_lora` needs; nothing is written."""
    return plan_export(patch, out, live=_live_places, **options)


def _live_places(base: Checkpoint | None, patch: Patch) -> LivePlaces | str:
    why = "no base is named"
    if base is not None:
        try:
            from .lora_places import PeftPlaces

            return PeftPlaces(base, patch)
        except ImportError as error:
            why = f"{error.name} cannot be imported; {install_command('train')}"
        except UsageError as error:
            why = str(error)
    return f"modules are named as in the files, and PEFT was not asked if it finds them ({why})"
