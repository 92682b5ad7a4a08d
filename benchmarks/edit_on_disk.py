"""How long pruning a checkpoint on disk takes beside copying it, and how much memory.

A checkpoint of random bytes is made (Mixtral's layout: 16 layers of 32 experts, one tensor an expert and matrix, four
files and more), and half of its experts are removed, and none but one: the second writes nearly all bytes. Edit and
`cp -r` take turns, each followed by `sync`, which is timed too, since the edit waits until its files are on the disk.
The edit runs in a process of its own, whose peak memory is that of everything: Python, torch, transformers, plan, copy.

    python benchmarks/edit_on_disk.py [--gigabytes 2] [--rounds 5] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, EXPERTS, HIDDEN, VOCABULARY, SHARDS = 16, 32, 1024, 32000, 4

CHILD = """
import copy, json, resource, sys, time
from pathlib import Path
started = time.perf_counter()
from compressor.edit.checkpoint_edit import meta_model
from compressor.edit.checkpoint_edit import plan_edit
from compressor.checkpoint.find import Checkpoint
imported = time.perf_counter()
source, output, num_kept = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
found = Checkpoint(str(source), source)
before = meta_model(found)
after = copy.deepcopy(before)
after.keep({layer.path: range(layer.num_experts - num_kept, layer.num_experts) for layer in after.layers})
edit = plan_edit(found, before, after)
planned = time.perf_counter()
output.mkdir()
edit.write(output)
written = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps([imported - started, planned - imported, written - planned, edit.bytes_after, peak]))
"""


def write_source(folder: Path, gigabytes: float) -> int:
    """A bfloat16 checkpoint of about that size; returns its bytes of weights."""
    intermediate = max(64, round(gigabytes * 1e9 / (LAYERS * EXPERTS * 3 * HIDDEN * 2) / 64) * 64)
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": HIDDEN, "dtype": "bfloat16",
        "intermediate_size": intermediate, "num_hidden_layers": LAYERS, "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN // 4, HIDDEN) for name in "kv"}
        shapes |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        shapes[f"{prefix}block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, shape in (("w1", (intermediate, HIDDEN)), ("w2", (HIDDEN, intermediate))):
                shapes[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
            shapes[f"{prefix}block_sparse_moe.experts.{expert}.w3.weight"] = (intermediate, HIDDEN)
    names = sorted(shapes)
    weight_map = {}
    total = 0
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        mine = names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]
        header, at = {}, 0
        for name in mine:
            shape = shapes[name]
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, at, 2**24):
                out.write(os.urandom(min(2**24, at - start)))
        weight_map |= dict.fromkeys(mine, file)
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def copied(source: Path, output: Path) -> tuple[float, float]:
    """Seconds that `cp -r` takes, without and with `sync` after it."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, output], check=True)
    done = time.perf_counter()
    subprocess.run(["sync", "-f", output], check=True)
    return done - started, time.perf_counter() - started


def main() -> None:
    """Print one line for each number of experts kept: medians over alternated rounds (minimum-maximum)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, output = Path(name) / "source", Path(name) / "output"
        size = write_source(source, options.gigabytes)
        subprocess.run(["sync", "-f", source], check=True)
        copied(source, output)
        shutil.rmtree(output)
        print(f"{size / 1e9:.2f} GB, {LAYERS} layers × {EXPERTS} experts, {SHARDS} files, {options.rounds} rounds")
        print("kept | written, GB | cp, s | cp and sync, s | edit, s | speed ÷ cp and sync's | plan, s | peak, GB")
        for num_kept in (EXPERTS - 1, EXPERTS // 2):
            figures = []
            for _ in range(options.rounds):
                bare, by_cp = copied(source, output)
                shutil.rmtree(output)
                child = [sys.executable, "-c", CHILD, str(source), str(output), str(num_kept)]
                answer = subprocess.run(child, check=True, capture_output=True, text=True)
                _, plan, write, written, peak = json.loads(answer.stdout.splitlines()[-1])
                shutil.rmtree(output)
                figures.append((bare, by_cp, write, (written / write) / (size / by_cp), plan, peak, written))
            bare, by_cp, write, ratio, plan, peak, written = map(sorted, zip(*figures, strict=True))
            print(
                f"{num_kept} | {written[0] / 1e9:.2f} | {_spread(bare)} | {_spread(by_cp)} | {_spread(write)} | "
                f"{_spread(ratio)} | {_spread(plan)} | {peak[-1]:.2f}"
            )


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({values[0]:.2f}-{values[-1]:.2f})"


if __name__ == "__main__":
    main()
