"""Export Hugging Face causal LMs to Core ML `.pte` files, and prove the result off-device.

    import llm_coreml

    llm_coreml.export(model, tokenizer, bits=4, output="out/")
    print(llm_coreml.load("out/").generate("def add(a, b):"))
    print(llm_coreml.evaluate("out/", model=model).artifact.perplexity)

Names load on first use, so that the import itself is quick and brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_coreml.bundle.language_model import LanguageModel, load
    from llm_coreml.config import ExportConfig
    from llm_coreml.delta.applying import apply_delta
    from llm_coreml.delta.making import make_delta
    from llm_coreml.errors import LlmCoreMLError
    from llm_coreml.eval.evaluate import evaluate
    from llm_coreml.eval.publish import push_to_hub
    from llm_coreml.eval.results import Evaluation
    from llm_coreml.eval.sweep.sweeping import sweep
    from llm_coreml.eval.trackers.tracking import track
    from llm_coreml.inspect.extraction import extract
    from llm_coreml.pipeline import export
    from llm_coreml.pretrained import push_to_hub_coreml, save_pretrained_coreml
    from llm_coreml.qat import qat_config
    from llm_coreml.runtime.sampling import Sampling
    from llm_coreml.training.callback import CoreMLExportCallback

_HOMES = {
    "CoreMLExportCallback": "llm_coreml.training.callback",
    "Evaluation": "llm_coreml.eval.results",
    "ExportConfig": "llm_coreml.config",
    "LanguageModel": "llm_coreml.bundle.language_model",
    "LlmCoreMLError": "llm_coreml.errors",
    "Sampling": "llm_coreml.runtime.sampling",
    "apply_delta": "llm_coreml.delta.applying",
    "evaluate": "llm_coreml.eval.evaluate",
    "export": "llm_coreml.pipeline",
    "extract": "llm_coreml.inspect.extraction",
    "load": "llm_coreml.bundle.language_model",
    "make_delta": "llm_coreml.delta.making",
    "push_to_hub": "llm_coreml.eval.publish",
    "push_to_hub_coreml": "llm_coreml.pretrained",
    "qat_config": "llm_coreml.qat",
    "save_pretrained_coreml": "llm_coreml.pretrained",
    "sweep": "llm_coreml.eval.sweep.sweeping",
    "track": "llm_coreml.eval.trackers.tracking",
}

# These bring no torch.
_LIGHT = frozenset({"ExportConfig", "LlmCoreMLError"})

__all__ = [
    "CoreMLExportCallback",
    "Evaluation",
    "ExportConfig",
    "LanguageModel",
    "LlmCoreMLError",
    "Sampling",
    "apply_delta",
    "evaluate",
    "export",
    "extract",
    "load",
    "make_delta",
    "push_to_hub",
    "push_to_hub_coreml",
    "qat_config",
    "save_pretrained_coreml",
    "sweep",
    "track",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llm_coreml' has no attribute '{name}'")
    if name != "LlmCoreMLError":  # which is what is raised
        from llm_coreml.host import check_host

        check_host()
    if name in _LIGHT:
        return getattr(importlib.import_module(_HOMES[name]), name)
    from llm_coreml.quiet import quiet

    # Each of the libraries below has something to say when it is loaded.
    with quiet():
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
