"""A mixin for transformers' Trainer that saves, resumes and compares only the chosen neurons.

A save is the folder ``checkpoint-N`` that the Trainer makes. It holds the patch, the values in float32 and
the Trainer's own state (optimizer, schedule, random state), and nothing of the model. A completion marker,
written last, lists its files: a folder without one is incomplete, and is never resumed from.

This is the only module that uses private methods of the Trainer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..checkpoint.provenance import require_same_files
from ..errors import CorruptFileError, NeftError, UsageError, boundary, naming
from ..patch.patch import Patch
from ..patch.patch_file import PATCH_NAME
from ..selection.selection import Selection
from ..storage.output import fsync, fsync_folder, staged_file
from ..tensors.document import read_object
from .attached import Attached
from .processes import ENGINES

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
    from transformers.trainer_utils import TrainOutput
else:  # the class after the mixin, any Trainer; importing one takes seconds
    _Trainer = object


_STATE_NAME = "neuron_state.safetensors"
_MARKER_NAME = "neuron_save.json"
_SAVE = re.compile(r"checkpoint-(\d+)")


class PatchSaving(_Trainer):
    """A base class to put before a Trainer, which then takes ``attached``::

        class PatchTrainer(PatchSaving, Trainer): ...

        attached = ns.attach(model, selection)
        trainer = PatchTrainer(attached=attached, args=args, train_dataset=data)
        trainer.train(resume_from_checkpoint=False)     # True: from the last complete save
        attached.patch("neuron_patch.safetensors")

    Works with ``transformers.Trainer`` and TRL's ``SFTTrainer``, alone or under DDP, FSDP2, ZeRO 1 or 2.
    Saves hold the patch and what resuming needs; ``load_best_model_at_end`` loads the best values.

    Args:
        attached: The trainable neurons. Their model is the Trainer's; ``model`` may be left out.

    Raises:
        UsageError: If ``model`` is another model, no neuron is trainable, or the Trainer shards or copies the
            model.
    """

    reselects = False  # whether a save may be of other neurons, by `Attached.select`: then these are trained

    def __init__(self, model: Any = None, *args: Any, attached: Attached, **kwargs: Any) -> None:
        if model is not None and model is not attached.model:
            raise UsageError("the neurons are attached to another model")
        if not any(True for _ in attached.parameters()):
            raise UsageError(
                "no neuron is trainable", hint="attach a selection, or a patch with trainable=True"
            )
        self.attached = attached
        own: Any = attached.model
        marked = getattr(own, "_hf_peft_config_loaded", False)  # the mark of adapters
        own._hf_peft_config_loaded = marked or getattr(own, "is_quantized", False)  # or it is refused
        try:
            super().__init__(own, *args, **kwargs)
        finally:
            own._hf_peft_config_loaded = marked
        state: Any = self.accelerator.state
        zero3 = self.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3
        if zero3 or (self.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 1):
            what = f"{'ZeRO 3' if zero3 else 'FSDP 1'} puts other tensors in the place of the weights"
            raise UsageError(what, hint=ENGINES)
        if self.args.n_gpu > 1:
            raise UsageError(
                "this Trainer would copy the model to several GPUs in one process",
                hint="start it with `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU",
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's ``train``. With ``resume_from_checkpoint=True``, from the last complete save.

        Raises:
            UsageError: If there is no complete save to resume from.
        """
        if resume_from_checkpoint is True:
            found = last_save(self.args.output_dir)
            if found is None:
                raise UsageError("there is no complete save to resume from", file=self.args.output_dir)
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint and (done := self._finished(Path(resume_from_checkpoint))) is not None:
            return done
        if resume_from_checkpoint and self.is_deepspeed_enabled:  # which then loads its own copy of them
            self._load_values(Path(resume_from_checkpoint))
        model: Any = self.attached.model
        if self._inputs_need_gradients():
            model.enable_input_require_grads()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _finished(self, save: Path) -> TrainOutput | None:
        """The output of a run that was saved after its last step; the Trainer would make one step more."""
        from transformers import TrainerState
        from transformers.trainer_utils import TrainOutput

        self._require_complete(save)
        state = TrainerState.load_from_json(str(save / "trainer_state.json"))
        if not 0 < self.args.max_steps <= state.global_step:
            return None
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        else:
            self._load_values(save)
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return TrainOutput(state.global_step, losses[-1] if losses else 0.0, {})

    def _inputs_need_gradients(self) -> bool:
        """Whether reentrant checkpointing is on: it gives no gradient unless one of its inputs needs one."""
        args: Any = self.args
        for kind in ("activation_checkpointing", "gradient_checkpointing"):  # the new name and the old one
            if getattr(args, kind, None):
                options = getattr(args, f"{kind}_kwargs", None)
                return bool(options and options.get("use_reentrant"))
        return False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the patch and the values. No weights are gathered; every process must call this."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        if not (self.args.should_save or self.is_fsdp_enabled):
            return
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.attached.patch(folder / PATCH_NAME if self.args.should_save else None, force=True).close()
        state = {name: tensor.cpu().contiguous() for name, tensor in self.attached.state_dict().items()}
        if self.args.should_save:
            save_file(state, folder / _STATE_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer  # the Trainer would save all weights too

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")  # type: ignore[union-attr]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        args: Any = self.args
        saves = Path(self._get_output_dir(trial))
        save = saves / f"checkpoint-{self.state.global_step}"
        if args.should_save and save.exists():  # incomplete, or of another run
            _remove(save)
        self.accelerator.wait_for_everyone()
        # The Trainer would remove old saves before this one is complete; they are removed below instead.
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # every process adds its random state
        if args.should_save:
            _mark_complete(save)
            _rotate(saves, limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._require_complete(Path(resume_from_checkpoint))
        self._load_values(Path(resume_from_checkpoint))

    def _require_complete(self, save: Path) -> None:
        if not _is_complete(save):
            raise UsageError(
                "this save is not complete: the run was stopped while writing it",
                file=save,
                hint="use resume_from_checkpoint=True for the last complete save",
            )

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if not best.exists():  # the run was moved
            best = Path(str(self.args.output_dir)) / best.name
        self._load_values(best)

    @boundary
    def _load_values(self, save: Path) -> None:
        """Load the neurons' values of a save."""
        with Patch.load(save / PATCH_NAME) as patch:
            require_same_files("the save belongs to another base", self.attached.base, patch.base, file=save)
            if self.reselects:
                self.attached.select(Selection(patch.selection.tensors, self.attached.selection.facts))
        try:
            state = load_file(save / _STATE_NAME)
        except SafetensorError as error:
            raise CorruptFileError(f"the saved values cannot be read: {error}", file=save) from error
        self.attached.load_state_dict(state)


def last_save(folder: str | os.PathLike[str] | None) -> Path | None:
    """The last complete save in a Trainer's ``output_dir``; None if there is none."""
    return next((save for _, save in _saves(Path(str(folder))) if _is_complete(save)), None)


def _saves(folder: Path) -> Iterator[tuple[int, Path]]:
    """The saves in ``folder`` with their steps, latest first, complete or not."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = ((int(match[1]), folder / match[0]) for match in map(_SAVE.fullmatch, names) if match)
    yield from sorted(found, reverse=True)


def _mark_complete(save: Path) -> None:
    """Sync every file to disk, then write the completion marker."""
    files = {}
    for path in sorted(save.rglob("*")):
        if path.is_file():
            with naming(path), open(path, "rb") as file:
                fsync(file.fileno())
            files[path.relative_to(save).as_posix()] = path.stat().st_size
    fsync_folder(save)
    with staged_file(save / _MARKER_NAME, force=True) as marker:
        marker.write_at(json.dumps({"version": 1, "files": files}).encode(), 0)


def _is_complete(save: Path) -> bool:
    try:
        files = read_object(save / _MARKER_NAME)["files"]
        return bool(files) and all((save / name).stat().st_size == size for name, size in files.items())
    except (NeftError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Keep ``limit`` complete saves: the last, the best, and the latest others. Remove the rest."""
    if limit is None or limit < 1:
        return
    saves = [save for _, save in _saves(folder)]
    last, *earlier = [save for save in saves if _is_complete(save)]
    kept = [last, *(save for save in earlier if best is not None and save.name == Path(best).name)]
    kept += [save for save in earlier if save not in kept][: max(0, limit - len(kept))]
    for save in saves:
        if save not in kept:
            _remove(save)


def _remove(save: Path) -> None:
    """Remove a save, its marker first, so that a half-removed save is incomplete."""
    (save / _MARKER_NAME).unlink(missing_ok=True)
    shutil.rmtree(save)
