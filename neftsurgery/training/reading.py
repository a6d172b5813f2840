"""Recipes from YAML: a key that there is not, or a value that does not fit, is an error that says what would.

Loads transformers for its `HfArgumentParser` when a recipe is read, not before.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import UsageError, boundary
from ..selection.budget import Budget
from ..sources.resolve import is_hub_id
from .form import Form
from .recipe import Data, Probe, Recipe, Select, Train

__all__ = ["nearest", "read_recipe"]

_SECTIONS: Mapping[str, type[Any]] = {"data": Data, "probe": Probe, "select": Select, "train": Train}
_TOP = {"model": str, "out": str}
_MAX_BYTES = 100_000
_MAX_DEPTH = 50
_SHOWN = 100
_PATHS = ("model", "data.train", "data.eval", "probe.path", "select.like")


@boundary
def read_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Parameters
    ----------
    path:
        The YAML file. Paths in it start from its folder.
    overrides:
        ``key=value``, as in ``train.steps=100``. Paths in them start from the current folder.

    Raises
    ------
    UsageError
        For a key that there is not, a value that does not fit, or options that do not go together.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(
            "there is no such recipe", file=file, hint="recipes/quickstart.yaml is one to start from"
        )
    content = _parse(_text(file), file)
    flat = dict(_flat(content, file))
    for key, value in flat.items():
        if key in _PATHS and isinstance(value, str):
            flat[key] = _from_folder(value, file.parent)
        elif key == "out" and isinstance(value, str):
            flat[key] = str(file.parent / value)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UsageError(f"--set takes key=value, not {override!r}", hint="as in --set train.steps=100")
        _require_key(key, file="--set")
        flat[key] = _parse(text, file="--set " + override)
    return _build(flat, file)


def _text(file: Path) -> str:
    with open(file, "rb") as stream:
        raw = stream.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise UsageError(f"this is no recipe: it is larger than {_MAX_BYTES:,} bytes", file=file)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("this is no recipe: it is not UTF-8 text", file=file) from error


def _parse(text: str, file: str | Path) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise UsageError("not valid YAML: it is nested too deeply", file=file) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise UsageError(f"not valid YAML{where}: {problem}", file=file) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What PyYAML makes of `!!timestamp x` and the like.
        raise UsageError("not valid YAML: a value is not what its tag says", file=file) from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """YAML's safe one, but a key that is there twice is an error, and so is an alias.

    A few lines of aliases of aliases are a document of any size; brackets in brackets take PyYAML a time
    that is quadratic in their depth.
    """

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        if self.flow_level >= _MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, "it is nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"*{event.anchor}: recipes do without anchors and aliases", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for (key, _), value in zip(node.value, keys, strict=True):
            if keys.count(value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{value!r} is there twice", key.start_mark
                )
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _flat(content: object, file: Path) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; refuses keys that there are not."""
    if not isinstance(content, dict):
        raise UsageError("a recipe is a mapping of keys to values", file=file, found=type(content).__name__)
    for name, value in content.items():
        if name not in _SECTIONS:
            _require_key(str(name), file)
            yield str(name), value
        elif value is not None and not isinstance(value, dict):
            raise UsageError(f"{name} is a section of keys, not a value", file=file)
        else:
            for key, inner in (value or {}).items():
                _require_key(f"{name}.{key}", file)
                yield f"{name}.{key}", inner


def _keys() -> list[str]:
    inner = [f"{name}.{one.name}" for name, kind in _SECTIONS.items() for one in dataclasses.fields(kind)]
    return [*_TOP, *inner]


def _require_key(key: str, file: str | Path) -> None:
    if key not in (known := _keys()):
        raise UsageError(
            f"there is no key {_shown(key)} in a recipe", file=file, hint=nearest(key[:_SHOWN], known)
        )


def _shown(value: object) -> str:
    """A value for messages."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def nearest(key: str, known: Sequence[str]) -> str:
    """The hint for a name that there is not."""
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    close = same or difflib.get_close_matches(key, known, 3, 0.5)
    if not close:
        ends = {name.rpartition(".")[2]: name for name in known}
        close = [ends[end] for end in difflib.get_close_matches(last, list(ends), 3, 0.5)]
    return f"did you mean {' or '.join(close)}?" if close else f"keys are {', '.join(known)}"


def _from_folder(value: str, folder: Path) -> str:
    """A path in a recipe starts from the recipe's folder; what is not there and could be on the Hub stays."""
    joined = folder / value
    return value if not joined.exists() and is_hub_id(value) and value[0] != "." else str(joined)


def _build(flat: Mapping[str, Any], file: Path) -> Recipe:
    top = {key: _fit(key, flat.get(key), kind, file) for key, kind in _TOP.items() if _given(key, flat, file)}
    sections = {}
    for name, kind in _SECTIONS.items():
        hints = _hints(name)
        values = {}
        for one in dataclasses.fields(kind):
            key = f"{name}.{one.name}"
            required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
            if key in flat and (flat[key] is not None or _optional(hints[one.name])):
                values[one.name] = _fit(key, flat[key], hints[one.name], file)
            elif required:
                _given(key, flat, file)
        sections[name] = _parsed(kind, values)
    recipe = Recipe(**top, **sections)
    _check(recipe, file)
    return recipe


@functools.cache
def _hints(section: str) -> dict[str, Any]:
    return get_type_hints(_SECTIONS[section])


def _parsed(kind: Any, values: dict[str, Any]) -> Any:
    (section,) = _parser(kind).parse_dict(values, allow_extra_keys=False)
    return section


@functools.cache
def _parser(kind: Any) -> Any:
    try:
        from transformers import HfArgumentParser
    except ImportError as error:
        raise UsageError(
            f"training needs torch and transformers: {error}", hint="pip install 'neftsurgery[train]'"
        ) from error
    return HfArgumentParser(kind)


def _given(key: str, flat: Mapping[str, Any], file: Path) -> bool:
    if flat.get(key) is None:
        raise UsageError(f"the recipe does not say {key}", file=file, hint=f"add it, or give --set {key}=…")
    return True


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _fit(key: str, value: Any, hint: Any, file: Path) -> Any:
    """``value`` as the type that the field has."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            known = ", ".join(get_args(hint))
            raise UsageError(f"{key} cannot be {_shown(value)}", file=file, hint=f"it is one of {known}")
        return value
    converted = _convert(value, get_origin(hint) or hint)
    if converted is None:
        raise UsageError(
            f"{key} does not fit", file=file, expected=_KINDS[get_origin(hint) or hint], found=_shown(value)
        )
    return converted


_KINDS = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list of texts",
    dict: "a mapping",
}  # fmt: skip


def _convert(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``; None if it is something else."""
    if kind is bool or isinstance(value, bool):
        return value if kind is bool and isinstance(value, bool) else None
    if kind is str:
        return str(value) if isinstance(value, str | int | float) else None
    if kind is float:  # YAML takes 2e-5 for text
        try:
            number = float(value)
        except (TypeError, ValueError):
            return None
        return number if math.isfinite(number) else None
    if kind is list:
        items = [value] if isinstance(value, str) else value
        return items if isinstance(items, list) and all(isinstance(item, str) for item in items) else None
    return value if isinstance(value, kind) else None


_POSITIVE = (
    "data.max_length",
    "data.limit",
    "probe.steps",
    "probe.learning_rate",
    "train.steps",
    "train.epochs",
    "train.batch_size",
    "train.accumulate",
    "train.learning_rate",
    "train.save_every",
)
_NOT_NEGATIVE = (
    "train.warmup",
    "train.weight_decay",
    "train.clip",
    "train.seed",
    "select.seed",
    "data.eval_share",
)


def _check(recipe: Recipe, file: Path) -> None:
    """What goes with what, and which numbers make sense."""
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section), name)
        if value is not None and (value < 0 or (value == 0 and key in _POSITIVE)):
            raise UsageError(f"{key} is too small", file=file, found=value)
    if recipe.data.eval_share >= 1:
        raise UsageError(
            "data.eval_share leaves nothing to train on", file=file, found=recipe.data.eval_share
        )
    Form.of(recipe.data.prompt, recipe.data.completion)
    probe, select = recipe.probe, recipe.select
    has_file = probe.by in ("tuned", "scores", "selection")
    if has_file and probe.path is None:
        raise UsageError(f"probe.by {probe.by} needs probe.path", file=file)
    if not has_file and probe.path is not None:
        raise UsageError(f"probe.path does not go with probe.by {probe.by}", file=file)
    if has_file and probe.steps is not None:
        raise UsageError(f"probe.steps does not go with probe.by {probe.by}", file=file)
    done = {
        "gradients": ("score",),
        "fisher": ("score",),
        "scores": ("score", *_SCOPE),
        "selection": _ALL,
    }.get(probe.by, ())
    for one in dataclasses.fields(Select):
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if one.name in done and getattr(select, one.name) != default:
            raise UsageError(f"select.{one.name} does not go with probe.by {probe.by}", file=file)
    if probe.by != "selection":
        _check_budget(select, file, units=select.anatomy == "units" and probe.by != "scores")


_SCOPE = ("anatomy", "include", "exclude", "only", "axis")
_ALL = tuple(one.name for one in dataclasses.fields(Select))


def _check_budget(select: Select, file: Path, *, units: bool) -> None:
    budget = select.budget
    if not budget.keys() & {"neurons", "params", "threshold", "changed", "like"}:
        raise UsageError(
            "the recipe does not say how many neurons to train", file=file, hint="add select.neurons: 3%"
        )
    checked = Budget.of(**(budget | {"like": {}} if "like" in budget else budget))
    if units:
        try:
            checked.check_units()
        except UsageError as error:
            hint = "a unit lies in several tensors: say select.anatomy: rows"
            raise UsageError(error.what, file=file, hint=hint) from None
