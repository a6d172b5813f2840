"""Every refusal: its exit code, a message of one or two lines, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support import LLAMA_CONFIG, patch_rows, process, write_file, write_folder

import neftsurgery as ns


@pytest.fixture
def patch(neft, pair, tmp_path):
    assert neft("extract", "base", "tuned", "--neurons", "3%", "-o", "p.safetensors").code == 0
    assert neft("diff", "base", "tuned", "-o", "s.safetensors").code == 0
    return tmp_path / "p.safetensors"


USAGE = [
    ("nothing-there", ("diff", "nothing", "tuned"), "no such file or folder"),
    ("not-on-hub", ("diff", "a/b/c", "tuned"), "no such file or folder"),
    ("no-arguments", ("diff",), "Missing argument"),
    ("no-command", ("frobnicate",), "No such command"),
    ("bad-option", ("diff", "base", "tuned", "--frobnicate"), "No such option"),
    ("bad-axis", ("diff", "base", "tuned", "--axis", "kernel"), "GLOB=N"),
    ("axis-matches-nothing", ("diff", "base", "tuned", "--axis", "nothing=1"), "--axis"),
    ("axis-too-high", ("diff", "base", "tuned", "--axis", "*q_proj*=7"), "no axis 7"),
    ("include-matches-nothing", ("diff", "base", "tuned", "--include", "nothing"), "--include"),
    ("bad-score", ("diff", "base", "tuned", "--score", "nice"), "nice"),
    ("zero-threads", ("diff", "base", "tuned", "--threads", "0"), "--threads"),
    ("no-memory", ("diff", "base", "tuned", "--memory", "1MB"), "at least 16 MiB"),
    ("no-size", ("diff", "base", "tuned", "--memory", "much"), "not a size"),
    ("no-budget", ("extract", "base", "tuned", "-o", "new"), "--neurons"),
    (
        "two-budgets",
        ("extract", "base", "tuned", "--neurons", "3%", "--changed", "-o", "new"),
        "do not go together",
    ),
    ("fraction", ("extract", "base", "tuned", "--neurons", "0.03", "-o", "new"), "3%"),
    (
        "selection-and-budget",
        ("extract", "base", "tuned", "--selection", "x", "--scores", "y", "-o", "new"),
        "go together",
    ),
    (
        "units-per-tensor",
        ("extract", "base", "tuned", "--anatomy", "units", "--per", "tensor", "--neurons", "3%", "-o", "new"),
        "units",
    ),
    (
        "units-capped",
        (
            "extract",
            "base",
            "tuned",
            "--anatomy",
            "units",
            "--max-per-tensor",
            "3",
            "--neurons",
            "3%",
            "-o",
            "new",
        ),
        "units",
    ),
    (
        "scoring-again",
        (
            "extract",
            "base",
            "tuned",
            "--scores",
            "s.safetensors",
            "--anatomy",
            "ffn",
            "--neurons",
            "1",
            "-o",
            "new",
        ),
        "--anatomy does not go with --scores",
    ),
    ("no-output", ("apply", "base", "p.safetensors"), "--in-place"),
    ("both-outputs", ("apply", "base", "p.safetensors", "-o", "new", "--in-place"), "--in-place"),
    ("output-exists", ("extract", "base", "tuned", "--neurons", "3%", "-o", "p.safetensors"), "exists"),
    ("folder-exists", ("apply", "base", "p.safetensors", "-o", "tuned"), "exists"),
    ("output-is-input", ("apply", "base", "p.safetensors", "-o", "base", "--force"), "base"),
    ("output-inside-input", ("apply", "base", "p.safetensors", "-o", "base/new"), "inside"),
    ("no-parent", ("apply", "base", "p.safetensors", "-o", "missing/new"), "missing"),
    ("needs-base", ("revert", "tuned", "p.safetensors", "-o", "new"), "--base"),
    ("patch-missing", ("apply", "base", "nothing.safetensors", "-o", "new"), "no such file"),
]


@pytest.mark.parametrize(("words", "says"), [case[1:] for case in USAGE], ids=[case[0] for case in USAGE])
def test_a_wrong_command_line_is_2(neft, patch, tmp_path, words, says):
    names = sorted(str(p) for p in tmp_path.rglob("*"))
    result = neft(*words)
    assert result.code == 2, result
    assert says in result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert sorted(str(p) for p in tmp_path.rglob("*")) == names


def test_a_hub_id_that_cannot_be_reached_is_5(neft, patch):
    result = neft("diff", "org/name", "tuned")
    assert result.code == 5, result
    assert "org/name" in result.err


def test_inputs_that_do_not_fit_are_3(neft, patch, llama_arrays, tmp_path):
    write_folder(tmp_path / "other", llama_arrays(seed=5), 1, LLAMA_CONFIG)
    write_folder(tmp_path / "wider", llama_arrays(hidden=40), 1, LLAMA_CONFIG)
    write_file(tmp_path / "strange.safetensors", {"x": np.ones((3, 4), np.float32)})
    cases = {
        ("apply", "other", "p.safetensors", "-o", "new"): ("other", "another base"),
        ("apply", "wider", "p.safetensors", "-o", "new"): ("wider", "F32 [40, 48]"),
        ("diff", "base", "strange.safetensors", "-o", "new"): ("no tensor in common", "x"),
        ("verify", "other", "p.safetensors"): ("neither",),
        ("extract", "base", "other", "--scores", "s.safetensors", "--neurons", "3%", "-o", "new"): (
            "another tuned",
        ),
        ("extract", "base", "base", "--changed", "-o", "new"): ("no neuron is chosen",),
        (
            "extract",
            "strange.safetensors",
            "strange.safetensors",
            "--anatomy",
            "ffn",
            "--neurons",
            "1",
            "-o",
            "new",
        ): ("rows",),
    }
    for words, says in cases.items():
        result = neft(*words)
        assert result.code == 3, (words, result)
        assert all(text in result.err for text in says), (words, result.err)
        assert "Traceback" not in result.err
    assert not (tmp_path / "new").exists()


def test_corrupt_files_are_4(neft, patch, tmp_path):
    whole = patch.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (tmp_path / "zip.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("cut", "flipped", "zip", "text"):
        result = neft("apply", "base", f"{name}.safetensors", "-o", "new")
        assert result.code == 4, (name, result)
        assert name in result.err
        assert not (tmp_path / "new").exists()
    assert neft("apply", "base", "s.safetensors", "-o", "new").code == 4  # scores are no patch
    assert neft("select", "p.safetensors", "--neurons", "1", "-o", "new").code == 4
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    result = neft("diff", "base", "tuned")
    assert result.code == 4
    assert "outside its folder" in result.err


def test_errors_as_json_are_one_object(neft, patch):
    for words, code in (
        (("diff", "nothing", "tuned", "--json"), 2),
        (("diff", "--json"), 2),
        (("apply", "tuned", "s.safetensors", "-o", "new", "--json"), 4),
    ):
        result = neft(*words)
        assert result.code == code
        assert result.json["exit_code"] == code
        assert result.json["error"]


def test_an_error_is_one_or_two_lines_and_a_traceback_only_with_v(neft, patch):
    result = neft("diff", "nothing", "tuned")
    assert 1 <= len(result.err.strip().splitlines()) <= 2
    assert "Traceback" in neft("diff", "nothing", "tuned", "-v").err


def test_verify_of_a_mixed_checkpoint(neft, patch, tmp_path):
    from safetensors.numpy import load_file

    assert neft("apply", "base", "p.safetensors", "-o", "patched").code == 0
    rows = patch_rows(patch)
    name = next(
        key.removesuffix(":index")
        for key, (_, value) in sorted(rows.items())
        if key.endswith(":index") and len(value)
    )
    for shard in (tmp_path / "patched").glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            original = next(
                load_file(f)[name] for f in (tmp_path / "base").glob("*.safetensors") if name in load_file(f)
            )
            tensors[name] = original
            write_file(shard, tensors, {"format": "pt"})
    result = neft("verify", "patched", "p.safetensors", "--json")
    assert result.code == 3
    assert result.json["state"] == "mixed"
    assert result.json["tensors"][name]["state"] == "base"
    assert neft("apply", "patched", "p.safetensors", "-o", "whole").code == 0
    assert neft("verify", "whole", "p.safetensors", "--expect", "patched").code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_is_5(neft, patch, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert neft("apply", "base", "p.safetensors", "-o", "locked/new").code == 5


def test_ctrl_c_is_130_and_leaves_nothing(tmp_path):
    """A real SIGINT into a real process that is busy writing."""
    rng = np.random.default_rng(0)
    arrays = {f"l.{i}.weight": rng.standard_normal((2000, 1000), dtype=np.float32) for i in range(8)}
    write_folder(tmp_path / "a", arrays)
    write_folder(tmp_path / "b", {name: array + 1 for name, array in arrays.items()})
    names = sorted(p.name for p in tmp_path.iterdir())
    for delay in (0.0, 0.1, 0.2, 0.4):
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "neftsurgery",
                "extract",
                "a",
                "b",
                "--changed",
                "-o",
                "p.safetensors",
                "--json",
            ],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while child.poll() is None and not list(tmp_path.glob(".p.safetensors.neft-*")):
            time.sleep(0.001)  # before, Python itself may be starting, and dies of the signal in its own way
        time.sleep(delay)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
        if child.returncode == 0:  # it was faster
            (tmp_path / "p.safetensors").unlink()
            continue
        assert child.returncode == 130, err
        assert "Traceback" not in err
        assert out == "" or json.loads(out)["exit_code"] == 130
        assert sorted(p.name for p in tmp_path.iterdir()) == names
        return
    pytest.skip("the machine was too fast for every delay")


def test_a_signal_inside_a_finalizer_stops_the_command(tmp_path):
    """Python drops an exception that a ``__del__`` raises; the signal must not be dropped with it."""
    script = """if True:
        import os, signal, sys, time, types
        import click
        from neftsurgery.cli.main import run

        class Closing:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                print("closed")

        def work():
            Closing()
            time.sleep(60)

        command = click.Command("inspect", callback=work)
        sys.modules["neftsurgery.cli.commands.inspect"] = types.SimpleNamespace(command=command)
        run(["inspect"])
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stderr) == (143, "neftsurgery: interrupted\n")


def test_module_entry(tmp_path):
    assert process("inspect", "nothing", cwd=tmp_path).code == 2


def test_names_cannot_steer_the_terminal(neft, tmp_path):
    """A tensor may have any name; what is printed of it is printable."""
    name = "layer.\x1b[2J\x07.weight"
    write_file(tmp_path / "a.safetensors", {name: np.ones((4, 3), np.float32)})
    write_file(tmp_path / "b.safetensors", {name: np.full((4, 3), 2, np.float32)})
    for words in (("inspect", "a.safetensors"), ("diff", "a.safetensors", "b.safetensors")):
        result = neft(*words)
        assert result.code == 0
        assert "\\x1b[2J" in result.out
        assert "\x1b" not in result.out + result.err
    wrong = neft("diff", "a.safetensors", "b.safetensors", "--axis", "*=9")
    assert wrong.code == 2
    assert "\x1b" not in wrong.err


def test_a_pipe_is_not_a_checkpoint(neft, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    result = neft("inspect", "pipe")
    assert (result.code, "pipe or socket" in result.err) == (2, True)


def test_no_input_is_overwritten_even_by_force(neft, patch, tmp_path):
    """Scores, selections and controls are inputs too."""
    assert neft("select", "s.safetensors", "--neurons", "3", "-o", "c.safetensors").code == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("s.safetensors", "c.safetensors")}
    extract = ("extract", "base", "tuned", "--force", "-o")
    for words in (
        ("select", "s.safetensors", "--like", "c.safetensors", "-o", "c.safetensors", "--force"),
        ("select", "s.safetensors", "--neurons", "3", "-o", "s.safetensors", "--force"),
        (*extract, "c.safetensors", "--like", "c.safetensors"),
        (*extract, "c.safetensors", "--selection", "c.safetensors"),
        (*extract, "s.safetensors", "--scores", "s.safetensors", "--neurons", "3"),
    ):
        assert neft(*words).code == 2, words
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_hub_model_is_refused_in_place_without_asking_the_hub(neft, patch):
    result = neft("apply", "org/name", "p.safetensors", "--in-place")
    assert (result.code, "in place" in result.err) == (2, True)


def test_a_mistyped_file_is_not_looked_for_on_the_hub(neft, patch):
    for words in (
        ("apply", "base", "runs/neuron_patch.safetensors", "-o", "new"),
        ("select", "org/s", "--neurons", "1", "-o", "new"),
    ):
        assert neft(*words).code == 2
    assert neft("apply", "base", "org/patch", "-o", "new").code == 5  # that one may be there, but not here


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
def test_values_that_are_not_numbers_are_refused(neft, patch, tmp_path, number):
    (tmp_path / "base" / "config.json").write_text(f'{{"model_type": "llama", "x": {number}}}')
    assert neft("inspect", "base").code == 4


WORDS = [
    (
        ("dif", "base", "tuned"),
        "neftsurgery: No such command 'dif'. Did you mean diff?",
        "see `neftsurgery --help`",
    ),
    (
        ("Extract",),
        "neftsurgery: No such command 'Extract'. Did you mean extract?",
        "see `neftsurgery --help`",
    ),
    (("help",), "neftsurgery: No such command 'help'. Did you mean --help?", "see `neftsurgery --help`"),
    (
        ("export", "p", "-o", "x"),
        "neftsurgery: Missing option '--to'. Choose from: lora",
        "see `neftsurgery export --help`",
    ),
    (
        ("diff", "a", "b", "--threads", "1.5"),
        "neftsurgery: Invalid value for '--threads': '1.5' is not a valid whole number.",
        "see `neftsurgery diff --help`",
    ),
    (("diff", "a\nb", "--x\x1b[1m\ny"), r"neftsurgery: No such option '--x\x1b[1m\ny'", "see `neftsurgery"),
    (("inspect", ""), "neftsurgery: '': there is no such file or folder", "name a .safetensors file"),
    (("inspect", "a\nb"), r"neftsurgery: a\nb: there is no such file or folder", "name a .safetensors file"),
    (
        ("inspect", "~/a/b"),
        "neftsurgery: ~/a/b: there is no such file or folder",
        "~ is expanded by the shell",
    ),
    (("verify", "base", "~/p"), "neftsurgery: ~/p: there is no such file", "~ is expanded by the shell"),
    (
        ("diff", "base", "tuned", "-o", "~/x"),
        "neftsurgery: ~/x: the folder ~ does not exist",
        "~ is expanded by the shell",
    ),
    (
        ("diff", "base", "tuned", "-o", "-"),
        "neftsurgery: -: an output cannot go to stdout",
        "name a file; ./-",
    ),
    (
        ("extract", "base", "tuned", "-o", "x", "--neurons", "0,5%"),
        "neftsurgery: --neurons: '0,5%' is not an amount",
        "write 0.5%",
    ),
    (
        ("extract", "base", "tuned", "-o", "x", "--neurons", "3%", "--selection", "sel"),
        "neftsurgery: --selection does not go with --neurons",
        "give one or the other",
    ),
]


@pytest.mark.parametrize(("words", "says", "hint"), WORDS, ids=[" ".join(case[0]) for case in WORDS])
def test_what_newcomers_type_is_answered_in_one_line_and_a_hint(neft, pair, patch, words, says, hint):
    assert neft("select", "s.safetensors", "--neurons", "5%", "-o", "sel").code == 0
    result = neft(*words)
    assert (result.code, result.out) == (2, "")
    first, *rest = result.err.splitlines()
    assert first.startswith(says)
    assert len(rest) == 1
    assert rest[0].startswith(hint)


def test_no_words_at_all_show_the_help(neft):
    bare, asked = neft(), neft("--help")
    assert (bare.code, bare.out, bare.err) == (2, "", asked.out)


def test_options_of_the_console_may_stand_before_the_command(neft, pair, patch):
    after = neft("inspect", "p.safetensors", "--json")
    assert neft("--json", "inspect", "p.safetensors") == after
    assert neft("-q", "inspect", "p.safetensors").out == ""
    assert neft("-q", "--json", "inspect", "p.safetensors") == after
    assert json.loads(neft("--json", "inspect", "nothing").out)["exit_code"] == 2
    for words in (("-v", "inspect", "nothing"), ("inspect", "nothing", "-v"), ("-qv", "inspect", "nothing")):
        assert neft(*words).err.startswith("Traceback")
    assert not neft("inspect", "nothing").err.startswith("Traceback")


EVIL = "model.layers.{}.x\nneftsurgery: all is well\r\x1b[31m\u202e.weight"


@pytest.fixture
def evil(neft, tmp_path):
    """Two checkpoints with names that would print lines of their own; their patch and their scores."""
    rng = np.random.default_rng(0)
    for folder in ("a\nneftsurgery: all is well", "b\x1b[31m"):
        tensors = {EVIL.format(n): rng.standard_normal((40, 8)).astype(np.float32) for n in range(3)}
        write_folder(tmp_path / folder, tensors, 1, {"model_type": "?\nneftsurgery: all is well"})
    base, tuned = "a\nneftsurgery: all is well", "b\x1b[31m"
    assert neft("extract", base, tuned, "--neurons", "9%", "-o", "p\r").code == 0
    assert neft("diff", base, tuned, "-o", "s\u202e").code == 0
    return base, tuned, "p\r", "s\u202e"


def test_no_name_prints_a_line_of_its_own(neft, evil, tmp_path):
    """Names of tensors, files and folders, and what configs and manifests say."""
    base, tuned, patch, scores = evil
    write_file(tmp_path / "other", {"x": np.ones((4, 3), np.float32)})
    lines = [
        ("inspect", base),
        ("inspect", patch),
        ("inspect", scores),
        ("inspect", patch, patch),
        ("diff", base, tuned),
        ("select", scores, "--neurons", "9%", "-o", "sel\n"),
        ("apply", base, patch, "-o", "out\n"),
        ("apply", "other", patch, "-o", "x"),
        ("verify", base, patch),
        ("verify", tuned, patch, "--expect", "base"),
        ("verify", "other", patch),
        ("revert", base, patch, "-o", "x"),
        ("merge", patch, patch, "-o", "merged\n"),
        ("merge", patch, patch, "-o", "merged\n"),
        ("export", patch, "--to", "lora", "-o", "x"),
        ("report", scores, patch, "-o", "page\n"),
        ("push", patch, "me/it", "--dry-run"),
        ("heal", base),
        ("diff", base, "other"),
        ("inspect", base, "--only", "x\nneftsurgery: all is well"),
        ("-v", "inspect", "no\nneftsurgery: all is well"),
    ]
    for words in lines:
        result = neft(*words)
        for text in (result.out, result.err):
            assert all(c.isprintable() or c == "\n" for c in text), (words, text)
            assert not any(line.lstrip().startswith("neftsurgery: all") for line in text.split("\n")), text
        assert "internal error" not in result.err, result.err
    page = (tmp_path / "page\n").read_text()
    assert all(c.isprintable() or c == "\n" for c in page)


def test_what_prints_itself_prints_no_lines_of_others(neft, evil, tmp_path, monkeypatch, caplog):
    base, tuned, patch, scores = evil
    found = [ns.Patch.load(patch), ns.Scores.load(scores), ns.Checkpoint.open(base), ns.inspect(base)]
    found.append(ns.apply(base, patch, out="out\n"))
    found.append(ns.verify(base, patch))
    ns.diff(base, tuned).close()
    for text in (*map(str, found), *map(repr, found), *(record.getMessage() for record in caplog.records)):
        assert all(c.isprintable() or c == "\n" for c in text), text
        assert not any(line.startswith("neftsurgery: all") for line in text.split("\n")), text
    assert caplog.records


def test_layers_are_listed_in_their_order(neft, tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("base", "tuned"):
        names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(12)]
        more = (
            {"only.10": np.ones(3, np.float32), "only.9": np.ones(3, np.float32)} if folder == "base" else {}
        )
        tensors = {name: rng.standard_normal((8, 4)).astype(np.float32) for name in names}
        write_folder(tmp_path / folder, tensors | more, 1, {"model_type": "?"})
    assert neft("extract", "base", "tuned", "--changed", "-o", "p").code == 0
    assert neft("diff", "base", "tuned", "-o", "s").code == 0
    assert neft("select", "s", "--neurons", "100%", "-o", "sel").code == 0
    for subject in ("base", "p", "s", "sel"):
        listed = [tensor["name"] for tensor in neft("inspect", subject, "--json").json["tensors"]]
        assert listed[:12] == names
        printed = neft("inspect", subject, "--all").out
        assert re.findall(r"model\.layers\.\d+\.mlp\.up_proj\.weight", printed) == names
    assert "only in base: only.9, only.10" in neft("diff", "base", "tuned").out
    write_folder(tmp_path / "mixed", {name: np.ones((8, 4), np.float32) for name in names}, 1, None)
    assert re.findall(r"(model\S+)", neft("verify", "mixed", "p").out) == names
    assert neft("inspect", "p", "p", "--json").json["overlaps"][0]["tensors"] == names
