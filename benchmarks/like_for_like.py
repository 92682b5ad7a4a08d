"""Every way of choosing experts, at even and at measured counts, re-routed and with constants: losers stay in.

    python benchmarks/train_demo.py prepare
    python benchmarks/train_demo.py train --experts 64 --top-k 8 --expert-width 64 --output fine-grained
    python benchmarks/train_demo.py train --experts 64 --top-k 8 --expert-width 64 --model-type olmoe --output olmoe
    python benchmarks/like_for_like.py demo fine-grained olmoe

Each cell (model, share that goes, seed of the calibration text, way) is one run of a recipe by `compressor.compress`,
calibrated on the training split of three domains, and what it leaves answers held-out text: KL of its next-token
distribution from the original's over the whole vocabulary, share of tokens whose likeliest next one is the same, loss;
with the first seed tasks too. Cells are kept by sequence as JSON lines (`--cells`). Those that are there are not
measured again, so the table can be made in pieces (`--only`, `--seeds`, `--ratios`); it is printed from all of them
that are of the models given.

All domains count the same. Errors are of differences: what a way has above the search at even counts, sequence by
sequence and seed by seed; its variance over sequences and over seeds is added up. `random` is ten draws against the
mean of the search's seeds. Ways whose options a recipe refuses are left out, and named.

Dimensions: R seeds, D domains, N sequences of a domain.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compressor
from compressor.checkpoint.find import find_checkpoint
from compressor.checkpoint.load import load_model, load_tokenizer
from compressor.data.lm_eval_tasks import LoadedTasks, load_tasks
from compressor.data.packing import load_sequences
from compressor.data.sources import DemoSource
from compressor.evaluation.lm_eval import run_tasks
from compressor.machine.environment import hardware, versions
from compressor.observe.divergence import kl_divergences
from compressor.plugins import load_plugins

DOMAINS = ("code", "prose", "arithmetic")
TASKS = [f"demo_{domain}" for domain in DOMAINS]
CRITERIA = ("reap", "ean", "weighted_ean", "frequency", "man", "aimer", "hope", "hope_sums")
WAYS: Mapping[str, dict[str, Any]] = {
    "search": {},
    "progressive": {"progressive": True},
    **{name: {"criterion": name} for name in CRITERIA},
}
SCALED = ("search", "weighted_ean", "reap")
NUM_DRAWS = 10
LENGTH = 256
HELD_OUT_LENGTH = 96
BATCH = 20
REFERENCE = ("search", "even", "re-routed")
Cell = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One way, and the passes that go it."""

    way: str
    counts: str
    answers: str
    passes: tuple[dict[str, Any], ...]

    @property
    def name(self) -> tuple[str, str, str]:
        """What it is called in the table."""
        return self.way, self.counts, self.answers

    def is_known(self) -> bool:
        """Whether this version has all of its options."""
        known = load_plugins().methods["expert_pruning"].options_type.model_fields
        return all(name in known for name in self.passes[0]["expert_pruning"])


def rows(num_kept: int, num_experts: int) -> Iterator[Row]:
    """All ways but chance. Where counts differ, no layer goes below a quarter of its experts but where that is said."""
    even, mean = {"keep": num_kept}, {"keep": {"mean": num_kept, "min": num_experts // 4}}
    measured = mean | {"share": "measured"}
    for (answers, replaced), (counts, kept) in itertools.product(
        {"re-routed": {}, "constants": {"replace": "constants"}}.items(), {"even": even, "measured": measured}.items()
    ):
        for way, options in WAYS.items():
            yield Row(way, counts, answers, ({"expert_pruning": kept | options | replaced},))
    scaled = [(way, "even", even) for way in SCALED] + [("search", "measured", measured)]
    for way, counts, kept in scaled:
        pruned = {"expert_pruning": kept | WAYS[way]}
        yield Row(f"{way}, output_scale", counts, "re-routed", (pruned, {"output_scale": {}}))
    yield Row("search", "by loss", "re-routed", ({"expert_pruning": mean | {"share": "loss"}},))
    cheaper = {"measured_counts": 3, "measured_tokens": 2048}
    yield Row("search", "measured, 3 on 2,048 tokens", "re-routed", ({"expert_pruning": measured | cheaper},))
    chosen = {"choose": "measured", "replace": "none"}
    yield Row("chosen by KL", "measured", "measured", ({"expert_pruning": mean | chosen},))
    bare = {"keep": {"mean": num_kept}}
    yield Row("chosen by KL", "measured, no least", "re-routed", ({"expert_pruning": bare | chosen},))
    yield Row("the default", "measured, no least", "either", ({"expert_pruning": bare},))


def random_row(num_kept: int, draw: int) -> Row:
    """As many experts of every layer by chance."""
    options = {"keep": num_kept, "criterion": "random", "seed": draw}
    return Row("random", "even", "re-routed", ({"expert_pruning": options},))


# Measuring -------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model, what is held out of its text, and what it answers there."""

    name: str
    model: Any
    tokenizer: Any
    held_out: Mapping[str, Tensor]
    """By domain: ids [N, S]."""
    logits: Mapping[str, list[Tensor]]
    """By domain, by batch: [B, S, V]."""
    tasks: LoadedTasks

    @classmethod
    def of(cls, reference: str, num_held_out: int, tasks: LoadedTasks) -> Subject:
        """Load it, in float32."""
        source = find_checkpoint(reference)
        model, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
        held_out = {domain: read(domain, num_held_out, HELD_OUT_LENGTH, "held-out", tokenizer, 0) for domain in DOMAINS}
        logits = {domain: [answers(model, ids_BS) for ids_BS in ids.split(BATCH)] for domain, ids in held_out.items()}
        return cls(Path(reference).name, model, tokenizer, held_out, logits, tasks)

    @property
    def num_experts(self) -> int:
        """Of each layer."""
        return compressor.MoEModel(self.model).layers[0].num_experts


def read(domain: str, samples: int, length: int, split: Any, tokenizer: Any, seed: int) -> Tensor:
    """One domain's sequences, ids [N, S]."""
    source = DemoSource(demo=domain, samples=samples, length=length, split=split, name=domain)
    return torch.stack(list(load_sequences(source, tokenizer, seed=seed, split=split).ids))


@torch.no_grad()
def answers(model: Any, ids_BS: Tensor) -> Tensor:
    """Logits [B, S, V]."""
    return model(input_ids=ids_BS, use_cache=False).logits  # type: ignore[no-any-return]


def quality(subject: Subject, model: Any) -> Cell:
    """By domain, by sequence: mean KL of the model from the original, share of tokens with the same likeliest next one,
    mean loss.
    """
    found: Cell = {"kl": {}, "top1": {}, "loss": {}}
    for domain, ids in subject.held_out.items():
        columns: list[Tensor] = []
        for ids_BS, original_BSV in zip(ids.split(BATCH), subject.logits[domain], strict=True):
            log_q_BSV = answers(model, ids_BS).log_softmax(-1)
            kl_BS = kl_divergences(original_BSV.flatten(0, 1), log_q_BSV.flatten(0, 1)).view(ids_BS.shape)
            same_BS = (log_q_BSV.argmax(-1) == original_BSV.argmax(-1)).double()
            loss_BC = -log_q_BSV[:, :-1].gather(-1, ids_BS[:, 1:, None])[..., 0]
            columns.append(torch.stack([kl_BS.mean(1), same_BS.mean(1), loss_BC.double().mean(1)]))
        for name, by_sequence in zip(found, torch.cat(columns, dim=1).tolist(), strict=True):
            found[name][domain] = [round(value, 7) for value in by_sequence]
    return found


def accuracies(subject: Subject, model: Any, limit: int) -> dict[str, float]:
    """By task."""
    results = run_tasks(model, subject.tokenizer, subject.tasks, limit=limit, batch_size=32)
    return {name: results[name].metrics["acc"].value for name in TASKS}


def calibration(subject: Subject, folder: Path, seed: int, samples: int) -> dict[str, Any]:
    """`calibration:` of a recipe, and its text; a quarter as much follows, to be held out by passes that need it."""
    data = []
    for domain in DOMAINS:
        ids = read(domain, samples + samples // 4, LENGTH, "train", subject.tokenizer, seed)
        file = folder / f"{domain}.{seed}.jsonl"
        file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
        data.append({"tokens": str(file), "samples": samples, "name": domain})
    return {"data": data}


def measured(subject: Subject, row: Row, seed: int, text: Mapping[str, Any], limit: int) -> Cell:
    """One cell. Raises RecipeError for what is refused."""
    recipe = {"seed": seed, "calibration": text, "passes": list(row.passes)}
    if row.way == "random" or (row.way == "aimer" and row.counts == "even" and row.answers == "re-routed"):
        del recipe["calibration"]  # nothing would read it
    started = time.process_time()
    result = compressor.compress(recipe, model=subject.model, tokenizer=subject.tokenizer)
    cell: Cell = {"seconds": round(time.process_time() - started, 2)}
    decided = result.record["passes"][0]["decision"]
    cell["experts"] = [len(layer["kept"]) for layer in decided["layers"].values()]
    cell |= quality(subject, result.model)
    if seed == 0:
        cell["accuracy"] = accuracies(subject, result.model, limit)
    return cell


def measure(args: argparse.Namespace) -> None:
    """Measure all cells that are not there."""
    there, tasks = {key(cell) for cell in cells_of(args.cells)}, load_tasks(TASKS)
    with tempfile.TemporaryDirectory() as folder, args.cells.open("a", encoding="utf-8") as file:

        def keep(about: Cell, cell: Cell) -> None:
            file.write(json.dumps(about | cell) + "\n")
            file.flush()

        for seed, reference in itertools.product(args.seeds, args.models):
            subject = Subject.of(reference, args.held_out, tasks)
            text = calibration(subject, Path(folder), seed, args.samples)
            about: Cell = {"model": subject.name, "num_experts": subject.num_experts}
            original = about | {"ratio": 0.0, "seed": 0, "row": ["original", "", ""]}
            if key(original) not in there:
                there.add(key(original))
                cell = quality(subject, subject.model) | {"seconds": 0.0}
                keep(original, cell | {"accuracy": accuracies(subject, subject.model, args.limit)})
            for ratio in args.ratios:
                num_kept = round(subject.num_experts * (1 - ratio))
                wanted = [(row, seed) for row in rows(num_kept, subject.num_experts)]
                if seed == 0:
                    wanted += [(random_row(num_kept, draw), draw) for draw in range(NUM_DRAWS)]
                for row, own_seed in wanted:
                    one = about | {"ratio": ratio, "seed": own_seed, "row": list(row.name)}
                    title = f"{subject.name} {ratio:.0%} seed {own_seed}: {', '.join(row.name)}"
                    if key(one) in there or not re.search(args.only, title) or not row.is_known():
                        continue
                    try:
                        keep(one, measured(subject, row, own_seed, text, args.limit))
                    except compressor.RecipeError as error:
                        title += f" is refused: {error}"
                    print(title, file=sys.stderr, flush=True)


def key(cell: Cell) -> tuple[Any, ...]:
    """What there is one cell of."""
    return cell["model"], cell["ratio"], cell["seed"], tuple(cell["row"])


def cells_of(file: Path) -> list[Cell]:
    """Those that are there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# The table -------------------------------------------------------------------------------------------------


def by_sequence(cells: Sequence[Cell], name: str) -> Tensor:
    """[R, D, N] float64."""
    return torch.tensor([[cell[name][domain] for domain in DOMAINS] for cell in cells], dtype=torch.float64)


def mean_and_error(values_RDN: Tensor) -> tuple[float, float]:
    """The mean, and √(variance of the mean over sequences + over seeds); each domain counts the same."""
    num_seeds, num_domains, num_sequences = values_RDN.shape
    of_sequences = values_RDN.mean(0).var(dim=1).sum() / num_sequences / num_domains**2
    of_seeds = values_RDN.mean((1, 2)).var() / num_seeds if num_seeds > 1 else torch.zeros(())
    return float(values_RDN.mean()), float((of_sequences + of_seeds).sqrt())


def paired_with(cells: Sequence[Cell], others: Sequence[Cell]) -> Sequence[Cell]:
    """Those of the others that have the same seeds; all where not every seed is there, as of random draws."""
    seeds = {cell["seed"] for cell in cells}
    same = [other for other in others if other["seed"] in seeds]
    return same if len(same) == len(cells) else others


def above(cells: Sequence[Cell], others: Sequence[Cell], name: str) -> tuple[float, float]:
    """How far a figure lies above that of others, by pairs of the same seed; of other seeds, above their mean."""
    pairs = paired_with(cells, others)
    others_RDN = by_sequence(pairs, name)
    if len(pairs) != len(cells) or pairs[0]["seed"] != cells[0]["seed"]:
        others_RDN = others_RDN.mean(0, keepdim=True)
    return mean_and_error(by_sequence(cells, name) - others_RDN)


HEADS = (
    "kept by | counts | dropped are | KL, nats | above the search | top-1 % | ΔNLL | perplexity | tasks % | s | seeds"
)
ByRow = Mapping[tuple[str, ...], Sequence[Cell]]


@dataclass(frozen=True)
class Setting:
    """One model with so much of it gone."""

    title: str
    original: Cell
    by_row: ByRow
    """Sorted by their KL."""

    @property
    def reference(self) -> Sequence[Cell]:
        """The search at even counts."""
        return self.by_row[REFERENCE]


def settings_of(cells: Sequence[Cell]) -> Iterator[Setting]:
    """One for each model and ratio of which the search at even counts is there."""
    for model, num_experts, ratio in sorted({(one["model"], one["num_experts"], one["ratio"]) for one in cells}):
        if not ratio:
            continue
        original = next(one for one in cells if (one["model"], one["ratio"]) == (model, 0.0))
        by_row: dict[tuple[str, ...], list[Cell]] = {}
        for cell in sorted(cells, key=lambda cell: cell["seed"]):
            if (cell["model"], cell["ratio"]) == (model, ratio):
                by_row.setdefault(tuple(cell["row"]), []).append(cell)
        by_kl = sorted(by_row.items(), key=lambda item: mean_and_error(by_sequence(item[1], "kl")))
        if REFERENCE not in by_row:
            continue
        yield Setting(f"{model}, {round(num_experts * (1 - ratio))} of {num_experts}", original, dict(by_kl))


def line(row: Sequence[str], cells: Sequence[Cell], setting: Setting) -> str:
    """One line of a setting's table."""
    top1, _ = mean_and_error(by_sequence(cells, "top1"))
    loss, _ = mean_and_error(by_sequence(cells, "loss"))
    rise = mean_and_error(by_sequence(cells, "loss") - by_sequence([setting.original], "loss"))
    tasks = [value for cell in cells for value in cell.get("accuracy", {}).values()]
    figures = (
        f"{mean_and_error(by_sequence(cells, 'kl'))[0]:.3g}",
        "{:+.2g} ± {:.1g}".format(*above(cells, setting.reference, "kl")) if tuple(row) != REFERENCE else "",
        f"{100 * top1:.1f}",
        "{:+.3f} ± {:.3f}".format(*rise),
        f"{math.exp(loss):.2f}",
        f"{100 * sum(tasks) / len(tasks):.0f}" if tasks else "",
        f"{sum(cell['seconds'] for cell in cells) / len(cells):.1f}",
        f"{len(cells)}",
    )
    return "| " + " | ".join((*row, *figures)) + " |"


def tables(settings: Sequence[Setting]) -> Iterator[str]:
    """Markdown, a table for each setting, the best way first."""
    for setting in settings:
        yield f"\n**{setting.title}**\n\n| {HEADS} |\n|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"
        yield from (line(row, cells, setting) for row, cells in setting.by_row.items())


def overview(settings: Sequence[Setting]) -> Iterator[str]:
    """Markdown: every way's KL over the search's at even counts, in every setting, and their geometric mean; **better**
    and *worse* than that by more than two standard errors.
    """
    lines: list[tuple[float, str]] = []
    for row in {row for setting in settings for row in setting.by_row}:
        found = [_compared(setting.by_row.get(row), setting.reference) for setting in settings]
        ratios = [ratio for ratio, _ in found if ratio]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        shown = f"{mean:.2f}" if len(ratios) == len(settings) else f"({mean:.2f})"
        lines.append((mean, " | ".join((*row, shown, *(text for _, text in found)))))
    yield "| kept by | counts | dropped are | mean | " + " | ".join(one.title for one in settings) + " |"
    yield "|---|---|---|" + "--:|" * (1 + len(settings))
    yield from (f"| {text} |" for _, text in sorted(lines))


def _compared(cells: Sequence[Cell] | None, reference: Sequence[Cell]) -> tuple[float | None, str]:
    """(KL over the search's, the same as it is shown)."""
    if cells is None:
        return None, ""
    kl, search = (mean_and_error(by_sequence(of, "kl"))[0] for of in (cells, paired_with(cells, reference)))
    if cells is reference:
        return 1.0, f"1 ({kl:.3g} nats)"
    difference, error = above(cells, reference, "kl")
    mark = "" if abs(difference) <= 2 * error else "**" if difference < 0 else "*"
    return kl / search, f"{mark}{kl / search:.2f}{mark}" + ("¹" if len(cells) < len(reference) else "")


def main() -> None:
    """Measure what is missing; print the tables, and the circumstances as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="demo, or folders; none: only print, all models")
    parser.add_argument("--cells", type=Path, default=Path("like_for_like.jsonl"))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5], help="share of the experts that goes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration text")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of each domain")
    parser.add_argument("--held-out", type=int, default=60, help="held-out sequences of each domain")
    parser.add_argument("--limit", type=int, default=50, help="documents of each task")
    parser.add_argument("--only", default="", help="cells whose title this pattern is found in")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure(args)
    names = {Path(reference).name for reference in args.models}
    settings = list(settings_of([one for one in cells_of(args.cells) if not names or one["model"] in names]))
    print("\n".join([*overview(settings), *tables(settings)]))
    print(json.dumps({**versions({}), **hardware("cpu")}))


if __name__ == "__main__":
    main()
