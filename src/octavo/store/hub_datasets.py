"""Data sets of the Hugging Face hub: `hf:owner/name[/config][@revision][:split]` to files in the hub's cache.

Only the files of one split are downloaded, by huggingface_hub, whose settings apply: HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE. Without a network a data set is read that was downloaded before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any

from octavo.bounded_json import shortened
from octavo.errors import DataError, OctavoError, UsageError
from octavo.reporting import Report
from octavo.store.dataset_splits import MAX_README_BYTES, Split, find_split

PREFIX = "hf:"
README = "README.md"
_NAME = re.compile(
    r"hf:(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<config>[^/@:]+))?(?:@(?P<revision>[^@:\s]+))?(?::(?P<split>[^/@:]+))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HOW = "Give it as hf:owner/name, hf:owner/name/config, hf:owner/name:split or hf:owner/name@revision."


@dataclass(frozen=True)
class DatasetName:
    """A data set as --data names it."""

    repository: str  # owner/name
    config: str | None = None
    revision: str | None = None
    split: str | None = None

    @staticmethod
    def parse(text: str) -> DatasetName:
        """UsageError for a text that starts with hf: and has another form."""
        match = _NAME.fullmatch(text)
        if match is None or any(part.startswith(("-", ".")) for part in match["repository"].split("/")):
            raise UsageError(f"{shortened(text)!r} names no data set of the hub.", hint=_HOW)
        return DatasetName(**match.groupdict())

    def __str__(self) -> str:
        parts = (("/", self.config), ("@", self.revision), (":", self.split))
        return PREFIX + self.repository + "".join(mark + value for mark, value in parts if value)

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, whose data never change."""
        return _COMMIT.fullmatch(self.revision or "") is not None

    @property
    def source(self) -> str:
        """The data set in messages, without config, revision and split."""
        return PREFIX + self.repository


@dataclass(frozen=True)
class LocalFiles:
    """Paths on this machine in place of names of data sets."""

    paths: list[str]
    names: dict[Path, str] = field(default_factory=dict)  # file in the cache -> hf:owner/name/path
    revisions: dict[str, str] = field(default_factory=dict)  # hf:owner/name -> commit


def is_dataset(path: str) -> bool:
    """Whether an item of --data is a data set of the hub."""
    return path.startswith(PREFIX)


def pinned(paths: Sequence[str], report: Report | None = None) -> list[str]:
    """`paths` with the commit in the name of each data set of the hub, so that they name the same data later."""
    return [_pinned(DatasetName.parse(path), report) if is_dataset(path) else path for path in paths]


def _pinned(name: DatasetName, report: Report | None) -> str:
    if name.is_pinned:
        return str(name)
    folder, _ = _repository(name, report)
    return str(replace(name, revision=folder.name))


def local_files(paths: Sequence[str], report: Report | None = None) -> LocalFiles:
    """Downloads the data sets of the hub among `paths`. Reports commit, split and size of each.

    UsageError for a name, revision, config or split that does not exist and for a data set that this account may not
    read; DataError for one without files to read; OctavoError without a network.
    """
    result = LocalFiles([])
    for path in paths:
        if not is_dataset(path):
            result.paths.append(path)
            continue
        name = DatasetName.parse(path)
        folder, split, n_bytes = _located(name, report)
        if result.revisions.setdefault(name.source, folder.name) != folder.name:
            raise UsageError(f"{name.source} is named with two revisions.", hint="Give one of them.")
        if report:
            size = f"{len(split.files):,} file{'s' * (len(split.files) != 1)}, {n_bytes / 1e6:,.1f} MB"
            config = "" if split.config == "default" else f"config {split.config}, "
            report.say(f"{name.source}: commit {folder.name[:12]}, {config}split {split.split}, {size}.")
            if split.others:
                others = ", ".join(f"{count:,} {kind}" for kind, count in split.others.items())
                report.say(f"{name.source}: files of other kinds in this split are not read: {others}.")
        patterns = [escape(file) for file in split.files]
        with _hub_errors(name):
            _snapshot(name, patterns, revision=folder.name)
        for file in split.files:
            if not (folder / file).is_file():  # huggingface_hub returns the folder without a network too
                raise _not_fetched(name, f"{file} is missing")
            result.paths.append(str(folder / file))
            result.names[folder / file] = f"{name.source}/{file}"
    return result


def _repository(name: DatasetName, report: Report | None) -> tuple[Path, str]:
    """The folder of a commit in the hub's cache, whose name is the commit, and the README.md ("" without one).

    Warns if the hub cannot be reached to ask for the newest commit, and an earlier one is in the cache.
    """
    unreachable = "" if name.is_pinned else _unreachable(name)
    with _hub_errors(name):
        folder = _snapshot(name, [README], revision=name.revision, quiet=True)
    if unreachable and report:
        what = f"the hub could not be reached ({unreachable}); the commit in its cache is used, {folder.name[:12]}."
        report.warn(f"{name.source}: {what}")
    try:
        with (folder / README).open("rb") as file:
            return folder, file.read(8 * MAX_README_BYTES).decode("utf-8", "replace").removeprefix("\ufeff")
    except FileNotFoundError:
        return folder, ""


def _unreachable(name: DatasetName) -> str:
    """Why the hub cannot be asked about a data set; "" if it answers, or if HF_HUB_OFFLINE says not to ask."""
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    with _hub_errors(name):
        try:
            huggingface_hub.HfApi().dataset_info(name.repository, revision=name.revision)
        except (OfflineModeIsEnabled, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError) and _status(error) < 500:
                raise
            return "" if isinstance(error, OfflineModeIsEnabled) else f"{_status(error)}"
        except httpx.TransportError as error:
            return type(error).__name__
    return ""


def _located(name: DatasetName, report: Report | None) -> tuple[Path, Split, int]:
    """The folder of the commit, the files of the split, and their bytes. Downloads the README.md alone."""
    folder, readme = _repository(name, report)
    sizes = _sizes(name, folder.name)
    split = find_split(list(sizes), readme, config=name.config, split=name.split, source=name.source)
    for file in split.files:
        _check_name(file, name)
    return folder, split, sum(sizes[file] for file in split.files)


def _sizes(name: DatasetName, commit: str) -> dict[str, int]:
    """File -> bytes of a commit, as huggingface_hub stored them with the README.md, or from the hub."""
    import huggingface_hub
    from huggingface_hub.hf_api import RepoFile

    listed = getattr(huggingface_hub, "get_cached_repo_tree", None)  # not in older versions
    with _hub_errors(name):
        entries = (
            listed(name.repository, repo_type="dataset", revision=commit)
            if listed is not None
            else huggingface_hub.HfApi().list_repo_tree(
                name.repository, repo_type="dataset", revision=commit, recursive=True
            )
        )
        return {entry.path: int(entry.size or 0) for entry in entries if isinstance(entry, RepoFile)}


def _check_name(file: str, name: DatasetName) -> None:
    """DataError for a file whose name is a path out of the folder, on any operating system."""
    parts = file.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f]", file):
        message = f"has a file of the name {shortened(file)!r}, which no file of a data set may have."
        raise DataError(message, source=name.source, hint="Do not use this data set.")


def _snapshot(name: DatasetName, patterns: list[str], *, revision: str | None, quiet: bool = False) -> Path:
    """Downloads the files that fit; returns the folder of their commit. `quiet`: without a progress bar."""
    import huggingface_hub
    from huggingface_hub import utils

    bar: Any = utils.tqdm  # type: ignore[attr-defined]

    def begin(self: Any, *args: Any, **options: Any) -> None:
        bar.__init__(self, *args, **{**options, "disable": True})

    silent: Any = type("Silent", (bar,), {"__init__": begin})
    return Path(
        huggingface_hub.snapshot_download(
            name.repository,
            repo_type="dataset",
            revision=revision,
            allow_patterns=patterns,
            tqdm_class=silent if quiet else None,
        )
    )


def cached_file(source: str, revisions: Mapping[str, str]) -> Path | None:
    """The file in the hub's cache that `local_files` named `source`; None for other files."""
    import huggingface_hub

    if not is_dataset(source):
        return None
    owner, _, rest = source.removeprefix(PREFIX).partition("/")
    repository, _, file = rest.partition("/")
    repository = f"{owner}/{repository}"
    if (commit := revisions.get(PREFIX + repository)) is None or not file:
        return None
    found = huggingface_hub.try_to_load_from_cache(repository, file, revision=commit, repo_type="dataset")
    return Path(found) if isinstance(found, str) else None


@contextmanager
def _hub_errors(name: DatasetName) -> Iterator[None]:
    """Errors of the hub and the network as OctavoErrors. None of them has the token."""
    import httpx
    from huggingface_hub import errors

    login = "Log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except OctavoError:
        raise
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{name.source} is gated: this account may not read it.",
            hint=f"Accept its terms on https://huggingface.co/datasets/{name.repository}. {login}.",
        ) from error
    except errors.RevisionNotFoundError as error:
        revision = shortened(name.revision or "main")
        raise UsageError(f"{name.source} has no revision {revision!r}.", hint="Check the branch, tag or commit.") from (
            error
        )
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"There is no data set {name.source} on the hub that this account may see.",
            hint=f"Check owner/name. {login}, if it is private.",
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{name.source}: {shortened(str(error))}", hint=_HOW) from error
    except (httpx.HTTPError, OSError, errors.EntryNotFoundError) as error:
        status = _status(error)
        if status in (401, 403):
            raise UsageError(f"{name.source} may not be read by this account ({status}).", hint=f"{login}.") from error
        why = f"the hub answered with {status}" if status else f"{type(error).__name__}"
        raise _not_fetched(name, why) from error


def _not_fetched(name: DatasetName, why: str) -> OctavoError:
    return OctavoError(
        f"{name.source} could not be fetched from the hub and is not in its cache ({why}).",
        hint="Check the network (HF_HUB_OFFLINE, HF_ENDPOINT) and try again, or download the files and name them.",
    )


def _status(error: BaseException | None) -> int:
    """The HTTP status of an error or of one that caused it; 0 without one."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return int(response.status_code)
        error = error.__cause__
    return 0
