"""What a training script has, and an export of its model has no business with."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import tempfile
import warnings
from typing import Any

import numpy
import torch


def state_of(model: Any) -> dict[str, Any]:
    """Return all of a training script's state that an export has no business with."""
    numbers = {}
    for name, tensor in model.state_dict().items():
        numbers[name] = hash(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    root = logging.getLogger()
    return {
        "numbers": numbers,
        "training": [module.training for module in model.modules()],
        "gradients": [
            None if each.grad is None else each.grad.clone().numpy().tobytes()
            for each in model.parameters()
        ],
        "trainable": [each.requires_grad for each in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "config": json.dumps(model.config.to_dict(), default=str),
        "random": (
            random.getstate(),
            [str(part) for part in numpy.random.get_state()],
            numpy.random.get_state()[1].tobytes(),  # type: ignore[union-attr]
            torch.get_rng_state().numpy().tobytes(),
        ),
        "dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "handlers": list(root.handlers),
        "log filters": list(root.filters),
        "levels": {
            name: each.level
            for name, each in logging.root.manager.loggerDict.items()
            if isinstance(each, logging.Logger)
        },
        "level": root.level,
        "tempfile": tempfile.tempdir,
        "environment": dict(os.environ),
        "collections": (gc.isenabled(), gc.get_threshold()),
        "folder": os.getcwd(),
    }
