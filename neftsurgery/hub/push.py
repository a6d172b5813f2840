"""push: publish a patch and its model card in one commit of a repository of the Hub."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypedDict, Unpack

from ..errors import MachineError, MismatchError, UsageError, boundary
from ..patch.lossless import AnyPatch, LosslessPatch, load_any
from ..patch.patch import Patch
from ..patch.patch_file import PATCH_NAME
from ..progress import Progress, silent
from ..sources.hub_client import page
from ..sources.hub_id import HubId, is_repo, is_revision
from ..surgery.merge_checks import check_patches
from ..surgery.verb import warn
from ..text import lines
from .card import base_of, card_figure, read_licence, write_card
from .repository import CARD_NAME, FIGURE_NAME, MAIN, Files, Repository, read_repository, send_commit


@dataclass(frozen=True, slots=True)
class PushResult:
    """What a push did."""

    # Where the patch is now: pull it as ``repo@commit``. The address is that of the repository's page.
    repo: str
    branch: str
    commit: str
    url: str
    created: bool  # whether the repository was created
    changed: bool  # whether there is a new commit: not if the Hub had all files, by their sizes and hashes
    card: str = field(repr=False)  # the README
    neurons: int  # of the patch; a lossless one counts none
    tensors: int
    sha256: str  # of the patch's file: what `pull` and `apply` check if they are given it
    what: str  # the patch holds, in a few words
    created_branch: bool = False  # whether the branch was created

    def __str__(self) -> str:
        said = [f"created {self.repo}"] if self.created else []
        said += [f"created branch {self.branch}"] if self.created_branch else []
        done = f"pushed {self.what} to {self.url}"
        if not self.changed:
            nothing = "no commit was needed" if said else "nothing to push"
            done = f"{nothing}: {self.repo} has this patch and this card already"
        where = f"branch {self.branch}, commit {self.commit}"
        return lines([*said, done, where, f"SHA-256 of {PATCH_NAME}: {self.sha256}"])


@dataclass(frozen=True)
class PushPlan:
    """A planned push: everything is checked, and nothing is sent."""

    patch: Patch | LosslessPatch
    base: HubId | None  # where it is known
    repository: Repository  # where the patch goes, as it is now
    private: bool | None  # of a new repository; None: as the user's settings on the Hub say
    message: str  # of the commit
    card: str = field(repr=False)  # the README
    figure: bytes | None = field(repr=False)  # PNG; None if there is nothing to draw it with
    warnings: tuple[str, ...]

    @cached_property
    def sha256(self) -> str:
        """Of the patch's file; reads all of it."""
        return self.patch.sha256()

    @property
    def files(self) -> list[str]:
        """The names of the files that are sent."""
        return [PATCH_NAME, CARD_NAME, *([FIGURE_NAME] if self.figure else [])]

    def __str__(self) -> str:
        exists, needs_branch = self.repository.exists, self.repository.needs_branch
        new = ", a new repository" if not exists else ", a new branch" if needs_branch else ""
        return lines(
            [
                f"push {self.patch.what} to {self.repository.repo} ({self.repository.branch}{new})",
                f"base: {self.base or 'unknown'}",
                f"files: {', '.join(self.files)}",
                f"SHA-256 of {PATCH_NAME}: {self.sha256}",
                f"commit message: {self.message}",
            ]
        )

    def describe(self) -> dict[str, object]:
        """For JSON. What only `run` can tell is None or False."""
        repository, source = self.repository, self.patch.source
        return {
            "patch": None if source is None else source.named,
            "repo": repository.repo,
            "revision": repository.branch,
            "parent": repository.head,
            "commit": None,
            "url": None,
            "created": False,
            "created_branch": False,
            "changed": False,
            "private": repository.private if repository.exists else self.private,
            "files": self.files,
            "message": self.message,
            "base": self.base and self.base.repo,
            "base_revision": self.base and self.base.revision,
            "neurons": self.patch.neurons,
            "selected": self.patch.neurons,
            "sha256": self.sha256,
            "card": self.card,
            "warnings": list(self.warnings),
        }

    @boundary
    def run(self) -> PushResult:
        """Send the patch and its card; raises as `push`."""
        patch, repository, sha256 = self.patch, self.repository, self.sha256
        patch.check_in_place()  # what is sent is what was checked
        figure = {FIGURE_NAME: self.figure} if self.figure else {}
        with patch.stream() if patch.path is None else nullcontext(patch.path) as content:
            files: Files = {PATCH_NAME: content, CARD_NAME: self.card.encode(), **figure}
            commit, parent = send_commit(repository, files, self.message, private=self.private)
        return PushResult(
            repo=repository.repo,
            branch=repository.branch,
            commit=commit,
            url=page(repository.repo),
            created=not repository.exists,
            changed=commit != parent,
            card=self.card,
            neurons=patch.neurons,
            tensors=len(patch.forward.tensors if isinstance(patch, LosslessPatch) else patch.tensors),
            sha256=sha256,
            what=patch.what,
            created_branch=repository.needs_branch,
        )


class PushOptions(TypedDict, total=False):
    """The keywords of `push`, which documents them."""

    private: bool | None
    revision: str | None
    message: str | None
    base: str | None
    parent: str | None
    replace_card: bool
    progress: Progress


def push(patch: AnyPatch, repo: str, **options: Unpack[PushOptions]) -> PushResult:
    """Publish a patch on the Hugging Face Hub, with a model card: one commit, all or nothing.

    huggingface_hub finds the token: ``HF_TOKEN``, or that of ``hf auth login``.

    Args:
        patch: A patch, its file, or the Hub id of another repository.
        repo: ``org/name``; created if it does not exist.
        private: Create the repository as private. An existing public one is refused.
        revision: A branch; created from main if it does not exist. Default: main.
        message: The commit message.
        base: ``org/name`` or ``org/name@revision`` of the base, if the patch does not name it.
        parent: The commit that must be the branch's head: the one that you looked at last.
        replace_card: Write a new card. By default the owner's text is kept.

    Raises:
        UsageError: If a name is not valid, ``private`` does not fit the repository, or a named base does not
            exist.
        MismatchError: If the branch is not at ``parent``, or moves on while the patch is sent; if ``base`` is
            not the one that the patch names; if the card on the Hub cannot be read.
        CorruptFileError, MachineError: If the patch's hashes do not match; if the Hub refuses or cannot be
            reached. The branch is as it was.
    """
    plan = plan_push(patch, repo, **options)
    warn(__name__, plan.warnings)
    return plan.run()


@boundary
def plan_push(
    patch: AnyPatch, repo: str, *, dry_run: bool = False, **options: Unpack[PushOptions]
) -> PushPlan:
    """Check what `push` needs, and write the card; on a ``dry_run``, a silent Hub is a warning."""
    patch, base, message = load_any(patch), options.get("base"), options.get("message")
    if not is_repo(repo):
        raise UsageError("not the name of a repository", file=repo, hint="name it as org/name")
    base_model = base_of(patch, base)
    if base_model is not None and repo == base_model.repo:
        raise UsageError(
            "this is the repository of the base itself", file=repo, hint="name a repository for the patch"
        )
    if message is not None and not message.strip():
        raise UsageError("the commit message is empty")
    branch = MAIN if (revision := options.get("revision")) is None else revision
    private = options.get("private")
    if not is_revision(branch) or branch == "HEAD":
        raise UsageError(
            f"[[revision]] is not the name of a branch: {branch!r}",
            file=repo,
            hint="name it with letters, digits and . _ - /, as git allows",
        )
    if isinstance(patch, Patch):
        check_patches([patch], options.get("progress", silent))  # a lossless one needs its base for that
    warnings = []
    try:
        repository = read_repository(repo, branch)
    except MachineError as error:
        if not dry_run:
            raise
        repository = Repository(repo, branch)
        warnings.append(f"the repository on the Hub was not read: {error.what}")
    else:
        _check_repository(repository, private, options.get("parent"))
    licence, warning = read_licence(base_model, required=base is not None and not dry_run)
    if warning is not None:
        warnings.append(warning)
    if base_model is None:
        warnings.append(
            "the patch does not say which Hub model is its base, so the card names none: give it as [[base]]"
        )
    figure = card_figure(patch) if isinstance(patch, Patch) else None
    existing = None if options.get("replace_card") else repository.card()
    shown = FIGURE_NAME if figure else None
    card = write_card(patch, repo, base_model, licence, figure=shown, existing=existing)
    if message is None:
        verb = "Update" if PATCH_NAME in repository.files else "Add"
        kind = "neuron" if isinstance(patch, Patch) else "lossless"
        message = f"{verb} {kind} patch: {patch.what}"
    return PushPlan(patch, base_model, repository, private, message, card, figure, tuple(warnings))


def _check_repository(repository: Repository, private: bool | None, parent: str | None) -> None:
    if private and repository.exists and not repository.private:
        raise UsageError(
            "the repository exists already, and it is public",
            file=repository.repo,
            hint="push without [[private=True]], name another repository, or make this one private there",
        )
    if parent is not None and parent != repository.head:
        raise MismatchError(
            "the repository is not at the commit that [[parent]] names",
            file=str(repository.hub_id),
            expected=parent,
            found=repository.head or "no repository",
            hint="nothing was changed: look at the new commit, and name it with [[parent=...]]",
        )
