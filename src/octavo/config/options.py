"""Every option, once: small sections, each option with its one line of help."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from octavo.config.section import Columns, Date, MemorySize, Names, Paths, Section, Texts


class ModelOptions(Section):
    """The base model and what it runs on."""

    panel = "Model"

    model: str = Field("smollm2", description="A folder, a .gguf file, a hub id, or smollm2.")
    scheme: Literal["auto", "none", "int8", "dynamic8", "nf4"] = Field(
        "auto", description="How frozen weights are stored; auto: as the folder has them, else int8."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    allow_pickle: bool = Field(False, description="Read .bin files (weights only) where there is no safetensors.")
    device: str = Field(
        "auto", description="auto, cpu, cuda or cuda:N; auto: the first GPU that PyTorch finds, else the CPU."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type that matmuls are computed in; auto: the best that the hardware has."
    )


class TextOptions(Section):
    """How text files become rows of tokens."""

    panel = "Data"

    seq_len: int = Field(512, ge=2, description="Tokens in a row; longer documents go over several rows.")
    split_on: str | None = Field(None, description="Plain text: 'lines', or a separator between documents.")
    columns: Columns = Field(
        [], description="Which fields of records are meant, as prompt=question,completion=answer or text=body."
    )
    template_date: Date = Field(
        None, description="The day that chat templates which write a date are given: 2026-11-28; a run keeps its first."
    )
    truncate: bool = Field(False, description="Cut documents at --seq-len instead of splitting them.")
    skip_bad: bool = Field(False, description="Count what cannot be read and go on, instead of stopping.")
    ftfy: bool = Field(False, description="Repair wrongly decoded text (needs octavo[clean]).")
    deduplicate: bool = Field(False, description="Leave out exact copies of documents.")
    min_unique_tokens: int = Field(0, ge=0, description="Leave out documents with fewer different tokens.")


class TrainingData(Section):
    """What to learn from, and what to measure on."""

    panel = "Data"

    data: Paths = Field([], description="Text to learn from: file, folder or glob; may be repeated.")
    test_data: Paths = Field([], description="Text held out to measure on; may be repeated.")
    test_fraction: float = Field(
        0.05, ge=0, lt=1, description="Without --test-data: share of the documents, or of a lone text, to hold out."
    )


class LoraOptions(Section):
    """The adapter."""

    panel = "Adapter"

    rank: int = Field(16, ge=1, description="LoRA rank.")
    alpha: float = Field(32.0, gt=0, description="LoRA alpha: the term is alpha / rank times B A x.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank).")
    lora_targets: Names = Field(
        ["all-linear"], description="Layers with LoRA: all-linear, or names like q_proj,v_proj,lm_head."
    )
    train_norms: bool = Field(False, description="Train the norms too.")
    train_biases: bool = Field(False, description="Train the biases of the targets too.")


class TrainOptions(Section):
    """The training itself."""

    panel = "Training"

    epochs: float = Field(1.0, gt=0, description="Passes over the data, unless --steps is given.")
    steps: int | None = Field(None, ge=1, description="Optimizer steps.")
    batch: int = Field(4, ge=1, description="Rows in a micro-batch.")
    accumulate: int = Field(1, ge=1, description="Micro-batches in an optimizer step.")
    lr: float = Field(2e-4, gt=0, le=1e30, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate over time.")
    warmup: float = Field(0.05, ge=0, description="Warm-up: a share of the steps, or a number of steps from 1 on.")
    lr_floor: float = Field(0.1, ge=0, le=1, description="Last learning rate over the peak.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, description="Largest gradient norm; 0: no clipping.")
    optimizer: Literal["adamw8bit", "adamw"] = Field("adamw8bit", description="AdamW with 8- or 32-bit state.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of adapters, data order and dropout.")


class MemoryOptions(Section):
    """What a step may take, and what it runs on; auto everywhere is the fastest that fits."""

    panel = "Memory"

    gpu_memory: MemorySize = Field(
        "auto", description="GPU memory to use, as 10GiB, without CUDA's own 0.8 GiB; auto: what is free."
    )
    recompute: Literal["auto", "none", "selective", "full"] = Field(
        "auto", description="What backward computes again instead of saving it; selective: all but attention."
    )
    offload: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Offload activations and the embedding to CPU memory; auto: when GPU memory is short.",
    )
    matmul: Literal["auto", "exact", "8bit"] = Field(
        "auto",
        description="Matmuls in training; auto: 8 bits for layers whose measured error is under 6 %, if faster on this "
        "GPU.",
    )
    kernels: bool = Field(True, description="Use the Triton kernels on a GPU that runs them.")
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = Field(
        "auto", description="Implementation of attention on a GPU; auto: the fastest that takes the call."
    )
    cuda_graphs: bool = Field(True, description="Capture a step as CUDA graphs and replay them.")


class RunOptions(Section):
    """The run folder and what happens along the way."""

    panel = "Run"

    out: Path = Field(Path("runs/finetune"), description="The run folder.")
    resume: bool = Field(False, description="Go on from the newest valid checkpoint in --out.")
    force: bool = Field(False, description="Resume even if model, data, adapter or batch differ from the checkpoint's.")
    checkpoint_every: int = Field(100, ge=0, description="Steps between checkpoints; 0: only at the end.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints to keep.")
    eval_every: int = Field(0, ge=0, description="Steps between held-out losses; 0: five times a run.")
    eval_rows: int = Field(0, ge=0, description="Held-out rows to measure on; 0: all.")
    keep: Literal["best", "last"] = Field("best", description="Which adapter stays: best held-out loss, or last.")
    sample_every: int = Field(0, ge=0, description="Steps between samples; 0: only before and after.")
    sample_prompt: Texts = Field([], description="Prompt to continue before and after; may be repeated.")
    sample_tokens: int = Field(80, ge=1, description="New tokens in a sample.")
    stop_after: int | None = Field(None, ge=1, description="Stop this call after so many steps, ready to resume.")


class EvaluateOptions(Section):
    """What to measure."""

    panel = "Measuring"

    data: Paths = Field([], description="Text to measure on: file, folder or glob; may be repeated.")
    tasks: Names = Field([], description="Tasks of lm-evaluation-harness, as hellaswag,mmlu_* (needs octavo[eval]).")
    include_path: Path | None = Field(None, description="A folder of your own tasks, in YAML; their Python code runs.")
    limit: int | None = Field(None, ge=1, description="Documents of a task at most; default: all.")
    fewshot: int | None = Field(None, ge=0, description="Solved examples before a task; default: as the task says.")
    adapter: Path | None = Field(None, description="An adapter's folder: adds the row 'tuned'.")
    batch: int = Field(4, ge=1, description="Rows in a batch; with --tasks texts and answers at once.")
    rows: int = Field(0, ge=0, description="Rows to measure on; 0: all.")
    base: bool = Field(True, description="Measure the unquantised base too.")
    compare: Names = Field(
        [], description="Schemes to set side by side, as none,int8,nf4: a row for each in place of the others."
    )


class GenerateOptions(Section):
    """How text is continued."""

    panel = "Generation"

    adapter: Path | None = Field(None, description="An adapter's folder.")
    max_new_tokens: int = Field(200, ge=1, description="New tokens at most.")
    temperature: float = Field(0.8, ge=0, description="0 is greedy.")
    top_k: int = Field(0, ge=0, description="Draw from the k likeliest tokens; 0: all.")
    top_p: float = Field(0.95, gt=0, le=1, description="Draw from the likeliest tokens that reach this probability.")
    repetition_penalty: float = Field(1.0, gt=0, description="Over 1: tokens that occurred become less likely.")
    stop: Texts = Field([], description="End before this string; may be repeated.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the draws.")


class PromptOptions(Section):
    """What to continue."""

    panel = "Prompts"

    prompt: str | None = Field(None, description="The text to continue; without it, or as -, standard input.")
    prompts: Path | None = Field(None, description="A JSONL file of prompts to continue instead, many at once.")
    slots: int = Field(8, ge=1, le=256, description="Prompts of --prompts at work at once.")
    chat: bool = Field(False, description="Put the prompt into the model's chat template as a user's message.")


class ChatOptions(Section):
    """A conversation."""

    panel = "Conversation"

    system: str | None = Field(None, description="The system message.")


class ServeOptions(Section):
    """How a model is served."""

    panel = "Server"

    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on; any but this machine's own needs a key."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    adapter: Texts = Field([], description="An adapter to serve, as NAME=FOLDER; may be repeated.")
    adapters_from: Path | None = Field(
        None, description="Clients may load adapters from below this folder, and remove adapters, while it runs."
    )
    max_adapters: int = Field(16, ge=1, le=1024, description="Adapters up to which clients may load more.")
    api_key: str | None = Field(
        None, repr=False, description="Key that clients must send; better given in OCTAVO_API_KEY."
    )
    auth: bool = Field(True, description="Insist on a key where other machines can reach the server.")
    origins: Names = Field([], description="Origins whose web pages may use the server, as https://name; or '*'.")
    hosts: Names = Field([], description="More names that the server goes by (the Host header); '*': any.")
    slots: int = Field(8, ge=1, le=1024, description="Requests that run at once.")
    max_model_len: int = Field(
        2048, ge=2, description="Tokens of a prompt and its answer together, at most the context."
    )
    queue: int = Field(64, ge=0, le=100_000, description="Requests that may wait for a slot.")
    deterministic: bool = Field(
        False,
        description="Give a request the same answer beside any others also where a GPU decodes more than 32 of them at "
        "once; with fewer, and on a CPU, it always has one answer.",
    )
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Tokens of a prompt; default: --max-model-len less one."
    )
    max_new_tokens: int = Field(1024, ge=1, le=2**20, description="New tokens that a request can ask for.")
    request_seconds: float = Field(300.0, gt=0, description="Longest time for an answer, waiting included.")
    grace_seconds: float = Field(
        30.0, ge=0, description="Time to finish answers in when told to stop, or to unload an adapter."
    )
    max_body_bytes: int = Field(2**21, ge=1024, description="Bytes of a request's body.")
    max_connections: int = Field(512, ge=1, le=100_000, description="Connections that may be open at once.")
    log_level: Literal["error", "warning", "info", "debug"] = Field(
        "warning", description="What the server logs on stderr; info: every request."
    )


class PlanOptions(Section):
    """What to plan for."""

    panel = "Plan"

    gpu: str | None = Field(None, description="The GPU to predict the time on, as 'RTX 3060'; default: the one here.")


class QuantizeOptions(Section):
    """Where to write."""

    panel = "Output"

    out: Path | None = Field(None, description="The new folder.")


class ConvertOptions(Section):
    """What to split into a base and an adapter, and where to write."""

    panel = "Output"

    model: str | None = Field(None, description="A folder or hub id with frozen weights and trained adapters in one.")
    allow_pickle: bool = Field(False, description="Read .bin files (weights only) where there is no safetensors.")
    out: Path | None = Field(None, description="The new folder, for base/ and adapter/.")


class DataOptions(Section):
    """What to look at."""

    panel = "Data"

    data: Paths = Field([], description="Text files: file, folder or glob; may be repeated.")
    samples: int = Field(2, ge=0, description="Decoded samples to show.")


_PLAYS = Path(__file__).parents[1] / "shakespeare"
# The defaults of `octavo demo`, chosen on two cores: held-out perplexity falls by more than a quarter in under
# three minutes.
DEMO: dict[str, Any] = {
    "data": [str(_PLAYS / "train")],
    "test_data": [str(_PLAYS / "test")],
    "out": "runs/demo",
    "seq_len": 128,
    "batch": 4,
    "steps": 30,
    "lr": 2e-3,
    "rank": 8,
    "alpha": 16.0,
    "eval_rows": 48,
    "eval_every": 15,
    "checkpoint_every": 15,
    "sample_prompt": ["HAMLET.\nTo be, or not to be,"],
    "sample_tokens": 40,
}
