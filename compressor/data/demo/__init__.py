"""The demo: a small Mixture-of-Experts model that is really trained, and the text every Python carries.

``model: demo`` is a four-layer Mixtral of 3.6 million parameters, trained on three domains (Python code,
English documentation, arithmetic) whose text needs no download. Its figures mean something: removing
experts costs accuracy, and experts chosen on one domain hurt the others. It is for learning the tool and
for tests, not for using its answers.

``corpus`` gives the text, ``tasks`` three multiple-choice tasks; ``benchmarks/train_demo.py`` made the model.
"""

from __future__ import annotations

from pathlib import Path

from compressor.errors import CheckpointError

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
)


def model_folder() -> Path:
    """The demo checkpoint, an ordinary Hugging Face folder. Raises CheckpointError if a file is missing."""
    folder = Path(__file__).with_name("model")
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"demo model {folder}: {', '.join(missing)} missing; install moe-compressor again")
    return folder
