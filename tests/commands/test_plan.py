"""commands/plan.py: the output of `octavo plan` without reading weights, and the plan of a run."""

from __future__ import annotations

import json
import math
import re
import shlex
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests import devices

from octavo.commands import loading, plan, run_plan
from octavo.config import Config, MemoryOptions
from octavo.config import commands as sections
from octavo.errors import ModelError, UsageError
from octavo.hardware import GPUS, Hardware
from octavo.layers.context import Save
from octavo.ops.quantize import SCHEMES, scheme_named
from octavo.reporting import Report
from octavo.store.contents import items_of
from octavo.store.hf_folder import write_folder
from octavo.store.sources import FolderSource
from octavo.store.weights import allocated
from octavo.system import quoted
from octavo.train.memory import MARGIN, WORKSPACE_BYTES, MemoryPlan

Octavo = Callable[..., Any]
GIB = 2**30
RTX_3060, CPU = devices.hardware(devices.RTX_3060), devices.hardware(devices.CPU, torch.bfloat16)
LAYERS = 2
SHAPE: dict[str, Any] = {
    "architectures": ["GPTJForCausalLM"], "vocab_size": 16384, "n_positions": 4096, "n_embd": 2048, "n_layer": LAYERS,
    "n_head": 8, "rotary_dim": 64, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json and a sparse weight file, 340 MB by its header, without a tokenizer."""
    folder = tmp_path_factory.mktemp("a hollow model")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    model = allocated(SHAPE, scheme_named("none"), dtype=torch.bfloat16, device=torch.device("meta"))
    header, end = {}, 0
    for name, item in items_of(model):
        matrix, parameter = item.entry.matrix, item.entry.parameter(item.kind)
        shape = (matrix.outputs[item.entry.rows_key], matrix.in_features) if item.is_matrix and matrix else None
        sizes = list(shape or (parameter.shape if parameter is not None else ()))
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [end, end := end + 2 * math.prod(sizes)]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def config_of(folder: Path, **changes: Any) -> Config:
    values = {
        "model": str(folder),
        "seq_len": 1024,
        "batch_size": 2,
        "rank": 4,
        "gpu_memory": "4GiB",
        "gpu": "RTX 3060",
    }
    return Config.read(sections.PLAN, {**values, **changes})


def plan_result(folder: Path, **changes: Any) -> dict[str, Any]:
    with Report(console=False) as report:
        return plan.plan(config_of(folder, **changes), report)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates an RTX 3060 with 3 GiB of free memory."""
    monkeypatch.setattr(loading, "pick", lambda device, dtype: RTX_3060)
    monkeypatch.setattr(run_plan, "free_memory_bytes", lambda device: 3 * GIB)


def test_plan_reads_only_the_headers_of_the_weights(hollow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensor", "tokenizer"):
        monkeypatch.setattr(FolderSource, name, lambda *_: pytest.fail("was read"))
    assert [row["fits"] for row in plan_result(hollow)["plans"]] == [True, True]


def test_config_json_is_enough_for_a_plan(octavo: Octavo, hollow: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((hollow / "config.json").read_bytes())
    assert plan_result(tmp_path) == plan_result(hollow)
    assert octavo("models", "check", tmp_path).code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_embd": "wide"}, "n_embd is 'wide'"), ({"architectures": ["FooForCausalLM"]}, "FooForCausalLM")],
)
def test_an_error_of_the_model_comes_before_the_question_for_a_gpu(
    octavo: Octavo, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, **change}))
    done = octavo("plan", "--model", tmp_path)
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert "GPU" not in done.err


def test_shards_of_an_index_may_be_incomplete(hollow: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((hollow / "config.json").read_bytes())
    files = dict.fromkeys(FolderSource(hollow).names(), "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "one.safetensors").write_bytes(b"not yet")
    assert plan_result(tmp_path) == plan_result(hollow)


def test_the_error_for_a_truncated_file_names_it(hollow: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((hollow / "config.json").read_bytes())
    with (hollow / "model.safetensors").open("rb") as weights:
        (tmp_path / "model.safetensors").write_bytes(weights.read(2**16))
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        plan_result(tmp_path)


@pytest.mark.parametrize("hardware", [CPU, RTX_3060])
def test_8bit_matmuls_are_an_error_for_a_gpu_that_has_none(
    octavo: Octavo, hollow: Path, monkeypatch: pytest.MonkeyPatch, hardware: Hardware
) -> None:
    monkeypatch.setattr(loading, "pick", lambda device, dtype: hardware)
    arguments = ("plan", "--model", hollow, "--seq-len", 256, "--batch-size", 1, "--gpu-memory", "4GiB")
    done = octavo(*arguments, "--gpu", "P100", "--matmul", "8bit")
    assert (done.code, done.out) == (2, "")
    assert "The P100 has no 8-bit matmuls: they need an NVIDIA GPU of compute capability 7.5 with tensor" in done.err
    assert "Use --matmul exact." in done.err
    assert octavo(*arguments, "--gpu", "P100").code == 0
    assert octavo(*arguments, "--gpu", "T4", "--matmul", "8bit").code == 0
    assert octavo(*arguments, "--gpu", "RTX 3060", "--matmul", "8bit").code == 0


def test_what_the_times_rest_on_is_said_also_without_any(octavo: Octavo, hollow: Path) -> None:
    arguments = ("plan", "--model", hollow, "--seq-len", 256, "--gpu-memory", "14GiB")
    none, t4, plain = (
        octavo(*arguments, *more) for more in ((), ("--gpu", "T4"), ("--gpu", "T4", "--no-kernels", "--no-cuda-graphs"))
    )
    assert "No time is computed, since no GPU is named" in none.err
    assert "slower than that" not in t4.err
    assert "With --no-kernels and --no-cuda-graphs steps are slower than that." in " ".join(plain.err.split())


@pytest.mark.parametrize(
    ("gpu", "limit", "most"), [("T4", "20GiB", 15), ("3060", "12.1GiB", 12), ("4060 Ti", "17GiB", 16)]
)
def test_a_limit_beyond_the_memory_of_the_gpu_is_an_error(
    octavo: Octavo, hollow: Path, gpu: str, limit: str, most: int
) -> None:
    arguments = ("plan", "--model", hollow, "--seq-len", 256, "--batch-size", 1, "--gpu", gpu)
    done = octavo(*arguments, "--gpu-memory", limit)
    assert (done.code, done.out) == (2, "")
    assert f"--gpu-memory {limit} is more than the {most} GiB of the " in " ".join(done.err.split())
    assert f"Give --gpu-memory {most}GiB or less" in " ".join(done.err.split())
    assert octavo(*arguments, "--gpu-memory", f"{most}GiB").code == 0


@pytest.mark.parametrize(
    ("flop", "text"), [(39.1e9, "39.1 GFLOP"), (1e8, "0.1 GFLOP"), (9.9e7, "99.0 MFLOP"), (4000, "4.0 kFLOP")]
)
def test_small_amounts_of_work_have_a_smaller_unit(flop: float, text: str) -> None:
    assert plan._flop_text(flop) == text


def test_a_long_plan_says_how_far_it_is_on_stderr(
    octavo: Octavo, hollow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("plan", "--model", hollow, "--seq-len", 256, "--gpu-memory", "4GiB", "--json")
    monkeypatch.setattr(plan, "PROGRESS_SECONDS", math.inf)
    short = octavo(*arguments)
    monkeypatch.setattr(plan, "PROGRESS_SECONDS", 0)
    long = octavo(*arguments)
    assert "Planning: " not in short.err
    assert "Planning: 2 steps simulated in " in long.err
    assert long.json == short.json


def test_without_a_gpu_the_error_says_why_there_is_none(
    octavo: Octavo, hollow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "PyTorch is built without CUDA and cannot use the Tesla T4."
    monkeypatch.setattr(loading, "pick", lambda device, dtype: replace(CPU, reason=reason))
    done = octavo("plan", "--model", hollow, "--seq-len", 256)
    assert done.code == 2
    assert f"There is no GPU to plan for. {reason}" in done.err


def test_json_of_plan(octavo: Octavo, hollow: Path) -> None:
    arguments = ("--seq-len", 1024, "--batch-size", 2, "--rank", 4, "--gpu-memory", "4GiB", "--gpu", "RTX 3060")
    done = octavo("plan", "--model", hollow, *arguments, "--json")
    assert done.code == 0
    assert done.json == plan_result(hollow)
    assert done.json.keys() == {"budget_bytes", "gpu", "time_basis", "plans"}
    assert (done.json["budget_bytes"], done.json["gpu"]) == (4 * GIB, "RTX 3060")
    assert [row["scheme"] for row in done.json["plans"]] == ["int8", "nf4"]
    for row in done.json["plans"]:
        assert row["least_bytes"] * MARGIN <= row["peak_bytes"] <= 4 * GIB
        assert row["least_gib"] - 0.01 <= row["least_bytes"] / GIB <= row["least_gib"]
        assert row["peak_gib"] == round(row["peak_bytes"] / GIB, 2)
        (short, long), (slow, fast) = row["seconds"], row["tokens_per_second"]
        assert long > 2 * short  # of an RTX 3060 nothing was measured but its memory
        assert (slow, fast) == pytest.approx((2 * 1024 / long, 2 * 1024 / short))
        assert (row["micro_batch_size"], row["layers_all"], row["layers_attention"]) == (2, LAYERS, 0)


def test_the_table_ends_with_a_command_that_runs(octavo: Octavo, hollow: Path) -> None:
    done = octavo("plan", "--model", hollow, "--gpu-memory", "4GiB", "--seq-len", 640, "--batch-size", 3)
    assert done.code == 0
    assert "3 x 640 in 4.0 GiB" in done.out
    assert "least --gpu-memory: the smallest limit, in GiB, with which the scheme fits: the peak of its" in done.err
    assert {"int8", "nf4", "yes"} <= set(done.out.replace("│", " ").split())
    assert "None" not in done.out  # unknown time of an unknown GPU
    command = done.out.strip().splitlines()[-1]
    arguments = shlex.split(command)
    assert arguments[:2] == ["octavo", "finetune"]
    printed = octavo(*arguments[1:], "--print-config")
    assert printed.code == 0
    expected = {"model": str(hollow), "scheme": "int8", "seq_len": 640, "batch_size": 3}
    assert (
        expected.items()
        <= {key: value for key, value in yaml.safe_load(printed.out).items() if key in expected}.items()
    )


def test_the_command_has_all_given_options(octavo: Octavo, hollow: Path) -> None:
    given = (
        "--no-fused",
        "--micro-batch-size",
        1,
        "--gpu-memory",
        "4GiB",
        "--dropout",
        0.1,
        "--lora-targets",
        "q_proj",
    )
    done = octavo("plan", "--model", hollow, *given)
    assert done.code == 0
    printed = octavo(*shlex.split(done.out.strip().splitlines()[-1])[1:], "--print-config")
    values = yaml.safe_load(printed.out)
    expected = {"fused": False, "micro_batch_size": 1, "gpu_memory": "4GiB", "dropout": 0.1, "lora_targets": ["q_proj"]}
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize("requested", ["int8", "nf4", "dynamic8", "none"])
def test_with_scheme_there_is_only_its_row(hollow: Path, requested: str) -> None:
    assert [row["scheme"] for row in plan_result(hollow, scheme=requested)["plans"]] == [requested]


def test_a_quantized_folder_keeps_its_scheme(tiny_llama: Path, tmp_path: Path) -> None:
    write_folder(FolderSource(tiny_llama), tmp_path / "small", scheme_named("nf4"))
    result = plan_result(tmp_path / "small", seq_len=64)["plans"]
    assert [row["scheme"] for row in result] == ["nf4"]


def test_no_other_scheme_is_suggested_for_a_quantized_folder(hollow: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "octavo": {"format": 1, "scheme": "nf4"}}))
    (tmp_path / "model.safetensors").symlink_to(hollow / "model.safetensors")
    smallest = plan_result(tmp_path, seq_len=4096)["plans"][0]["least_gib"]
    with pytest.raises(UsageError) as caught:
        plan_result(tmp_path, seq_len=4096, gpu_memory=f"{smallest - 0.01}GiB")
    assert "--scheme nf4 --seq-len 2048" in caught.value.hint
    assert "int8" not in caught.value.hint


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("3GiB", 3 * 2**30),
        ("3GB", 3 * 10**9),
        ("3G", 3 * 2**30),
        ("3", 3 * 2**30),
        ("3.5", 7 * 2**29),
        ("8192MiB", 8 * 2**30),
        (" 0.5 tib ", 2**39),
    ],
)
def test_memory_sizes_may_have_every_common_form(tiny_llama: Path, size: str, expected: int) -> None:
    assert plan_result(tiny_llama, seq_len=64, gpu=None, gpu_memory=size)["budget_bytes"] == expected


@pytest.mark.parametrize("size", ["big", "-3", "0", "3PiB", "11 Gb/s", "", "nan"])
def test_other_memory_sizes_are_a_usage_error(octavo: Octavo, hollow: Path, size: str) -> None:
    done = octavo("plan", "--model", hollow, f"--gpu-memory={size}")
    assert done.code == 2
    assert "--gpu-memory" in done.err
    assert "11GiB" in done.err


@pytest.mark.exhaustive
def test_if_nothing_fits_the_hint_has_settings_that_fit(octavo: Octavo, hollow: Path) -> None:
    smallest = {row["scheme"]: row["least_gib"] for row in plan_result(hollow, seq_len=4096)["plans"]}
    budget = smallest["nf4"] - 0.011  # available, but less than the smallest plan with its margin
    assert budget > smallest["nf4"] * MARGIN
    requested = ("plan", "--model", hollow, "--rank", 4, "--gpu-memory", f"{budget}GiB", "--gpu", "RTX 3060", "--json")
    done = octavo(*requested, "--seq-len", 4096)
    assert done.code == 2
    message = re.search(r"needs at least (\d+\.\d+) GiB; (\d+\.\d+) GiB are available", done.err)
    assert message is not None
    assert [float(number) for number in message.groups()] == pytest.approx([smallest["int8"], budget], abs=0.011)
    offers = done.err.partition("This fits: ")[2].strip().rstrip(".").split("; ")
    assert len(offers) == 3
    for offer in offers:
        flags = offer.partition(" takes ")[0].split()
        again = octavo(*requested, *flags)
        assert again.code == 0, offer
        assert again.json["plans"][0]["fits"], offer
        assert int(flags[3]) < 4096 or flags[1] == "nf4-double"


def test_if_no_setting_fits_the_hint_says_so(hollow: Path) -> None:
    with pytest.raises(UsageError, match="smaller model, or raise --gpu-memory: --scheme nf4") as caught:
        plan_result(hollow, gpu_memory="100MiB")
    enough = re.search(r"--scheme (nf4\S*) --seq-len (\d+) needs (\d+\.\d+) GiB", caught.value.hint)
    assert enough is not None
    assert int(enough[2]) < 1024
    wanted = {"scheme": enough[1], "seq_len": int(enough[2]), "gpu_memory": f"{enough[3]}GiB"}
    assert plan_result(hollow, **wanted)["plans"][0]["least_gib"] == float(enough[3])


def test_a_run_that_does_not_fit_with_recompute_none_may_fit_with_auto(hollow: Path) -> None:
    """--recompute is applied as given; without it the planner chooses a plan that fits."""
    requested = {"scheme": "int8", "seq_len": 4096, "recompute": "none", "micro_batch_size": 2, "gpu": "A6000"}
    peak = plan_result(hollow, **requested, gpu_memory="40GiB")["plans"][0]
    assert (peak["layers_all"], peak["micro_batch_size"]) == (LAYERS, 2)
    with pytest.raises(UsageError, match="--scheme int8 --seq-len 4096 --recompute auto takes"):
        plan_result(hollow, **requested, gpu_memory=f"{peak['peak_bytes'] / GIB - 0.05}GiB")


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_recompute_sets_the_save_level_of_all_layers(hollow: Path, recompute: str) -> None:
    row = plan_result(hollow, recompute=recompute)["plans"][0]
    expected = {"none": (LAYERS, 0), "selective": (0, LAYERS), "full": (0, 0)}
    assert (row["layers_all"], row["layers_attention"]) == expected[recompute]


@pytest.mark.parametrize("recompute", ["auto", "none", "full"])
def test_least_is_the_smallest_limit_that_fits(hollow: Path, recompute: str) -> None:
    """It is the peak of the smallest plan and, unless --recompute fixes the plan, the margin of the forecast."""
    requested = {"scheme": "int8", "seq_len": 4096, "recompute": recompute, "gpu": "A6000"}
    least = plan_result(hollow, **requested, gpu_memory="40GiB")["plans"][0]["least_bytes"]
    row = plan_result(hollow, **requested, gpu_memory=f"{least / 2**20}MiB")["plans"][0]
    margin = MARGIN if recompute == "auto" else 1
    assert row["fits"]
    assert row["least_bytes"] == least == math.ceil(row["peak_bytes"] / margin)
    with pytest.raises(UsageError, match="are available"):
        plan_result(hollow, **requested, gpu_memory=f"{least / 2**20 - 0.01}MiB")


def test_a_plan_fits_only_if_a_run_would_take_it(hollow: Path) -> None:
    """If the budget is between the smallest plan and that plan plus its margin, `octavo finetune` fails."""
    exact = {"matmul": "exact"}
    planner = run_plan.planner_for(config_of(hollow, **exact), FolderSource(hollow), SCHEMES["nf4"], CPU, None)
    smallest = planner.smallest().peak_bytes
    short, enough = (f"{factor * smallest / GIB}GiB" for factor in (1.001, 1.001 / MARGIN))
    for ask in (partial(plan_result, hollow, scheme="nf4", **exact), partial(fitted, hollow, RTX_3060, "nf4", **exact)):
        ask(gpu_memory=enough)
        with pytest.raises(UsageError, match="are available"):
            ask(gpu_memory=short)


def test_packed_documents_take_the_memory_of_a_mask_on_a_gpu_without_flash_attention(hollow: Path) -> None:
    """A GPU that is named, and one that is here. The mask is 2048 x 2048 values of 2 bytes."""
    config = config_of(hollow, seq_len=2048, batch_size=1, matmul="exact")

    def peak(hardware: Hardware, name: str | None) -> int:
        gpu = GPUS[name] if name else None
        planner = run_plan.planner_for(config, FolderSource(hollow), SCHEMES["int8"], hardware, gpu, documents=4)
        return planner.smallest().peak_bytes

    assert peak(CPU, "T4") - peak(CPU, "RTX 3060") >= 2 * 2048**2
    assert peak(devices.hardware(devices.T4), None) - peak(RTX_3060, None) >= 2 * 2048**2


def test_the_time_of_a_step_is_proportional_to_its_micro_batches(hollow: Path) -> None:
    one, three = (plan_result(hollow, batch_size=2 * count, micro_batch_size=2)["plans"][0] for count in (1, 3))
    assert one["micro_batch_size"] == three["micro_batch_size"] == 2
    assert three["seconds"] == pytest.approx([3 * end for end in one["seconds"]])
    assert three["tokens_per_second"] == pytest.approx(one["tokens_per_second"])
    assert three["peak_bytes"] == one["peak_bytes"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lora_targets": ["q_porj"]}, UsageError, "--lora-targets.*'q_porj'.*\n.*q_proj"),
        ({"seq_len": 4097}, UsageError, "--seq-len 4096"),
        ({"gpu": "RTX 9999"}, UsageError, "no data of the GPU 'RTX 9999'"),
        ({"gpu": "RTX 3080 Laptop"}, UsageError, "no data of the GPU 'RTX 3080 Laptop'"),
        ({"model": "absent"}, UsageError, "absent"),
    ],
)
def test_an_invalid_setting_is_reported_before_weights_are_read(
    hollow: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(FolderSource, "tensor", lambda *_: pytest.fail("was read"))
    with pytest.raises(error, match=message):
        plan_result(hollow, **changes)


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        (None, "no GPU to plan for"),
        ("RTX 4060 Ti", f"with one of {quoted(['RTX 4060 Ti 16GB'])}, {quoted(['RTX 4060 Ti 8GB'])}"),
    ],
)
def test_without_a_memory_size_plan_asks_for_it(octavo: Octavo, hollow: Path, gpu: str | None, message: str) -> None:
    done = octavo("plan", "--model", hollow, *(["--gpu", gpu] if gpu else []))
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert "--gpu-memory" in done.err


@pytest.mark.parametrize(("gpu", "name"), [("RXT 3060", "RTX 3060"), ("RTX 4090 48GB", "RTX 4090")])
def test_an_unknown_gpu_is_answered_with_similar_names(octavo: Octavo, hollow: Path, gpu: str, name: str) -> None:
    done = octavo("plan", "--model", hollow, "--gpu", gpu)
    assert (done.code, done.out) == (2, "")
    assert f"Similar names: {quoted([name])}" in done.err


@pytest.mark.parametrize("limit", [None, "4GiB"])
def test_for_an_unknown_gpu_the_error_has_a_command_that_plans_its_memory(
    octavo: Octavo, hollow: Path, limit: str | None
) -> None:
    given = ("plan", "--model", hollow, "--seq-len", 256, "--rank", 4, *(("--gpu-memory", limit) if limit else ()))
    done = octavo(*given, "--gpu", "GTX 1060")
    assert (done.code, done.out) == (2, "")
    text = " ".join(done.err.split())
    assert "octavo has no data of the GPU 'GTX 1060'." in text
    assert "RTX" not in text
    command = text.partition("Its memory alone can be planned, without times: ")[2].partition(" (the memory")[0]
    arguments = shlex.split(command)
    assert arguments[:2] == ["octavo", "plan"]
    assert arguments[-2:] == ["--gpu-memory", limit or "5GiB"]
    assert arguments[2:-2] == ["--model", str(hollow), "--seq-len", "256", "--rank", "4"]
    assert octavo(*arguments[1:]).code == 0


def test_a_scheme_that_does_not_fit_has_no_time_in_the_table(octavo: Octavo, hollow: Path) -> None:
    arguments = ("--seq-len", 1024, "--batch-size", 2, "--rank", 4, "--gpu", "RTX 3060", "--gpu-memory")
    least = [row["least_gib"] for row in plan_result(hollow)["plans"]]
    done = octavo("plan", "--model", hollow, *arguments, f"{(least[0] + least[1]) / 2}GiB")
    assert done.code == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.out.splitlines() if "│ " in line]
    rows = {line[0]: line for line in cells}
    assert rows["int8"][1] == "no"
    assert rows["int8"][-2:] == ["-", "-"]
    assert rows["nf4"][1] == "yes"
    assert all(re.fullmatch(r"[\d.,]+ to [\d.,]+", cell) for cell in rows["nf4"][-2:])


@pytest.mark.parametrize(
    ("gpu", "size", "others"), [("RTX 3060", 12, "RTX 3060 8GB"), ("RTX 3060 8GB", 8, ""), ("T4", 15, "")]
)
def test_the_memory_of_a_known_gpu_is_assumed_and_said(
    octavo: Octavo, hollow: Path, gpu: str, size: int, others: str
) -> None:
    done = octavo("plan", "--model", hollow, "--gpu", gpu, "--json")
    assert done.code == 0
    assert done.json["budget_bytes"] == int(0.9 * size * GIB)
    assert f"The {gpu} has {size} GiB; the plan counts on 90 % of it, {0.9 * size:.1f} GiB" in done.err
    assert "--gpu-memory" in done.err
    assert (f"--gpu {quoted([others])}" in done.err) if others else "another size" not in done.err


def test_a_name_of_several_gpus_is_refused_with_their_names(octavo: Octavo, hollow: Path) -> None:
    done = octavo("plan", "--model", hollow, "--gpu", "a100")
    assert (done.code, done.out) == (2, "")
    assert "'a100' can be several GPUs" in done.err
    assert ", ".join(quoted([name]) for name in ("A100 40GB", "A100 80GB", "A100 80GB PCIe")) in done.err


def test_a_short_name_of_a_gpu_is_the_name_of_its_row(hollow: Path) -> None:
    short, whole = (plan_result(hollow, gpu=name) for name in ("3060", "RTX 3060"))
    assert short == whole
    assert short["gpu"] == "RTX 3060"


@pytest.mark.usefixtures("on_a_gpu")
def test_plan_is_for_the_gpu_of_this_machine(hollow: Path) -> None:
    for gpu in (None, "RTX 3060"):
        result = plan_result(hollow, gpu_memory="auto", gpu=gpu)
        assert result["budget_bytes"] == 3 * GIB - run_plan.LIBRARIES_BYTES
        assert result["plans"][0]["seconds"] is not None
    # The free memory here is of another GPU.
    assert plan_result(hollow, gpu_memory="auto", gpu="H100")["budget_bytes"] == int(0.9 * 80 * GIB)
    assert plan_result(hollow, gpu_memory="auto", gpu=None)["gpu"] == RTX_3060.name


def test_a_faster_gpu_has_a_shorter_predicted_time(hollow: Path) -> None:
    gpus = ("RTX 3060", "RTX 3090", "A100 80GB", "H100")
    for end in (0, 1):
        seconds = [plan_result(hollow, gpu=gpu)["plans"][0]["seconds"][end] for gpu in gpus]
        assert seconds == sorted(seconds, reverse=True)
        assert len(set(seconds)) == 4


def test_the_table_has_both_ends_of_a_time_and_the_text_what_it_rests_on(octavo: Octavo, hollow: Path) -> None:
    arguments = ("--seq-len", 1024, "--batch-size", 2, "--rank", 4, "--scheme", "int8", "--gpu", "t4")
    done = octavo("plan", "--model", hollow, *arguments)
    assert done.code == 0
    row = plan_result(hollow, gpu="T4", scheme="int8", gpu_memory="auto")["plans"][0]
    cells = [cell.strip() for cell in done.out.replace("│", "|").split("|")]
    for time in ("seconds", "tokens_per_second"):
        assert run_plan.range_text(*row[time]) in cells
    text = " ".join(done.err.split())
    assert text.count("The times are computed, not measured: ") == 1
    assert (
        "Others published rates of its 16-bit matmuls and memory; for 8-bit matmuls and attention an estimate" in text
    )


def test_without_a_known_gpu_there_is_no_word_of_times(octavo: Octavo, hollow: Path) -> None:
    done = octavo("plan", "--model", hollow, "--gpu-memory", "4GiB", "--seq-len", 256, "--batch-size", 1, "--json")
    assert done.json["plans"][0]["seconds"] is done.json["plans"][0]["tokens_per_second"] is None
    assert "times are computed" not in done.err


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (312.4, 623, "310 to 620"),
        (0.0474, 0.1, "0.047 to 0.10"),
        (1.04, 1.04, "1.0"),
        (9.96, 12345, "10.0 to 12,000"),
        (0, 0, "0"),
    ],
)
def test_a_range_has_two_digits_of_each_end(low: float, high: float, text: str) -> None:
    assert run_plan.range_text(low, high) == text


def fitted(folder: Path, hardware: Hardware, scheme: str = "int8", **changes: Any) -> run_plan.FittedPlan:
    return run_plan.fit(config_of(folder, **changes), FolderSource(folder), SCHEMES[scheme], hardware)


def test_the_plan_of_a_run_has_no_more_sequences_than_the_data_have_rows(hollow: Path) -> None:
    def fitted_rows(rows: int, **changes: Any) -> run_plan.FittedPlan:
        return run_plan.fit(config_of(hollow, **changes), FolderSource(hollow), SCHEMES["int8"], RTX_3060, rows=rows)

    many, few = fitted_rows(3, batch_size=4000), fitted(hollow, RTX_3060, batch_size=3)
    assert many.plan == few.plan
    assert fitted_rows(3, batch_size=2).plan == fitted(hollow, RTX_3060, batch_size=2).plan
    assert fitted_rows(3, batch_size=4000, micro_batch_size=2000).plan.rows == 3


def test_a_batch_size_over_a_million_is_an_error(octavo: Octavo, hollow: Path) -> None:
    done = octavo("plan", "--model", hollow, "--gpu-memory", "4GiB", "--batch-size", 10**6 + 1)
    assert done.code == 2
    assert "--batch-size: must be less than or equal to 1000000" in done.err


def test_offload_on_needs_a_gpu(hollow: Path) -> None:
    tight: dict[str, Any] = {"gpu_memory": "1.2GiB", "seq_len": 4096}
    result = {way: fitted(hollow, RTX_3060, offload=way, **tight) for way in ("auto", "on", "off")}
    assert [result[way].plan.offload for way in ("on", "off")] == [True, False]
    assert result["auto"].planner.offloads == (False, True)
    assert result["off"].plan.host_bytes == 0
    with pytest.raises(UsageError, match="needs a GPU"):
        fitted(hollow, CPU, offload="on", **tight)
    assert not fitted(hollow, CPU, **tight).plan.offload


@pytest.mark.parametrize("recompute", ["auto", "full"])
def test_a_plan_that_offloads_more_than_free_cpu_memory_is_an_error(
    hollow: Path, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    requested: dict[str, Any] = {"gpu_memory": "4GiB", "recompute": recompute}
    monkeypatch.setattr(run_plan, "free_memory_bytes", lambda device: 2**25)
    with pytest.raises(UsageError, match="to CPU memory") as refused:
        fitted(hollow, RTX_3060, offload="on", **requested)
    assert "--offload off" in (refused.value.hint or "")
    assert not fitted(hollow, RTX_3060, offload="auto", **requested).plan.offload
    with pytest.raises(UsageError, match="to CPU memory"):
        plan_result(hollow, offload="on", **requested)


def test_a_run_gets_the_fastest_plan_that_fits(hollow: Path) -> None:
    roomy = fitted(hollow, RTX_3060, gpu_memory="8GiB", seq_len=4096)
    assert (roomy.plan.save, roomy.plan.rows) == ((Save.ALL,) * LAYERS, 2)
    assert roomy.plan.seconds is not None
    tight = fitted(hollow, RTX_3060, gpu_memory="1.2GiB", seq_len=4096)
    assert tight.plan == tight.planner.best(1.2 * GIB)
    assert tight.plan.peak_bytes <= tight.budget_bytes == int(1.2 * GIB)
    assert tight.plan.seconds is not None
    assert tight.plan.seconds > roomy.plan.seconds


def test_a_run_uses_the_save_level_of_recompute(hollow: Path) -> None:
    """Even if it does not fit: the run then changes to a cheaper plan."""
    result = fitted(hollow, RTX_3060, recompute="selective", gpu_memory="0.3GiB", micro_batch_size=2)
    assert (result.plan.save, result.plan.rows) == ((Save.ATTENTION,) * LAYERS, 2)
    assert result.plan.peak_bytes > result.budget_bytes


def test_too_little_memory_is_an_error_on_a_gpu_but_not_on_a_cpu(hollow: Path) -> None:
    with pytest.raises(UsageError, match=r"needs at least .* GiB; 0\.10 GiB are available"):
        fitted(hollow, RTX_3060, gpu_memory="0.1GiB")
    result = fitted(hollow, CPU, gpu_memory="0.1GiB")
    assert result.plan == result.planner.smallest()


def test_cheaper_plans_end_with_the_smallest(hollow: Path) -> None:
    result = fitted(hollow, RTX_3060, gpu_memory="8GiB", seq_len=4096)
    plans = [result.plan]
    while (following := result.cheaper(plans[-1])) is not None:
        plans.append(following)
        assert len(plans) < 30
    peaks = [plan.peak_bytes for plan in plans]
    assert all(later < 0.95 * earlier for earlier, later in pairwise(peaks[:-1]))
    assert peaks == sorted(set(peaks), reverse=True)
    assert plans[-1] == result.planner.smallest()
    assert len(plans) > 3
    beyond = fitted(hollow, RTX_3060, recompute="none", gpu_memory="1.05GiB", seq_len=4096, micro_batch_size=2)
    following = beyond.cheaper(beyond.plan)
    assert following is not None
    assert (
        following.peak_bytes <= beyond.budget_bytes < 0.94 * 0.94 * beyond.plan.peak_bytes
    )  # at once, not by a little


def test_the_memory_budget_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_plan, "free_memory_bytes", lambda device: {"cuda": 8, "cpu": 6}[device.type] * GIB)
    auto, requested = (MemoryOptions.model_validate({"gpu_memory": size}) for size in ("auto", "11GB"))
    assert run_plan.budget_bytes(auto, RTX_3060) == 8 * GIB - run_plan.LIBRARIES_BYTES
    assert run_plan.budget_bytes(auto, CPU) == 3 * GIB
    assert run_plan.budget_bytes(requested, RTX_3060) == run_plan.budget_bytes(requested, CPU) == 11 * 10**9


@pytest.mark.parametrize(("optimizer", "state"), [("adamw8bit", 2), ("adamw", 8)])
def test_the_planner_has_the_settings_of_the_run(hollow: Path, optimizer: str, state: int) -> None:
    changes = {"optimizer": optimizer, "lora_targets": ["q_proj", "lm_head"], "train_norms": True, "batch_size": 3}
    made = run_plan.planner_for(config_of(hollow, **changes), FolderSource(hollow), SCHEMES["int8"], CPU, GPUS["L4"])
    assert (made.batch_size, made.length, made.gpu, made.optimizer_bytes) == (3, 1024, GPUS["L4"], state)
    trained = [p for p in made.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == LAYERS * 4 * 2 * 2048 + 4 * (2048 + 16384) + (LAYERS + 1) * 2 * 2048
    assert all(tensor.is_meta for tensor in (*trained, *made.model.embed.matrix.parts.values()))
    assert made.smallest().peak_bytes > made.fixed_bytes + WORKSPACE_BYTES


@pytest.mark.parametrize(("fixed", "peak", "text"), [
    (None, 98, ""), (None, 99, "no plan is certain to fit"), (None, 150, "no plan is certain"), (Save.ALL, 100, ""),
    (Save.ALL, 101, "--recompute"),
])  # fmt: skip
def test_a_plan_that_does_not_fit_with_its_exact_layers_gets_a_warning(fixed: Any, peak: int, text: str) -> None:
    made = MemoryPlan((Save.INPUT,), 1, peak, None)
    fitting = run_plan.FittedPlan(made, 100, planner=None, fixed=None if fixed is None else (fixed,))  # type: ignore[arg-type]
    assert (text in fitting.warning()) if text else fitting.warning() == ""


def test_the_plan_of_a_run_counts_the_documents_of_its_rows(octavo: Octavo, hollow: Path) -> None:
    """`octavo plan` reads no data, and says what it assumes."""
    packed, alone = (
        run_plan.fit(config_of(hollow), FolderSource(hollow), SCHEMES["int8"], RTX_3060, rows=2, documents=documents)
        for documents in (200, 1)
    )
    assert packed.plan.peak_bytes > alone.plan.peak_bytes
    assert alone.plan == fitted(hollow, RTX_3060).plan
    done = octavo("plan", "--model", hollow, "--seq-len", 256, "--batch-size", 1, "--gpu-memory", "4GiB")
    assert "The plan is of rows with one document each" in done.err


def test_the_error_for_a_run_that_does_not_fit_counts_the_documents_of_its_rows(hollow: Path) -> None:
    needed = []
    for documents in (1, 200):
        config = config_of(hollow, gpu_memory="0.05GiB")
        with pytest.raises(UsageError, match=r"needs at least [\d.]+ GiB") as caught:
            run_plan.fit(config, FolderSource(hollow), SCHEMES["int8"], RTX_3060, rows=2, documents=documents)
        needed.append([float(gib) for gib in re.findall(r"([\d.]+) GiB", f"{caught.value} {caught.value.hint}")])
    assert needed[1][0] > needed[0][0]
    assert needed[1][-1] > needed[0][-1]  # of the cheapest settings, in the hint


def test_the_budget_of_another_gpu_is_not_cut_to_the_memory_of_the_gpu_here(
    hollow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "pick", lambda device, dtype: RTX_3060)
    monkeypatch.setattr(run_plan, "memory_limit_bytes", lambda device: 2 * GIB)
    assert plan_result(hollow, gpu="RTX 3060", gpu_memory="4GiB")["budget_bytes"] == 2 * GIB
    assert plan_result(hollow, gpu="RTX 4090", gpu_memory="4GiB")["budget_bytes"] == 4 * GIB


@pytest.mark.parametrize(
    "name", ["4090 " + "9" * 5000 + "GB", "RTX 4090 " + "9" * 5000 + "GB", "A100 " * 6000, "x" * 30_000]
)
def test_a_long_name_of_a_gpu_is_an_error_of_a_few_lines(hollow: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_result(hollow, gpu=name)
    assert name[:100] in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("hardware", [CPU, RTX_3060, devices.hardware(devices.T4)])
def test_what_finetune_refuses_on_a_gpu_is_refused_in_a_plan_for_it(
    hollow: Path, monkeypatch: pytest.MonkeyPatch, hardware: Hardware
) -> None:
    monkeypatch.setattr(loading, "pick", lambda device, dtype: hardware)
    for attention in ("flash", "cudnn"):
        with pytest.raises(UsageError, match=f"T4 does not run --attention {attention}: .* compute capability 8.0"):
            plan_result(hollow, gpu="T4", attention=attention)
    with pytest.raises(UsageError, match="T4 has no bfloat16 instructions") as caught:
        plan_result(hollow, gpu="T4", dtype="bfloat16")
    assert caught.value.hint == "Use --dtype float16 or float32."
    for values in ({"attention": "efficient"}, {"dtype": "float16"}, {"attention": "auto", "dtype": "auto"}):
        assert plan_result(hollow, gpu="T4", **values)["gpu"] == "T4"
    assert plan_result(hollow, gpu="RTX 4090", attention="flash", dtype="bfloat16")["gpu"] == "RTX 4090"


def test_a_plan_in_float32_has_no_time_and_says_why(octavo: Octavo, tiny_llama: Path) -> None:
    done = octavo("plan", "--model", tiny_llama, "--gpu", "T4", "--dtype", "float32", "--json")
    assert done.code == 0, done.err
    assert {plan["seconds"] for plan in done.json["plans"]} == {None}
    assert "16-bit matmuls" in done.json["time_basis"]


def test_a_plan_with_attention_math_warns_that_scores_are_not_counted(octavo: Octavo, tiny_llama: Path) -> None:
    done = octavo("plan", "--model", tiny_llama, "--gpu", "T4", "--attention", "math")
    assert "the scores of all pairs of tokens" in done.err
    assert "the scores of all pairs" not in octavo("plan", "--model", tiny_llama, "--gpu", "T4").err
