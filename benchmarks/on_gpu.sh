#!/usr/bin/env bash
# What a GPU is to show, in four minutes: the demo model in bfloat16, streaming to the GPU, layers of OLMoE's shape, the
# speed of skipping. Each part says what must hold, and the script ends with 1 where one does not.
#
#     benchmarks/on_gpu.sh                             # on cuda
#     DEVICE=auto benchmarks/on_gpu.sh                 # on all GPUs of the machine
#     DEVICE=cpu SMALL=1 benchmarks/on_gpu.sh          # tries the script out, at tiny sizes
#
# PYTHON: the Python that has the package (default .venv/bin/python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
device=${DEVICE:-cuda}
if [ "$device" != cpu ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "on_gpu.sh: torch sees no CUDA device here; DEVICE=cpu SMALL=1 tries the script out" >&2
  exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1

compress() { # name, recipe, options
  echo "== $1"
  local name=$1 recipe=$2
  shift 2
  timeout "${LIMIT:-75}" "$python" -m compressor run "$recipe" --quiet --output "$work/$name" --set "device=$device" "$@"
}

if [ -n "${SMALL:-}" ]; then
  samples=2 length=64 limit=2 layers=2 divide=32 rounds=1 tokens="16"
else
  samples=24 length=256 limit=100 layers=4 divide=1 rounds=5 tokens="1 512 2048"
fi

cat >"$work/demo.yaml" <<RECIPE
model: demo
calibration:
  data:
    - {demo: code, samples: $samples, length: $length}
    - {demo: prose, samples: $samples, length: $length}
passes: [{expert_pruning: {keep: 6}}]
evaluate:
  tasks: [demo_code]
  limit: $limit
  perplexity: [{demo: code, samples: $samples, length: $length}]
RECIPE
compress bfloat16 "$work/demo.yaml" --set dtype=bfloat16 --set evaluate.random=3 --set evaluate.speed=true
compress memory "$work/demo.yaml"
compress disk "$work/demo.yaml" --set weights=disk

echo "== OLMoE's shape, $layers layers"
"$python" - "$work" "$layers" "$divide" <<'PYTHON'
import json, pathlib, random, sys
sys.path.insert(0, "benchmarks")
import streaming

work, layers, divide = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
streaming.HIDDEN, streaming.WIDTH, streaming.VOCABULARY = 2048 // divide, 1024 // divide, 50304 // divide
streaming.write_source(work / "olmoe", layers, fp8=False)
draw = random.Random(0)
rows = [[draw.randrange(2, streaming.VOCABULARY) for _ in range(512 // divide + 48)] for _ in range(32)]
(work / "tokens.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
PYTHON
cat >"$work/olmoe.yaml" <<RECIPE
model: $work/olmoe
calibration: {batch_size: 8, data: [{tokens: $work/tokens.jsonl}]}
passes:
  - expert_pruning: {keep: 48, criterion: reap}
  - dynamic_skipping: {mean_experts: 6, precision: 1}
evaluate: {perplexity: [{tokens: $work/tokens.jsonl}]}
RECIPE
compress olmoe-memory "$work/olmoe.yaml"
compress olmoe-disk "$work/olmoe.yaml" --set weights=disk

echo "== what must hold"
"$python" - "$work" <<'PYTHON'
import json, pathlib, sys

work, wrong = pathlib.Path(sys.argv[1]), 0
for pair in (("memory", "disk"), ("olmoe-memory", "olmoe-disk")):
    records = [json.loads((work / name / "compressor" / "record.json").read_text()) for name in pair]
    kept = [{p: layer.get("kept") for p, layer in one["passes"][0]["decision"]["layers"].items()} for one in records]
    perplexity = [next(iter(one["evaluation"]["after"]["perplexity"].values()))["perplexity"] for one in records]
    same, near = kept[0] == kept[1], abs(perplexity[0] / perplexity[1] - 1) < 1e-2
    seconds = [round(sum(one["seconds"].values()), 1) for one in records]
    print(f"{' and '.join(pair)} on {records[0]['hardware']['accelerator'] or records[0]['hardware']['device']}:")
    print(f"  same experts kept: {same}; perplexity {perplexity}, within 1 %: {near}; seconds {seconds}")
    wrong += not (same and near)
sys.exit(wrong > 0)
PYTHON

echo "== speed of skipping"
one_gpu=${device/auto/cuda}
# shellcheck disable=SC2086  # several numbers of tokens
timeout 60 "$python" benchmarks/skipping.py --device "$one_gpu" --dtype bfloat16 --layers-only --implementations grouped_mm \
  --rounds "$rounds" --divide "$divide" --tokens $tokens
