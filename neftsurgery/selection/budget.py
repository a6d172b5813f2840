"""How much to choose, and by which rule: the values of options, checked once, where they are made."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal, Unpack, cast, get_args

from ..errors import UsageError
from ..options import HasCounts, SelectOptions
from ..text import plural

Per = Literal["model", "layer", "tensor"]
Policy = Literal["sensitive", "reversed", "random"]
Allocation = Literal["size", "equal", "scores"]

_EXAMPLES = "write a share such as 3% or a number such as 50000 or 200M"
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+) ?%")
_COUNT = re.compile(
    r"([0-9]+(?:_[0-9]+)*|[0-9]{1,3}(?:,[0-9]{3})+)(\.[0-9]+)?(?: ?([KMBG]))?",
    re.IGNORECASE,
)
_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_SIZES = ("neurons", "params", "threshold", "changed", "like")
_LONGEST = 40
_FEW, _MANY = 20, 1000  # a number like a percentage, and neurons of which it is a small part
_DECIMALS = 40


@dataclass(frozen=True, slots=True)
class Amount:
    """A share of something, or a number of things: exactly one of the two, else a `UsageError`."""

    percent: Fraction | None = None  # above 0, at most 100, with a finite decimal expansion, as if typed
    count: int | None = None  # 1 or more

    def __post_init__(self) -> None:
        if (self.percent is None) == (self.count is None):
            raise UsageError("an amount is either a percentage or a number", hint=_EXAMPLES)
        if self.percent is not None and not 0 < self.percent <= 100:
            raise UsageError("a percentage must be above 0% and at most 100%", hint=_EXAMPLES)
        if self.percent is not None and 10**_DECIMALS % self.percent.denominator:
            raise UsageError(f"{self.percent}% cannot be written as a decimal number", hint=_EXAMPLES)
        if self.count is not None and self.count < 1:
            raise UsageError("a number must be at least 1", found=self.count, hint=_EXAMPLES)

    @classmethod
    def parse(cls, text: str | int) -> Amount:
        """Read ``"3%"``, ``"0.5%"``, ``50000``, ``"50_000"``, ``"50,000"`` or ``"1.5M"``.

        The suffixes K, M and B (or G), of either case, are 10**3, 10**6 and 10**9. Raises a `UsageError` for
        anything else: 0, a negative, a fraction such as 0.03, more than 100%.
        """
        if isinstance(text, float):
            raise _fraction(text, repr(text))
        if not isinstance(text, str):
            return cls(count=_whole("an amount", text))
        clean = text.strip()
        shown = clean if len(clean) <= _LONGEST else clean[: _LONGEST - 1] + "…"
        if len(clean) <= _LONGEST:
            if found := _PERCENT.fullmatch(clean):
                return cls(percent=Fraction(found[1]))
            if found := _COUNT.fullmatch(clean):
                whole, decimals, suffix = found[1], found[2] or "", (found[3] or "").upper()
                value = Fraction(re.sub("[_,]", "", whole) + decimals) * _SUFFIX[suffix]
                if decimals and not suffix:
                    raise _fraction(float(value), shown)
                if value.denominator != 1:
                    raise UsageError(f"{shown} is not a whole number", hint=_EXAMPLES)
                return cls(count=int(value))
            if re.fullmatch(r"-.*[0-9].*", clean):
                raise UsageError(f"an amount cannot be negative: {shown}", hint=_EXAMPLES)
            if re.fullmatch(r"\.[0-9]+", clean):
                raise _fraction(float(clean), shown)
            if _PERCENT.fullmatch(point := clean.replace(",", ".")):
                raise UsageError(f"{shown!r} is not an amount", hint=f"write {point}")
        raise UsageError(f"{shown!r} is not an amount", hint=_EXAMPLES)

    def __str__(self) -> str:
        """The one text for this amount; `parse` reads it back."""
        if self.percent is None:
            return str(self.count)
        scaled = str(self.percent * 10**_DECIMALS).rjust(_DECIMALS + 1, "0")
        text = f"{scaled[:-_DECIMALS]}.{scaled[-_DECIMALS:]}".rstrip("0").rstrip(".")
        return f"{text}%"

    def describe(self) -> str | int:
        """For JSON: a percentage as text, a number as a number; `parse` reads both back."""
        return str(self) if self.count is None else self.count


def _fraction(value: float, shown: str) -> UsageError:
    """The error for a number with a decimal point, which could mean a share or be a slip."""
    hint = f"for a share write {value * 100:.12g}%" if 0 < value <= 1 else _EXAMPLES
    return UsageError(f"{shown} is neither a percentage nor a whole number", hint=hint)


def _whole(what: str, value: object) -> int:
    if isinstance(value, bool):
        raise UsageError(f"{what} must be a whole number", found=value)
    try:
        return operator.index(cast(Any, value))
    except TypeError:
        raise UsageError(f"{what} must be a whole number", found=value) from None


@dataclass(frozen=True, slots=True)
class Budget:
    """How many neurons to choose, out of which pools, and which first.

    Exactly one of ``neurons``, ``params``, ``threshold``, ``changed`` and ``like`` is given; values out of
    range, and options that do not go together, are a `UsageError`. `BudgetOptions` says what they mean.
    """

    neurons: Amount | None = None
    params: Amount | None = None
    like: Mapping[str, int] | None = None  # neurons by tensor name
    threshold: float | None = None
    max_per_tensor: int | None = None
    per: Per = "model"
    allocate: Allocation = "size"
    policy: Policy = "sensitive"
    seed: int = 0
    changed: bool = False
    with_bias: bool = False

    def __post_init__(self) -> None:
        option = self._check_size()
        self._check_values()
        self._check_combinations(option)

    @classmethod
    def of(cls, **options: Unpack[SelectOptions]) -> Budget:
        """The budget of options as a user gives them: amounts as text or numbers. Raises as the class."""
        values: dict[str, Any] = dict(options)
        for name, read in _READ.items():
            if values.get(name) is not None or (name == "seed" and name in values):
                values[name] = read(f"[[{name}]]", values[name])
        return cls(**values)

    def _check_size(self) -> str:
        """The option that says how much."""
        values = (self.neurons, self.params, self.threshold, self.changed or None, self.like)
        given = [option for option, value in zip(_SIZES, values, strict=True) if value is not None]
        if not given:
            raise UsageError(
                "nothing says how many neurons to choose",
                hint="give one of [[neurons]], [[params]], [[threshold]], [[changed]] and [[like]]",
            )
        if len(given) > 1:
            raise UsageError(
                f"{' and '.join(f'[[{name}]]' for name in given)} do not go together",
                hint="give only one of them",
            )
        return given[0]

    def _check_values(self) -> None:
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UsageError("[[threshold]] must be a finite number", found=self.threshold)
        if self.max_per_tensor is not None and self.max_per_tensor < 1:
            raise UsageError("[[max_per_tensor]] must be at least 1", found=self.max_per_tensor)
        if self.seed < 0:
            raise UsageError("[[seed]] must not be negative", found=self.seed)
        if self.per not in get_args(Per):
            raise UsageError("[[per]] must be model, layer or tensor", found=self.per)
        if self.allocate not in get_args(Allocation):
            raise UsageError("[[allocate]] must be size, equal or scores", found=self.allocate)
        if self.policy not in get_args(Policy):
            raise UsageError("[[policy]] must be sensitive, reversed or random", found=self.policy)
        for name, count in (self.like or {}).items():
            if count < 0:
                raise UsageError("[[like]] asks for a negative number of neurons", tensor=name, found=count)

    def _check_combinations(self, option: str) -> None:
        if option in ("threshold", "changed") and self.policy != "sensitive":
            raise UsageError(f"[[{option}]] does not go with [[policy={self.policy}]]")
        if self.allocate != "size" and (self.per == "model" or option == "threshold"):
            other = "per=model" if self.per == "model" else option
            raise UsageError(f"[[allocate={self.allocate}]] does not go with [[{other}]]")
        if option in ("changed", "like") and self.per != "model":
            raise UsageError(f"[[{option}]] does not go with [[per={self.per}]]")
        if option in ("changed", "like") and self.max_per_tensor is not None:
            raise UsageError(f"[[{option}]] does not go with [[max_per_tensor]]")

    def check_units(self) -> None:
        """Refuse what makes no sense for the anatomy ``units``, as a unit lies in several tensors."""
        for option, is_given in (
            ("per=tensor", self.per == "tensor"),
            ("max_per_tensor", self.max_per_tensor is not None),
            ("like", self.like is not None),
        ):
            if is_given:
                raise UsageError(
                    f"[[{option}]] does not go with [[anatomy=units]]", hint="a unit lies in several tensors"
                )

    def warnings(self, neurons: int) -> list[str]:
        """What may not be meant: 3 neurons of thousands instead of 3 percent of ``neurons``."""
        count = 0 if self.neurons is None else self.neurons.count or 0
        if not 0 < count <= _FEW or neurons < _MANY:
            return []
        return [
            f"[[neurons={count}]] chooses {plural(count, 'neuron')} of {neurons:,}: "
            f"{count} percent is [[neurons={count}%]]"
        ]

    def describe(self) -> dict[str, object]:
        """JSON for a manifest, only what is set: ``Budget.of(**described)`` is this budget again."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        usual = {one.name: one.default for one in fields(self)}
        if self.policy == "random":
            del usual["seed"]
        given = {name: one for name, one in values.items() if name not in usual or one != usual[name]}
        return {name: one.describe() if isinstance(one, Amount) else one for name, one in given.items()}


def _amount(option: str, value: Amount | str | int) -> Amount:
    if isinstance(value, Amount):
        return value
    try:
        return Amount.parse(value)
    except UsageError as error:
        raise UsageError(f"{option}: {error.what}", found=error.found, hint=error.hint) from None


def _number(option: str, value: object) -> float:
    try:
        return float(cast(Any, value))
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{option} must be a number", found=value) from None


def _counts(option: str, like: HasCounts | Mapping[str, int]) -> dict[str, int]:
    counts = like if isinstance(like, Mapping) else like.counts
    return {name: _whole(option, count) for name, count in counts.items()}


_READ: dict[str, Callable[[str, Any], object]] = {
    "neurons": _amount,
    "params": _amount,
    "threshold": _number,
    "like": _counts,
    "max_per_tensor": _whole,
    "seed": _whole,
}
