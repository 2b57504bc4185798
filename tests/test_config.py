"""config/: precedence of flags, files and defaults; error messages name the key and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from octavo.config import (
    DEMO,
    Config,
    GenerateOptions,
    LoraOptions,
    MemoryOptions,
    ModelOptions,
    PlanOptions,
    RunOptions,
    Section,
    TextOptions,
    TrainingData,
    TrainOptions,
    commands,
    fields,
    size_in_bytes,
)
from octavo.errors import UsageError

KINDS: dict[str, tuple[type[Section], ...]] = {
    "finetune": commands.FINETUNE,
    "plan": commands.PLAN,
    "evaluate": commands.EVALUATE,
    "generate": commands.GENERATE,
    "chat": commands.CHAT,
    "serve": commands.SERVE,
    "quantize": commands.QUANTIZE,
    "convert": commands.CONVERT,
    "merge": commands.MERGE,
    "export": commands.EXPORT,
    "data": commands.DATA,
    "runs": commands.RUNS,
    "compare": commands.COMPARE,
    "adapters show": commands.ADAPTER_SHOW,
    "adapters diff": commands.ADAPTER_DIFF,
    "adapters combine": commands.ADAPTER_COMBINE,
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def written(folder: Path, content: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(content, encoding="utf-8")
    return path


def refusal(file: Path) -> str:
    with pytest.raises(UsageError) as caught:
        Config.read(commands.FINETUNE, {}, file)
    return str(caught.value)


def test_a_flag_overrides_the_file_and_the_file_overrides_the_default(tmp_path: Path) -> None:
    file = written(tmp_path, "rank: 4\nalpha: 8\n")
    lora = Config.read(commands.FINETUNE, {"rank": 2}, file)[LoraOptions]
    assert (lora.rank, lora.alpha, lora.dropout) == (2, 8.0, 0.0)


def test_defaults_of_a_command_override_the_sections_but_not_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "steps: 7\n")
    config = Config.read(commands.FINETUNE, {"rank": 16}, file, defaults=DEMO)
    assert (config[TrainOptions].steps, config[LoraOptions].rank) == (7, 16)
    assert config[TextOptions].seq_len == DEMO["seq_len"] != Config.read(commands.FINETUNE, {})[TextOptions].seq_len


@pytest.mark.parametrize("key", ["seq_lenn", "seq-lenn"])
def test_an_unknown_key_names_the_file_and_the_most_similar_option(tmp_path: Path, key: str) -> None:
    message = refusal(written(tmp_path, f"{key}: 12\n"))
    assert "settings.yaml" in message
    assert key in message
    assert "Did you mean 'seq_len'?" in message


def test_an_unknown_key_similar_to_none_lists_the_options(tmp_path: Path) -> None:
    assert "checkpoint_every" in refusal(written(tmp_path, "zzzzzz: 1\n"))


def test_keys_may_have_hyphens_as_flags_do(tmp_path: Path) -> None:
    assert Config.read(commands.FINETUNE, {}, written(tmp_path, "seq-len: 64\n"))[TextOptions].seq_len == 64


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_every_notation_of_a_small_number_is_read(tmp_path: Path, number: str) -> None:
    assert Config.read(commands.FINETUNE, {}, written(tmp_path, f"lr: {number}\n"))[TrainOptions].lr == 1e-4


@pytest.mark.parametrize(
    ("line", "read_as"),
    [
        ("split_on: no", "False"),
        ("lora_targets: off", "False"),
        ("out: yes", "True"),
        ("split_on: 12:30", "750"),
        ("sample_prompt: [12:30]", "750"),
        ("out: 2024", "2024"),
        ("revision: 2024-05-01", "2024-05-01"),
    ],
)
def test_a_string_that_yaml_reads_as_another_type_gets_a_hint_to_quote_it(
    tmp_path: Path, line: str, read_as: str
) -> None:
    message = refusal(written(tmp_path, f"{line}\n"))
    assert message.startswith(f"{line.partition(':')[0]}:")
    assert read_as in message
    assert "put it in quotes" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- rank\n- 4\n", "key: value"),
        ("rank: [4\n", "not valid YAML"),
        ("revision: 2020-13-45\n", "not valid YAML"),
        ("rank: &a [*a\n", "aliases (*a) are not supported"),
        ("rank: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_the_error_for_a_broken_file_names_it(tmp_path: Path, content: str, message: str) -> None:
    error = refusal(written(tmp_path, content))
    assert "settings.yaml" in error
    assert message in error


def test_the_error_for_a_missing_file_a_folder_or_binary_data_names_it(tmp_path: Path) -> None:
    (binary := tmp_path / "binary.yaml").write_bytes(b"rank: \xff\xfe")
    for path in (tmp_path / "nothing.yaml", tmp_path, binary):
        assert str(path) in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\ndata: [*b, *b]\n", "line 2: aliases (*a) are not supported"),
        ("data: " + "[" * 20_000 + "]" * 20_000, "nested more than 16 deep"),
        ("".join(f"{' ' * n}a:\n" for n in range(200)), "nested more than 16 deep"),
        ("{" * 5000, "nested more than 16 deep"),
        ("data: " + "x" * 2**20, "larger than 1,048,576 bytes"),
        ("data:\n" + "- [a]\n" * 5000, "data: "),
        ("x" * 1000 + ": 1", "this command has no option"),
        ("lr: [" + "'" + "y" * 5000 + "']", "lr: "),
        ("lr: '" + "y" * 5000, "not valid YAML"),
    ],
)
def test_a_file_over_a_limit_gives_a_short_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UsageError) as caught:
        Config.read(KINDS["finetune"], {}, tmp_path / "a.yaml")
    assert message in caught.value.message
    assert len(caught.value.message) < 6000


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("columns: prompt=q,completion=a", ["prompt=q", "completion=a"]),
        ("columns: {prompt: 'my, question', completion: a}", ["prompt=my, question", "completion=a"]),
        ("columns: [prompt=q, 'completion=a']", ["prompt=q", "completion=a"]),
    ],
)
def test_columns_may_be_a_string_a_list_or_a_mapping(tmp_path: Path, content: str, columns: list[str]) -> None:
    (tmp_path / "a.yaml").write_text(content)
    config = Config.read((TextOptions,), {}, tmp_path / "a.yaml")
    assert config[TextOptions].columns == columns
    (tmp_path / "b.yaml").write_text(config.to_yaml())
    assert Config.read((TextOptions,), {}, tmp_path / "b.yaml")[TextOptions].columns == columns


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = written(tmp_path, "# nothing yet\n")
    assert Config.read(commands.FINETUNE, {}, file).to_yaml() == Config.read(commands.FINETUNE, {}).to_yaml()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seq_len", 1),
        ("min_unique_tokens", -1),
        ("test_fraction", 1),
        ("test_fraction", -0.1),
        ("rank", 0),
        ("rank", 2.5),
        ("rank", "many"),
        ("alpha", 0),
        ("dropout", 1),
        ("epochs", 0),
        ("epochs", float("inf")),
        ("steps", 0),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("lr", 0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("schedule", "cosin"),
        ("lr_floor", 1.1),
        ("max_grad_norm", -1),
        ("optimizer", "sgd"),
        ("seed", -1),
        ("seed", 2**63),
        ("scheme", "int4"),
        ("dtype", "float64"),
        ("keep_checkpoints", 0),
        ("keep", "first"),
        ("stop_after", 0),
        ("recompute", "some"),
        ("attention", "triton"),
        ("kernels", "perhaps"),
        ("cuda_graphs", 2),
        ("gpu_memory", "big"),
        ("gpu_memory", "0GiB"),
        ("gpu_memory", -1),
        ("gpu_memory", float("nan")),
        ("gpu_memory", "11 B"),
        ("gpu_memory", "1e3"),
        ("gpu_memory", "11GiBs"),
        ("gpu_memory", "11,5GiB"),
    ],
)
def test_the_error_for_a_value_out_of_bounds_starts_with_its_flag(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"^--{key.replace('_', '-')}: .*not {value!r}\."):
        Config.read(commands.FINETUNE, {key: value})


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("11GiB", 11 * 2**30),
        ("11gib", 11 * 2**30),
        ("11GB", 11 * 10**9),
        ("11G", 11 * 2**30),
        ("11", 11 * 2**30),
        (" 11.5 GiB ", 23 * 2**29),
        ("8192MiB", 2**33),
        ("500MB", 5 * 10**8),
        ("4096KiB", 2**22),
        ("0.5TiB", 2**39),
        ("auto", None),
    ],
)
def test_a_memory_size_is_read_with_its_unit(size: str, expected: int | None) -> None:
    """GB is 10^9 bytes (SI); all other units are powers of 1024; a number without a unit is GiB."""
    read = Config.read(commands.FINETUNE, {"gpu_memory": size})[MemoryOptions].gpu_memory
    assert read == size
    assert size_in_bytes(read) == expected


@pytest.mark.parametrize(("line", "expected"), [("11", 11 * 2**30), ("11.5", 23 * 2**29), ("11GB", 11 * 10**9)])
def test_a_memory_size_in_a_file_needs_no_quotes(tmp_path: Path, line: str, expected: int) -> None:
    config = Config.read(commands.FINETUNE, {}, written(tmp_path, f"gpu_memory: {line}\n"))
    assert size_in_bytes(config[MemoryOptions].gpu_memory) == expected
    again = Config.read(commands.FINETUNE, {}, written(tmp_path, config.to_yaml()))
    assert again[MemoryOptions] == config[MemoryOptions]


@settings(deadline=None)
@given(number=st.integers(1, 10**6), unit=st.sampled_from(["KiB", "MiB", "GiB", "TiB", "KB", "MB", "GB", "TB"]))
def test_a_memory_size_is_the_number_times_the_unit(number: int, unit: str) -> None:
    base = 1024 if "i" in unit else 1000
    assert size_in_bytes(f"{number}{unit}") == number * base ** ("KMGT".index(unit[0]) + 1)
    assert size_in_bytes(f"{number} {unit.lower()}") == number * base ** ("KMGT".index(unit[0]) + 1)


@pytest.mark.parametrize("size", ["9" * 400, "9" * 308 + "TiB", "0.0000000000001K", "1048577TiB"])
def test_a_memory_size_that_no_device_has_is_an_error(size: str) -> None:
    with pytest.raises(UsageError, match="--gpu-memory: must be auto or a size like 11GiB"):
        Config.read(commands.FINETUNE, {"gpu_memory": size})


def test_the_defaults_choose_the_fastest_plan_for_the_machine() -> None:
    options = Config.read(commands.FINETUNE, {})[MemoryOptions]
    assert (options.gpu_memory, options.recompute, options.attention) == ("auto", "auto", "auto")
    assert options.kernels
    assert options.cuda_graphs
    assert Config.read(commands.PLAN, {})[PlanOptions].gpu is None


def test_plan_has_every_option_of_finetune_that_memory_depends_on() -> None:
    """So the options of `octavo plan` can be given to `octavo finetune`."""
    assert {LoraOptions, TrainOptions, TextOptions, MemoryOptions, ModelOptions} <= set(commands.PLAN)
    assert set(commands.PLAN) - {PlanOptions} < set(commands.FINETUNE)


def test_all_invalid_values_are_reported_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Config.read(commands.FINETUNE, {"rank": 0, "lr": -1.0, "scheme": "int4"})
    assert all(f"{key}: " in caught.value.message for key in ("rank", "lr", "scheme"))


def test_lists_may_be_one_string_and_targets_may_have_commas(tmp_path: Path) -> None:
    file = written(tmp_path, "data: a, b.txt\nsample_prompt: Yes, my lord\nlora_targets: [q_proj, 'v_proj, lm_head']\n")
    config = Config.read(commands.FINETUNE, {}, file)
    assert config[TrainingData].data == ["a, b.txt"]
    assert config[RunOptions].sample_prompt == ["Yes, my lord"]
    assert config[LoraOptions].lora_targets == ["q_proj", "v_proj", "lm_head"]


@settings(deadline=None)  # disk access may be slow
@example(split_on="\x85", prompts=["a\u2028b", "\u2029", "Größe\r\n"], lr=1e-4, seed=0, steps=None)
@given(
    split_on=st.none() | TEXT,
    prompts=st.lists(TEXT, max_size=3),
    lr=st.floats(1e-300, 1e30),
    seed=st.integers(0, 2**63 - 1),
    steps=st.none() | st.integers(1),
)
def test_a_configuration_is_the_same_after_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory,
    split_on: str | None,
    prompts: list[str],
    lr: float,
    seed: int,
    steps: int | None,
) -> None:
    values = {"split_on": split_on, "sample_prompt": prompts, "lr": lr, "seed": seed, "steps": steps}
    config = Config.read(commands.FINETUNE, values)
    again = Config.read(commands.FINETUNE, {}, written(tmp_path_factory.getbasetemp(), config.to_yaml()))
    assert [again[kind] for kind in commands.FINETUNE] == [config[kind] for kind in commands.FINETUNE]


@pytest.mark.parametrize("command", KINDS)
def test_option_names_are_unique_in_a_command_and_have_a_line_of_help(command: str) -> None:
    names = [name for name, _ in fields(KINDS[command])]
    assert len(names) == len(set(names))
    assert all(field.description and field.description.endswith((".", "}")) for _, field in fields(KINDS[command]))


def test_replace_changes_the_given_values_and_validates_them() -> None:
    config = Config.read(commands.GENERATE, {"top_k": 5})
    other = config.replace(temperature=0.0)
    assert (other[GenerateOptions].temperature, other[GenerateOptions].top_k) == (0.0, 5)
    assert config[GenerateOptions].temperature == 0.8
    with pytest.raises(UsageError, match="temperature"):
        config.replace(temperature=-1)


def test_a_section_is_immutable() -> None:
    section = Config.read(commands.GENERATE, {})[ModelOptions]
    with pytest.raises(ValidationError, match="frozen"):
        section.model = "other"  # type: ignore[misc]
