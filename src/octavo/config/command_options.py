"""The options of single commands other than `octavo finetune`. See options.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from octavo.config.section import Names, Paths, Section, Text, Texts


class EvaluateOptions(Section):
    """What to evaluate."""

    panel = "Evaluation"

    data: Paths = Field([], description="Text to evaluate on: file, folder, glob or hf:owner/name; may be repeated.")
    tasks: Names = Field([], description="Tasks of lm-evaluation-harness, as hellaswag,mmlu_* (needs octavo[eval]).")
    include_path: Path | None = Field(None, description="Folder of your own tasks in YAML; executes their Python code.")
    limit: int | None = Field(None, ge=1, description="Maximum number of documents of a task; default: all.")
    fewshot: int | None = Field(None, ge=0, description="Few-shot examples in a prompt; default: as in the task.")
    adapter: Path | None = Field(None, description="An adapter, a run, or RUN@STEP: adds the row 'tuned'.")
    batch_size: int = Field(4, ge=1, description="Packed rows in a batch; with --tasks texts and answers.")
    rows: int = Field(0, ge=0, description="Packed rows to evaluate; 0: all.")
    base: bool = Field(True, description="Also evaluate the unquantized base.")
    compare: Names = Field(
        [], description="Schemes to compare, as none,int8,nf4: one row each, instead of the other rows."
    )


class GenerateOptions(Section):
    """How text is generated."""

    panel = "Generation"

    adapter: Path | None = Field(
        None, description="Folder of an adapter or of a run, or RUN@STEP for one of its checkpoints."
    )
    max_new_tokens: int = Field(200, ge=1, description="Maximum number of new tokens.")
    temperature: float = Field(0.8, ge=0, description="Sampling temperature; 0: greedy.")
    top_k: int = Field(0, ge=0, description="Sample from the k most likely tokens; 0: all.")
    top_p: float = Field(
        0.95, gt=0, le=1, description="Sample from the most likely tokens up to this total probability."
    )
    repetition_penalty: float = Field(1.0, gt=0, description="Over 1: tokens that occurred become less likely; 1: off.")
    stop: Texts = Field([], description="Stop string, not part of the output; may be repeated.")
    seed: int = Field(0, ge=0, lt=2**63, description="Random seed of sampling.")


class PromptOptions(Section):
    """Prompts."""

    panel = "Prompts"

    prompt: str | None = Field(None, description="Prompt to continue; default, or -: standard input.")
    prompts: Path | None = Field(None, description="A JSONL file of prompts instead, generated as one batch.")
    slots: int = Field(8, ge=1, le=256, description="Prompts of --prompts in a batch.")
    chat: bool = Field(False, description="Format the prompt as a user message with the chat template of the model.")


class ChatOptions(Section):
    """A conversation."""

    panel = "Conversation"

    system: Text = Field(None, description="The system message.")


class ServeOptions(Section):
    """How a model is served over HTTP."""

    panel = "Server"

    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on; one that other machines can reach needs a key."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free port.")
    adapter: Paths = Field(
        [], description="An adapter to serve, as NAME=FOLDER, NAME=RUN or NAME=RUN@STEP; may be repeated."
    )
    adapters_from: Path | None = Field(
        None, description="Clients may load adapters from below this folder, and unload adapters, at runtime."
    )
    max_adapters: int = Field(16, ge=1, le=1024, description="Maximum number of adapters that clients may load up to.")
    api_key: str | None = Field(
        None, repr=False, description="API key that clients must send; better set in OCTAVO_API_KEY."
    )
    auth: bool = Field(True, description="Require an API key if other machines can reach the server.")
    origins: Names = Field(
        [], description="Origins of web pages that may use the server (CORS), as https://name; '*': any."
    )
    hosts: Names = Field([], description="Additional host names to accept in the Host header; '*': any.")
    slots: int = Field(8, ge=1, le=1024, description="Maximum number of requests in a batch.")
    max_model_len: int = Field(
        2048, ge=2, description="Maximum tokens of a prompt and its answer together, at most the context of the model."
    )
    queue: int = Field(64, ge=0, le=100_000, description="Maximum number of requests that wait for a slot.")
    deterministic: bool = Field(
        False,
        description="Give a request the same answer in every batch, also where a GPU decodes more than 32 requests at "
        "once; with fewer, and on a CPU, this is always so.",
    )
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Maximum tokens of a prompt; default: --max-model-len - 1."
    )
    max_new_tokens: int = Field(1024, ge=1, le=2**20, description="Maximum new tokens of a request.")
    request_seconds: float = Field(300.0, gt=0, description="Maximum seconds of a request, waiting included.")
    grace_seconds: float = Field(
        30.0, ge=0, description="Seconds to finish running requests at shutdown, and before an adapter is unloaded."
    )
    max_body_bytes: int = Field(2**21, ge=1024, description="Maximum bytes of a request body.")
    max_connections: int = Field(512, ge=1, le=100_000, description="Maximum number of open connections.")
    log_level: Literal["error", "warning", "info", "debug"] = Field(
        "warning", description="Log level on stderr; info: every request."
    )


class PlanOptions(Section):
    """The GPU to plan for."""

    panel = "Plan"

    gpu: str | None = Field(
        None, description="GPU to plan for, as 'RTX 3060': its speed and memory; default: this machine's."
    )


class QuantizeOptions(Section):
    """The output folder."""

    panel = "Output"

    out: Path | None = Field(None, description="New folder to write.")


class MergeOptions(Section):
    """The base and the adapter to merge, and the output folder."""

    panel = "Merge"

    model: str | None = Field(
        None,
        description="Base model: a folder, a .gguf file, a hub id, or smollm2; default: the adapter's.",
    )
    adapter: Path | None = Field(
        None, description="Folder of an adapter or of a run, or RUN@STEP for one of its checkpoints."
    )
    out: Path | None = Field(None, description="New folder to write.")
    type: Literal["bfloat16", "float16", "float32", "int8", "nf4", "nf4-double"] = Field(
        "bfloat16", description="Type of the merged weights; int8, nf4 and nf4-double are for octavo."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    allow_pickle: bool = Field(
        False, description="Read pickled .bin files (weights only) if there is no safetensors file."
    )
    force: bool = Field(False, description="Merge an adapter that was trained on other base weights.")


class ExportOptions(Section):
    """The model to write for other programs, and how."""

    panel = "Export"

    model: str | None = Field(
        None, description="Model: a folder, a .gguf file, a hub id, or smollm2; default: the adapter's base."
    )
    adapter: Path | None = Field(
        None, description="Folder of an adapter or of a run to merge, or RUN@STEP for one of its checkpoints."
    )
    out: Path | None = Field(None, description="New file to write.")
    to: Literal["gguf", "gguf-lora"] = Field(
        "gguf", description="gguf: the model, with the adapter merged; gguf-lora: the adapter alone."
    )
    type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = Field(
        "q8_0", description="Type of the matrices; with gguf-lora f32 for f32, else f16."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    allow_pickle: bool = Field(
        False, description="Read pickled .bin files (weights only) if there is no safetensors file."
    )
    force: bool = Field(False, description="Export an adapter with other base weights than those of its training.")


class ConvertOptions(Section):
    """The model to split into a base and an adapter, and the output folder."""

    panel = "Output"

    model: str | None = Field(None, description="Folder or hub id with frozen weights and trained adapters in one.")
    allow_pickle: bool = Field(
        False, description="Read pickled .bin files (weights only) if there is no safetensors file."
    )
    out: Path | None = Field(None, description="New folder to write, with base/ and adapter/.")


class RunsOptions(Section):
    """The folders to search for runs, and the order of the list."""

    panel = "Runs"

    folders: Paths = Field([], description="Folder that contains runs; may be repeated; default: the current folder.")
    sort: Literal["date", "name", "perplexity", "gain", "steps", "speed"] = Field(
        "date", description="Order: the newest, lowest perplexity, largest gain, most steps or fastest first."
    )
    depth: int = Field(3, ge=0, le=20, description="Levels of folders to search.")


class CompareOptions(Section):
    """The runs to compare, and the report to write."""

    panel = "Comparison"

    runs: Paths = Field(
        [], description="Run folder, or RUN@STEP for a run up to a checkpoint, 2 to 8; compared with the first."
    )
    report: Path | None = Field(None, description="Also write the comparison to this HTML file.")


class PushOptions(Section):
    """What to upload to the Hugging Face hub, and where to."""

    panel = "Hub"

    run: str | None = Field(None, description="Folder of a finished run, or RUN@STEP for one of its checkpoints.")
    repository: str | None = Field(None, description="Repository on the hub, as owner/name.")
    private: bool = Field(False, description="Create the repository as a private one.")
    revision: str | None = Field(None, description="Branch to write to; default: main.")
    file_names: bool = Field(True, description="Name the files of the data in the model card.")
    dry_run: bool = Field(False, description="Print the model card and list the files; upload nothing.")


class CheckOptions(Section):
    """The model whose config.json is checked."""

    panel = "Model"

    model: str | None = Field(None, description="Model to check: a folder, a .gguf file, a hub id, or smollm2.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")


class DataOptions(Section):
    """The text to inspect."""

    panel = "Data"

    data: Paths = Field([], description="Text to inspect: file, folder, glob or hf:owner/name; may be repeated.")
    samples: int = Field(2, ge=0, description="Number of decoded samples to show.")
