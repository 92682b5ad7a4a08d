"""Models that are read from disk one decoder layer at a time: the same as in memory, to the bit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from greenlet import getcurrent, greenlet
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder, tiny_model, token_ids, write_checkpoint, write_token_file
from transformers import MixtralConfig, MixtralForCausalLM

import compressor
from compressor import CheckpointError, DiskError, EvaluationError, MoEModel, RecipeError
from compressor.checkpoint import headers
from compressor.checkpoint.find import Checkpoint, read_config
from compressor.checkpoint.headers import verify_files
from compressor.checkpoint.layerwise_weights import StoredTensor, StreamedWeights, sizes_of, stored_tensors
from compressor.checkpoint.load import load_model
from compressor.checkpoint.resume_state import ObservationJournal
from compressor.data.sequences import TokenBatch
from compressor.edit import checkpoint_edit
from compressor.edit.on_disk import OnDisk
from compressor.edit.safetensors_writer import write_shard
from compressor.machine.progress import Progress
from compressor.model.modules import units_of
from compressor.observe import activation_offload, layerwise
from compressor.observe.activation_offload import Parking
from compressor.plugin import Statistic
from compressor.testing import tiny

Recipe = dict[str, Any]
WEIGHTS = "model.safetensors"


def streamed(folder: Path) -> tuple[MoEModel, StreamedWeights]:
    found = Checkpoint(str(folder), folder)
    model = load_model(found, device="meta")
    return MoEModel(model), StreamedWeights(model, found)


def in_memory(folder: Path) -> MoEModel:
    return MoEModel(load_model(Checkpoint(str(folder), folder)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("mixtral"), tmp_path / "model"))


class Counted:
    def __init__(self, call: Any) -> None:
        self.call, self.calls = call, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.call(*args, **kwargs)

    def __get__(self, owner: Any, _: Any) -> Any:
        return partial(self, owner)


# --- weights that come and go


def test_a_layer_is_there_and_gone_again(model: Path) -> None:
    expected = in_memory(model).model.state_dict()
    moe, weights = streamed(model)
    assert weights.units == ("model.layers.0", "model.layers.1", "model.layers.2")
    weights.load("model.layers.1")
    for name, tensor in moe.model.state_dict().items():
        is_there = name.startswith("model.layers.1.")
        assert tensor.is_meta is not is_there, name
        assert not is_there or torch.equal(tensor, expected[name]), name
    weights.free("model.layers.1")
    assert all(tensor.is_meta for tensor in moe.model.state_dict().values())


def test_computed_buffers_are_there(model: Path) -> None:
    moe, _ = streamed(model)
    expected = dict(in_memory(model).model.named_buffers())
    found = dict(moe.model.named_buffers())
    assert torch.equal(found["model.rotary_emb.inv_freq"], expected["model.rotary_emb.inv_freq"])


def test_tensors_that_share_their_memory_do_so_again(tmp_path: Path) -> None:
    live = tiny_model("mixtral")
    live.config.tie_word_embeddings = True
    live.tie_weights()
    folder = write_checkpoint(live, tmp_path / "tied")
    moe, weights = streamed(folder)
    with weights.around(moe.model):
        assert not moe.model.lm_head.weight.is_meta
        assert moe.model.lm_head.weight is moe.model.model.embed_tokens.weight
    assert moe.model.lm_head.weight.is_meta


def test_sizes(model: Path) -> None:
    live = in_memory(model).model
    outside, by_unit = sizes_of(live)
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in live.model.layers]
    assert list(by_unit.values()) == layers
    rest = (live.model.embed_tokens.weight, live.lm_head.weight, live.model.norm.weight)
    buffers = live.model.rotary_emb.inv_freq.nbytes + live.model.rotary_emb.original_inv_freq.nbytes
    assert outside == sum(tensor.nbytes for tensor in rest) + buffers
    assert tuple(by_unit) == units_of(live)


def test_a_file_that_was_cut_meanwhile(model: Path) -> None:
    path = model / WEIGHTS
    stored = stored_tensors(verify_files(model))
    last = max(stored, key=lambda name: stored[name].start)
    assert torch.equal(stored[last][...], load_file(path)[last])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DiskError, match=rf"^{path}: it ends within a tensor"):
        stored[last][...]


def test_unknown_types_of_numbers_are_named(tmp_path: Path) -> None:
    tensor = StoredTensor(tmp_path / "x", 0, 4, "F4", (8,))
    with pytest.raises(CheckpointError, match="tensors of type F4 are not known"):
        tensor[...]


def test_nan_in_one_expert_is_named(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    name = next(name for name in tensors if name.startswith("model.layers.1.") and "experts.3." in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    _, weights = streamed(model)
    weights.load("model.layers.0")
    with pytest.raises(
        CheckpointError, match=r"tensor model\.layers\.1\.mlp\.experts\.\S+ holds 1 value\(s\) that are NaN"
    ):
        weights.load("model.layers.1")


# --- walking


class Recorded(Statistic):
    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def update(self, tokens: Any) -> None:
        number = len(self.seen)
        self.seen[f"{number}.in"] = tokens.hidden_TH.clone()
        self.seen[f"{number}.weights"] = tokens.weights_TK.clone()

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.seen


@pytest.mark.parametrize(
    "model_type",
    [
        "mixtral",
        "switch_transformers",
        "gemma4",
        *(pytest.param(one, marks=pytest.mark.nightly) for one in ("diffusion_gemma", "deepseek_v4", "ernie4_5_moe")),
    ],
)
def test_walk_from_disk_sees_the_same(model_type: str, tmp_path: Path) -> None:
    tiny.tiny_model(model_type).save_pretrained(tmp_path)
    live, (moe, weights) = in_memory(tmp_path), streamed(tmp_path)
    inputs = [tiny.tiny_inputs(live.model, seed=seed)["input_ids"] for seed in range(2)]
    batches = [TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in inputs]
    paths = [layer.path for layer in live.layers]
    expected = layerwise.observe(live, batches, {path: Recorded() for path in paths}, Progress())
    held: list[set[str]] = []
    load = weights.load

    def watched(unit: str) -> None:
        load(unit)
        loaded = {n for n, tensor in moe.model.named_parameters() if not tensor.is_meta}
        held.append({unit for unit in weights.units if any(name.startswith(unit + ".") for name in loaded)})

    weights.load = watched  # type: ignore[method-assign]
    found = layerwise.observe(moe, batches, {path: Recorded() for path in paths}, Progress(), weights=weights)
    assert list(found) == list(expected)
    for path, figures in expected.items():
        assert all(torch.equal(found[path][name], value) for name, value in figures.items()), path
    assert all(len(units) == 1 for units in held)  # never two layers at a time
    assert all(tensor.is_meta for tensor in moe.model.parameters())


# --- runs


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Recipe:
    tokens = write_token_file(tmp_path / "tokens.jsonl", token_ids(30, 24).tolist())
    return {
        "model": str(model),
        "calibration": {"batch_size": 8, "data": [{"tokens": str(tokens), "samples": 24}]},
        "passes": [{"expert_pruning": {"keep": 6}}],
        "evaluate": {"perplexity": [{"tokens": str(tokens), "samples": 8}], "random": 1},
    }


PASSES = {
    "exact": [{"expert_pruning": {"keep": 6}}],
    "progressive": [{"expert_pruning": {"keep": 6, "progressive": True}}],
    "criterion": [{"expert_pruning": {"keep": 6, "criterion": "reap"}}],
    "greedy": [{"expert_pruning": {"keep": 5, "search": "greedy"}}],
    "uneven": [{"expert_pruning": {"keep": {"mean": 6}}}],
    "skipping": [{"dynamic_skipping": {}}],
    "prune, skip": [{"expert_pruning": {"keep": 6}}, {"dynamic_skipping": {}}],
    "twice, top-1": [{"expert_pruning": {"keep": 6}}, {"expert_pruning": {"keep": 4, "top_k": 1}}],
}


_NIGHTLY = ("exact", "criterion", "greedy", "uneven", "progressive", "skipping", "twice, top-1")


@pytest.mark.parametrize(
    "passes",
    [pytest.param(PASSES[name], id=name, marks=[pytest.mark.nightly] * (name in _NIGHTLY)) for name in PASSES],
)
def test_run_from_disk_gives_the_same(
    recipe: Recipe, tmp_path: Path, passes: list[Any], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    recipe["passes"] = passes
    if all("dynamic_skipping" in one for one in passes):
        del recipe["evaluate"]["random"]
    whole = compressor.compress(recipe, output=tmp_path / "memory", overrides=["weights=memory"])
    monkeypatch.setattr(headers, "read_header", counted := Counted(headers.read_header))
    result = compressor.compress(recipe, output=tmp_path / "disk", overrides=["weights=disk"])
    assert counted.calls == 1 + len(passes)  # of the model, and of what each pass writes
    assert result.model is None
    for name in ("compressor/statistics.safetensors", "compressor/decision.json"):
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes(), name
    ours, theirs = (load_file(tmp_path / one / WEIGHTS) for one in ("disk", "memory"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    configs = [read_config(tmp_path / one) for one in ("disk", "memory")]
    assert configs[0] == configs[1]
    for when in ("before", "after"):
        figures = [one.record["evaluation"][when] for one in (result, whole)]
        assert figures[0]["perplexity"] == figures[1]["perplexity"]
        assert figures[0]["experts_per_token"] == figures[1]["experts_per_token"]
        assert figures[0]["size"] == figures[1]["size"]
    loaded, _ = compressor.load(tmp_path / "disk")
    assert torch.equal(loaded(token_ids(2, 9)).logits, whole.model(token_ids(2, 9)).logits)
    assert not list(tmp_path.glob(".*"))
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.parametrize(
    ("passes", "weights"),
    [
        (PASSES["progressive"], "disk"),
        pytest.param(PASSES["greedy"], "memory", marks=pytest.mark.nightly),
        pytest.param(PASSES["prune, skip"], "disk", marks=pytest.mark.nightly),
    ],
)
def test_hidden_states_in_files_change_nothing(
    recipe: Recipe, tmp_path: Path, passes: list[Any], weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["passes"] = passes
    compressor.compress(recipe, output=tmp_path / "whole")
    monkeypatch.setattr(activation_offload, "_SMALLEST", 1)
    monkeypatch.setattr(Parking, "_put_into_file", counted := Counted(Parking._put_into_file))
    wanted = ["hidden_states=file", f"weights={weights}"]
    compressor.compress(recipe, output=tmp_path / "out", overrides=wanted)
    assert counted.calls > 20
    for name in ("compressor/statistics.safetensors", "compressor/decision.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list(tmp_path.glob(".*"))


# --- parking


def test_what_waits_is_in_files(tmp_path: Path) -> None:
    def work() -> torch.Tensor:
        hidden, pair = torch.arange(2.0**15), (torch.ones(2**15), [torch.full((2, 2**14), 3.0)])
        shared = torch.zeros(2**15)
        view = shared.view(2, -1)
        getcurrent().parent.switch()  # type: ignore[union-attr]
        view[0, 0] = 7  # seen through both, because they were left alone
        return sum(one.double().sum() for one in (hidden, pair[0], pair[1][0], shared))  # type: ignore[return-value]

    waiting = greenlet(work)
    waiting.switch()
    place = Parking(tmp_path / "waiting")
    (tmp_path / "waiting").mkdir()
    parked = place.park(waiting.gr_frame)
    assert place.num_bytes == 3 * 2**17
    assert len(parked.files) == 3
    assert not list((tmp_path / "waiting").iterdir())  # they have no names
    assert float(waiting.switch()) == sum(range(2**15)) + 2**15 + 3 * 2**15 + 7


def resident(tensor: torch.Tensor) -> int:
    """How many bytes of a mapped tensor the process holds; whatever else it holds, or has let go of."""
    address, inside = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
            inside = start <= address < end
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise LookupError(address)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_files_take_no_memory(tmp_path: Path) -> None:
    """Of the process; the system's cache is its own affair."""
    arrays = [np.full(2**18, float(number), dtype=np.float32) for number in range(4)]  # 1 MiB each
    tensors = [torch.from_numpy(array) for array in arrays]
    before = [weakref.ref(array) for array in arrays]
    del arrays
    parked = Parking(tmp_path).park(None, tensors)
    assert [array() for array in before] == [None] * 4  # what they were in is free
    assert [resident(tensor) for tensor in tensors] == [0] * 4
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))
    assert min(resident(tensor) for tensor in tensors) > 0
    parked.let_go()
    assert [resident(tensor) for tensor in tensors] == [0] * 4
    assert [float(tensor[-1]) for tensor in tensors] == [0.0, 1.0, 2.0, 3.0]


def test_weights_small_tensors_and_views_stay_where_they_are(tmp_path: Path) -> None:
    weight, small, part = torch.nn.Parameter(torch.ones(2**15)), torch.ones(8), torch.ones(2, 2**15)[0]
    before = [tensor.data_ptr() for tensor in (weight, small, part)]
    place = Parking(tmp_path)
    place.park(None, [weight, small, part])
    assert place.num_bytes == 0
    assert [tensor.data_ptr() for tensor in (weight, small, part)] == before


def test_what_was_copied_is_the_users_own(recipe: Recipe, tmp_path: Path, model: Path) -> None:
    recipe["passes"] = [{"dynamic_skipping": {}}]
    del recipe["evaluate"]
    compressor.compress(recipe, output=tmp_path / "out", overrides=["weights=disk"])
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert not (tmp_path / "out" / WEIGHTS).samefile(model / WEIGHTS)
    assert (model / WEIGHTS).stat().st_nlink == (tmp_path / "out" / WEIGHTS).stat().st_nlink == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"evaluate": {"speed": True}},
            "evaluate.speed: weights cannot be read from disk: `speed` needs a model that is",
        ),
        ({"dtype": "bfloat16"}, "dtype: weights cannot be read from disk: tensors are copied from file to file"),
    ],
)
def test_what_cannot_be_done_from_disk_is_named(recipe: Recipe, tmp_path: Path, changes: Recipe, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        compressor.compress(recipe | changes | {"weights": "disk"}, output=tmp_path / "out")


GENERATE = """task: my_sum
dataset_path: json
dataset_kwargs: {data_files: {train: FOLDER/rows.jsonl, test: FOLDER/rows.jsonl}}
training_split: train
test_split: test
output_type: generate_until
doc_to_text: '{{question}}'
doc_to_target: answer
"""


@pytest.fixture
def my_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task that has the model write."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.dumps({"question": f"{n} + 1 =", "answer": f" {n + 1}"}) for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "my_sum.yaml").write_text(GENERATE.replace("FOLDER", str(tmp_path)))
    return tmp_path


@pytest.mark.slow  # lm-eval reads its index of tasks
def test_tasks_that_write_need_the_model_in_memory(
    my_sum: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe: Recipe = {
        "model": "demo",
        "weights": "disk",
        "calibration": {"data": [{"demo": "code", "samples": 2, "length": 32}]},
        "passes": [{"expert_pruning": {"keep": 6}}],
        "evaluate": {"tasks": ["my_sum", "demo_code"], "task_path": str(my_sum), "limit": 4},
        "output": str(tmp_path / "out"),
    }
    with pytest.raises(EvaluationError, match=r"evaluate\.tasks\[0\]: task my_sum: the model is to write"):
        compressor.compress(recipe)
    # where only the method brought it, it is left out with a note
    recipe["passes"] = [
        {"task_pruning": {"task": "my_sum", "task_path": str(my_sum), "samples": 6, "length": 32, "keep": 6}}
    ]
    recipe["evaluate"] = {"tasks": ["demo_code"], "limit": 4, "batch_size": 4}
    del recipe["calibration"]
    record = compressor.compress(recipe, progress=Progress("lines")).record
    assert "not measured: task my_sum: the model is to write" in capsys.readouterr().err
    assert list(record["evaluation"]["after"]["tasks"]) == ["demo_code"]


def test_without_an_output_nothing_is_read_from_disk(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="every pass writes a checkpoint then, so it needs an `output`"):
        compressor.compress(recipe | {"weights": "disk"})


def test_a_live_model_is_not_read_from_disk(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    live, tokenizer = compressor.load(model)
    with pytest.raises(RecipeError, match="the model given is in memory already"):
        compressor.compress(recipe | {"weights": "disk"}, live, tokenizer, output=tmp_path / "out")


def test_interrupted_between_two_passes(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint between them is found again."""
    recipe |= {"passes": PASSES["twice, top-1"], "weights": "disk"}
    del recipe["evaluate"]
    compressor.compress(recipe, output=tmp_path / "whole")
    put = ObservationJournal.put

    def stop(self: ObservationJournal, layer: str, figures: Any) -> None:
        put(self, layer, figures)
        if self.folder.name.startswith("1.") and layer == "model.layers.1.mlp":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ObservationJournal, "put", stop)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(recipe, output=tmp_path / "out")
    (stage,) = (tmp_path / ".out.partial" / "stages").iterdir()
    assert stage.name == "0.expert_pruning"
    monkeypatch.setattr(checkpoint_edit, "write_shard", counted := Counted(write_shard))
    compressor.compress(recipe, output=tmp_path / "out", resume=True)
    for name in (WEIGHTS, "config.json", "compressor/statistics.safetensors", "compressor/decision.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert counted.calls == 1  # the second pass's checkpoint; the first one's is there
    assert not list(tmp_path.glob(".*"))


@pytest.mark.nightly
def test_interrupted_when_all_passes_are_done(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last checkpoint is there, and nothing is written or read again."""
    recipe |= {"passes": PASSES["twice, top-1"], "weights": "disk"}
    del recipe["evaluate"]
    compressor.compress(recipe, output=tmp_path / "whole")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OnDisk, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(recipe, output=tmp_path / "out")
    assert [path.name for path in (tmp_path / ".out.partial" / "stages").iterdir()] == ["1.expert_pruning"]
    monkeypatch.setattr(checkpoint_edit, "write_shard", lambda *_, **__: pytest.fail("written again"))
    monkeypatch.setattr(StreamedWeights, "load", lambda *_: pytest.fail("read again"))
    compressor.compress(recipe, output=tmp_path / "out", resume=True)
    for name in (WEIGHTS, "config.json", "compressor/statistics.safetensors", "compressor/decision.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list(tmp_path.glob(".*"))


CHILD = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from compressor import MoEModel
from compressor.checkpoint.load import load_model
from compressor.observe import layerwise
from compressor.data.sequences import TokenBatch
from compressor.checkpoint.find import Checkpoint
from compressor.machine.progress import Progress
from compressor.selection.activation_sums import ExpertSums
from compressor.checkpoint.layerwise_weights import StreamedWeights
from compressor.checkpoint.layerwise_weights import sizes_of

def peak():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024  # of this process: getrusage counts from the one that started it

folder = Path(sys.argv[1])
found = Checkpoint("large", folder)
model = load_model(found, device="meta")
moe, weights = MoEModel(model), StreamedWeights(model, found)
before, (outside, by_layer) = peak(), sizes_of(model)
ids = torch.arange(128).reshape(2, 64)
batches = [TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))]
layerwise.observe(moe, batches, {layer.path: ExpertSums(layer) for layer in moe.layers}, Progress(), weights=weights)
print(json.dumps([peak() - before, max(by_layer.values()), outside, sum(by_layer.values())]))
"""


@pytest.mark.nightly
def test_memory_stays_at_two_layers(tmp_path: Path) -> None:
    """On half a gigabyte of weights: what is read is let go of, and the files are not mapped."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    config = MixtralConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=8, num_local_experts=16, num_experts_per_tok=2, dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    folder = tmp_path / "large"
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in MixtralForCausalLM(config).state_dict().items()}
    numbers = torch.randn(2**20).bfloat16() * 0.02
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if "experts" not in name:
            size = torch.Size(shape).numel()
            tensors[name] = numbers.repeat(-(-size // 2**20))[:size].reshape(shape).clone()
            continue
        prefix = name.split("mlp.experts")[0] + "block_sparse_moe.experts."
        for expert in range(16):
            for matrix in ("w1", "w3") if "gate_up" in name else ("w2",):
                tensors[f"{prefix}{expert}.{matrix}.weight"] = numbers.reshape(1024, 1024).roll(expert).clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    del tensors
    answer = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    taken, layer, outside, total = json.loads(answer.stdout.splitlines()[-1])
    assert total > 500 * 2**20
    assert layer > 100 * 2**20
    assert taken > layer
    assert taken < 2 * layer + outside + 150 * 2**20
    assert taken < total / 1.2
