"""From a YAML file or a mapping to a `Recipe`.

YAML is read by PyYAML's safe loader, reduced to what recipes need; errors name the line.

An unknown key is an error, and the message suggests the nearest one. A value of the wrong type is an error,
and the message states the type. So are numbers that make no sense, and keys that do not go together. All
errors of a recipe are raised at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import NeftError, UsageError, boundary, naming, spelled
from ..options import Scope
from ..scoring.sums import BASE_SCORES
from ..selection.budget import Budget
from . import recipe as recipes
from .raw_examples import PromptTemplate
from .recipe import SECTIONS, Data, Probe, Recipe, Select, Train, as_key, known_keys, rooted

_MAX_BYTES = 100_000
_MAX_DEPTH = 50

AnyRecipe = str | os.PathLike[str] | Mapping[str, Any]
"""A recipe as a user gives it: the path of a YAML file, or a mapping with its content."""

_MAX_SHOWN = 100
_MOST_FAULTS = 10
_MORE = "train.more."


class _Faults(list[UsageError]):
    """The errors of a recipe, which are raised together."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.sections: set[str] = set()  # those in which something is wrong

    @contextmanager
    def kept(self, *sections: str) -> Iterator[None]:
        """Keep an error about these sections until all are raised."""
        try:
            yield
        except UsageError as error:
            error.file = error.file or (None if self.file is None else str(self.file))
            self.append(error)
            self.sections.update(sections)
            if len(self) == _MOST_FAULTS:
                self.throw()

    def throw(self) -> None:
        """Raise what was kept, as one error."""
        if self:
            self[0].also = self[1:]
            raise self[0]


@boundary
def read_recipe(recipe: AnyRecipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe: a YAML file, whose paths start from its folder, or a mapping.

    ``overrides`` replace values, as ``{"train.steps": 100}`` or ``{"train": {"steps": 100}}``.
    """
    file = None if isinstance(recipe, Mapping) else Path(recipe)
    faults = _Faults(file)
    if file is not None and not file.is_file():
        hint = "`neftsurgery train --init` prints one to start from"
        raise UsageError("there is no such recipe", file=file, hint=hint)
    values = _flat(recipe if isinstance(recipe, Mapping) else load_yaml(Path(recipe)), faults)
    for key in recipes.PATH_KEYS if file is not None else ():
        if file is not None and isinstance(value := values.get(key), str | list | dict):
            values[key] = rooted(value, file.parent, out=key == "out")
    values |= _flat(overrides or {}, faults)
    more = values.get("train.more") or {}
    inner = {key.removeprefix(_MORE): value for key, value in values.items() if key.startswith(_MORE)}
    values["train.more"] = {**more, **inner} if isinstance(more, Mapping) else more
    made = Recipe(
        **_values(Recipe, "", values, faults),
        **{name: kind(**_values(kind, f"{name}.", values, faults)) for name, kind in SECTIONS.items()},
    )
    for sections, check in (
        (("data",), partial(_check_data, made.data, made.train, made.control)),
        (("probe",), partial(_check_probe, made.probe)),
        (("select", "probe", "schedule", "train"), partial(_check_select, made)),
    ):
        if not faults.sections.intersection(sections):
            with faults.kept(*sections):
                check()
    faults.throw()
    return made


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """The overrides that ``--set KEY=VALUE`` gives; a value is YAML."""
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"[[set]] takes key=value, not {text!r}", hint="as in train.steps=100")
        overrides[key] = parse_yaml(value, f"[[set]] {text}")
    return overrides


def nearest(key: str, known: Sequence[str]) -> str:
    """The hint for an unknown key: the known ones that are spelled like it."""
    last = key.rpartition(".")[2]
    ends = {name: name.rpartition(".")[2] for name in known}
    same = [name for name, end in ends.items() if last in (end, "".join(word[:1] for word in end.split("_")))]
    close = same or difflib.get_close_matches(key, known, 3, 0.5)
    if not close:
        like = difflib.get_close_matches(last, ends.values(), 3, 0.5)
        close = [name for name, end in ends.items() if end in like]
    return f"did you mean {' or '.join(close)}?" if close else f"keys are {', '.join(known)}"


def _flat(content: object, faults: _Faults) -> dict[str, Any]:
    """Dotted keys and their values, without the unknown ones."""
    if not isinstance(content, Mapping):
        found = type(content).__name__
        raise UsageError("a recipe is a mapping of keys to values", file=faults.file, found=found)
    values = {}
    for name, value in content.items():
        inner = {str(name): value}
        if name in SECTIONS:
            with faults.kept(name):
                if value is not None and not isinstance(value, Mapping):
                    raise UsageError(f"{name} is a section with keys of its own, not a value")
            inner = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, Mapping) else {}
        for key, one in inner.items():
            with faults.kept(key.partition(".")[0]):
                if key not in known_keys() and not key.startswith(_MORE):
                    sections = () if "." in key else SECTIONS
                    hint = nearest(key[:_MAX_SHOWN], (*sections, *known_keys()))
                    raise UsageError(f"a recipe has no key {_shown(key)}", hint=hint)
                values[key] = one
    return values


def _shown(value: object) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def _values(kind: type[Any], prefix: str, given: Mapping[str, Any], faults: _Faults) -> dict[str, Any]:
    """The arguments of a dataclass from the values under its keys; what has a default may be left out."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for one in dataclasses.fields(kind):
        name, hint = prefix + one.name, hints[one.name]
        if name in SECTIONS:
            continue
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required:
            values[one.name] = ""
        with faults.kept(name.partition(".")[0]):
            if given.get(name) is not None or (name in given and type(None) in get_args(hint)):
                values[one.name] = _fit(name, given[name], hint, one.metadata)
            elif required:
                advice = f"add it to the recipe, or override {name}" if faults.file else "add it"
                raise UsageError(f"the recipe does not say {name}", hint=advice)
    return values


def _fit(key: str, value: Any, hint: Any, bounds: Mapping[str, Any]) -> Any:
    """``value`` in the type of its field, within its bounds."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint, *others = [one for one in get_args(hint) if one is not type(None)]
        hint = next((one for one in others if isinstance(value, get_origin(one) or one)), hint)
    kind = get_origin(hint) or hint
    if kind is Literal:
        if value not in get_args(hint):
            known = ", ".join(get_args(hint))
            raise UsageError(f"{key} cannot be {_shown(value)}", hint=f"it is one of {known}")
        return value
    converted = _convert(value, kind)
    if converted is None:
        raise UsageError(f"{key} does not fit", expected=_TYPE_NAMES[kind], found=_shown(value))
    if ("above" in bounds and converted <= bounds["above"]) or (
        "least" in bounds and converted < bounds["least"]
    ):
        raise UsageError(f"{key} is too small", found=converted)
    if "most" in bounds and converted > bounds["most"]:
        raise UsageError(f"{key} is too large", found=converted)
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


def _check_data(data: Data, train: Train, control: str | None) -> None:
    if data.eval_share >= 1:
        raise UsageError("data.eval_share leaves nothing to train on", found=data.eval_share)
    for key, value in (("train.early_stopping", train.early_stopping), ("control", control)):
        if value and data.eval is None and not data.eval_share:
            raise UsageError(f"{key} needs a dev loss", hint="add data.eval or data.eval_share")
    PromptTemplate.of(data.prompt, data.completion)
    for name in ("prompt", "packing", "loss_on", "long"):
        if train.method == "dpo" and getattr(data, name) != Data.__dataclass_fields__[name].default:
            raise UsageError(f"data.{name} does not go with train.method: dpo")
    for key, names in (("train", data.names), ("eval", data.eval_names)):
        if len(set(names)) < len(names):
            raise UsageError(f"data.{key} names a set twice", found=_shown(names))
    weights = data.train.values() if isinstance(data.train, dict) else [1] * len(data.names)
    if not weights or not all(isinstance(one, int | float) and one > 0 for one in weights):
        raise UsageError("data.train needs a set, and weights above 0", found=_shown(data.train))


def _check_probe(probe: Probe) -> None:
    has_file = probe.by in ("tuned", "scores", "selection")
    if has_file and probe.path is None:
        raise UsageError(f"probe.by {probe.by} needs probe.path")
    if not has_file and probe.path is not None:
        raise UsageError(f"probe.path does not go with probe.by {probe.by}")
    if probe.by != "tuned" and (probe.strip_prefix or probe.add_prefix):
        raise UsageError("probe.strip_prefix and probe.add_prefix need probe.by: tuned")
    if (probe.by == "activation") != (probe.against is not None):
        raise UsageError("probe.by activation and probe.against, other texts, go together")
    if has_file and probe.steps is not None:
        raise UsageError(f"probe.steps does not go with probe.by {probe.by}")


def _check_select(recipe: Recipe) -> None:
    select, by = recipe.select, recipe.probe.by
    keys = dataclasses.fields(Select)
    settled = {  # by the probe or its file
        **{probe: {"score", "rank"} for probe in recipes.EXAMPLE_PROBES},
        "scores": {"score", "rank", *(one.name for one in dataclasses.fields(Scope))},
        "selection": {one.name for one in keys},
    }.get(by, set())
    for one in keys:
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if one.name in settled and getattr(select, one.name) != default:
            raise UsageError(f"select.{one.name} does not go with probe.by {by}")
    schedule = recipe.schedule
    for name, used in (("backward", schedule.backward < 1), ("regrow", schedule.regrow)):
        if by in ("scores", "selection") and used:
            raise UsageError(f"schedule.{name} does not go with probe.by {by}: the file has chosen neurons")
    for key in ("threshold", "changed", "policy", "allocate", "with_bias", "quantization", "skip", "mode"):
        section, default = ("select", False) if hasattr(select, key) else ("train", "auto")
        if schedule.regrow and getattr(getattr(recipe, section), key) not in (None, default):
            raise UsageError(f"schedule.regrow does not go with {section}.{key}")
    if by == "weights" and select.score not in BASE_SCORES:
        hint = f"one of {', '.join(BASE_SCORES)}"
        raise UsageError("probe.by weights needs a select.score of the base alone", hint=hint)
    budget = select.budget
    if by != "selection" and not budget.keys() & {"neurons", "params", "threshold", "changed", "like"}:
        raise UsageError("the recipe does not say how many neurons to train", hint="add select.neurons: 3%")
    if by != "selection":
        with in_recipe_words():
            checked = Budget.of(**(budget | {"like": {}} if "like" in budget else budget))
            if select.anatomy == "units" and by != "scores":
                checked.check_units()


@contextmanager
def in_recipe_words() -> Iterator[None]:
    """Spell the options of a message as keys of the recipe."""
    try:
        yield
    except NeftError as error:
        error.what = spelled(error.what, as_key)
        error.hint = error.hint and spelled(error.hint, as_key)
        raise


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
