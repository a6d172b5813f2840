"""Shared files run no code and reveal no secrets: no pickle, no code, no token in any message."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from support import raw_file

import neftsurgery
from neftsurgery.cli.main import run

PACKAGE = Path(neftsurgery.__file__).parent
TOKEN = "hf_" + "AbCdEf0123" * 3

#: Modules that run what they read, or another program.
MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "pty",
    "code", "codeop", "runpy", "multiprocessing", "xmlrpc",
}  # fmt: skip
#: Functions that do.
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "system",
    "popen",
    "execv",
    "execve",
    "spawnv",
    "posix_spawn",
}
#: The one module that may start a process.
MATCHER = PACKAGE / "checkpoint" / "adapter_patterns.py"
LOADERS = {"load", "unsafe_load", "full_load", "load_all"}


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path, node


def test_the_package_imports_nothing_that_runs_what_it_reads() -> None:
    found = 0
    for path, node in nodes():
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        found += len(names)
        used = {name.partition(".")[0] for name in names} & MODULES
        assert used <= ({"subprocess"} if path == MATCHER else set()), path
    assert found > 100


def test_the_one_process_that_is_started_runs_a_constant() -> None:
    """Patterns of an adapter's config are matched in an interpreter of its own: as input, not as code."""
    starts = [node for path, node in nodes() if path == MATCHER and isinstance(node, ast.Assign)]
    commands = [ast.unparse(node.value) for node in starts if ast.unparse(node.targets[0]) == "command"]
    assert commands == ["[sys.executable, '-I', '-S', '-c', _MATCHER]"]
    calls = [
        ast.unparse(node)
        for path, node in nodes()
        if path == MATCHER and isinstance(node, ast.Call) and ast.unparse(node.func).startswith("subprocess.")
    ]
    assert len(calls) == 1
    assert calls[0].startswith("subprocess.run(command, input=")


def test_the_package_calls_nothing_that_runs_what_it_reads() -> None:
    found = 0
    for path, node in nodes():
        if not isinstance(node, ast.Call):
            continue
        found += 1
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        owner = getattr(called.value, "id", "") if isinstance(called, ast.Attribute) else ""
        where = f"{path.name}:{node.lineno}: {owner}.{name}"
        bare = isinstance(called, ast.Name) or owner in ("os", "builtins")
        assert not (bare and name in CALLS), where
        if owner in ("torch", "np", "numpy", "joblib"):
            assert name != "load", where
        if owner == "yaml" and name in LOADERS:
            assert [ast.unparse(k.value) for k in node.keywords if k.arg == "Loader"] == ["_Loader"], where
        for keyword in node.keywords:
            if keyword.arg in ("allow_pickle", "shell", "trust_remote_code"):
                assert ast.unparse(keyword.value) == "False", where
    assert found > 1000


@pytest.mark.parametrize("command", ["inspect", "diff"])
@pytest.mark.parametrize("options", [[], ["-v"], ["--json"], ["--json", "-v"]])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"connection to https://hub/x?token={TOKEN} lost"),
        OSError(f"Authorization: Bearer {TOKEN}"),
        ValueError(f"bad id, sent {TOKEN}"),
        ConnectionError(f"https://cdn/x?X-Amz-Signature=0123abcd&token={TOKEN}"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_token_in_any_message(
    error: Exception,
    options: list[str],
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whatever the Hub's client says when it fails, and also in the traceback of -v."""

    asked = set()

    def failing(name: str) -> Callable[..., str]:
        def fail(*arguments: object, **more: object) -> str:
            asked.add(name)
            raise error

        return fail

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, failing(name))
    monkeypatch.chdir(tmp_path)
    raw_file(tmp_path / "patch", [])
    if command == "inspect":  # is it a patch?
        words, first = ["inspect", "org/name"], "hf_hub_download"
    else:
        words, first = ["diff", "org/name", "patch"], "snapshot_download"
    with pytest.raises(SystemExit) as left:
        run([*words, *options])
    captured = capfd.readouterr()
    assert asked == {first}
    assert left.value.code == (3 if type(error) is ValueError else 5)  # that one is not the network's
    said = captured.out + captured.err
    assert "org/name" in said
    assert TOKEN not in said
    assert "Signature=" not in said
