"""`octavo push`: uploads the adapter of a run to the Hugging Face hub with its model card, in one commit.

The token is that of huggingface_hub: HF_TOKEN, or that of `hf auth login`. It is never an option.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from octavo.bounded_json import read_object
from octavo.commands.model_card import About, model_card, public_name
from octavo.commands.run_summary import state_of
from octavo.config import Config, PushOptions
from octavo.config.settings import read_settings
from octavo.errors import AdapterError, OctavoError, UsageError
from octavo.failures import cut
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.adapter import NamedAdapter, adapter_folder
from octavo.runs.folder import RunFolder
from octavo.store import peft
from octavo.store.base_names import hub_id, licence_of
from octavo.store.files import json_bytes
from octavo.store.peft import ORIGIN, TENSORS
from octavo.store.peft_config import CONFIG

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,200}", re.ASCII)
README = "README.md"


def push(config: Config, report: Report) -> dict[str, Any]:
    """Uploads the adapter of a run; returns the JSON result. UsageError for a run that has not finished."""
    options = config[PushOptions]
    if not options.run or not options.repository:
        raise UsageError("octavo push needs a run and a repository.", hint="octavo push runs/mine owner/name")
    _check_names(options.repository, options.revision or "main")
    named = NamedAdapter.read(Path(options.run))
    run = RunFolder(named.folder)
    if named.step is None:
        _check_finished(run)
    folder = adapter_folder(Path(options.run), say=report.say, warn=report.warn)
    peft.read(folder)  # a damaged adapter is not uploaded
    readme = readme_of(run.path, folder, file_names=options.file_names, adapter_name=options.repository)
    files = _files(folder, readme)
    revision = options.revision or "main"
    result: dict[str, Any] = {
        "repository": options.repository, "revision": revision,
        "files": {name: len(content) for name, content in files.items()}, "url": None, "commit": None, "readme": readme,
    }  # fmt: skip
    if options.dry_run:
        report.result(readme)
    report.table("Files", ["file", "bytes"], [[name, len(content)] for name, content in files.items()], result=True)
    if options.dry_run:
        report.say(f"Nothing was uploaded to {options.repository} (--dry-run).")
        return result
    commit = _upload(options.repository, revision, files, private=options.private, report=report)
    report.result(f"Uploaded to {commit.repo_url} (commit {commit.oid[:12]}).")
    return {**result, "url": str(commit.repo_url), "commit": str(commit.oid)}


def _check_names(repository: str, revision: str) -> None:
    """UsageError for names that the hub does not accept."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
        valid = _REPOSITORY.fullmatch(repository)
    except HFValidationError:
        valid = None
    if not valid:
        raise UsageError(
            f"{cut(repository)} is no name of a repository.",
            hint="Give it as owner/name, of letters, digits, -, _ and single dots inside.",
        )
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise UsageError(f"{cut(revision)} is no name of a branch.", hint="Give --revision letters, digits, -, _ . /")


def readme_of(run: Path, adapter: Path, *, file_names: bool = True, adapter_name: str = "") -> str:
    """The model card of an adapter of a run."""
    return model_card(about(run, adapter, file_names=file_names, adapter_name=adapter_name))


def about(run: Path, adapter: Path, *, file_names: bool = True, adapter_name: str = "") -> About:
    """What the card of an adapter of a run says. It has the results if the adapter is the one that the run keeps."""
    folder = RunFolder(run)
    settings = read_settings(folder.settings)
    origin = read_object(adapter / ORIGIN, error=AdapterError)
    named = origin.get("base")
    base = named if isinstance(named, dict) else {}
    recorded = events.read(folder.metrics)
    if adapter != folder.adapter:  # of a checkpoint: the table is of another adapter
        recorded = [event for event in recorded if isinstance(event, events.Versions | events.Hardware)]
    model = str(settings.get("model", ""))
    return About(
        settings,
        hub_id(model),
        str(base.get("sha256", "")),
        int(origin.get("step", 0)),
        licence_of(model),
        recorded,
        read_object(folder.ledger, error=AdapterError) if folder.ledger.is_file() else {},
        file_names,
        adapter_name or "THIS_FOLDER",
    )


def _check_finished(run: RunFolder) -> None:
    if not run.is_run() or not run.settings.is_file():
        raise UsageError(f"{run.path} contains no run.", hint="Name the folder of `octavo finetune --out`.")
    run.check_format()
    state, _ = state_of(run, events.read(run.metrics))
    if state != "finished":
        steps = run.steps()
        named = f", or name a checkpoint: {run.path}@{steps[-1]}" if steps else ""
        raise UsageError(
            f"The run {run.path} has not finished ({state}).",
            hint=f"Finish it with `octavo finetune --resume --out {run.path}`{named}.",
        )


def _files(folder: Path, readme: str) -> dict[str, bytes]:
    """The files to upload by name. A base that is a path of this machine is named without its folders."""
    content = read_object(folder / CONFIG, error=AdapterError)
    content["base_model_name_or_path"] = public_name(str(content.get("base_model_name_or_path", "")))
    origin = read_object(folder / ORIGIN, error=AdapterError)
    if isinstance(base := origin.get("base"), dict) and isinstance(base.get("name"), str):
        origin["base"] = {**base, "name": public_name(base["name"])}
    if isinstance(initial := origin.get("initial"), dict) and "path" in initial:
        origin["initial"] = {**initial, "path": Path(str(initial["path"])).name}
    return {
        README: readme.encode("utf-8", "replace"),
        CONFIG: json_bytes(content),
        ORIGIN: json_bytes(origin),
        TENSORS: (folder / TENSORS).read_bytes(),
    }


def _upload(repository: str, revision: str, files: dict[str, bytes], *, private: bool, report: Report) -> Any:
    """Creates the repository if there is none, and writes all files in one commit."""
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not huggingface_hub.get_token():
        raise UsageError(
            "There is no token for the Hugging Face hub.",
            hint="Log in with `hf auth login`, or set HF_TOKEN to a token with write access.",
        )
    api = HfApi()
    with _hub_errors(repository):
        try:
            names = [sibling.rfilename for sibling in api.model_info(repository).siblings or []]
        except RepositoryNotFoundError:
            names = None
        if names is None:
            api.create_repo(repository, private=private)
            report.say(f"Created the repository {repository}.")
        elif CONFIG not in names and (other := sorted(set(names) - {README, ".gitattributes"})):
            raise UsageError(
                f"{repository} exists and holds no adapter: {', '.join(other[:3])}.",
                hint="Choose another name, so that nothing in it is replaced.",
            )
        elif private:
            report.warn(f"{repository} exists: --private does not change who can see it.")
        if revision != "main":
            api.create_branch(repository, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        return api.create_commit(
            repository, operations, commit_message="Adapter trained with octavo", revision=revision
        )


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Errors of the hub and the network as OctavoErrors. None of them has the token."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OctavoError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reasons = {
            401: ("the hub does not accept the token", "Log in again with `hf auth login`, or renew HF_TOKEN."),
            403: (
                f"the account of the token may not write to {repository}",
                "Use a token with write access, and an owner that is you or your organization.",
            ),
            404: ("the repository or its branch does not exist", "Check owner/name and --revision."),
        }
        why, hint = reasons.get(status, (f"the hub answered with {status}", "Try again later."))
        raise OctavoError(f"Nothing was uploaded to {repository}: {why}.", hint=hint) from error
    except (httpx.HTTPError, OfflineModeIsEnabled, ConnectionError, RuntimeError) as error:
        # huggingface_hub raises RuntimeError for a file that could not be sent, before the commit.
        raise OctavoError(
            f"Nothing was uploaded to {repository}: the hub could not be reached ({type(error).__name__}).",
            hint="Check the network and HF_HUB_OFFLINE; --dry-run needs no network.",
        ) from error
