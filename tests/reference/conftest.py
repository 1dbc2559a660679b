"""Programs and files that tests of this folder share."""

from programs import (
    bounded as bounded,
)
from programs import (
    harness as harness,
)
from programs import (
    load_program as load_program,
)
from programs import (
    portable_pte as portable_pte,
)
from programs import (
    sample_pte as sample_pte,
)
from programs import (
    segmented_pte as segmented_pte,
)
from programs import (
    two_segments_pte as two_segments_pte,
)
from programs import (
    xnnpack_pte as xnnpack_pte,
)
