"""For the tests of whoever writes a method or an adapter: tiny models of every architecture, and what all must pass.

from compressor.testing import check_method, check_model, tiny_inputs, tiny_model
model = tiny_model("qwen3_moe")                # or a tiny random model of your own
check_model(model, tiny_inputs(model)).raise_for_failures()
check_method("my_method", {"share": 0.5})
"""

from compressor.testing.checks import Check, Report, check_model, kept_evenly, kept_unevenly
from compressor.testing.methods import check_method
from compressor.testing.tiny import (
    answers,
    auto_class,
    candidate_types,
    model_class,
    tiny_config,
    tiny_inputs,
    tiny_model,
)

__all__ = [
    "Check", "Report", "answers", "auto_class", "candidate_types", "check_method", "check_model", "kept_evenly",
    "kept_unevenly", "model_class", "tiny_config", "tiny_inputs", "tiny_model",
]  # fmt: skip
