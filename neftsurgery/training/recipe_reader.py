"""From a YAML file or a mapping to a `Recipe`.

YAML is read by PyYAML's safe loader, reduced to what recipes need; errors name the line.

An unknown key is an error, and the message suggests the nearest one. A value of the wrong type is an error,
and the message states the type. So are numbers that make no sense, and keys that do not go together.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import NeftError, UsageError, boundary, naming, spelled
from ..options import PrefixOptions, Scope
from ..selection.budget import Budget
from ..sources.resolve import is_hub_id
from .raw_examples import PromptTemplate
from .recipe import PATH_KEYS, Data, Probe, Recipe, Select, Train

_MAX_BYTES = 100_000
_MAX_DEPTH = 50

AnyRecipe = str | os.PathLike[str] | Mapping[str, Any]
"""A recipe as a user gives it: the path of a YAML file, or a mapping with its content."""

_SECTIONS: Mapping[str, type[Any]] = {"data": Data, "probe": Probe, "select": Select, "train": Train}
_MAX_SHOWN = 100
_POSITIVE = (
    "data.max_length", "data.limit", "probe.steps", "probe.learning_rate", "train.steps", "train.epochs",
    "train.batch_size", "train.accumulate", "train.learning_rate", "train.save_every",
)  # fmt: skip
_NOT_NEGATIVE = (
    "train.warmup", "train.weight_decay", "train.clip", "train.seed", "select.seed", "data.eval_share",
)  # fmt: skip


@boundary
def read_recipe(recipe: AnyRecipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe: a YAML file, whose paths start from its folder, or a mapping.

    ``overrides`` replace values, as ``{"train.steps": 100}`` or ``{"train": {"steps": 100}}``.
    """
    if isinstance(recipe, Mapping):
        file, values = None, dict(_flat(recipe, None))
    else:
        file = Path(recipe)
        if not file.is_file():
            raise UsageError(
                "there is no such recipe", file=file, hint="recipes/quickstart.yaml is one to start from"
            )
        values = dict(_flat(load_yaml(file), file))
        for key in PATH_KEYS:
            if isinstance(value := values.get(key), str):
                values[key] = str(file.parent / value) if key == "out" else _from_folder(value, file.parent)
    values |= dict(_flat(overrides or {}, None))
    made = Recipe(
        **_values(Recipe, "", values, file),
        **{name: kind(**_values(kind, f"{name}.", values, file)) for name, kind in _SECTIONS.items()},
    )
    check_recipe(made, file)
    return made


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """The overrides that ``--set KEY=VALUE`` gives; a value is YAML."""
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"[[set]] takes key=value, not {text!r}", hint="as in train.steps=100")
        _require_key(key, "[[set]]")
        overrides[key] = parse_yaml(value, f"[[set]] {text}")
    return overrides


@functools.cache
def known_keys() -> tuple[str, ...]:
    """All keys of a recipe, as ``train.steps``."""
    top = [one.name for one in dataclasses.fields(Recipe) if one.name not in _SECTIONS]
    return (
        *top,
        *(f"{name}.{one.name}" for name, kind in _SECTIONS.items() for one in dataclasses.fields(kind)),
    )


def nearest(key: str, known: Sequence[str]) -> str:
    """The hint for an unknown key: the known ones that are spelled like it."""
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    close = same or difflib.get_close_matches(key, known, 3, 0.5)
    if not close:
        ends = {name.rpartition(".")[2]: name for name in known}
        close = [ends[end] for end in difflib.get_close_matches(last, list(ends), 3, 0.5)]
    return f"did you mean {' or '.join(close)}?" if close else f"keys are {', '.join(known)}"


def _flat(content: object, file: Path | None) -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; refuses unknown keys."""
    if not isinstance(content, Mapping):
        raise UsageError("a recipe is a mapping of keys to values", file=file, found=type(content).__name__)
    for name, value in content.items():
        if name not in _SECTIONS:
            _require_key(str(name), file)
            yield str(name), value
        elif value is not None and not isinstance(value, Mapping):
            raise UsageError(f"{name} is a section with keys of its own, not a value", file=file)
        else:
            for key, inner in (value or {}).items():
                _require_key(f"{name}.{key}", file)
                yield f"{name}.{key}", inner


def _require_key(key: str, file: str | Path | None) -> None:
    if key not in known_keys():
        raise UsageError(
            f"a recipe has no key {_shown(key)}", file=file, hint=nearest(key[:_MAX_SHOWN], known_keys())
        )


def _shown(value: object) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def _from_folder(value: str, folder: Path) -> str:
    """A path that starts from ``folder``. A Hub id stays as it is unless the path exists."""
    joined = folder / value
    return value if not joined.exists() and is_hub_id(value) and value[0] != "." else str(joined)


def _values(kind: type[Any], prefix: str, given: Mapping[str, Any], file: Path | None) -> dict[str, Any]:
    """The arguments of a dataclass from the values under its keys; what has a default may be left out."""
    hints = get_type_hints(kind)
    values = {}
    for one in dataclasses.fields(kind):
        key, hint = prefix + one.name, hints[one.name]
        if key in _SECTIONS:
            continue
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if given.get(key) is not None or (key in given and type(None) in get_args(hint)):
            values[one.name] = _fit(key, given[key], hint, file)
        elif required:
            hint = f"add it to the recipe, or override {key}" if file else "add it"
            raise UsageError(f"the recipe does not say {key}", file=file, hint=hint)
    return values


def _fit(key: str, value: Any, hint: Any, file: Path | None) -> Any:
    """``value`` in the type of its field."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    kind = get_origin(hint) or hint
    if kind is Literal:
        if value not in get_args(hint):
            known = ", ".join(get_args(hint))
            raise UsageError(f"{key} cannot be {_shown(value)}", file=file, hint=f"it is one of {known}")
        return value
    converted = _convert(value, kind)
    if converted is None:
        raise UsageError(f"{key} does not fit", file=file, expected=_TYPE_NAMES[kind], found=_shown(value))
    return converted


_TYPE_NAMES = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list of texts",
    dict: "a mapping of plain values",
}  # fmt: skip


def _convert(value: Any, kind: Any) -> Any:
    """``value`` as ``kind``; None if it is of another type."""
    if isinstance(value, bool):
        return value if kind is bool else None
    if kind is str:
        return str(value) if isinstance(value, str | int | float | os.PathLike) else None
    if kind is float:  # YAML reads 2e-5 as text
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None
    if kind is list:
        items = [value] if isinstance(value, str) else value
        good = isinstance(items, list | tuple) and all(isinstance(item, str) for item in items)
        return list(items) if good else None
    if kind is dict:
        return dict(value) if isinstance(value, Mapping) and _is_plain(value) else None
    return value if isinstance(value, kind) else None


def _is_plain(value: Mapping[str, Any]) -> bool:
    """Whether JSON can hold it."""
    try:
        json.dumps(dict(value))
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def check_recipe(recipe: Recipe, file: Path | None) -> None:
    """Raise a `UsageError` for numbers out of range, or keys that do not go together."""
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section), name)
        if value is not None and (value < 0 or (value == 0 and key in _POSITIVE)):
            raise UsageError(f"{key} is too small", file=file, found=value)
    if recipe.data.eval_share >= 1:
        raise UsageError(
            "data.eval_share leaves nothing to train on", file=file, found=recipe.data.eval_share
        )
    PromptTemplate.of(recipe.data.prompt, recipe.data.completion)
    _check_probe(recipe.probe, file)
    _check_select(recipe.select, recipe.probe.by, file)


def _check_probe(probe: Probe, file: Path | None) -> None:
    has_file = probe.by in ("tuned", "scores", "selection")
    if has_file and probe.path is None:
        raise UsageError(f"probe.by {probe.by} needs probe.path", file=file)
    if not has_file and probe.path is not None:
        raise UsageError(f"probe.path does not go with probe.by {probe.by}", file=file)
    if probe.by != "tuned" and (probe.strip_prefix or probe.add_prefix):
        raise UsageError("probe.strip_prefix and probe.add_prefix need probe.by: tuned", file=file)
    if has_file and probe.steps is not None:
        raise UsageError(f"probe.steps does not go with probe.by {probe.by}", file=file)


def _check_select(select: Select, by: str, file: Path | None) -> None:
    keys = dataclasses.fields(Select)
    settled = {  # by the probe or its file
        "gradients": {"score"},
        "fisher": {"score"},
        "scores": {"score", *(one.name for one in dataclasses.fields(Scope))},
        "selection": {one.name for one in keys},
    }.get(by, set())
    for one in keys:
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if one.name in settled and getattr(select, one.name) != default:
            raise UsageError(f"select.{one.name} does not go with probe.by {by}", file=file)
    if by != "selection":
        _check_budget(select, file, units=select.anatomy == "units" and by != "scores")


def _check_budget(select: Select, file: Path | None, *, units: bool) -> None:
    budget = select.budget
    if not budget.keys() & {"neurons", "params", "threshold", "changed", "like"}:
        raise UsageError(
            "the recipe does not say how many neurons to train", file=file, hint="add select.neurons: 3%"
        )
    with in_recipe_words(file):
        checked = Budget.of(**(budget | {"like": {}} if "like" in budget else budget))
        if units:
            checked.check_units()


@contextmanager
def in_recipe_words(file: Path | None = None) -> Iterator[None]:
    """Spell the options of a message as keys of the recipe, and name its ``file`` where none is named."""
    try:
        yield
    except NeftError as error:
        error.what = spelled(error.what, as_key)
        error.hint = error.hint and spelled(error.hint, as_key)
        error.file = error.file or (None if file is None else str(file))
        raise


def as_key(name: str, value: str | None) -> str:
    """An option as a recipe spells it; one that is not a key stays for whoever shows the message."""
    section = "select" if name in Select.__dataclass_fields__ else "probe"
    if name not in Select.__dataclass_fields__ and name not in PrefixOptions.__annotations__:
        return f"[[{name}]]" if value is None else f"[[{name}={value}]]"
    return f"{section}.{name}" if value is None else f"{section}.{name}: {value}"


def load_yaml(file: Path) -> Any:
    """The content of a recipe file; a `UsageError` if it is too large, or not YAML in UTF-8."""
    with naming(file), open(file, "rb") as stream:
        raw = stream.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise UsageError(f"this is not a recipe: it is larger than {_MAX_BYTES:,} bytes", file=file)
    try:
        return parse_yaml(raw.decode("utf-8"), file)
    except UnicodeDecodeError as error:
        raise UsageError("this is not a recipe: it is not UTF-8 text", file=file) from error


def parse_yaml(text: str, file: str | Path) -> Any:
    """The value of a YAML text; ``file`` is named in errors. Raises UsageError if it is not valid YAML."""
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
        # PyYAML raises these for `!!timestamp x` and the like.
        raise UsageError("not valid YAML: a value does not match its tag", file=file) from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """The safe loader, which also refuses duplicate keys, aliases and deep nesting.

    A few lines of aliases to aliases expand to a document of any size. The time PyYAML takes for nested
    brackets is quadratic in their depth.
    """

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        if self.flow_level >= _MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, "it is nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"*{event.anchor}: recipes have no anchors and aliases", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if (value := str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{value!r} is given twice", key.start_mark
                )
            seen.add(value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping
