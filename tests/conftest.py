"""Settings of every test run."""

from __future__ import annotations

import torch

# Tiny operations gain nothing from threads, and lose much to them beside other work.
torch.set_num_threads(1)
