"""What a file or folder is, where another kind was wanted, and what helps: told by content, not by name.

It is asked only about what was refused. So nothing here decides what is read.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import hub_place

_HEAD, _TAIL = 4096, 65536
#: Bytes 4 to 8 of a safetensors file, however damaged the rest of it is.
_SAFETENSORS = b"\0\0\0\0{"

# What helps. {path}, {folder} and {name} are those of the file; by {first} a folder was known.
_TORCH = (
    'convert it: `python -c "import sys, torch; from safetensors.torch import save_file; save_file({k: '
    "v.contiguous().clone() for path in sys.argv[2:] for k, v in torch.LOAD.items()}, sys.argv[1])"
    '" OUT.safetensors {path}`'
)
_PICKLE = _TORCH.replace("LOAD", "load(path, 'cpu', weights_only=True)")
_TORCHSCRIPT = _TORCH.replace("LOAD", "jit.load(path, 'cpu').state_dict()")
_NUMPY = (
    'convert it: `python -c "import sys, numpy; from safetensors.numpy import save_file; '
    'save_file(dict(numpy.load(sys.argv[1])), sys.argv[2])" {path} OUT.safetensors`'
)
_GGUF = (
    'convert it, with transformers 5 and gguf installed: `python -c "import sys; from transformers import '
    "AutoModelForCausalLM as M, GgufConfig as G; M.from_pretrained(sys.argv[1], gguf_file=sys.argv[2], "
    'quantization_config=G(dequantize=True)).save_pretrained(sys.argv[3])" {folder} {name} OUT`'
)
_FROM_TF = "convert it with transformers 4: from_pretrained(FOLDER, from_tf=True), then save_pretrained(OUT)"
_FROM_FLAX = _FROM_TF.replace("from_tf", "from_flax")
_ORIGINAL = "fetch the model's safetensors weights instead"
_AGAIN = "fetch the file again: `hf download ORG/NAME {name}`"
_UNPACK = "unpack it: `tar -xf {path}`"
_FOLDER = "name its folder: {folder}"
_ZERO = "`python -m deepspeed.utils.zero_to_fp32 {path} OUT --safe_serialization`"

#: How a file begins, and of a zip which names it holds; what it is; what helps. The first match counts.
_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (rb"GGUF", "a GGUF file, as llama.cpp reads", _GGUF),
    (rb"lmgg|fmgg|tjgg|algg", "a GGML file, as llama.cpp read before GGUF", _ORIGINAL),
    (rb"PK\x03\x04.*/constants\.pkl", "a TorchScript program", _TORCHSCRIPT),
    (rb"PK\x03\x04.*/data\.pkl", "a PyTorch pickle, as torch.save writes", _PICKLE),
    (rb"\x80\x02\x8a\nl\xfc\x9cF\xf9", "a PyTorch pickle, as torch.save wrote before 1.6", _PICKLE),
    (rb"\x80[\x02-\x05]", "a Python pickle", f"loading a pickle runs its code: {_ORIGINAL}"),
    (rb"PK\x03\x04.*\.npy", "a NumPy archive (.npz), as MLX writes", _NUMPY),
    (rb"PK\x03\x04.*\.weights\.h5|\x89HDF\r\n", "HDF5, as Keras and TensorFlow write", _FROM_TF),
    (rb"[\x81-\x8f][\xa1-\xbf\xd9]|\xde..[\xa1-\xbf\xd9]", "msgpack, as Flax writes", _FROM_FLAX),
    (rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]", "an ONNX graph", _ORIGINAL),
    (rb"....TFL3", "a TensorFlow Lite graph", _ORIGINAL),
    (rb"\x93NUMPY", "one NumPy array (.npy)", "save it under its name with safetensors.numpy.save_file"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive", "unpack it: `unzip {path}`"),
    (rb"\x1f\x8b", "a gzip archive", f"{_UNPACK}, or `gzip -d {{path}}`"),
    (rb"\x28\xb5\x2f\xfd", "a zstd archive", f"{_UNPACK}, or `zstd -d {{path}}`"),
    (rb"\xfd7zXZ|BZh[1-9]|7z\xbc\xaf|\x04\x22\x4d\x18", "a compressed archive", _UNPACK),
    (rb".{257}ustar", "a tar archive, as NeMo writes", _UNPACK),
    (rb"version https://git-lfs", "a Git LFS pointer, not the content", "fetch the content: `git lfs pull`"),
    (rb"/annex/objects/", "a git-annex pointer, not the content", "fetch it: `git annex get {path}`"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page, often one that tells of an error", _AGAIN),
    (rb'\s*\{.*"weight_map"', "an index of shards", _FOLDER),
    (rb'\s*\{.*"peft_type"', "the config of a PEFT adapter", _FOLDER),
    (rb'\s*\{.*"(model_type|architectures)"', "the config of a model", _FOLDER),
    (rb"\0{64}", "zeros, as of a download that was not finished", _AGAIN),
)


def foreign_file(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """What the file at ``path``, which is not a valid safetensors file, is instead, and what helps.

    None if it is not known. Reads its first and last bytes only.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
        if head.startswith(b"PK") and len(head) == _HEAD:  # a zip lists its names at its end
            file.seek(max(_HEAD, os.fstat(file.fileno()).st_size - _TAIL))
            head += file.read(_TAIL)
    if not head:
        return "an empty file", _filled(_AGAIN, path)
    if head[4:9] == _SAFETENSORS:
        return None
    for pattern, what, hint in _FORMATS:
        if re.match(pattern, head, re.DOTALL):
            return what, _filled(hint, path)
    if re.fullmatch(rb"[\t\n\r -~]+", head):
        return f"a text file that begins with {head[:60].decode()!r}", _filled(_AGAIN, path)
    return None


#: What a folder holds, by name, that is not a checkpoint; what the folder is; what helps.
_FOLDERS = (
    (
        "adapter_config.json",
        "the folder of a PEFT adapter",
        "name its base here, and the adapter as TUNED: `neftsurgery diff BASE {path}`",
    ),
    ("*.distcp", "a distributed checkpoint of torch (DCP)", "join it: `accelerate merge-weights {path} OUT`"),
    (
        "pytorch_model_fsdp_*",
        "a training checkpoint of FSDP",
        "join its weights: `accelerate merge-weights {path}/{first} OUT`",
    ),
    ("zero_to_fp32.py", "a training checkpoint of DeepSpeed", f"join its weights: {_ZERO}"),
    ("*mp_rank_*", "a checkpoint of DeepSpeed or Megatron, one part a rank", f"join its parts: {_ZERO}"),
    ("*_rank_*", "a checkpoint in parts, one a rank", "join its parts with the trainer that wrote them"),
    ("latest_checkpointed_iteration.txt", "a checkpoint of Megatron", "export it with Megatron Bridge"),
    ("model_index.json", "a pipeline of several models", "name the weight file of one of them"),
    ("checkpoint-*", "a folder of training checkpoints", "name one of them: {path}/{first}"),
    ("neuron_patch.safetensors", "a neuron patch", "name its file or Hub id as PATCH, after the base"),
)


def foreign_folder(folder: Path, endings: tuple[str, ...] = ()) -> tuple[str | None, str]:
    """What a folder that is no checkpoint is instead, if that is known, and what helps.

    ``endings``: those of weights in other formats. The first such file is looked into.
    """
    names = sorted(os.listdir(folder))
    for pattern, what, hint in _FOLDERS:
        if found := fnmatch.filter(names, pattern):
            return what, _filled(hint, folder, found[0])
    if found := fnmatch.filter(names, "*.safetensors"):
        return None, f"it does hold {', '.join(found[:3])}: name that file"
    weights = [name for name in names if name.endswith(endings) and (folder / name).is_file()]
    for name in sorted(weights, key=lambda name: ("model" not in name, not name.endswith(".bin"))):
        if other := foreign_file(folder / name):
            shards = fnmatch.filter(weights, f"{name.partition('-')[0]}-*{folder.joinpath(name).suffix}")
            rest = "".join(f" {shlex.quote(str(folder / shard))}" for shard in shards if shard != name)
            place = shlex.quote(str(folder / name))
            return f"{name}, {other[0]}", other[1].replace(place, place + rest)
    if not names:
        return "an empty folder", "name the folder that holds the weights"
    return None, "there are no safetensors weights here: `hf download ORG/NAME` fetches those of a Hub model"


def _filled(hint: str, path: str | os.PathLike[str], first: str = "") -> str:
    """A hint with the words of a command quoted for a shell."""
    place = hub_place(os.fspath(path))
    folder, name = os.path.split(place)
    values = {"path": place, "folder": folder or ".", "name": name, "first": first}
    return re.sub(r"\{(path|folder|name|first)\}", lambda found: shlex.quote(values[found[1]]), hint)


#: The kinds of safetensors file that hold a document, by its key.
KINDS = {
    "neuron_patch": "a neuron patch",
    "neuron_selection": "a selection",
    "neuron_scores": "a scores file",
}
_CHECKPOINT, _ADAPTER = "a checkpoint", "a PEFT adapter"

_ORDER = "the base comes first, and patches after it"

#: What helps, by the key of what was wanted ("" for a checkpoint), and by what was found; "": anything else.
_INSTEAD = {
    "neuron_patch": {
        "a scores file": "cut it out: `neftsurgery extract BASE TUNED --scores {path} --neurons 3% -o PATCH`",
        "a selection": "cut it out: `neftsurgery extract BASE TUNED --selection {path} -o PATCH`",
        _ADAPTER: "make a patch of its folder: `neftsurgery extract BASE ADAPTER --changed -o PATCH`",
        "": f"{_ORDER}; make a patch: `neftsurgery extract BASE TUNED --neurons 3% -o PATCH`",
    },
    "neuron_selection": {
        "a scores file": "choose from it: `neftsurgery select {path} --neurons 3% -o SELECTION`",
        "": "make one: `neftsurgery select SCORES --neurons 3% -o SELECTION`",
    },
    "neuron_scores": {"": "make one: `neftsurgery diff BASE TUNED -o SCORES`"},
    "": {
        "a neuron patch": f"{_ORDER}: `neftsurgery apply BASE {{path}} -o OUT`",
        "": "see what it holds: `neftsurgery inspect {path}`",
    },
}


def tensor_kind(metadata: Mapping[str, str], names: Iterable[str] = ()) -> str:
    """What a safetensors file is, by its metadata and the names of its tensors."""
    for key, what in KINDS.items():
        if key in metadata:
            return what
    return _ADAPTER if any(".lora_" in name for name in names) else _CHECKPOINT


def what_helps(key: str, found: str, path: str | os.PathLike[str] | None) -> str | None:
    """What helps somebody who gave a file of the kind ``found`` where that of ``key`` is wanted.

    The key ``""`` stands for a checkpoint. None for files that no user makes, such as journals.
    """
    hints = _INSTEAD.get(key, {})
    hint = hints.get(found, hints.get(""))
    return None if hint is None else _filled(hint, path or "FILE")


def folder_instead(folder: str | os.PathLike[str], key: str) -> str | None:
    """What helps somebody who gave a folder where a file of the kind of ``key`` is wanted."""
    names = os.listdir(folder)
    for name in (f"{key}.safetensors", f"{key.removeprefix('neuron_')}.safetensors"):
        if name in names:
            return f"name the file in it: {shlex.quote(os.path.join(folder, name))}"
    return what_helps(key, _ADAPTER if "adapter_config.json" in names else _CHECKPOINT, folder)
