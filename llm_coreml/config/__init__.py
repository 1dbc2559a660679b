"""What an export is asked to do, and what that comes to for one model.

    config = ExportConfig(bits=4, target="gpu", context=2048)      # from flags, Python or a recipe
    job = resolve(config, spec)                                    # everything decided and checked

In come names and numbers that people chose; out goes a `Job`. Rooms below take the job and ask no
flag again. Nothing here loads torch or opens a file, and no config or job is changed once it
is made.

Adding a setting: one field in `sections.py`. The flag, its help, the recipes' schema, the manifest
and the command that rebuilds an artifact follow from it; what it means is decided in `job.py`, or
where the job's section is read.
"""

from llm_coreml.config.calibration_settings import CalibrationSettings
from llm_coreml.config.export_config import ExportConfig
from llm_coreml.config.job import Job, Shapes, resolve, resolve_shapes
from llm_coreml.config.sections import (
    SECTIONS,
    ProgramSettings,
    Rotate,
    SourceSettings,
    TargetSettings,
    WeightSettings,
)

__all__ = [
    "SECTIONS",
    "CalibrationSettings",
    "ExportConfig",
    "Job",
    "ProgramSettings",
    "Rotate",
    "Shapes",
    "SourceSettings",
    "TargetSettings",
    "WeightSettings",
    "resolve",
    "resolve_shapes",
]
