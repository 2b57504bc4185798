"""Tests of what only a CUDA card can do. They are collected where there is one, and nowhere else."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
