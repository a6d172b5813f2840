"""The verb ``utilization``: rank neurons by correlation with hidden states, before and after a fine-tune."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Unpack, get_args

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.provenance import Provenance
from ..errors import MismatchError, UsageError, boundary
from ..live.loading import load_tokenizer, meta_model, require_model_folder
from ..live.placement import live_places
from ..neurons.anatomy import NeuronTensor, read_anatomy
from ..neurons.tensor_names import layer_and_kind
from ..patch.patch import Patch
from ..patch.patch_file import PATCH_KEY
from ..progress import Progress, silent
from ..selection.budget import Amount
from ..selection.selection import Selection
from ..sources.resolve import resolve
from ..storage.output_checks import AnyPath, refuse_output
from ..surgery.verify import verify
from ..tensors.header import read_header
from ..text import printable
from ..version import __version__
from .hidden_states import find_block_stack, hidden_size
from .measure import measure
from .options import ANATOMIES, BATCH, DTYPES, LENGTH, TOKENS, States, UtilizationOptions
from .result import Utilization
from .tokenized_text import TokenizedText, tokenize_file


@dataclass(frozen=True, repr=False)
class UtilizationPlan:
    """A planned utilization: everything is checked, no weight is loaded, nothing is written."""

    base: Checkpoint  # the checkpoint before training
    tuned: Patch | Checkpoint  # a patch of the base, or another checkpoint
    text: TokenizedText
    padding: int  # the token id that fills up short chunks
    tensors: Mapping[str, NeuronTensor]  # whose neurons are ranked
    blocks: Mapping[str, int]  # the number of the block that contains each tensor
    unranked: int | None  # trained neurons that are not ranked; None: comparing the checkpoints will tell
    stack: str  # the name of the list of blocks in the model
    # The options of `utilization`.
    states: States
    strongly: Amount | None
    batch: int
    dtype: str
    device: torch.device
    out: AnyPath | None
    force: bool

    def __repr__(self) -> str:
        return printable(
            f"UtilizationPlan(base={self.base.name}, neurons={self.neurons}, text={self.text.name}, "
            f"tokens={self.text.tokens}, states={self.states})"
        )

    @property
    def neurons(self) -> int:
        """How many neurons are ranked."""
        return sum(tensor.neurons for tensor in self.tensors.values())

    def facts(self) -> dict[str, Any]:
        """What is compared, and how: the `Utilization.facts` of the result."""
        kind, tuned = "tuned", self.tuned
        if isinstance(tuned, Patch):
            name, kind = tuned.path.name if tuned.path else None, "patch"
            other: object = {"name": name, "neurons": tuned.neurons, "outside": self.unranked}
        else:
            other = Provenance.of(tuned).to_json()
        return {
            "base": Provenance.of(self.base).to_json(),
            kind: other,
            "text": self.text.describe(),
            "states": self.states,
            "strongly": None if self.strongly is None else self.strongly.describe(),
            "dtype": self.dtype,
        }

    def describe(self) -> dict[str, object]:
        """The plan as JSON."""
        return {**self.facts(), "out": None if self.out is None else os.fspath(self.out)}

    @boundary
    def run(self, *, progress: Progress = silent) -> Utilization:
        """Measure and rank the neurons, and write ``out``; errors are those of `utilization`."""
        facts = self.facts() | {"created_by": f"neftsurgery {__version__}"}
        found = Utilization(measure(self, progress), facts)
        if self.out is not None:
            found.save(self.out, force=self.force)
        return found


def utilization(
    base: AnyPath,
    tuned: AnyPath | Patch,
    text: AnyPath,
    *,
    progress: Progress = silent,
    **options: Unpack[UtilizationOptions],
) -> Utilization:
    """Measure how a fine-tune moved neurons in the ranking by correlation with hidden states.

    Neurons of the same kind are ranked by their largest absolute Pearson correlation with the mean hidden
    state of a layer on a text, before and after training. The method is that of Xu et al., COLING 2025,
    section 6.1 (https://aclanthology.org/2025.coling-main.630/); ``docs/utilization.md`` has the definitions.

    Args:
        base: The checkpoint before training: a folder or Hub id, with config and tokenizer.
        tuned: A patch of the base, whose neurons count as trained; or another checkpoint, whose neurons with
            any differing bit do. Of a patch, no second model is loaded.
        text: A UTF-8 file with a text on each line.
        anatomy: ``ffn`` (the paper's up rows and down columns) or ``rows``, of vectors as wide as the hidden
            states. Default: ``ffn``, and in addition the kinds of weight in which the patch has neurons.
        states: Which hidden states count: those that enter the neuron's block or an earlier one
            (``preceding``, the default, as in the paper), leave it or a later one (``following``, as the
            paper's code), or ``all``.
        strongly: A neuron that moves by more ranks than this is strongly affected: a number, or a share of
            the neurons ranked together (``"5%"``). Default: the paper's 100,000 ranks as a share, 28.4%.
        tokens, length, batch: The most tokens of the text (default 32,768), of a text that the model sees
            together (default 512, or the model's maximum), and of those that go through it at once (default
            4,096).
        dtype, device: What the model computes in, and where. Default ``auto``: the dtype of its files, and a
            GPU if any.
        out, force: A safetensors file for the numbers of every neuron (default: none), and whether to replace
            it.
        progress: Called for tokens and for neurons, before and after training.

    Raises:
        UsageError: For a path or an option that is wrong, an empty text, or a model without a usable
            tokenizer.
        MismatchError: If the patch is not of this base, or the model does not have hidden states of one
            width.
        CorruptFileError, MachineError: If a file is damaged, or the text is not UTF-8; if something cannot be
            read or written.
    """
    return plan_utilization(base, tuned, text, **options).run(progress=progress)


@boundary
def plan_utilization(
    base: AnyPath,
    tuned: AnyPath | Patch,
    text: AnyPath,
    *,
    anatomy: str | None = None,
    states: States = "preceding",
    strongly: str | int | None = None,
    tokens: int = TOKENS,
    length: int | None = None,
    batch: int = BATCH,
    dtype: str = "auto",
    device: str = "auto",
    out: AnyPath | None = None,
    force: bool = False,
) -> UtilizationPlan:
    """Check everything without loading a weight; parameters and errors are those of `utilization`."""
    _check_options(states, dtype, tokens=tokens, length=length, batch=batch)
    other = tuned.path if isinstance(tuned, Patch) else tuned
    refuse_output(out, inputs=[base, text, *([] if other is None else [other])], force=force, kind="file")
    limit = None if strongly is None else Amount.parse(strongly)
    before = Checkpoint.open(base)
    with closing(before):
        model = _single_stream(before)
        after = _open_tuned(before, tuned)
        trained = after.selection if isinstance(after, Patch) else None
        tensors = _ranked_tensors(before, trained, anatomy, hidden_size(model))
        places = live_places(model, {name: tensor.layout for name, tensor in tensors.items()})
        live = {name: found[0].parameter for name, found in places.items()}
        stack = find_block_stack(model, live.values())
        blocks = {name: number for name in tensors if (number := stack.block_of(live[name])) is not None}
        tensors = {name: tensors[name] for name in blocks}
        tokenizer = load_tokenizer(before)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
        tokenized = tokenize_file(text, tokenizer, tokens=tokens, length=min(length or LENGTH, longest))
        _check_vocabulary(before, model, tokenized)
    unranked = None if trained is None else _count_unranked(trained, tensors)
    return UtilizationPlan(
        before, after, tokenized, tokenizer.pad_token_id or 0, tensors, blocks, unranked, stack.path,
        states, limit, batch, dtype, _device(device), out, force,
    )  # fmt: skip


def _ranked_tensors(
    base: Checkpoint, trained: Selection | None, anatomy: str | None, width: int
) -> dict[str, NeuronTensor]:
    """The ranked tensors; by default the paper's ``ffn``, and all of kinds with ``trained`` neurons."""
    if anatomy is not None and anatomy not in ANATOMIES:
        raise UsageError(
            "only single vectors can be correlated with hidden states",
            expected=f"the anatomy {' or '.join(ANATOMIES)}",
            found=anatomy,
        )
    trained_axes = {}
    if trained is not None and anatomy is None:  # of the kinds of tensor that have trained neurons
        chosen = ((layer_and_kind(name)[1], one.layout) for name, one in trained.own.items())
        trained_axes = {kind: layout.axes for kind, layout in chosen if layout.width == width}
    found: dict[str, NeuronTensor] = {}
    try:
        scored = read_anatomy(anatomy or "ffn", base.tensors, base.config).scored
        found = {tensor.info.name: tensor for tensor in scored}
    except MismatchError:
        if not trained_axes:
            raise
    for tensor in read_anatomy("rows", base.tensors, base.config).scored if trained_axes else ():
        name, axes = tensor.info.name, trained_axes.get(tensor.kind)
        if axes is not None and (name not in found or found[name].axes != axes):
            found[name] = replace(tensor, axes=axes)
    wide = {name: t for name, t in found.items() if t.layout.width == width and t.layer}
    if not wide:
        raise MismatchError(
            f"no neuron of a block is as wide as the hidden states: {width} elements",
            file=base.name,
            hint="the anatomy rows has every row of a linear weight",
        )
    return dict(sorted(wide.items()))


def _count_unranked(trained: Selection, tensors: Mapping[str, NeuronTensor]) -> int:
    """How many trained neurons are not among those of ``tensors``."""
    count = 0
    for name, chosen in trained.own.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.axes != chosen.layout.axes:
            count += len(chosen.index)
        else:
            count += int((~tensor.counted()[chosen.index]).sum())
    return count


def _check_options(states: str, dtype: str, **counts: int | None) -> None:
    if states not in get_args(States):
        raise UsageError("there are no such states", expected="preceding, following or all", found=states)
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError("there is no such dtype", expected=f"auto, {', '.join(DTYPES)}", found=dtype)
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"[[{name}]] must be at least 1", found=count)


def _single_stream(base: Checkpoint) -> Any:
    """The model without weights, which must have one stream of hidden states."""
    model = meta_model(base, "saved")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(
            "an encoder-decoder model has two streams of hidden states; only models with one are supported",
            file=base.name,
        )
    return model


def _device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is a GPU if torch has one, otherwise the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of these
        reason = next(iter(str(error).splitlines()), "")
        raise UsageError(f"torch has no device {name!r}", found=reason) from error
    return device


def _open_tuned(base: Checkpoint, tuned: AnyPath | Patch) -> Patch | Checkpoint:
    """The patch or checkpoint ``tuned``. A patch must fit the base, which must not be patched yet."""
    if not isinstance(tuned, Patch):
        source = resolve(tuned)
        if source.path.is_dir() or PATCH_KEY not in read_header(source.path).metadata:
            return require_model_folder(Checkpoint.open(source))
        tuned = Patch.load(source.path)
    tuned.selection.require_fit(base)
    found = verify(base.source.path, tuned)
    if not found.holds("base"):
        raise MismatchError(
            "the patch is not of this base",
            file=base.name,
            expected="base",
            found=found.state,
            hint="name the checkpoint that the patch was made from",
        )
    return tuned


def _check_vocabulary(base: Checkpoint, model: Any, text: TokenizedText) -> None:
    size = model.get_input_embeddings().num_embeddings
    largest = max(max(chunk.ids) for chunk in text.chunks)
    if largest >= size:
        raise MismatchError(
            "the tokenizer has a token that the model does not have",
            file=base.name,
            expected=f"ids below {size}",
            found=largest,
            hint="the folder may have the tokenizer of another model",
        )
