"""Programs and files that tests of this folder share."""

from programs import bounded, portable_pte, sample_pte, shared_pte, xnnpack_pte

__all__ = ["bounded", "portable_pte", "sample_pte", "shared_pte", "xnnpack_pte"]
