"""A wrong base whose touched neurons look like the right one's: refused, or at least said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import patch_rows, patched_by_hand, raw_file, raw_folder, raw_read, snapshot, with_facts

import neftsurgery as ns
from neftsurgery.checkpoint.checkpoint import Checkpoint
from neftsurgery.checkpoint.provenance import fingerprint
from neftsurgery.patch.overlap import RowSource, lay_over
from neftsurgery.surgery.verify import TELLING

ONE = np.float16(1).view(np.uint16)
CONSTANT = ("scale.weight", "zero.weight")


def model(seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """A model whose rows of ones and zeros, and whose norm of few values, every model has."""
    rng = np.random.default_rng(seed)
    return {
        "a.weight": ("F16", rng.integers(0, 1 << 14, (70, 80), np.uint16)),
        "norm.weight": ("F16", np.full(40, ONE)),
        "scale.weight": ("F16", np.full((6, 20), ONE)),
        "zero.weight": ("F16", np.zeros((5, 30), np.uint16)),
    }


def tuned(of: dict[str, Any], *names: str, seed: int = 9) -> dict[str, tuple[str, np.ndarray]]:
    """The model with other values in some tensors."""
    rng = np.random.default_rng(seed)
    return {
        name: (kind, rng.integers(0, 1 << 14, bits.shape, np.uint16) if name in names else bits)
        for name, (kind, bits) in of.items()
    }


BASE, OTHER = model(0), model(1)


def cut(root: Path, name: str, base: dict[str, Any], to: dict[str, Any], **options: object) -> ns.Patch:
    """A patch of everything that differs, at ``root / name``."""
    sides = [raw_file(root / f"{name}-{side}", tensors) for side, tensors in (("from", base), ("to", to))]
    how = {"changed": True, "include": ["*"], "axis": {"norm.*": 0}} | options
    return ns.extract(*sides, out=root / name, **how)


@pytest.fixture
def says(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was logged since the last call."""
    caplog.set_level(logging.WARNING)

    def take() -> list[str]:
        found = [one.getMessage() for one in caplog.records if one.name == "neftsurgery.surgery.apply"]
        caplog.clear()
        return found

    return take


@pytest.mark.parametrize("names", [CONSTANT, ("zero.weight",), ("scale.weight",), ("norm.weight",)])
@pytest.mark.parametrize("reversible", [False, True])
def test_rows_that_every_model_has_do_not_fit_every_model(
    tmp_path: Path, neft: Any, names: tuple[str, ...], reversible: bool
) -> None:
    cut(tmp_path, "p", BASE, tuned(BASE, *names), reversible=reversible).close()
    raw_folder(tmp_path / "right", BASE, 2), raw_folder(tmp_path / "wrong", OTHER, 2)
    for place in (("-o", "out"), ("--in-place",), ("-o", "out", "--dry-run")):
        before = snapshot(tmp_path)
        refused = neft("apply", "wrong", "p", *place)
        assert (refused.code, refused.out, snapshot(tmp_path)) == (3, "", before)
        for word in ("wrong: ", "may not be the model", f"fewer than {TELLING} ", "fingerprint", "--force"):
            assert word in refused.err
    found = neft("verify", "wrong", "p")
    assert (found.code, found.out.split(":")[0]) == (0, "base")
    assert "may not be the model that the patch is for: its fingerprint is another" in found.err
    told = neft("verify", "wrong", "p", "--json").json
    assert (told["same_base"], told["remark"] in found.err, told["ok"]) == (False, True, True)

    forced = neft("apply", "wrong", "p", "-o", "out", "--force")
    assert forced.code == 0
    assert "warning: p on wrong: this may not be the model" in forced.err
    assert snapshot(tmp_path / "out") == snapshot(
        raw_folder(tmp_path / "expected", patched_by_hand(OTHER, tmp_path / "p"), 2)
    )
    good = neft("apply", "right", "p", "-o", "good", "--json")
    assert (good.code, good.err, good.json["warnings"]) == (0, "", [])
    told = neft("verify", "right", "p", "--json").json
    assert (told["same_base"], told["remark"]) == (True, None)
    assert neft("verify", "right", "p").err == ""
    again = neft("apply", "good", "p", "-o", "again")
    assert (again.code, again.err) == (0, "")


def test_revert_does_not_take_a_patch_out_of_a_model_it_was_not_put_into(tmp_path: Path, neft: Any) -> None:
    """The patch writes zeros, as pruning does; another model's rows of zeros are no sign of it."""
    pruned = BASE | {"scale.weight": ("F16", np.zeros((6, 20), np.uint16))}
    cut(tmp_path, "p", BASE, pruned, reversible=True).close()
    cut(tmp_path, "plain", BASE, pruned).close()
    raw_file(tmp_path / "patched", pruned), raw_file(tmp_path / "base", BASE)
    raw_file(tmp_path / "wrong", OTHER | {"scale.weight": pruned["scale.weight"]})
    for words in (("p",), ("plain", "--base", "base"), ("p", "--base", "base")):
        for place in (("-o", "out"), ("--in-place",)):
            before = snapshot(tmp_path)
            refused = neft("revert", "wrong", *words, *place)
            assert (refused.code, snapshot(tmp_path)) == (3, before)
            assert "may not be the model" in refused.err
            assert "before it take out the later patches" in refused.err  # revert takes one PATCH
        good = neft("revert", "patched", *words, "-o", "back", "--force")
        assert (good.code, good.err) == (0, "")
        assert snapshot(tmp_path / "back") == snapshot(tmp_path / "base")
    forced = neft("revert", "wrong", "p", "-o", "out", "--force")
    assert (forced.code, "warning: p on wrong" in forced.err) == (0, True)
    # Undoing a patch that is not reversible needs what it replaced, so here nothing is known for sure.
    told = neft("verify", "patched", "plain", "--json").json
    assert (told["state"], told["same_base"]) == ("patched", None)
    assert "its fingerprint cannot be compared" in neft("verify", "patched", "plain").err
    told = neft("verify", "patched", "p", "--json").json
    assert (told["state"], told["same_base"]) == ("patched", True)
    assert neft("verify", "wrong", "p", "--json").json["same_base"] is False


def test_neurons_that_tell_models_apart_may_be_put_into_a_relative(
    tmp_path: Path, says: Callable[[], list[str]]
) -> None:
    """The touched rows are the base's own: that something else differs is worth a remark, and no more."""
    patch = cut(tmp_path, "p", BASE, tuned(BASE, "a.weight"))
    relative = raw_file(tmp_path / "relative", tuned(BASE, "norm.weight"))
    ns.apply(relative, patch, out=tmp_path / "out")
    (said,) = says()
    assert "something besides the patch's neurons differs" in said
    found = ns.verify(relative, patch)
    assert (found.state, found.same_base) == ("base", False)
    assert str(found).splitlines()[1] == found.remark
    assert "\n" not in repr(found)
    assert (
        raw_read(tmp_path / "out")["a.weight"][1].tolist()
        == patch_rows(patch.path)["a.weight:value"][1].tolist()
    )


@pytest.mark.parametrize(("count", "enough"), [(TELLING - 1, False), (TELLING, True)])
def test_a_few_weights_of_a_norm_do_not_tell_models_apart(tmp_path: Path, count: int, enough: bool) -> None:
    def norm(start: int) -> tuple[str, np.ndarray]:
        return "F16", np.concatenate([np.arange(start, start + count), np.full(40 - count, 7)]).astype("u2")

    base, to = BASE | {"norm.weight": norm(100)}, BASE | {"norm.weight": norm(200)}
    patch = cut(tmp_path, "p", base, to)
    wrong = raw_file(tmp_path / "wrong", OTHER | {"norm.weight": norm(100)})
    assert ("do not tell models apart" in str(ns.verify(wrong, patch))) is not enough
    if enough:
        ns.apply(wrong, patch, out=tmp_path / "out")
    else:
        with pytest.raises(ns.MismatchError, match="may not be the model"):
            ns.apply(wrong, patch, out=tmp_path / "out")


def test_a_patch_that_does_not_know_its_base_is_applied_with_a_warning(
    tmp_path: Path, says: Callable[[], list[str]]
) -> None:
    patch = cut(tmp_path, "p", BASE, tuned(BASE, *CONSTANT))
    assert patch.base.fingerprint
    with_facts(patch.path, tmp_path / "q", base=dict(patch.base) | {"fingerprint": None})
    wrong = raw_file(tmp_path / "wrong", OTHER)
    ns.apply(wrong, tmp_path / "q", out=tmp_path / "out")
    (said,) = says()
    assert "its fingerprint cannot be compared" in said
    assert ns.verify(wrong, tmp_path / "q").same_base is None


@pytest.mark.parametrize("reversible", [False, True])
def test_patches_that_follow_each_other_or_share_a_base_fit(
    tmp_path: Path, says: Callable[[], list[str]], reversible: bool
) -> None:
    first = tuned(BASE, "scale.weight")
    second = tuned(first, "scale.weight", "a.weight", seed=10)
    p = cut(tmp_path, "p", BASE, first, reversible=reversible)
    q = cut(tmp_path, "q", first, second, reversible=reversible)
    beside = cut(tmp_path, "beside", BASE, tuned(BASE, "zero.weight"), reversible=reversible)
    base = raw_file(tmp_path / "base", BASE)
    for number, patches in enumerate(([p, q], [beside, p], [p, beside], [p, p], [p, q, beside])):
        out = tmp_path / f"out{number}"
        ns.apply(base, patches, out=out)
        ns.apply(out, patches, out=tmp_path / f"again{number}")
        assert snapshot(out) == snapshot(tmp_path / f"again{number}")
        assert says() == []
    wrong = raw_file(tmp_path / "wrong", OTHER)
    for patches in ([p, q], [beside, p], [p, p]):
        with pytest.raises(ns.MismatchError):
            ns.apply(wrong, patches, out=tmp_path / "out")


def test_a_base_named_beside_the_patch_is_checked_as_well(tmp_path: Path, neft: Any) -> None:
    """Its vectors have the right digests, so nothing wrong is written; it is said."""
    for name in ("p", "q"):
        cut(tmp_path, name, BASE, tuned(BASE, "scale.weight", seed=ord(name))).close()
    raw_file(tmp_path / "patched", patched_by_hand(BASE, tmp_path / "p"))
    raw_file(tmp_path / "right", BASE), raw_file(tmp_path / "wrong", OTHER)
    for words in (
        ("revert", "patched", "p", "-o", "out1"),
        ("merge", "p", "q", "-o", "out2", "--on-overlap", "sum"),
        ("export", "p", "--to", "lora", "-o", "out3"),
    ):
        done = neft(*words, "--base", "wrong")
        assert (done.code, done.err.count("warning: wrong has another fingerprint than the base of ")) == (
            0,
            1,
        )
        done = neft(*words, "--base", "right", "--force")
        assert (done.code, "fingerprint" in done.err) == (0, False)


AXES = {"a.weight": 1, "b.weight": 0, "c": (0, 2), "d.weight": 0, "e.weight": 1}
SHAPES = {
    "a.weight": (70, 80),
    "b.weight": (3, 5000),
    "c": (4, 3, 700),
    "d.weight": (9, 2),
    "e.weight": (2, 9),
}


def test_the_fingerprint_with_a_patch_is_that_of_the_patched_checkpoint(tmp_path: Path) -> None:
    """For all layouts, where a tensor's first and last 4096 bytes overlap and where they do not."""
    rng = np.random.default_rng(3)
    base = {n: ("F32", rng.integers(0, 1 << 30, shape, np.uint32)) for n, shape in SHAPES.items()}
    to = {n: (kind, bits ^ np.uint32(5)) for n, (kind, bits) in base.items()}
    files = [raw_file(tmp_path / name, tensors) for name, tensors in (("base", base), ("to", to))]
    patch = ns.extract(*files, neurons="40%", score="random", axis=AXES, reversible=True, out=tmp_path / "p")
    assert set(patch.tensors) == set(SHAPES)
    after = Checkpoint.open(raw_file(tmp_path / "after", patched_by_hand(base, tmp_path / "p")))
    before = Checkpoint.open(files[0])
    values, replaced = (RowSource(patch, read) for read in (patch.values, patch.base_values))
    assert fingerprint(before, lambda *part: lay_over([values], *part)) == fingerprint(after)
    assert fingerprint(after, lambda *part: lay_over([replaced], *part)) == fingerprint(before)
    assert fingerprint(before, lambda *part: lay_over([values, replaced], *part)) == fingerprint(before)
    assert fingerprint(before) != fingerprint(after)


def test_a_patch_that_is_there_already_is_named_as_well(tmp_path: Path, neft: Any) -> None:
    """With another patch on it, a checkpoint does not have the base's fingerprint."""
    for name, tensor in (("p", "scale.weight"), ("q", "zero.weight")):
        cut(tmp_path, name, BASE, tuned(BASE, tensor)).close()
    raw_file(tmp_path / "base", BASE)
    assert neft("apply", "base", "p", "-o", "one").code == 0
    alone = neft("apply", "one", "q", "--in-place")
    assert (alone.code, "in one command the patches that are on it" in alone.err) == (3, True)
    together = neft("apply", "one", "p", "q", "--in-place")
    assert together.code == 0
    assert raw_read(tmp_path / "one")["zero.weight"][1].any()
