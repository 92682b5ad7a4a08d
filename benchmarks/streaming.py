"""Observing a model that is read from disk one decoder layer at a time, beside reading its files and beside observing
it in memory: time and peak memory.

A checkpoint with OLMoE-1B-7B's shapes is made (bfloat16, one tensor an expert and matrix, a file a layer; 16 layers are
14 GB), of random numbers that differ from expert to expert. Each part runs in a process of its own, whose peak memory
is that of everything, and starts with the files out of the system's cache:

    read        all bytes of the files, once, into a buffer
    memory      load, then observe (sums for criteria) `--sequences` of 512 tokens; the time is that of observing
    streamed    the same from disk; its ratio is to `read` and `memory` together
    run         a whole run of a recipe from disk: observe, decide, write the smaller checkpoint, compare

    python benchmarks/streaming.py [--layers 16] [--rounds 3] [--sequences 8] [--folder DIR] [--without-memory] [--fp8]
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
from pathlib import Path

HIDDEN, WIDTH, EXPERTS, TOP_K, VOCABULARY, LENGTH = 2048, 1024, 64, 8, 50304, 512

CHILD = """
import json, os, resource, sys, time
from pathlib import Path
part, folder, num_sequences, output = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
files = sorted(folder.glob("*.safetensors"))
for path in files:  # out of the system's cache
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
answer = {}
if part == "read":
    started, buffer = time.perf_counter(), bytearray(2**24)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
else:
    import torch
    from compressor.checkpoint.load import load_model
    from compressor.observe import layerwise
    from compressor.data.sequences import TokenBatch
    from compressor.checkpoint.find import Checkpoint
    from compressor.model.moe_model import MoEModel
    from compressor.machine.progress import Progress
    from compressor.selection.activation_sums import ExpertSums
    from compressor.checkpoint.layerwise_weights import StreamedWeights
    from compressor.checkpoint.layerwise_weights import sizes_of
    ids = torch.randint(50000, (num_sequences, 512), generator=torch.Generator().manual_seed(0))
    if part == "run":
        import compressor
        tokens = output / "tokens.jsonl"
        tokens.write_text("\\n".join(json.dumps({"input_ids": row}) for row in ids.tolist()))
        recipe = {
            "model": str(folder), "weights": "disk", "output": str(output / "out"),
            "calibration": {"batch_size": 2, "data": [{"tokens": str(tokens), "samples": num_sequences}]},
            "passes": [{"expert_pruning": {"keep": 48, "criterion": "reap"}}],
        }
        started = time.perf_counter()
        record = compressor.compress(recipe).record
        answer = {"steps": record["seconds"]}
    else:
        batches = [TokenBatch(one, torch.ones_like(one, dtype=torch.bool)) for one in ids.split(2)]
        found = Checkpoint("benchmark", folder)
        model = load_model(found, device="meta" if part == "streamed" else "cpu")
        moe = MoEModel(model)
        weights = StreamedWeights(model, found) if part == "streamed" else None
        answer = {"largest_layer": max(sizes_of(model)[1].values())}
        started = time.perf_counter()
        statistics = {layer.path: ExpertSums(layer) for layer in moe.layers}
        layerwise.observe(moe, batches, statistics, Progress(), weights=weights)
answer |= {
    "seconds": time.perf_counter() - started,
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}
print(json.dumps(answer))
"""


def write_source(folder: Path, num_layers: int, *, fp8: bool) -> int:
    """The checkpoint; returns its bytes of weights. With `fp8` its linear layers are stored so, in blocks of 128 × 128
    with a scale each.
    """
    config = {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": HIDDEN, "dtype": "bfloat16",
        "intermediate_size": WIDTH, "num_hidden_layers": num_layers, "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, "max_position_embeddings": 4096,
    }  # fmt: skip
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    import torch
    from safetensors.torch import save_file

    noise = (torch.randn(2**22 + 2**20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def random(shape: tuple[int, ...], place: int) -> torch.Tensor:
        """Numbers from another place of the noise for every tensor."""
        size = torch.Size(shape).numel()
        if size > 2**22:
            return noise[: 2**22].repeat(-(-size // 2**22))[:size].roll(place).reshape(shape)
        start = place * 7919 % 2**20
        return noise[start : start + size].reshape(shape).clone()

    weight_map, total, place = {}, 0, 0
    for number in range(num_layers + 1):
        shapes: dict[str, tuple[int, ...]] = {}
        if number == num_layers:
            shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
            shapes["model.norm.weight"] = (HIDDEN,)
        else:
            prefix = f"model.layers.{number}."
            shapes |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
            shapes |= {f"{prefix}self_attn.{name}_norm.weight": (HIDDEN,) for name in "qk"}
            shapes |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
            shapes[f"{prefix}mlp.gate.weight"] = (EXPERTS, HIDDEN)
            for expert in range(EXPERTS):
                for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
                    shapes[f"{prefix}mlp.experts.{expert}.{name}_proj.weight"] = shape
        tensors = {}
        for name, shape in shapes.items():
            place += 1
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16) if "norm" in name else random(shape, place)
            if fp8 and name.endswith("_proj.weight"):
                tensors[name] = (tensors[name].float() * 1024).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = torch.full((shape[0] // 128, shape[1] // 128), 1 / 1024)
        file = f"model-{number + 1:05}-of-{num_layers + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def measured(part: str, folder: Path, num_sequences: int, output: Path) -> dict[str, float]:
    """What one part takes, in a process of its own."""
    command = [sys.executable, "-c", CHILD, part, str(folder), str(num_sequences), str(output)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"LC_ALL": "C"})
    if answer.returncode:
        raise SystemExit(f"{part}: {answer.stderr[-2000:]}")
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def main() -> None:
    """Make the checkpoint, let the parts take turns, print what they took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to work; default the system's temporary folder"
    )
    parser.add_argument("--fp8", action="store_true", help="a quantised checkpoint, dequantised while it is read")
    parser.add_argument("--without-memory", action="store_true", help="leave out what needs all weights in memory")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as work:
        source = Path(work) / "source"
        # in a process of its own: the peak of a process counts from the one that started it
        writing = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import streaming, pathlib; "
        writing += f"print(streaming.write_source(pathlib.Path({str(source)!r}), {asked.layers}, fp8={asked.fp8}))"
        total = int(subprocess.run([sys.executable, "-c", writing], check=True, capture_output=True, text=True).stdout)
        found: dict[str, list[dict[str, float]]] = {}
        for number in range(asked.rounds):
            for part in ("read", *(() if asked.without_memory else ("memory",)), "streamed", "run"):
                output = Path(work) / f"{part}-{number}"
                output.mkdir()
                found.setdefault(part, []).append(measured(part, source, asked.sequences, output))
                print(part, found[part][-1], file=sys.stderr, flush=True)
                shutil.rmtree(output)
    hidden = asked.sequences * LENGTH * HIDDEN * 2 * 2
    largest = found["streamed"][0]["largest_layer"]
    print(f"{total / 1e9:.1f} GB of weights, largest layer {largest / 1e9:.2f} GB, text {hidden / 1e9:.2f} GB")
    print("| part | s | peak, GB |")
    for part, rows in found.items():
        print(
            f"| {part} | {_spread([row['seconds'] for row in rows])} | {max(row['peak'] for row in rows) / 1e9:.2f} |"
        )
    print(f"limit of the peak (2 layers + text + 1 GB): {(2 * largest + hidden + 1e9) / 1e9:.2f} GB")
    if not asked.without_memory:
        rows = zip(found["read"], found["memory"], found["streamed"], strict=True)
        ratios = [three["seconds"] / (one["seconds"] + two["seconds"]) for one, two, three in rows]
        print(f"streamed / (read + memory): {_spread(ratios)}")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


if __name__ == "__main__":
    main()
