"""Every way of choosing experts on the same model, the same text and the same counts: losers stay in the table.

    python benchmarks/train_demo.py prepare
    python benchmarks/train_demo.py train --experts 64 --top-k 8 --expert-width 64 --output fine-grained
    python benchmarks/like_for_like.py demo fine-grained --output like_for_like.json

Each model is pruned by 25 % and 50 % in every way, calibrated on the training split of three domains (blended by their
mean), and then measured on the held-out split: the paper's objective (mean over the layers of the loss as a fraction of
the layer's output, each domain on its own and averaged), perplexity and task accuracy with standard errors. Experts are
masked, not removed, which gives the same answers. `random` is drawn with five seeds; what is shown of it is the median
and the range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compressor import MoEModel
from compressor.checkpoint.find import find_checkpoint
from compressor.checkpoint.load import load_model, load_tokenizer
from compressor.data.lm_eval_tasks import LoadedTasks, load_tasks
from compressor.data.packing import load_sequences
from compressor.data.sequences import Sequences, TokenBatch, make_batches
from compressor.data.sources import DemoSource
from compressor.evaluation import perplexity as perplexities
from compressor.evaluation.lm_eval import run_tasks
from compressor.machine.environment import hardware, versions
from compressor.machine.progress import Progress
from compressor.observe import layerwise
from compressor.plugin import Gathered
from compressor.plugins import load_plugins
from compressor.selection.reference import SetLosses, relative_losses

DOMAINS = ("code", "prose", "arithmetic")
CRITERIA = ("reap", "ean", "weighted_ean", "frequency", "seer", "man", "msan", "mone", "aimer", "single_removal")
SEEDS = range(5)
Kept = Mapping[str, Sequence[int]]


def main() -> None:
    """Prune and measure; print a table for each model and ratio, write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="demo, or a folder")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5], help="share of the experts that goes")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of each domain")
    parser.add_argument("--held-out", type=int, default=32, help="held-out sequences of each domain")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--limit", type=int, default=200, help="documents of each task")
    parser.add_argument("--output", type=Path, default=Path("like_for_like.json"))
    args = parser.parse_args()
    found = {"settings": {**vars(args), "output": str(args.output)}, "versions": versions({}), "results": []}
    found["hardware"] = hardware("cpu")
    for model in args.models:
        for result in measured(model, args):
            found["results"].append(result)
            print(table(result), flush=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n")


def measured(reference: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result for each ratio."""
    source = find_checkpoint(reference)
    model, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
    moe = MoEModel(model)
    calibration = [read(domain, args.samples, args.length, "train", tokenizer) for domain in DOMAINS]
    held_out = [read(domain, args.held_out, args.length, "held-out", tokenizer) for domain in DOMAINS]
    tasks = load_tasks([f"demo_{domain}" for domain in DOMAINS])
    full = quality(moe, tokenizer, held_out, tasks, args.limit)
    for ratio in args.ratios:
        num_kept = round(moe.layers[0].num_experts * (1 - ratio))
        started = time.perf_counter()
        decisions = dict(ways(moe, batches_of(calibration), num_kept))
        rows: dict[str, Any] = {}
        losses = held_out_losses(moe, list(decisions.values()), held_out)
        for number, (way, kept) in enumerate(decisions.items()):
            with moe.masked(kept):
                rows[way] = quality(moe, tokenizer, held_out, tasks, args.limit)
            rows[way]["loss"] = {domain: of_sets[number] for domain, of_sets in losses.items()}
            rows[way]["loss"]["mean"] = statistics.fmean(rows[way]["loss"].values())
            rows[way]["kept"] = {path: list(ids) for path, ids in kept.items()}
            print(f"{reference} {ratio:.0%} {way}", file=sys.stderr, flush=True)
        yield {
            "model": reference,
            "experts": moe.layers[0].num_experts,
            "top_k": moe.layers[0].top_k,
            "kept": num_kept,
            "ratio": ratio,
            "seconds": round(time.perf_counter() - started, 1),
            "full": full,
            "ways": rows,
        }


def read(domain: str, samples: int, length: int, split: Any, tokenizer: Any) -> Sequences:
    """One domain's sequences."""
    source = DemoSource(demo=domain, samples=samples, length=length, split=split, name=domain)
    return load_sequences(source, tokenizer, seed=0, split=split)


def batches_of(sources: Sequence[Sequences]) -> list[TokenBatch]:
    """Batches of eight, each of one domain."""
    return [batch for one in sources for batch in make_batches(one.ids, 8, one.name)]


def ways(moe: MoEModel, batches: Sequence[TokenBatch], num_kept: int) -> Iterator[tuple[str, Kept]]:
    """(name, experts kept) of every way, through the method that a recipe would use."""
    plugins = load_plugins()
    method_type = plugins.methods["expert_pruning"]

    def method(**options: Any) -> Any:
        return method_type(method_type.options_type(keep=num_kept, **options), plugins.criteria)

    def observed(one: Any) -> Gathered:
        wanted = {layer.path: one.statistic(layer) for layer in moe.layers}

        def edited(path: str, figures: Any) -> Any:
            return one.preview(moe, one.decide([moe.layer(path)], Gathered({path: figures}, DOMAINS)))

        figures = layerwise.observe(moe, batches, wanted, Progress(), edited=edited if one.progressive else None)
        return Gathered(figures, DOMAINS)

    def kept(one: Any, figures: Gathered) -> Kept:
        layers = one.decide(moe.layers, figures)["layers"]
        return {path: layer["kept"] for path, layer in layers.items()}

    for name, options in (
        ("search", {}),
        ("search, pooled", {"blend": "pooled"}),
        ("progressive", {"progressive": True}),
    ):
        one = method(**options)
        yield name, kept(one, observed(one))
    gathered = observed(method(criterion="quad_mix", gather=("outputs",)))
    for name in (*CRITERIA, "quad_mix"):
        yield name, kept(method(criterion=name), gathered)
    for seed in SEEDS:
        yield f"random {seed}", kept(method(criterion="random", seed=seed), gathered)


def held_out_losses(moe: MoEModel, sets: Sequence[Kept], sources: Sequence[Sequences]) -> dict[str, list[float]]:
    """Domain → the objective of every set, mean over the layers."""
    found = {}
    for one in sources:
        wanted = {layer.path: SetLosses(layer, [kept[layer.path] for kept in sets]) for layer in moe.layers}
        figures = layerwise.observe(moe, batches_of([one]), wanted, Progress())
        found[one.name] = torch.stack([relative_losses(of) for of in figures.values()]).mean(0).tolist()
    return found


def quality(
    moe: MoEModel, tokenizer: Any, held_out: Sequence[Sequences], tasks: LoadedTasks, limit: int
) -> dict[str, Any]:
    """Perplexity of every domain and accuracy of every task, with standard errors."""
    perplexity = {one.name: perplexities.perplexity(moe.model, one).to_json() for one in held_out}
    results = run_tasks(moe.model, tokenizer, tasks, limit=limit, batch_size=32)
    accuracy = {name.removeprefix("demo_"): result.metrics["acc"].to_json() for name, result in results.items()}
    return {"perplexity": perplexity, "accuracy": accuracy}


def table(result: Mapping[str, Any]) -> str:
    """Markdown."""
    heads = ["kept by", "loss", *(f"ppl {d}" for d in DOMAINS), *(f"acc {d} %" for d in DOMAINS)]
    title = f"{result['model']}: {result['kept']} of {result['experts']} experts, top-{result['top_k']}"
    lines = [f"\n**{title}**\n", "| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    lines.append(_row("(all)", None, [result["full"]]))
    rows = {name: [row] for name, row in result["ways"].items() if not name.startswith("random")}
    rows["random × 5"] = [row for name, row in result["ways"].items() if name.startswith("random")]
    return "\n".join([*lines, *(_row(name, [row["loss"]["mean"] for row in of], of) for name, of in rows.items())])


def _row(name: str, losses: Sequence[float] | None, rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [name, "" if losses is None else _spread(losses, ".3f")]
    cells += [_spread([row["perplexity"][d]["perplexity"] for row in rows], ".1f") for d in DOMAINS]
    for domain in DOMAINS:
        values = [100 * row["accuracy"][domain]["value"] for row in rows]
        error = 100 * rows[0]["accuracy"][domain]["standard_error"]
        cells.append(f"{_spread(values, '.0f')}" + (f" ± {error:.0f}" if len(rows) == 1 else ""))
    return "| " + " | ".join(cells) + " |"


def _spread(values: Sequence[float], form: str) -> str:
    """One value, or the median with the range."""
    if len(values) == 1:
        return format(values[0], form)
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


if __name__ == "__main__":
    main()
