"""Supervised fine-tuning by TRL, with exports in the midst of it by a process of their own.

python examples/trl_sft.py out/sft
"""

from __future__ import annotations

import sys

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from llm_coreml import CoreMLExportCallback
from small import SHAPES, small_model, texts


def main(output: str) -> None:
    model, tokenizer = small_model()
    export = CoreMLExportCallback(
        f"{output}/exports", when="end", bits=4, target="gpu", config=SHAPES, tokens=256
    )
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            f"{output}/trained",
            max_steps=10,
            max_length=32,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            logging_steps=5,
            save_strategy="no",
            report_to="none",  # or trackio, wandb, mlflow: they get the figures of the exports
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"text": texts()}),
        processing_class=tokenizer,
        callbacks=[export],
    )
    trainer.train()
    figures = [each for each in trainer.state.log_history if "eval_coreml_step" in each]
    print(f"{figures[-1]}\nthe best export is in {export.best}")


if __name__ == "__main__":
    main(*sys.argv[1:])
