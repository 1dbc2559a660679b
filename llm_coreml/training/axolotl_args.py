"""What axolotl's YAML may say of exports during a training, for axolotl's own check of it.

plugins:
  - llm_coreml.training.axolotl_plugin.CoreMLPlugin
coreml:
  when: best
  bits: 4

Only axolotl, and its plugin here, import this.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class CoreMLSettings(BaseModel):
    """The arguments of `CoreMLExportCallback`, of which nothing has to be given.

    `settings` are those of the export, as a recipe has them, and `gates` those of `Gates`.
    """

    model_config = ConfigDict(extra="forbid")

    output: str | None = None
    when: int | list[int] | str | None = None
    bits: float | None = None
    target: str | None = None
    settings: dict[str, Any] | None = None
    text: str | None = None
    tokens: int | None = None
    best_by: str | None = None
    gates: dict[str, float] | None = None
    blocking: bool | None = None
    memory: int | None = None
    timeout: float | None = None


class CoreMLArgs(BaseModel):
    """The key that the plugin adds to axolotl's configuration."""

    coreml: CoreMLSettings | None = None
