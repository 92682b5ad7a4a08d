"""What rules say of facts: every rule by hand, what is not known yet, the counts that pass, and the file itself."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from compressor.model.structure import MoELayer
from compressor.report.figures import serving_said, serving_table
from compressor.serving.facts import facts_of
from compressor.serving.rules import Rule, Serve, answers, kernel_counts, rules

FACTS: dict[str, Any] = {
    "architecture": "MixtralForCausalLM",
    "model_type": "mixtral",
    "experts": 8,
    "groups": 1,
    "per_group": 8,
    "top_k": 2,
    "mean": 8,
    "most": 8,
    "uneven": False,
    "constants": False,
    "nested": False,
    "selection_bias": False,
    "skipping": False,
    "zeros": False,
    "quantised": False,
    "quantisation": "none",
    "extra_layers": False,
    "attention_heads": 32,
    "keys": {"num_local_experts", "rope_theta"},
    "tensor_parallel": 1,
    "expert_parallel": 1,
}
"""A Mixtral."""


def with_(**changes: Any) -> dict[str, Any]:
    found = FACTS | changes
    if "experts" in changes:
        found |= {"per_group": changes["experts"] // found["groups"], "mean": changes["experts"]}
        found["most"] = max(found["most"], changes["experts"])
    return found


def answer_of(engine: str, facts: dict[str, Any]) -> dict[str, Any]:
    return next(one for one in answers(facts) if one["engine"] == engine)


UNEVEN = FACTS | {"uneven": True, "experts": None, "mean": 6}
CONSTANTS = FACTS | {"uneven": True, "constants": True, "mean": 6}
QWEN = {"architecture": "Qwen3MoeForCausalLM", "model_type": "qwen3_moe", "most": 128}
DEEPSEEK = {"architecture": "DeepseekV3ForCausalLM", "model_type": "deepseek_v3", "groups": 8, "most": 256}
V4 = {"architecture": "DeepseekV4ForCausalLM", "model_type": "deepseek_v4", "most": 256}
STRANGE = with_(architecture="NewForCausalLM", model_type="new")
ALL = get_args(Serve.model_fields["engine"].annotation)


def stored(quantisation: str | None) -> dict[str, Any]:
    return with_(quantised=True, quantisation=quantisation)


CASES: list[tuple[str, dict[str, Any], str, str, list[int]]] = [
    *((engine, FACTS, "yes", "", []) for engine in ALL),
    # classes that no list has
    ("transformers", STRANGE, "yes", "its class builds", []),
    ("vllm", STRANGE, "unknown", "no rule speaks of this class", []),
    ("sglang", STRANGE, "unknown", "no rule speaks of this class", []),
    ("llama.cpp", STRANGE, "no", "its converter knows no NewForCausalLM", []),
    ("mlx", STRANGE, "no", "mlx-lm has no model new", []),
    # other numbers in other layers, and constants
    *((engine, UNEVEN, "no", "one number of experts for all layers", [6]) for engine in ALL),
    ("vllm", CONSTANTS, "yes", "constants are read from 0.33 on", []),
    ("transformers", CONSTANTS, "no", "weights of experts that answer constants are missing", [6]),
    ("sglang", CONSTANTS | {"uneven": False}, "no", "it knows no experts that answer constants", [6]),
    ("llama.cpp", CONSTANTS, "no", "it knows no experts that answer constants", [6]),
    ("mlx", CONSTANTS, "no", "it knows no experts that answer constants", [6]),
    ("vllm", CONSTANTS | {"quantised": True, "quantisation": "fp8"}, "no", "beside unquantised experts only", [6]),
    ("vllm", CONSTANTS | {"expert_parallel": 2}, "no", "leave expert_parallel out", [6]),
    ("vllm", CONSTANTS | {"nested": True}, "no", "one integer in a layer's path", [6]),
    ("vllm", CONSTANTS | {"tensor_parallel": 8}, "yes", "", []),
    # kernels
    ("vllm", with_(**QWEN, experts=96), "yes", "96 experts are routed at about the price of the next", [64, 128]),
    ("vllm", with_(**QWEN | {"most": 512}, experts=200), "yes", "200 experts are routed", [192, 256]),
    ("vllm", with_(**QWEN, experts=64), "yes", "Qwen3MoeForCausalLM is in its registry", []),
    ("vllm", with_(**V4, experts=144), "no", "its router kernel knows no 144 experts", [128, 192]),
    ("vllm", with_(**V4, experts=192), "yes", "", []),
    ("vllm", with_(**DEEPSEEK | {"groups": 64}, experts=256), "no", "64 groups of experts", []),
    ("sglang", with_(**DEEPSEEK, experts=192), "yes", "192 experts in 8 groups take the slow path", [128, 256]),
    ("sglang", with_(**DEEPSEEK | {"groups": 4}, experts=256), "yes", "64 experts a group take the slow", [128]),
    ("sglang", with_(**DEEPSEEK, experts=256), "yes", "DeepseekV3ForCausalLM is one of its classes", []),
    ("sglang", with_(selection_bias=True, experts=6), "yes", "6 experts with a selection bias take the slow", [4, 8]),
    # how many devices
    ("vllm", with_(tensor_parallel=16), "no", "tensor_parallel 16 is above the number of experts, 8", []),
    ("sglang", with_(tensor_parallel=16), "no", "tensor_parallel 16 is above the number of experts, 8", []),
    ("vllm", with_(**QWEN, experts=6, tensor_parallel=8), "no", "above the number of experts, 6", [8]),
    ("vllm", with_(tensor_parallel=3), "no", "32 attention heads cannot be shared out over tensor_parallel 3", []),
    ("sglang", with_(tensor_parallel=3), "no", "32 attention heads cannot be shared out over tensor_parallel 3", []),
    ("vllm", with_(tensor_parallel=3, attention_heads=None), "unknown", "not known yet: ? attention heads", []),
    ("vllm", with_(expert_parallel=3), "yes", "8 experts are shared out unevenly over expert_parallel 3", [6]),
    ("vllm", with_(**V4, experts=128, expert_parallel=3), "no", "cannot be shared out over expert_parallel 3", [192]),
    ("sglang", with_(experts=6, expert_parallel=4), "no", "6 experts cannot be shared out over", [4, 8]),
    ("sglang", with_(expert_parallel=4), "yes", "", []),
    # how many a file may say
    ("llama.cpp", with_(experts=600), "yes", "600 experts are more than releases before b10448 take", [512]),
    ("llama.cpp", with_(experts=1100), "no", "1100 experts, and it takes 1,024 at most", [1024]),
    # keys of config.json
    ("mlx", with_(**QWEN, experts=96, keys={"num_experts"}), "no", "no `num_experts` or no `rope_theta`", []),
    ("mlx", with_(**QWEN, experts=96, keys={"num_experts", "rope_theta"}), "yes", "", []),
    ("mlx", with_(model_type="glm4_moe", keys=set()), "no", "config.json has no `rope_theta`", []),
    # how weights are stored
    *((engine, stored("pack-quantized"), "yes", "", []) for engine in ("transformers", "vllm", "sglang", "llama.cpp")),
    *((engine, stored("fp8"), "yes", "", []) for engine in ("transformers", "vllm", "sglang", "llama.cpp")),
    *((engine, stored("nvfp4-pack-quantized"), "yes", "", []) for engine in ("vllm", "sglang", "llama.cpp", "mlx")),
    ("transformers", stored("nvfp4-pack-quantized"), "no", "NVFP4 experts are read by vLLM and SGLang only", []),
    ("mlx", stored("float-quantized"), "no", "float-quantized of compressed-tensors is refused", []),
    ("mlx", stored("pack-quantized"), "unknown", "would be taken for 4 bits in groups of 32", []),
    ("mlx", stored("fp8"), "unknown", "no rule speaks of experts stored as fp8", []),
    ("mlx", stored("mixed-precision"), "no", "mixed-precision of compressed-tensors is refused", []),
    ("mlx", stored("mxfp4"), "yes", "mxfp4 is read as it is", []),
    *((engine, stored("own"), "unknown", "experts stored as own", []) for engine in ("transformers", "vllm", "sglang")),
    ("llama.cpp", stored("own"), "no", "its converter reads no experts stored as own", []),
    ("llama.cpp", stored(None), "unknown", "not known yet: its converter reads no experts", []),
    # what it is without
    *((engine, with_(skipping=True), "yes", "it runs unskipped", []) for engine in ALL),
    *((engine, with_(zeros=True), "yes", "zeros are stored as numbers", []) for engine in ALL),
    *((engine, with_(extra_layers=True), "yes", "speculative", []) for engine in ("vllm", "sglang", "llama.cpp")),
]


@pytest.mark.parametrize(("engine", "facts", "said", "why", "nearest"), CASES)
def test_what_an_engine_does(engine: str, facts: dict[str, Any], said: str, why: str, nearest: list[int]) -> None:
    found = answer_of(engine, facts)
    assert (found["answer"], found["nearest"]) == (said, nearest), serving_said(found)
    assert why in serving_said(found)


def test_every_rule_holds_in_some_case() -> None:
    for engine, listed in rules().items():
        cases = [facts for name, facts, *_ in CASES if name == engine]
        idle = [rule.says for rule in listed if not any(rule.holds(facts) for facts in cases)]
        assert not idle, f"{engine}: {idle}"


def test_rules_ask_for_facts_that_are_there_and_engines_are_those_of_a_recipe() -> None:
    assert tuple(rules()) == ALL
    for listed in rules().values():
        assert all(rule.when.keys() <= FACTS.keys() for rule in listed)
        assert any(rule.answer == "yes" for rule in listed)


def test_what_a_run_finds_is_not_known_before() -> None:
    """A bare mean: counts differ for sure, whether constants answer is found by the run."""
    facts = FACTS | {"uneven": True, "constants": None, "experts": None, "mean": 6}
    found = {one["engine"]: one["answer"] for one in answers(facts)}
    assert found == {"transformers": "no", "vllm": "unknown", "sglang": "no", "llama.cpp": "no", "mlx": "no"}
    assert serving_said(answer_of("vllm", facts)).startswith("not known yet: one number of experts")
    padded = FACTS | {"experts": None, "mean": 6}
    assert {one["answer"] for one in answers(padded)} == {"yes"}


def test_constants_that_a_run_may_find_in_a_nested_path_are_not_promised() -> None:
    """vLLM takes one integer before an expert's; nothing of it where none will answer a constant."""
    layer = {"num_experts": 8, "top_k": 2, "num_groups": 1, "num_chosen_groups": 1, "parameters_per_expert": 1}
    paths, raw = ("towers.0.layers.1.mlp", "model.layers.1.mlp"), {"architectures": ["MixtralForCausalLM"]}
    nested, plain = (MoELayer.described({**layer, "path": path}) for path in paths)
    said = "not known yet: constants need one integer in a layer's path"
    for layers, found, is_said in (
        ([nested], ["constants"], True),
        ([nested], [], False),
        ([plain], ["constants"], False),
    ):
        assert (said in serving_said(answer_of("vllm", facts_of(raw, layers, found=found)))) == is_said


def test_what_a_refusal_names_passes() -> None:
    """In groups, as many in each; no fewer than are chosen; none where none is right."""
    facts = with_(**DEEPSEEK, experts=200, expert_parallel=16)
    assert answer_of("sglang", facts)["nearest"] == [192, 208]
    assert answer_of("sglang", facts | {"top_k": 256, "expert_parallel": 3, "most": 256})["nearest"] == []


def test_sources_and_dates_are_in_the_answer() -> None:
    [rule] = answer_of("vllm", UNEVEN)["rules"]
    assert rule["source"].startswith("vLLM 0.33.0: vllm/model_executor")
    assert rule["date"] == "2026-11-29"
    table = serving_table({"serving": answers(UNEVEN)})
    assert [row[:2] for row in table.rows] == [(engine, "no") for engine in ALL]
    assert serving_table({}).rows == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"when": {"experts": {"odd": True}}}, "there is no test 'odd'; there are is, above, "),
        ({"answer": "perhaps"}, "answer"),
        ({"source": ""}, "source"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_rule_that_is_wrong_is_refused(changes: dict[str, Any], says: str) -> None:
    right = {"answer": "no", "when": {"experts": 8}, "says": "no", "source": "file", "date": "2026-11-29"}
    assert Rule.model_validate(right).holds(FACTS)
    with pytest.raises(ValidationError, match=says):
        Rule.model_validate(right | changes)


def test_counts_that_kernels_are_made_for() -> None:
    assert [kernel_counts(count) for count in (64, 96, 200, 600)] == [[64], [64, 128], [192, 256], [576]]
