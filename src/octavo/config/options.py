"""Every option, defined once: sections of options, each with one line of help."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from octavo.config.section import Columns, Date, MemorySize, Names, Paths, Section, Text, Texts, Trackers

MAX_ROWS = 10**6  # of a step: more is a mistake, which the memory plan would simulate for minutes


class ModelOptions(Section):
    """The base model, its device and compute dtype."""

    panel = "Model"

    model: str = Field("smollm2", description="Base model: a folder, a .gguf file, a hub id, or smollm2.")
    scheme: Literal["auto", "none", "int8", "dynamic8", "nf4", "nf4-double"] = Field(
        "auto",
        description="Quantization of the frozen weights; auto: as in the checkpoint, else int8.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    allow_pickle: bool = Field(
        False, description="Read pickled .bin files (weights only) if there is no safetensors file."
    )
    device: str = Field(
        "auto", description="Device: auto, cpu, cuda or cuda:N; auto: the first GPU that PyTorch finds, else the CPU."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Compute dtype; auto: bfloat16 if supported, else float16 (GPU) or float32 (CPU).",
    )
    pretend: str | None = Field(
        None,
        description="Run as on this GPU, with its types, kernels and memory: "
        "T4, P100, 1080Ti, RTX5000, A6000, 3060, 4090 or 5090.",
    )


class TextOptions(Section):
    """How text files become packed rows of tokens."""

    panel = "Data"

    seq_len: int = Field(512, ge=2, description="Tokens in a packed row; longer documents are split over several rows.")
    split_on: str | None = Field(None, description="Split plain text into documents: 'lines', or a separator string.")
    columns: Columns = Field(
        [], description="Names of the fields of records, as prompt=question,completion=answer or text=body."
    )
    template_date: Date = Field(
        None,
        description="Date for chat templates that contain one, as 2026-11-28; default: today, fixed for a run.",
    )
    truncate: bool = Field(False, description="Truncate documents at --seq-len instead of splitting them.")
    skip_bad: bool = Field(False, description="Count and skip records that cannot be read, instead of stopping.")
    ftfy: bool = Field(False, description="Repair wrongly decoded text with ftfy (needs octavo[clean]).")
    deduplicate: bool = Field(False, description="Remove exact copies of documents.")
    min_unique_tokens: int = Field(0, ge=0, description="Remove documents with fewer distinct tokens.")


class TrainingData(Section):
    """Training data and held-out data."""

    panel = "Data"

    data: Paths = Field([], description="Training text: file, folder or glob; may be repeated.")
    test_data: Paths = Field([], description="Held-out text for evaluation: file, folder or glob; may be repeated.")
    test_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Without --test-data: fraction of the documents to hold out; of a single text, of its tokens.",
    )


class LoraCommon(Section):
    """The LoRA adapter but for its rank and its scaling."""

    panel = "Adapter"

    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the adapter.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (rank-stabilized LoRA).")
    lora_targets: Names = Field(
        ["all-linear"], description="Modules with LoRA: all-linear, or names like q_proj,v_proj,lm_head."
    )
    train_norms: bool = Field(False, description="Also train the norms, and learned positions if the model has them.")
    train_biases: bool = Field(False, description="Also train the biases of the targets.")


class LoraOptions(LoraCommon):
    """The LoRA adapter."""

    rank: int = Field(16, ge=1, description="LoRA rank.")
    alpha: float = Field(32.0, gt=0, description="LoRA alpha: the low-rank term is scaled by alpha / rank.")


class TrainCommon(Section):
    """Optimizer, schedule and batch size, without the learning rate."""

    panel = "Training"

    epochs: float | None = Field(
        None,
        gt=0,
        description="Epochs over the training data, unless --steps is given; default: 1, for small data up to 8, in "
        "smaller batches, for at least 64 steps.",
    )
    steps: int | None = Field(None, ge=1, description="Optimizer steps.")
    batch_size: int = Field(4, ge=1, le=MAX_ROWS, description="Sequences (packed rows) in an optimizer step.")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=MAX_ROWS,
        description="Sequences in one forward and backward pass; default: the fastest that fit into memory.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate schedule.")
    warmup: float = Field(0.05, ge=0, description="Warm-up: a fraction of the steps if under 1, else steps.")
    lr_floor: float = Field(0.1, ge=0, le=1, description="Final learning rate, as a fraction of the peak.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient norm to clip to; 0: no clipping.")
    optimizer: Literal["adamw8bit", "adamw"] = Field("adamw8bit", description="AdamW with 8-bit or 32-bit state.")
    seed: int = Field(0, ge=0, lt=2**63, description="Random seed of adapter initialization, data order and dropout.")


class TrainOptions(TrainCommon):
    """Optimizer, schedule and batch size."""

    lr: float = Field(2e-4, gt=0, le=1e30, description="Peak learning rate.")


class MemoryOptions(Section):
    """Memory and kernels of a training step; with auto everywhere it is the fastest plan that fits."""

    panel = "Memory"

    gpu_memory: MemorySize = Field(
        "auto",
        description="Limit of device memory, as 10GiB, without CUDA's 0.8 GiB; auto: all free memory.",
    )
    recompute: Literal["auto", "none", "selective", "full"] = Field(
        "auto",
        description="Activations to recompute in backward; selective: all except attention.",
    )
    offload: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Offload activations and the embedding to CPU memory; auto: if faster or necessary.",
    )
    matmul: Literal["auto", "exact", "8bit"] = Field(
        "auto",
        description="Matmuls in training; auto: 8 bits in layers whose measured error is under 6 %, if faster on this "
        "GPU; exact: in --dtype.",
    )
    kernels: bool = Field(True, description="Use Triton kernels on GPUs that support them.")
    fused: bool = Field(True, description="Use fused blocks where a model has them; --no-fused: plain PyTorch blocks.")
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = Field(
        "auto", description="SDPA backend of attention on a GPU; auto: the fastest that supports the call."
    )
    cuda_graphs: bool = Field(True, description="Capture training steps as CUDA graphs and replay them.")


class WindowOptions(Section):
    """Evaluation with a sliding window."""

    panel = "Evaluation"

    stride: int | None = Field(
        None,
        ge=1,
        description="Evaluate with a sliding window that moves by so many tokens: independent of --seq-len.",
    )
    window: int | None = Field(
        None, ge=2, description="Tokens of the sliding window; default: 1024, at most the model's context."
    )


class RunOptions(Section):
    """The run folder, checkpoints, held-out evaluation and samples."""

    panel = "Run"

    out: Path = Field(Path("runs/finetune"), description="The run folder.")
    resume: bool = Field(False, description="Resume from the newest valid checkpoint in --out.")
    force: bool = Field(
        False, description="Resume even if model, data, adapter or batch size differ from the checkpoint."
    )
    checkpoint_every: int = Field(
        100,
        ge=0,
        description="Steps between checkpoints, besides those of each best held-out loss and the last step; 0: none.",
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="Number of newest checkpoints to keep, those of a best held-out loss included."
    )
    eval_every: int = Field(
        0,
        ge=0,
        description="Steps between evaluations on held-out text; 0: five in a run, fewer if they take over a quarter "
        "of the time of training.",
    )
    eval_rows: int = Field(0, ge=0, description="Held-out packed rows to evaluate; 0: all.")
    keep: Literal["best", "last"] = Field("best", description="Adapter to keep: best held-out loss, or last.")
    early_stop: bool = Field(
        False,
        description="Stop when the held-out loss clearly rises, or falls no longer, by 95 % intervals; keeps the best "
        "adapter. The schedule stays that of all steps: a cosine that is cut ends at a higher learning rate.",
    )
    init_adapter: Path | None = Field(
        None,
        description="Start from this adapter, run, or RUN@STEP, on new data; rank, alpha and targets are its own.",
    )
    sample_every: int = Field(0, ge=0, description="Steps between samples; 0: only before and after training.")
    sample_prompt: Texts = Field([], description="Prompt for samples before and after training; may be repeated.")
    sample_tokens: int = Field(80, ge=1, description="New tokens of a sample.")
    track: Trackers = Field(
        [], description="Trackers that get the run's numbers and samples, as tensorboard,wandb,mlflow,trackio."
    )
    stop_after: int | None = Field(None, ge=1, description="Stop after so many steps; --resume continues.")


class EvaluateOptions(Section):
    """What to evaluate."""

    panel = "Evaluation"

    data: Paths = Field([], description="Text to evaluate on: file, folder or glob; may be repeated.")
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

    runs: Paths = Field([], description="Run folder, 2 to 8 of them; the others are compared with the first.")
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

    data: Paths = Field([], description="Text to inspect: file, folder or glob; may be repeated.")
    samples: int = Field(2, ge=0, description="Number of decoded samples to show.")
