"""The entry point of the command line: finds the command, and turns errors into messages and exit codes."""

from __future__ import annotations

import difflib
import gc
import importlib
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, NoReturn

import click

from ..errors import CorruptFileError, MachineError, MismatchError, NeftError, UsageError, spelled
from ..sources.hub_errors import redacted
from ..text import lines, printable
from ..version import __version__
from .console import flag, lossy_streams, remark
from .options import console_options

# In the order a newcomer needs them. Each line is the first sentence of the command's own help: it stands
# here so that `--help` loads no command.
_COMMANDS = {
    "demo": "Show all steps on a tiny model, offline, in about a minute.",
    "inspect": "Show what is in a checkpoint, scores, selection or patch.",
    "diff": "Score every neuron of TUNED against BASE.",
    "select": "Choose neurons from SCORES.",
    "extract": "Choose neurons of TUNED, and write them as a patch on BASE.",
    "apply": "Write a patched checkpoint: BASE with the neurons of one or more PATCHes.",
    "verify": "Tell whether CHECKPOINT is base, patched, mixed or neither.",
    "revert": "Take PATCH out of CHECKPOINT again, bit for bit.",
    "heal": "Undo a change in place that was interrupted.",
    "merge": "Make one patch from several PATCHes of one base.",
    "export": "Write PATCH as an exact LoRA adapter.",
    "report": "Show where a fine-tune changed the model, and which neurons a budget chooses.",
    "push": "Publish PATCH on the Hugging Face Hub, with a model card, in one commit.",
    "pull": "Fetch a patch from the Hugging Face Hub, and check all of its hashes.",
    "train": "Find the neurons that matter, train only them, and cut the patch.",
}

# Where scipy is installed, numba imports it to look for a BLAS. No kernel needs one, and the import is a
# tenth of a command's start-up.
_SCORING = (["diff"], ["extract"])
# Python looks for cycles after every 700 new objects; imports make hundreds of thousands.
_NEW_OBJECTS = 50_000

# Shells ask for completions with this variable, and without arguments.
_COMPLETE = "_NEFTSURGERY_COMPLETE"

_EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (UsageError, 2),
    (MismatchError, 3),
    (CorruptFileError, 4),
    (MachineError, 5),
    (MemoryError, 5),
)


class _LazyGroup(click.Group):
    """Imports a command's module when the command is called, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in _COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name.lower(), [*_COMMANDS, "--help", "--version"], 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise click.UsageError(f"No such command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f".commands.{cmd_name}", __package__)
        command = module.command
        assert isinstance(command, click.Command)
        if _COMPLETE in os.environ:  # most texts are names of files; nothing else is known of the others
            for parameter in command.params:
                parameter.type = click.Path() if parameter.type is click.STRING else parameter.type
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 2 wrong command line, 3 inputs that do not fit each other, "
    "4 corrupt file, 5 machine or network, 130 interrupted.",
)
@click.version_option(__version__, package_name="neftsurgery", message="%(prog)s %(version)s")
@console_options
def cli(**options: bool) -> None:
    """Neuron-level surgery on model checkpoints.

    Find the neurons a fine-tune changed most, cut them out as a small patch, put them into the base,
    verify them, and take them out again, bit for bit. Checkpoints are safetensors files, folders of
    shards, org/name on the Hugging Face Hub, or URLs: hf://, s3://, gs://, https://.

    \b
    Example:
      neftsurgery extract base/ tuned/ -o neuron_patch.safetensors --neurons 3%
      neftsurgery apply base/ neuron_patch.safetensors -o patched/
      neftsurgery verify patched/ neuron_patch.safetensors
    """


def run(args: list[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    args = sys.argv[1:] if args is None else args
    # How an error is shown depends on these options; with a wrong command line, click does not parse them.
    options = args[: args.index("--")] if "--" in args else args
    short = {letter for word in options if re.fullmatch("-[qv]+", word) for letter in word}
    as_json, verbose = "--json" in options, "v" in short or "--verbose" in options
    quiet = "q" in short or "--quiet" in options
    with lossy_streams() as lost:
        code = _run(args, as_json, verbose, quiet)
        if code == 0 and (error := lost()) is not None:
            code = _report(error, as_json, verbose)
    sys.exit(code)


def _run(args: list[str], as_json: bool, verbose: bool, quiet: bool) -> int:
    """Run a command so that signals stop it; return the exit code."""
    unraisable = sys.unraisablehook
    try:
        sys.unraisablehook = _stop_again
        _on_signals(_stop)
        gc.set_threshold(_NEW_OBJECTS, 20, 100)
        _log_to_stderr(logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING)
        _tell_hub_client(quiet, verbose)
        code = _outcome(args, as_json, verbose)
        _on_signals(signal.SIG_DFL)  # all is done: from here on, a signal may kill the process
    except _Stopped as error:
        from ..storage.output import remove_unfinished  # not for --help

        _on_signals(signal.SIG_DFL)
        code = _report(error, as_json, verbose)
        remove_unfinished()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = unraisable
        logging.getLogger("neftsurgery").handlers.clear()
        gc.freeze()  # no last search for cycles: the system takes all memory back at once
    return code


def _outcome(args: list[str], as_json: bool, verbose: bool) -> int:
    """Run the command that ``args`` name, report an error, and return the exit code."""
    if not args and _COMPLETE not in os.environ:
        with cli.make_context("neftsurgery", args, resilient_parsing=True) as context:
            click.echo(context.get_help(), err=True)
        return 2
    try:
        with _hidden("scipy") if args[:1] in _SCORING else nullcontext():
            result = cli.main(args, prog_name="neftsurgery", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.Abort as error:
        return _report(error, as_json, verbose)
    except click.ClickException as error:
        message = printable(" ".join(error.format_message().split()))  # click lists choices line by line
        where = getattr(error, "ctx", None)
        hint = f"\nsee `{where.command_path} --help`" if where is not None else ""
        remark(f"neftsurgery: {message}{hint}")
        return _as_json(message, error.exit_code) if as_json else error.exit_code
    except Exception as error:
        return _report(error, as_json, verbose)


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Make ``import name`` fail, unless it was imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


class _Stopped(SystemExit):
    """A signal asked the process to stop.

    Not a KeyboardInterrupt: one that passes through ``exec``, as in an import, ends the process by the
    signal, even if an outer frame catches it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Stop by an exception, so that half-written outputs are removed."""
    raise _Stopped(number)


def _stop_again(lost: sys.UnraisableHookArgs) -> None:
    """Stop a little later: the signal arrived where Python drops exceptions, as in ``__del__``."""
    if isinstance(lost.exc_value, _Stopped):
        number = lost.exc_value.number
        signal.signal(signal.SIGALRM, lambda alarm, frame: _stop(number, frame))
        signal.setitimer(signal.ITIMER_REAL, 0.001)
    else:
        sys.__unraisablehook__(lost)


def _on_signals(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _log_to_stderr(level: int) -> None:
    logger = logging.getLogger("neftsurgery")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    logger.handlers = [handler]
    logger.setLevel(level)


class _OneLine(logging.Formatter):
    """A record is one line, whatever names are in it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _tell_hub_client(quiet: bool, verbose: bool) -> None:
    """Have huggingface_hub be as quiet as we are; what its variables say already stays."""
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not verbose:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def _report(error: BaseException, as_json: bool, verbose: bool) -> int:
    if verbose:
        trace = redacted("".join(traceback.format_exception(error)))
        click.echo(lines(trace.split("\n")), err=True, nl=False)
    if isinstance(error, OSError) and not isinstance(error, NeftError):
        error = MachineError.of(error)
    code = next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)
    if isinstance(error, (_Stopped, click.exceptions.Abort)):
        message = "interrupted"
        code = int(error.code or 0) if isinstance(error, _Stopped) else 130
    elif isinstance(error, NeftError):
        message = redacted(error.text(flag))
    elif isinstance(error, MemoryError):
        message = "there is not enough memory"
    else:
        found = f"internal error: {type(error).__name__}: {error}"
        message = lines([found, "please run the command with -v and report it"])
    remark(f"neftsurgery: {message}")
    return _as_json(message, code, error) if as_json else code


def _as_json(message: str, code: int, error: BaseException | None = None) -> int:
    facts: dict[str, object] = {"error": message, "exit_code": code}
    if isinstance(error, NeftError):
        facts |= {
            key: redacted(spelled(str(value), flag) if key == "hint" else str(value))
            for key in ("file", "tensor", "expected", "found", "hint")
            if (value := getattr(error, key)) is not None
        }
    click.echo(json.dumps(facts))
    return code
