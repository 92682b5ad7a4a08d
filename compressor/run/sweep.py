"""Several totals of one pass: what each is asked as, whether it can be, what is said of it; `pipeline` measures."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint.atomic_files import write_json
from compressor.errors import RecipeError, writing
from compressor.method import Decision, Method
from compressor.recipe.schema import Evaluation, LoadedRecipe, ResolvedPass
from compressor.report.comparison import comparison_page

Json = dict[str, Any]
MOST_SEQUENCES = 32
"""Of each source of calibration text, where that is measured."""


@dataclass(frozen=True)
class Total:
    """One of several: a recipe whose only pass keeps so many, and its plan, see `check`."""

    name: str
    loaded: LoadedRecipe
    plan: Json

    @property
    def resolved(self) -> ResolvedPass:
        return self.loaded.passes[0]

    def swept(self, decision: Decision) -> Json:
        """What is said of the total besides figures: experts in all, and in each layer as it is decided."""
        return {
            "keep": self.resolved.method.options.model_dump(mode="json")["keep"],
            "experts": sum(layer["kept"] for layer in self.plan["layers"]),
            "parameters": self.plan["parameters"]["after"],
            **{key: one for key, one in decision.get("budget", {}).items() if key in ("even", "summed_kl")},
            "counts": {path: len(one["kept"]) for path, one in decision["layers"].items() if "kept" in one},
        }


def totals_of(
    keep: Sequence[Any], asked: LoadedRecipe, loaded_with: Callable[..., LoadedRecipe], planned: Callable[..., Any]
) -> tuple[list[Total], LoadedRecipe]:
    """(the totals, from the largest on; a recipe whose pass is observed for all). `loaded_with` some overrides is the
    recipe, `planned` one as it can be carried out, and its plan. Raises RecipeError that names all that cannot be.
    """
    swept, problems, totals = swept_pass(asked), list[str](), list[Total]()
    at, given = ".".join(map(str, swept.path)), swept.spec.options
    for one in dict.fromkeys(map(str, keep)):
        changes = [f"{at}.keep={one}"]
        if isinstance(given.get("keep"), Mapping):
            changes = [f"{at}.keep.fraction=", f"{at}.keep.mean={one}"]
        try:
            whole = planned(_of_text(loaded_with(*([f"{at}.drop="] if "drop" in given else []), *changes)))
            alone = whole if len(asked.passes) == 1 else planned(_alone(whole[0], swept.index))
            totals.append(Total(f"keep {one}", *alone))
        except RecipeError as error:
            problems.append(str(error))
    if problems or not totals:
        raise RecipeError("\n".join(dict.fromkeys(problems)) or "keep: no total to sweep; give one, such as 8 or 0.5.")
    first, *others = totals = sorted(totals, key=lambda total: -total.plan["parameters"]["after"])
    method = first.resolved.method.observing_for([total.resolved.method for total in others])
    return totals, dataclasses.replace(first.loaded, passes=(dataclasses.replace(first.resolved, method=method),))


def swept_pass(asked: LoadedRecipe) -> ResolvedPass:
    """The one pass with a `keep`. Raises RecipeError where that cannot be swept, naming why."""
    found = [one for one in asked.passes if "keep" in type(one.method.options).model_fields]
    if len(found) != 1:
        named = ", ".join(one.method.name for one in found)
        raise asked.error(
            ("passes",), f"a sweep is over the `keep` of one pass; {named or 'no pass'} would have it here"
        )
    [swept], evaluation = found, asked.recipe.evaluate
    name, given = swept.method.name, swept.spec.options.get("keep")
    before = [one.method.name for one in asked.passes[: swept.index]]
    is_by_layer = isinstance(given, Mapping) and not {"mean", "fraction"} & set(given)
    for problem, is_there in {
        f"{', '.join(before)} comes before {name}, and a sweep observes the model as it is": before,
        "counts by layer are no total: say a count or a mean to sweep it": is_by_layer,
        "`progressive` observes each total behind other layers: leave it out to sweep": swept.method.progressive,
        f"{name} has no preview, under which the model could be measured": type(swept.method).preview is Method.preview,
        f"{name} reads no text, so there is none to measure: name some, `evaluate: {{fidelity: [...]}}`": not (
            asked.sources_of(swept) or (evaluation and evaluation.texts)
        ),
    }.items():
        if is_there:
            raise asked.error(swept.path, problem)
    return swept


def _of_text(loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe, of which only text is measured."""
    asked = loaded.recipe.evaluate or Evaluation()
    kept = {key: getattr(asked, key) for key in ("batch_size", "perplexity", "fidelity", "random")}
    return dataclasses.replace(loaded, recipe=loaded.recipe.model_copy(update={"evaluate": Evaluation(**kept)}))


def _alone(loaded: LoadedRecipe, index: int) -> LoadedRecipe:
    """The recipe of one of its passes, as what is behind it lets that be."""
    only = loaded.recipe.model_copy(update={"passes": (loaded.recipe.passes[index],)})
    return dataclasses.replace(loaded, recipe=only, passes=(loaded.passes[index],))


def left_out_notes(asked: LoadedRecipe) -> list[str]:
    """That passes behind the one that is swept are not in it, if there are some."""
    behind = [one.method.name for one in asked.passes[swept_pass(asked).index + 1 :]]
    return [f"Left out, though behind it in the recipe: {', '.join(behind)}."] if behind else []


def sweep_json(found: Json, records: Mapping[Path, Json], largest: Total, *, is_calibration: bool) -> Json:
    """What `compare` would say of these records, and what is to be known of totals, in sentences."""
    outputs = [one | record["swept"] for one, record in zip(found["outputs"], records.values(), strict=True)]
    for one in outputs:
        del one["folder"]  # there is none
    kl = [(one["experts"], one["mean"]["kl"]) for one in outputs]
    steps = [f"×{less / more:.2f} from {a} to {b} experts" for (a, more), (b, less) in itertools.pairwise(kl) if more]
    chance = [f"{statistics.median(one['random']):.4g} at {one['experts']}" for one in outputs if "random" in one]
    notes = [f"KL grows {', '.join(steps)}."] if steps else []
    notes += [f"As many experts by chance lose {', '.join(chance)} (KL, median)."] if chance else []
    for one in (one for one in outputs if "even" in one):
        even, said = one["even"], f"{one['even']['summed_kl']:.4g} instead of {one['summed_kl']:.4g} (layers added up)"
        notes.append(f"{even['count']} experts in every layer, which every engine reads, would lose {said}.")
    notes += ["This is calibration text, by which was decided: other text loses more."] if is_calibration else []
    title = f"How far {largest.resolved.method.name} can go: {found['original']['reference']}"
    experts = sum(layer["num_experts"] for layer in largest.plan["layers"])
    return found | {
        "title": title,
        "notes": notes,
        "original": {**found["original"], "experts": experts},
        "outputs": outputs,
    }


def page_of(output: str | Path | None, model: Path | None, *, overwrite: bool) -> Path | None:
    """The page: beside the recipe's output, if any, unless another is named. Raises RecipeError."""
    page = Path(output) if output else model and model.with_name(f"{model.name}-sweep.html")
    if page is not None and page.suffix != ".html":
        raise RecipeError(f"{page}: a sweep writes a page, and JSON beside it: give a name in .html.")
    for path in (page, page.with_suffix(".json")) if page is not None else ():
        if path.exists() and not overwrite:
            raise RecipeError(f"{path} exists already. Choose another output, or pass --overwrite to replace it.")
    return page


def write(page: Path, found: Json) -> None:
    """The page, and the same as JSON. Raises DiskError."""
    with writing(page):
        write_json(page.with_suffix(".json"), found)
        page.write_text(comparison_page(found), encoding="utf-8")
