"""Every option, defined once: sections of options, each with one line of help."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from octavo.config.section import Columns, Date, MemorySize, Names, Paths, Section, Texts, Trackers

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

    data: Paths = Field([], description="Training text: file, folder, glob or hf:owner/name; may be repeated.")
    test_data: Paths = Field([], description="Held-out text: file, folder, glob or hf:owner/name; may be repeated.")
    test_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Without --test-data: fraction of the documents held out; of fewer than 10 texts, of their tokens.",
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
        le=1e6,
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


class ProbeOptions(Section):
    """What a model learned, forgot and copies."""

    panel = "Evaluation"

    probes: bool = Field(
        True,
        description="Measure what the model learned (cloze probes of the held-out text), forgot (a general text) and "
        "copies, before and after; takes seconds on a GPU, up to a minute on a CPU.",
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
