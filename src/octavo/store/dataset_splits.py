"""Which files of a data set's repository on the hub are a split: from the README.md's `configs`, else from their names.

The rules are those of the hub's documentation ("Structure your repository" and "Manual configuration"). A split's
files all have one kind: the most frequent of KINDS, as the same rows are often there in several.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from octavo.bounded_json import shortened
from octavo.data.files import suffix
from octavo.errors import DataError, UsageError

# Kinds of files with rows, by suffix; of equally frequent ones the first is read.
KINDS = {
    ".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".jsonlines": "json", ".json": "json", ".csv": "csv",
    ".tsv": "tsv", ".txt": "text", ".zip": "archive", ".tar": "archive",
}  # fmt: skip
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
DEFAULT_SPLIT, DEFAULT_CONFIG = "train", "default"
MAX_README_BYTES = 2**20
MAX_NAMED = 20  # names in a message
_ABOUT = {"dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json", "license.txt"}
_ABOUT |= {"requirements.txt", "robots.txt", "croissant.json"}
_SHARD = re.compile(r"(?:^|/)data/(\w[\w.]*?)-\d{5}-of-\d{5,}[-.]")
# The layout of the branch refs/convert/parquet: config/split/0000.parquet.
_CONVERTED = re.compile(r"([^/]+)/(?:partial-)?([^/]+)/\d{4}\.parquet")


@dataclass(frozen=True)
class Split:
    """The files of a split in order, and the number of files of other kinds that it has."""

    config: str
    split: str
    files: list[str]
    others: dict[str, int] = field(default_factory=dict)


def find_split(names: Sequence[str], readme: str, *, config: str | None, split: str | None, source: str) -> Split:
    """The files of a split. `names` are the repository's files, `readme` its README.md, `source` names it in messages.

    Without a `config` the only one, or that which is marked or named default; without a `split`, train. UsageError for
    several configs and for one that does not exist, DataError for a repository without files to read.
    """
    names = sorted(filter(_is_public, names))
    configs = _configs(names, readme, source)
    chosen = _chosen(configs, config, source)
    splits = _splits(configs[chosen], names, source)
    splits = {name: files for name, files in splits.items() if files}
    if not splits:
        raise _no_files(names, source)
    wanted = split or DEFAULT_SPLIT
    if wanted not in splits:
        what = f"has no split {shortened(wanted)!r}" if split else "has no split train, the default"
        named = f"{source}/{config}" if config else source
        hint = f"Add one: {named}:{next(iter(splits))}. It has: {_listed(splits)}."
        raise UsageError(f"{source} {what}.", hint=hint)
    files = splits[wanted]
    kinds = [KINDS.get(suffix(Path(name)), "other") for name in files]
    kind = min(dict.fromkeys(kinds), key=lambda kind: (-kinds.count(kind), [*KINDS.values(), "other"].index(kind)))
    kept = [name for name, other in zip(files, kinds, strict=True) if other == kind]
    others = {other: kinds.count(other) for other in dict.fromkeys(kinds) if other != kind}
    return Split(chosen, wanted, kept, others)


def _configs(names: Sequence[str], readme: str, source: str) -> dict[str, Mapping[str, Any]]:
    """Config name -> its entry in the readme; one without data files takes them by their names."""
    found: dict[str, Mapping[str, Any]] = {}
    for entry in _entries(readme, source):
        name = entry.get("config_name", DEFAULT_CONFIG) if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise DataError("`configs` has an entry without a name.", source=f"{source}/README.md")
        found[name] = entry
    if found:
        return found
    data = [name for name in names if suffix(Path(name)) in KINDS]
    converted = [_CONVERTED.fullmatch(name) for name in data]
    for match in converted if all(converted) else []:
        assert match is not None
        entry = found.setdefault(match[1], {"data_files": {}})
        entry["data_files"].setdefault(match[2], []).append(match[0])
    return found or {DEFAULT_CONFIG: {}}


def _entries(readme: str, source: str) -> Sequence[Any]:
    """The list `configs` of the front matter of a README.md. Only its lines are parsed: the rest may be long."""
    lines = iter(readme.splitlines())
    if next(lines, "").strip() != "---":
        return []
    block: list[str] = []
    for line in lines:
        if line.strip() == "---":
            break
        if block and re.match(r"[^\s#-]", line):  # the next key
            break
        if block or re.match(r"configs\s*:", line):
            block.append(line)
    text = "\n".join(block)
    where = f"{source}/README.md"
    if len(text) > MAX_README_BYTES:
        raise DataError(f"`configs` has more than {MAX_README_BYTES:,} characters.", source=where)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        # Aliases to aliases expand exponentially, so a small file could exhaust memory.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=loader)):
            raise DataError("`configs` has aliases, which are not supported.", source=where)
        configs = (yaml.load(text, Loader=loader) or {}).get("configs") or []
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"`configs` is not valid YAML: {shortened(str(error), 300)}", source=where) from error
    return configs if isinstance(configs, list) else [configs]


def _chosen(configs: Mapping[str, Mapping[str, Any]], config: str | None, source: str) -> str:
    marked = [name for name, entry in configs.items() if entry.get("default") is True]
    if config is None:
        fallback = [DEFAULT_CONFIG] if DEFAULT_CONFIG in configs else list(configs)
        found = marked or fallback
        if len(found) == 1:
            return found[0]
        hint = f"Name one: {source}/{found[0]}. It has: {_listed(configs)}."
        raise UsageError(f"{source} has {len(configs):,} configs and no default one.", hint=hint)
    if config not in configs:
        raise UsageError(f"{source} has no config {shortened(config)!r}.", hint=f"It has: {_listed(configs)}.")
    return config


def _splits(entry: Mapping[str, Any], names: Sequence[str], source: str) -> dict[str, list[str]]:
    """Split -> files of a config."""
    folder = entry.get("data_dir")
    prefix = f"{_checked_pattern(folder, source).strip('/')}/" if folder and folder != "." else ""
    below = [name for name in names if name.startswith(prefix)]
    if (given := entry.get("data_files")) is None:
        return _by_name(below, len(prefix))
    if isinstance(given, dict):
        given = [{"split": split, "path": path} for split, path in given.items()]
    if isinstance(given, str) or (isinstance(given, list) and all(isinstance(item, str) for item in given)):
        given = [{"split": DEFAULT_SPLIT, "path": given}]
    found: dict[str, list[str]] = {}
    for item in given if isinstance(given, list) else [None]:
        if not isinstance(item, dict) or not isinstance(item.get("split"), str) or "path" not in item:
            message = "`data_files` is neither a pattern, a list of patterns nor a list of split and path."
            raise DataError(message, source=f"{source}/README.md")
        paths = item["path"] if isinstance(item["path"], list) else [item["path"]]
        patterns = [_checked_pattern(path, source) for path in paths]
        matched = (name for pattern in patterns for name in names if _matches(name, prefix + pattern))
        files = found.setdefault(item["split"], [])
        files += [name for name in dict.fromkeys(matched) if name not in files]
    return found


def _checked_pattern(pattern: object, source: str) -> str:
    """A pattern of file names within the repository; DataError for an address and for a path that leads out of it."""
    where = f"{source}/README.md"
    if not isinstance(pattern, str) or not pattern or len(pattern) > 1000:
        raise DataError("a path in `data_files` is no pattern of file names.", source=where)
    pattern = pattern.removeprefix("./")
    if "://" in pattern or pattern.startswith("/") or ".." in pattern.split("/"):
        message = f"{shortened(pattern)!r} in `data_files` is outside of the repository."
        raise DataError(message, source=where, hint="Download these files yourself, and name them with --data.")
    return pattern


def _by_name(names: Iterable[str], start: int) -> dict[str, list[str]]:
    """Split -> files by the words in their names from character `start` on.

    The first rule that any file fits counts for all: shards (data/NAME-00000-of-00002.parquet), folders, words.
    Without any, all files are the split train.
    """
    names = [name for name in names if suffix(Path(name)) in KINDS and PurePosixPath(name).name.lower() not in _ABOUT]
    for rule in (_by_shard, _by_folder, _by_word):
        found: dict[str, list[str]] = {}
        for name in names:
            if split := rule(name[start:]):
                found.setdefault(split, []).append(name)
        if found:
            return found
    return {DEFAULT_SPLIT: names}


def _by_shard(name: str) -> str:
    match = _SHARD.search(name)
    return match[1] if match else ""


def _by_folder(name: str) -> str:
    folders = [folder.lower() for folder in name.split("/")[:-1]]
    return next((split for folder in reversed(folders) for split, words in WORDS.items() if folder in words), "")


def _by_word(name: str) -> str:
    parts = re.split(r"[-._ 0-9/]+", name.lower())
    return next((split for part in reversed(parts) for split, words in WORDS.items() if part in words), "")


def _matches(name: str, pattern: str) -> bool:
    """Whether a file's name fits a glob pattern, in which `**` is any number of folders and `*` has no slash."""
    parts, patterns = name.split("/"), pattern.split("/")

    @cache
    def fits(at: int, number: int) -> bool:
        if number == len(patterns):
            return at == len(parts)
        if patterns[number] == "**":
            last = number == len(patterns) - 1  # `folder/**` is every file below
            return (last and at < len(parts)) or fits(at, number + 1) or (at < len(parts) and fits(at + 1, number))
        return at < len(parts) and fnmatchcase(parts[at], patterns[number]) and fits(at + 1, number + 1)

    return fits(0, 0)


def _is_public(name: str) -> bool:
    return not any(part.startswith((".", "__")) and part != ".." for part in name.split("/"))


def _listed(names: Iterable[str]) -> str:
    shown = [shortened(name) for name in names]
    more = f" and {len(shown) - MAX_NAMED:,} more" if len(shown) > MAX_NAMED else ""
    return ", ".join(shown[:MAX_NAMED]) + more


def _no_files(names: Sequence[str], source: str) -> DataError:
    kinds = ", ".join(KINDS)
    if scripts := [name for name in names if name.endswith(".py")]:
        return DataError(
            f"has no data files, but a loading script ({shortened(scripts[0])}), which octavo does not run.",
            source=source,
            hint=f"The hub has converted many such data sets: try {source}@refs/convert/parquet.",
        )
    return DataError(f"has no files that octavo reads ({kinds}).", source=source, hint="Download and convert them.")
