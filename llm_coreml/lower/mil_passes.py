"""Graph passes of ours that run inside coremltools' pipeline."""

from __future__ import annotations

from typing import Any

import coremltools as ct
from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
from coremltools.converters.mil.mil.passes.pass_registry import register_pass


@register_pass(namespace="llm_coreml")
class drop_repeated_state_writes(AbstractGraphPass):  # type: ignore[misc]
    """Remove a state write whose value is what the last write to that state returned.

    coremltools writes every mutated buffer once more at the end of the program. After writes in
    place, that is a copy of the whole cache for nothing.
    """

    def apply(self, prog: Any) -> None:
        """Edit every function of the program in place."""
        for function in prog.functions.values():
            last_write: dict[Any, Any] = {}
            repeated = []
            for op in function.operations:
                if op.op_type != "coreml_update_state":
                    continue
                if last_write.get(op.state) is op.value and not op.outputs[0].child_ops:
                    repeated.append(op)
                else:
                    last_write[op.state] = op.outputs[0]
            function.remove_ops(repeated)


def pass_names() -> list[str]:
    """Return coremltools' default pipeline with our passes at its end."""
    return [*ct.PassPipeline.DEFAULT.passes, "llm_coreml::drop_repeated_state_writes"]
