"""A plugin of axolotl that exports during the training, as its YAML says under `coreml`.

plugins:
  - llm_coreml.training.axolotl_plugin.CoreMLPlugin

Only axolotl imports this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin

from llm_coreml.config import ExportConfig
from llm_coreml.errors import ConfigError
from llm_coreml.eval.gates import Gates
from llm_coreml.training.axolotl_args import CoreMLSettings
from llm_coreml.training.callback import CoreMLExportCallback


class CoreMLPlugin(BasePlugin):  # type: ignore[misc]
    """Gives axolotl's trainer a `CoreMLExportCallback`; by itself into `coreml` of its folder."""

    def get_input_args(self) -> str:
        """Return where axolotl finds what `coreml` may say."""
        return "llm_coreml.training.axolotl_args.CoreMLArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[CoreMLExportCallback]:
        """Return the callback that the configuration asks for.

        Raises:
            ConfigError: a value that cannot be; the training has not begun then.
        """
        try:
            # As plain objects: those of axolotl answer to any name.
            asked = CoreMLSettings(**json.loads(json.dumps(cfg.coreml or {})))
            named_gates: dict[str, Any] = dict(asked.gates or {})
            gates = Gates(**named_gates)
        except (TypeError, ValueError) as error:
            lines = str(error).splitlines()
            told = "; ".join(lines[1:3] or lines)
            raise ConfigError(f"coreml in axolotl's configuration is wrong: {told}") from None
        named = asked.model_dump(exclude={"gates"})
        given = {name: value for name, value in named.items() if value is not None}
        output = given.pop("output", None) or Path(trainer.args.output_dir, "coreml")
        settings = given.pop("settings", None)
        config = None if settings is None else ExportConfig.from_json(settings)
        return [CoreMLExportCallback(output, gates=gates, config=config, **given)]
