"""Splits of data sets: from the readme's `configs`, else from the files' names."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from octavo.errors import DataError, OctavoError, UsageError
from octavo.store.dataset_splits import Split, find_split

SOURCE = "hf:me/poems"


def found(names: list[str], configs: Any = None, *, config: str | None = None, split: str | None = None) -> Split:
    readme = (
        "---\nlicense: mit\n" + (yaml.safe_dump({"configs": configs}) if configs else "") + "tags:\n- a\n---\nText\n"
    )
    return find_split(names, readme, config=config, split=split, source=SOURCE)


@pytest.mark.parametrize(
    ("names", "split", "files"),
    [
        (["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/x-00000-of-00001.parquet"],
         None, ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]),
        (["data/x-00000-of-00001.parquet"], "x", ["data/x-00000-of-00001.parquet"]),
        (["dev/a.jsonl", "train/test.jsonl"], None, ["train/test.jsonl"]),
        (["poems_dev.jsonl.gz", "poems_train.jsonl.gz", "readme.md"], "validation", ["poems_dev.jsonl.gz"]),
        (["val.csv", "test.csv"], "test", ["test.csv"]),
        (["trains.jsonl", "LICENSE.txt", "poems.jsonl", ".b/train.jsonl"], "train", ["poems.jsonl", "trains.jsonl"]),
        (["a.txt", "b.parquet", "c.parquet"], None, ["b.parquet", "c.parquet"]),
        (["train.json", "train.parquet"], None, ["train.parquet"]),  # the same rows twice
    ],
)  # fmt: skip
def test_without_configs_names_say_the_split(names: list[str], split: str | None, files: list[str]) -> None:
    assert found(names, split=split).files == files


@pytest.mark.parametrize(
    ("data_files", "files"),
    [
        ("a/*.csv", ["a/1.csv", "a/2.csv"]),
        (["a/2.csv", "a/1.csv"], ["a/2.csv", "a/1.csv"]),
        ("**", ["a/1.csv", "a/2.csv", "a/b/3.csv", "c.csv"]),
        ("**/?.csv", ["a/1.csv", "a/2.csv", "a/b/3.csv", "c.csv"]),
        ("a/**/3.csv", ["a/b/3.csv"]),
        ([{"split": "train", "path": "c.csv"}, {"split": "test", "path": "a/*"}], ["c.csv"]),
        ([{"split": "train", "path": ["c.csv", "a/[12].csv"]}], ["c.csv", "a/1.csv", "a/2.csv"]),
        ({"train": "c.csv"}, ["c.csv"]),
    ],
)
def test_data_files_of_a_config(data_files: Any, files: list[str]) -> None:
    names = ["a/1.csv", "a/2.csv", "a/b/3.csv", "c.csv", "README.md"]
    assert found(names, [{"config_name": "one", "data_files": data_files}]).files == files


def test_the_default_config_or_a_named_one() -> None:
    names = ["de/train.csv", "en/train.csv", "en/test.csv"]
    configs = [{"config_name": name, "data_dir": name} for name in ("de", "en")]
    assert found(names, configs, config="en", split="test").files == ["en/test.csv"]
    configs[1]["default"] = True  # type: ignore[assignment]
    assert found(names, configs).files == ["en/train.csv"]
    configs[1] = {"config_name": "default", "data_files": "de/*"}
    assert found(names, configs).files == ["de/train.csv"]


def test_the_layout_of_converted_data_sets() -> None:
    names = ["de/train/0000.parquet", "de/train/0001.parquet", "de/test/0000.parquet", "en/partial-train/0000.parquet"]
    assert found(names, config="de").files == names[:2]
    assert found(names, config="en").files == names[3:]


@pytest.mark.parametrize(
    ("names", "configs", "named", "what"),
    [
        (["a.csv"], [{"config_name": "de"}, {"config_name": "en"}], {}, r"2 configs and no default one\.\n.*de, en"),
        (["a.csv"], [{"config_name": "de"}], {"config": "fr"}, r"no config 'fr'\.\nIt has: de"),
        (["a.csv"], None, {"config": "fr"}, "no config 'fr'"),
        (["train.csv", "test.csv"], None, {"split": "dev"}, "no split 'dev'\\.\n.*It has: test, train"),
        (["test.csv"], None, {}, "no split train, the default"),
        (["a.csv"], [{"config_name": "de"}], {"config": "de", "split": "x"}, "Add one: hf:me/poems/de:train"),
        (["poems.py", "README.md"], None, {}, r"loading script \(poems\.py\).*\n.*refs/convert/parquet"),
        (["a.png"], None, {}, "no files that octavo reads"),
        (["a.csv"], [{"config_name": "a", "data_files": "../*"}], {}, "outside of the repository"),
        (["a.csv"], [{"config_name": "a", "data_files": "https://x.org/a.csv"}], {}, "outside of the repository"),
        (["a.csv"], [{"config_name": "a", "data_files": [1]}], {}, "neither a pattern"),
        (["a.csv"], [{"config_name": "a", "data_files": 7}], {}, "neither a pattern"),
    ],
)
def test_what_is_missing_is_named(names: list[str], configs: Any, named: dict[str, str], what: str) -> None:
    with pytest.raises(OctavoError, match=what) as caught:
        found(names, configs, **named)
    assert isinstance(caught.value, UsageError | DataError)
    assert SOURCE in str(caught.value)


@pytest.mark.parametrize("configs", ["&a [*a]", "[{", "[" * 4000, "{config_name: 3}"])
def test_a_damaged_readme_is_a_data_error(configs: str) -> None:
    with pytest.raises(DataError, match=r"README\.md: `configs`"):
        find_split(["a.csv"], f"---\nconfigs: {configs}\n---\n", config=None, split=None, source=SOURCE)


def test_a_pattern_with_many_stars_ends() -> None:
    assert found(["a" * 200 + "/train.csv", "b.csv"], [{"config_name": "x", "data_files": "**/" * 50 + "*a" * 50 + "b"}
                 | {"data_files": ["**/" * 50 + "*a" * 50 + "b", "b.csv"]}]).files == ["b.csv"]  # fmt: skip
