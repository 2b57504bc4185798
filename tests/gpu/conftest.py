"""Tests that need a GPU. Without one, pytest does not collect them."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
