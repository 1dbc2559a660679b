"""Settings of what the codes of quantized matrices are chosen and tuned on."""

from __future__ import annotations

from dataclasses import dataclass

from llm_coreml.config.setting import Section, setting
from llm_coreml.config.values import MOST_POSITIONS, MOST_STEPS, recovery_rank
from llm_coreml.errors import ConfigError


def _checked_recovery(text: str) -> str:
    recovery_rank(text)
    return text


@dataclass(frozen=True)
class CalibrationSettings(Section):
    """What the codes are chosen on.

    Raises:
        ConfigError: a value breaks a rule of its own, or tuning has no text.
    """

    calibrate: str | None = setting(
        None,
        "Choose the linear layers' codes for what this text makes of them.",
        metavar="bundled|FILE",
    )
    calibration_tokens: int = setting(16384, "Tokens of the text to read.", most=MOST_POSITIONS)
    tune: int = setting(
        0,
        "Then tune scales, tables and norms on it; holds the whole model.",
        metavar="STEPS",
        most=MOST_STEPS,
    )
    recover: str | None = setting(
        None,
        "And train a small product beside each matrix with it, stored as fp16.",
        metavar="lora:RANK",
        check=_checked_recovery,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recover is not None and not self.tune:
            raise ConfigError(
                f"--recover {self.recover} is trained in the steps of --tune; give some hundreds, "
                "and --calibrate."
            )
        if self.calibration_tokens < 1:
            raise ConfigError(
                f"--calibration-tokens is {self.calibration_tokens}; it must be at least 1, and "
                "some thousands to be of use."
            )
        if self.tune < 0 or (self.tune and self.calibrate is None):
            raise ConfigError(
                f"--tune is {self.tune}; it must be a number of steps, some hundreds, and needs a "
                "text to read: --calibrate."
            )

    @property
    def recovery_rank(self) -> int:
        """Rank of what `recover` asks for, 0 if it does not."""
        return 0 if self.recover is None else recovery_rank(self.recover)
