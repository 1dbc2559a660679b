"""Programs and files that tests of this folder share."""

from programs import (
    bounded,
    harness,
    load_program,
    portable_pte,
    sample_pte,
    segmented_pte,
    shared_pte,
    two_segments_pte,
    xnnpack_pte,
)

__all__ = [
    "bounded",
    "harness",
    "load_program",
    "portable_pte",
    "sample_pte",
    "segmented_pte",
    "shared_pte",
    "two_segments_pte",
    "xnnpack_pte",
]
