"""What serving engines do with a checkpoint, by the rules of rules.yaml: yes, no or unknown, and why.

What asks for a fact that is not known yet may hold or not. One `no` that holds is a no; one that may hold leaves the
answer unknown; yes needs a rule that says yes.
"""

from __future__ import annotations

import datetime
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, model_validator


class Serve(BaseModel):
    """Where the result must be served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["transformers", "vllm", "sglang", "llama.cpp", "mlx"] = Field(description="what must run it")
    tensor_parallel: StrictInt = Field(default=1, ge=1, description="devices that share each layer; vllm and sglang")
    expert_parallel: StrictInt = Field(default=1, ge=1, description="devices that share the experts; vllm and sglang")

    @model_validator(mode="after")
    def _degrees_count(self) -> Self:
        for name, degree in (("tensor_parallel", self.tensor_parallel), ("expert_parallel", self.expert_parallel)):
            if degree > 1 and not any(name in rule.when for rule in rules()[self.engine]):
                raise ValueError(f"{name} would have no effect: no rule of {self.engine} asks for it; leave it out")
        return self


_TESTS: Mapping[str, Callable[[Any, Any], bool]] = {
    "is": operator.eq,
    "above": operator.gt,
    "no_multiple_of": lambda value, operand: value % operand != 0,
    "in": lambda value, operand: value in operand,
    "not_in": lambda value, operand: value not in operand,
    "power_of_two": lambda value, operand: (value & (value - 1) == 0) == operand,
    "lacks": lambda value, operand: not value.issuperset(operand),
}
_OF_FACTS = ("above", "no_multiple_of")


def _known(when: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tests = {name: one if isinstance(one, dict) else {"is": one} for name, one in when.items()}
    if unknown := {test for one in tests.values() for test in one} - _TESTS.keys():
        raise ValueError(f"there is no test {min(unknown)!r}; there are {', '.join(_TESTS)}")
    return tests


class Rule(BaseModel):
    """One sentence about an engine, when it holds, and who says so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    answer: Literal["yes", "no", "unknown", "note"]
    when: Annotated[dict[str, Any], AfterValidator(_known)]
    says: str = Field(min_length=1)
    source: str = Field(min_length=1)
    date: datetime.date

    def holds(self, facts: Mapping[str, Any]) -> bool | None:
        """Whether all that it asks for is so; None where that is not known yet."""
        found = set[bool | None]()
        for name, test, operand in ((name, *one) for name, tests in self.when.items() for one in tests.items()):
            value, other = facts[name], facts[operand] if test in _OF_FACTS and operand in facts else operand
            found.add(None if value is None or other is None else _TESTS[test](value, other))
        return False if False in found else None if None in found else True


@cache
def rules() -> Mapping[str, Sequence[Rule]]:
    """Those of every engine."""
    engines = yaml.safe_load(Path(__file__).with_name("rules.yaml").read_text(encoding="utf-8"))["engines"]
    return {engine: [Rule.model_validate(one) for one in listed] for engine, listed in engines.items()}


def answers(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each engine does with such a checkpoint, as JSON: `engine`, `answer`, the `rules` by which it is so, each
    with `says`, `source` and `date`, and of the counts of which none of these speaks those `nearest`.
    """
    return [{"engine": engine, **_answer(listed, facts)} for engine, listed in rules().items()]


def _answer(listed: Sequence[Rule], facts: Mapping[str, Any]) -> dict[str, Any]:
    held = [(rule, so) for rule in listed if (so := rule.holds(facts)) is not False]
    refusing = [one for one in held if one[0].answer == "no" and one[1]]
    doubts = [one for one in held if one[0].answer in ("no", "unknown")]
    right = [one for one in held if one[0].answer in ("yes", "note") and one[1]]
    known = "yes" if any(rule.answer == "yes" for rule, _ in right) else "unknown"
    known_as = {name: "?" if value is None else value for name, value in facts.items()}
    shown = [
        rule.model_dump(mode="json", include={"answer", "source", "date"})
        | {"says": ("not known yet: " if so is None else "") + rule.says.format_map(known_as)}
        for rule, so in refusing or doubts or right
    ]
    said = "no" if refusing else "unknown" if doubts else known
    return {"answer": said, "rules": shown, "nearest": _nearest(listed, [rule for rule, _ in refusing or right], facts)}


def _nearest(listed: Sequence[Rule], shown: Sequence[Rule], facts: Mapping[str, Any]) -> list[int]:
    """The mean if it is a count that nothing refuses and nothing shown speaks of, else those below and above: no more
    than there were, no fewer than are chosen, as many in each group. None where counts do not matter.
    """
    groups, mean, both = facts["groups"], facts["mean"], ("'experts'", "'per_group'")
    words = {"no": (*both, "'uneven'", "'constants'"), "note": both}
    asked = [one for one in shown if any(word in str(one.when) for word in words.get(one.answer, ()))]

    def passes(count: int) -> bool:
        other = {**facts, "experts": count, "per_group": count // groups, "uneven": False, "constants": False}
        refused = any(one.answer == "no" and one.holds(other) is not False for one in listed)
        return count % groups == 0 and not refused and all(one.holds(other) is False for one in asked)

    passing = [count for count in range(facts["top_k"], facts["most"] + 1) if asked and passes(count)]
    return [mean] if mean in passing else around(mean, passing)


def around(count: int, others: Sequence[int]) -> list[int]:
    """The nearest of `others`, which ascend, below and above."""
    return [*[one for one in others if one < count][-1:], *[one for one in others if one > count][:1]]


def kernel_counts(count: int) -> list[int]:
    """Numbers of experts that vLLM's router kernels are made for: this one, or those around it."""
    made = next(rule.when["experts"]["not_in"] for rule in rules()["vllm"] if "not_in" in rule.when.get("experts", {}))
    return [count] if count in made else around(count, made)
