"""What MkDocs does not find in docs/: README and its neighbours, and the references made from the code.

Pages are written for a reader of the repository. In the site, their links to files outside docs/ lead to the
repository, and README's to the pages of the site.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click

import neftsurgery
from neftsurgery import options
from neftsurgery.cli.main import cli
from neftsurgery.errors import spelled

ROOT = Path(__file__).resolve().parents[2]
HOME = "https://github.com/neftsurgery/neftsurgery/"
#: Pages that lie at the root of the repository, and what they are called in the site.
NEIGHBOURS = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
_OUTSIDE = re.compile(
    r"^(\.\./|https://(github|raw.githubusercontent)\.com/neftsurgery/neftsurgery/((blob|tree)/)?main/)"
)
#: A flag, and what it takes.
_FLAG, _SPLIT = re.compile(r"((?:-\w, )?--[\w-]+) ([^/].*)"), r"\1` `\2"
#: Keywords of verbs in Python, by what they say.
GROUPS = {
    "Which tensors and neurons": options.ScopeOptions,
    "How sensitivity is measured": options.ScoreOptions,
    "How many, and which first": options.BudgetOptions,
    "Names of the tuned checkpoint": options.PrefixOptions,
    "The whole fine-tune": options.LosslessOptions,
    "Chains": options.ChainOptions,
    "The form of a LoRA adapter": options.ExportOptions,
    "Everything random": options.SeedOptions,
    "The machine": options.RunOptions,
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here."""
    from mkdocs.structure.files import File

    for name, text in made_pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Have links lead to where the pages are in the site."""
    return loosened_lists(site_links(markdown))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Keep each flag in running text in one line: browsers would break it after its hyphens."""
    return re.sub(r"<code>([^<]+)</code>", lambda found: f"<code>{_unbroken(found[1])}</code>", html)


def _unbroken(code: str) -> str:
    return re.sub(r"(?<![\w-])--?[a-z][\w-]*", r'<span class="flag">\g<0></span>', code)


def made_pages() -> dict[str, str]:
    """By name, the text of each page that is not a file of docs/."""
    pages = {name: (ROOT / file).read_text() for file, name in NEIGHBOURS.items()}
    return pages | {"commands.md": command_reference(), "python.md": python_reference()}


def site_links(text: str) -> str:
    """Links of a page, as the site needs them."""

    def moved(match: re.Match[str]) -> str:
        target, hash_, anchor = match[1].partition("#")
        path = _OUTSIDE.sub("", target)
        if path == target and target not in NEIGHBOURS and not target.startswith("docs/"):
            return match[0]
        if path.startswith("docs/") or path in NEIGHBOURS:
            return f"]({NEIGHBOURS.get(path, path.removeprefix('docs/'))}{hash_}{anchor})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"a link leads to {path}, which is not there")
        return f"]({HOME}{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}{hash_}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, text)


def loosened_lists(text: str) -> str:
    """An empty line before each list, which Python-Markdown wants and GitHub does not."""
    lines, fenced, listed = list[str](), False, False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith("```")
        item = re.match(r"(- |\d+\. )", line) is not None
        if item and not listed and not fenced and lines and lines[-1].strip():
            lines.append("")
        listed = not fenced and bool(line.strip()) and (item or listed)
        lines.append(line)
    return "\n".join(lines) + "\n"


def command_reference() -> str:
    """All commands and their options, from the declarations that the command line is made of."""
    context = click.Context(cli, info_name="neftsurgery")
    parts = ["# Commands", *_sections(cli, context)]
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        here = click.Context(command, info_name=name, parent=context)
        parts += [f"## {name}", *_sections(command, here)]
    return "\n\n".join(parts) + "\n"


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    text, _, example = inspect.cleandoc(command.help or "").partition("\b\n")
    yield f"```text\n{context.command_path} {' '.join(command.collect_usage_pieces(context))}\n```"
    yield _escaped(text.strip())
    if command.epilog:
        yield _escaped(command.epilog)
    lines = [line.strip() for line in example.replace("Example:", "").strip().splitlines()]
    yield "```console\n" + "\n".join(f"$ {line}" for line in lines) + "\n```"
    given = [one for one in command.get_params(context) if isinstance(one, click.Option)]
    records = (one.get_help_record(context) for one in given)
    yield _table("option", [record for record in records if record is not None])


def python_reference() -> str:
    """The public names of the package, and the keywords that its verbs share."""
    parts = [
        "# Python",
        "`import neftsurgery as ns` loads nothing: each name is imported when it is first used.",
    ]
    homes = {name: f"neftsurgery.{home}.{name}" for name, home in neftsurgery._HOMES.items()}
    errors = [name for name in neftsurgery.__all__ if name.endswith("Error")]
    parts.append("## Verbs")
    parts += [f"::: {home}" for name, home in homes.items() if name[0].islower()]
    parts.append("## Values")
    parts += [f"::: {home}" for name, home in homes.items() if name[0].isupper()]
    parts += ["## Options", "The keywords that verbs share, `**options` in their signatures."]
    for title, group in GROUPS.items():
        rows = [
            (
                f"{name}: {_type(kind)}",
                spelled(option.help, lambda key, value: f"{key}={value!r}" if value else key),
            )
            for name, (kind, option) in options.declared(group).items()
        ]
        parts += [f"### {title}", _table("keyword", rows)]
    parts += ["## Errors", *(f"::: neftsurgery.errors.{name}" for name in errors)]
    parts += ["## As a method of PEFT", "::: neftsurgery.peft.config.NeftConfig"]
    return "\n\n".join(parts) + "\n"


def _keyword(name: str, value: str | None) -> str:
    return f"{name}={value!r}" if value else name


def _type(kind: Any) -> str:
    kinds = get_args(kind) or (kind,)
    names = ["None" if one is type(None) else getattr(one, "__name__", str(one)) for one in kinds]
    return kind.__name__ if isinstance(kind, type) else " or ".join(names)


def _table(head: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| {_FLAG.sub(_SPLIT, f'`{flags}`')} | {_escaped(text)} |" for flags, text in rows]
    return "\n".join([f"| {head} | |", "|---|---|", *lines])


def _escaped(text: str) -> str:
    return re.sub(r"([*|\[\]_])", r"\\\1", text).replace("<", "&lt;")
