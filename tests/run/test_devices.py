"""A model on another device than the CPU, and one spread over two: the same figures, decisions and bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch as patched

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from simulated_device import DEVICES, OnDevice, backend_registration, simulated_devices
from tiny_models import random_model, tiny_model, token_ids, write_checkpoint, write_token_file

import compressor
from compressor import MoEModel, RecipeError, UnsupportedModelError
from compressor.checkpoint.layerwise_weights import spread
from compressor.checkpoint.resume_state import ObservationJournal
from compressor.data.sequences import TokenBatch
from compressor.evaluation.speed import speed
from compressor.machine.distributed import Processes
from compressor.machine.memory_estimate import shares
from compressor.model.modules import units_of
from compressor.model.skipping.rule import SkipRule
from compressor.observe import activation_offload, forward, layerwise
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe
from compressor.run import check, elsewhere, loading, memory, readiness

Recipe = dict[str, Any]
PRUNE_AND_SKIP = [{"expert_pruning": {"keep": 6, "gather": ["pairs", "outputs"]}}, {"dynamic_skipping": {}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(random_model("mixtral", num_hidden_layers=2), tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_recipe(model: Path, tmp_path: Path) -> Any:
    calibration = write_token_file(tmp_path / "tokens.jsonl", [token_ids(n, seed=n).tolist() for n in (57, 43, 51, 60)])
    measured = write_token_file(tmp_path / "measured.jsonl", [token_ids(n, seed=n).tolist() for n in (11, 9)])

    def make(output: str | None = None, **others: Any) -> Recipe:
        return {
            "model": str(model),
            "calibration": {"batch_size": 2, "data": [{"tokens": str(calibration)}]},
            "passes": PRUNE_AND_SKIP,
            "evaluate": {"perplexity": [{"tokens": str(measured)}]},
            **({"output": str(tmp_path / output)} if output else {}),
            **others,
        }

    return make


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make this a machine with some GPUs, each with some bytes of memory; without a number all of its GPUs are used."""

    def have(number: int, free: int | None = None) -> None:
        for module in (elsewhere, loading):
            monkeypatch.setattr(module, "gpus", lambda: DEVICES[:number])
        monkeypatch.setattr(memory, "available_on", lambda device: free)

    return have


@pytest.fixture
def device() -> Iterator[None]:
    with simulated_devices():
        yield


def too_little(recipe: Recipe) -> int:
    """Bytes of device memory with which two GPUs hold the model, and one does not."""
    loaded = load_recipe(recipe, methods=load_plugins().methods, criteria=load_plugins().criteria)
    with patched.object(readiness, "_check_device"):  # what it would need where it was there
        needs: int = check.check(loaded).plan["needs"]["device_memory"]
    return needs - 1


# --- what stands in for a GPU


def test_torch_has_what_the_simulated_devices_are_made_of() -> None:
    assert hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), (
        "torch gives Python no device type any more (or under another name): look in torch.utils.backend_registration "
        "for what took its place, or skip this file on this version; nothing in the library depends on it"
    )


@pytest.mark.usefixtures("device")
def test_what_a_gpu_refuses_is_refused() -> None:
    here, there, on_cpu = (torch.arange(3.0, device=one) for one in (*DEVICES, "cpu"))
    index = torch.tensor([0, 2])
    for other in (there, on_cpu):
        with pytest.raises(RuntimeError, match="same device"):
            here + other
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([here, other])
        with pytest.raises(RuntimeError, match="same device"):
            here[index] = other[:2]
    with pytest.raises(RuntimeError, match="same device"):
        on_cpu[index.to(DEVICES[0])]
    with pytest.raises(RuntimeError, match="same device"):
        here.gather(0, index)
    for convert in (here.numpy, here.__array__):
        with pytest.raises(TypeError, match=r"Use Tensor\.cpu"):
            convert()


@pytest.mark.usefixtures("device")
def test_what_a_gpu_allows_is_allowed() -> None:
    here = torch.arange(3.0, device=DEVICES[0])
    assert (here + torch.tensor(1.0)).tolist() == [1, 2, 3]
    assert here[torch.tensor([0, 2])].tolist() == [0, 2]
    assert here.to(DEVICES[1]).device == torch.device(DEVICES[1])
    on_cpu = torch.zeros(3)
    assert type(on_cpu.copy_(here)) is torch.Tensor
    assert on_cpu.tolist() == here.cpu().tolist() == [0, 1, 2]
    assert torch.tensor([1], device=DEVICES[1]).device == torch.device(DEVICES[1])


@pytest.mark.usefixtures("device")
def test_tied_weights_stay_tied_on_the_way_there() -> None:
    one = torch.nn.Linear(2, 2)
    both = torch.nn.ModuleList([one, torch.nn.Linear(2, 2)])
    both[1].weight = one.weight
    both.to(DEVICES[0])
    assert both[0].weight is both[1].weight
    assert isinstance(copy.deepcopy(both)[0].weight, torch.nn.Parameter)


def test_outside_nothing_is_to_be_seen() -> None:
    with simulated_devices():
        assert torch.accelerator.device_count() == 2
        before = torch.ones(2, device=DEVICES[0])
    assert not torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 0
    assert torch.get_default_device() == torch.device("cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
    assert type(torch.ones(2) + 1) is torch.Tensor
    assert isinstance(before, OnDevice)


# --- whole runs


def assert_alike(found: Any, expected: Any, where: str = "") -> None:
    """The same, up to the rounding of attention, which torch computes otherwise on a device."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_alike(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_alike(one, other, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), where
    else:
        assert found == expected, where


def figures_of(record: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on where it was computed."""
    passes = [{key: one[key] for key in ("decision", "random") if key in one} for one in record["passes"]]
    evaluation = record["evaluation"]
    alone = [one["after"]["perplexity"] for one in evaluation.get("each_pass", [])]
    measured = {when: {key: evaluation[when][key] for key in ("perplexity", "size")} for when in ("before", "after")}
    return {"passes": passes, "alone": alone, **measured}


WITH_ZEROS = [{"expert_pruning": {"keep": 6}}, {"wanda": {"attention": True}}]
GREEDILY = [{"expert_pruning": {"keep": {0: 5, 1: 6}, "search": "greedy", "progressive": True}}]


@pytest.mark.parametrize(
    ("num_gpus", "weights", "passes", "evaluate"),
    [
        pytest.param(1, "memory", PRUNE_AND_SKIP, {}, marks=pytest.mark.nightly),
        pytest.param(2, "memory", PRUNE_AND_SKIP, {"each_pass": True, "random": 1}, marks=pytest.mark.nightly),
        pytest.param(2, "memory", GREEDILY, {}, marks=pytest.mark.nightly),
        (1, "disk", PRUNE_AND_SKIP, {"random": 1}),
        pytest.param(1, "disk", GREEDILY, {}, marks=pytest.mark.nightly),
        pytest.param(2, "memory", WITH_ZEROS, {}, marks=pytest.mark.nightly),
        pytest.param(1, "disk", WITH_ZEROS, {}, marks=pytest.mark.nightly),
    ],
)
def test_a_run_there_finds_what_one_on_the_cpu_finds(
    make_recipe: Any, gpus: Any, tmp_path: Path, num_gpus: int, weights: str, passes: Any, evaluate: Recipe
) -> None:
    recipe = make_recipe(weights=weights, passes=passes, device="auto")
    recipe["evaluate"] |= evaluate
    gpus(0)
    expected = compressor.compress(recipe | {"output": str(tmp_path / "cpu")}).record
    gpus(num_gpus, too_little(make_recipe(output="none", device="cuda", passes=passes)) if num_gpus > 1 else None)
    with simulated_devices():
        found = compressor.compress(recipe | {"output": str(tmp_path / "device")})
    assert found.record["hardware"]["device"] == ", ".join(DEVICES[:num_gpus])
    assert_alike(figures_of(found.record), figures_of(expected))
    written = {one: load_file(tmp_path / one / "model.safetensors") for one in ("cpu", "device")}
    assert written["cpu"].keys() == written["device"].keys()
    assert all(torch.equal(written["cpu"][name], tensor) for name, tensor in written["device"].items())
    statistics = [str(tmp_path / one / "compressor" / "statistics.safetensors") for one in ("cpu", "device")]
    known = [name for name, one in load_plugins().criteria.items() if one.statistic is None]  # others gather their own
    for criterion in known if weights == "disk" and passes is PRUNE_AND_SKIP else ():
        ours, theirs = (compressor.decide(file, keep=5, criterion=criterion)["passes"] for file in statistics)
        assert_alike(theirs, ours, criterion)


@pytest.mark.slow
@pytest.mark.parametrize(("num_gpus", "weights"), [pytest.param(2, "memory", marks=pytest.mark.nightly), (1, "disk")])
def test_scales_are_fitted_there_beside_the_original(
    make_recipe: Any, gpus: Any, tmp_path: Path, num_gpus: int, weights: str
) -> None:
    passes = [{"expert_pruning": {"keep": 5}}, {"output_scale": {}}]
    recipe = make_recipe(weights=weights, passes=passes, device="auto")
    recipe["calibration"]["data"][0]["samples"] = 3
    gpus(0)
    expected = compressor.compress(recipe | {"output": str(tmp_path / "cpu")}).record
    gpus(num_gpus, too_little(recipe | {"output": "none", "device": "cuda"}) if num_gpus > 1 else None)
    with simulated_devices():
        found = compressor.compress(recipe | {"output": str(tmp_path / "device")})
    assert found.record["hardware"]["device"] == ", ".join(DEVICES[:num_gpus])
    assert_alike(figures_of(found.record), figures_of(expected))


@pytest.mark.nightly
def test_tasks_there_are_answered_as_on_the_cpu(gpus: Any) -> None:
    recipe = {
        "model": "demo",
        "device": "auto",
        "passes": [{"task_pruning": {"task": "demo_code", "samples": 2, "length": 16, "keep": 6, "criterion": "seer"}}],
        "evaluate": {"tasks": ["demo_code"], "limit": 1},
    }
    gpus(0)
    expected = compressor.compress(recipe).record["evaluation"]["after"]["tasks"]
    gpus(2, too_little(recipe | {"device": "cuda"}))
    with simulated_devices():
        result = compressor.compress(recipe)
    assert forward.devices_of(result.model) == DEVICES
    assert_alike(result.record["evaluation"]["after"]["tasks"], expected)


def test_a_run_on_two_devices_goes_on(
    make_recipe: Any, gpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(device="auto", passes=GREEDILY, evaluate=None)
    gpus(2, too_little(make_recipe(output="none", device="cuda", passes=GREEDILY, evaluate=None)))
    put = ObservationJournal.put_streams

    def put_and_stop(*args: Any) -> None:
        put(*args)
        raise KeyboardInterrupt

    with simulated_devices():
        compressor.compress(recipe | {"output": str(tmp_path / "at once")})
        recipe["output"] = str(tmp_path / "in two parts")
        with monkeypatch.context() as patch:
            patch.setattr(ObservationJournal, "put_streams", put_and_stop)
            with pytest.raises(KeyboardInterrupt):
                compressor.compress(recipe)
        answered = []
        monkeypatch.setattr(
            layerwise._Walk,
            "_take_over_figures",
            lambda self, known, take=layerwise._Walk._take_over_figures: (answered.append(known), take(self, known)),
        )
        compressor.compress(recipe, resume=True)
    assert [known.passed for known in answered] == [["model.layers.0"]]
    for name in ("model.safetensors", "compressor/statistics.safetensors"):
        assert (tmp_path / "at once" / name).read_bytes() == (tmp_path / "in two parts" / name).read_bytes()


@pytest.mark.usefixtures("device")
def test_hidden_states_of_a_device_wait_in_memory_and_in_files(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        waiting = torch.arange(2.0**15).to(DEVICES[1])
        parked = activation_offload.Parking(folder).park(None, [waiting])
        assert waiting.device == torch.device("cpu")
        parked.fetch()
        assert waiting.device == torch.device(DEVICES[1])
        assert torch.equal(waiting.cpu(), torch.arange(2.0**15))


# --- models that lie on several devices


def on_two(name: str) -> Any:
    """A model whose first layer is on one device, and the others on another."""
    model = tiny_model(name)
    return dispatch_model(model, spread(model, 2), skip_keys=model._skip_keys_device_placement)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "name", ["mixtral", *(pytest.param(one, marks=pytest.mark.nightly) for one in ("deepseek_v3", "mixtral4"))]
)
def test_masked_removed_and_skipped_on_two_devices(name: str) -> None:
    batch = TokenBatch(token_ids(2, 12), torch.arange(24).view(2, 12) < 20)
    here, there = MoEModel(tiny_model(name)), MoEModel(on_two(name))
    assert forward.devices_of(there.model) == DEVICES
    kept = {layer.path: [0, 2, 3, 5, 6, 7] for layer in here.layers}
    with here.masked(kept), there.masked(kept):
        masked = forward.logits(here.model, batch)
        torch.testing.assert_close(forward.logits(there.model, batch).cpu(), masked, rtol=1e-3, atol=1e-3)
    smaller = MoEModel(copy.deepcopy(there.model))
    smaller.keep(kept)
    torch.testing.assert_close(forward.logits(smaller.model, batch).cpu(), masked, rtol=1e-3, atol=1e-3)
    rules = {layer.path: SkipRule("ratio", beta=0.4, renormalise=True) for layer in here.layers}
    for one in (here, there):
        one.skip(rules)
    with here.counted() as counted, there.counted() as counted_there:
        skipped = forward.logits(here.model, batch)
        torch.testing.assert_close(forward.logits(there.model, batch).cpu(), skipped, rtol=1e-3, atol=1e-3)
    assert counted.sums == counted_there.sums


@pytest.mark.usefixtures("device")
def test_a_live_model_on_two_devices_is_compressed(make_recipe: Any, tmp_path: Path) -> None:
    model = on_two("mixtral")
    before = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    result = compressor.compress(make_recipe(output="out", evaluate=None), model)
    assert forward.devices_of(result.model) == forward.devices_of(model) == DEVICES
    assert result.record["hardware"]["device"] == "sim:0, sim:1"
    assert all(torch.equal(before[name], tensor.cpu()) for name, tensor in model.state_dict().items())
    expected = compressor.compress(make_recipe(evaluate=None), tiny_model("mixtral")).model.state_dict()
    assert all(torch.equal(expected[name], tensor.cpu()) for name, tensor in result.model.state_dict().items())
    again, _ = compressor.load(tmp_path / "out")
    assert again.device == torch.device("cpu")


@pytest.mark.filterwarnings("ignore")
def test_what_accelerate_keeps_on_disk_is_refused(make_recipe: Any, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    places = {name: ("cpu", "disk")[number] for name, number in spread(model, 2).items()}
    dispatched = dispatch_model(model, places, offload_dir=tmp_path / "offloaded")
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.\S+ is on no device, .* with `weights: disk` it is read"
    ):
        compressor.compress(make_recipe(), dispatched)


@pytest.mark.usefixtures("device")
def test_a_smaller_model_is_loaded_onto_all_gpus(gpus: Any, model: Path) -> None:
    gpus(2)
    loaded, _ = compressor.load(model, device="auto")
    assert [str(loaded.get_submodule(unit).mlp.gate.weight.device) for unit in units_of(loaded)] == list(DEVICES)
    gpus(0)
    assert compressor.load(model, device="auto")[0].device == torch.device("cpu")


@pytest.mark.usefixtures("device")
def test_speed_of_models_on_two_devices() -> None:
    models = {"before": on_two("mixtral"), "after": on_two("mixtral")}
    found = speed(models, vocab_size=64, prompt_tokens=4, new_tokens=1, repeats=1, seconds=0)
    assert found.device == "sim:0, sim:1"
    assert found.decode_reason is None


# --- which device: said before anything is read


@pytest.mark.parametrize(
    ("num_gpus", "free", "weights", "expected"),
    [
        (0, None, "memory", "device auto: torch sees no GPU on this machine, so the CPU computes"),
        (1, None, "memory", "device auto: sim:0 of 1 GPU(s), all weights there"),
        (2, None, "memory", "device auto: sim:0 of 2 GPU(s), all weights there"),
        (2, 0, "memory", "device auto: sim:0, sim:1 of 2 GPU(s), all weights there, each with some of the layers"),
        (
            2,
            None,
            "disk",
            "device auto: sim:0 of 2 GPU(s), weights are read from disk one decoder layer at a time",
        ),
    ],
)
def test_check_says_what_auto_comes_to(
    make_recipe: Any, gpus: Any, num_gpus: int, free: int | None, weights: str, expected: str
) -> None:
    recipe = make_recipe(output="out", device="auto", weights=weights)
    gpus(num_gpus, None if free is None else too_little(recipe | {"device": "cuda"}) + free)
    preview = check.check(load_recipe(recipe, methods=load_plugins().methods, criteria=load_plugins().criteria))
    assert expected in preview.plan["notes"]


def test_several_processes_take_a_gpu_each(make_recipe: Any, gpus: Any) -> None:
    gpus(2)
    second = Processes()
    second.rank, second.size = 1, 2
    loaded = load_recipe(make_recipe(device="auto"), methods=load_plugins().methods, criteria=load_plugins().criteria)
    with pytest.raises(RecipeError, match="device: `auto` is for one process; with `device: cuda` each of 2"):
        loading.own_devices(loaded, second, check.check(loaded).devices)


@pytest.mark.parametrize(
    ("outside", "sizes", "num_devices", "places", "held"),
    [
        (0, [5, 5, 5, 5], 2, [0, 0, 1, 1], [10, 10]),
        (10, [5, 5, 5, 5], 2, [0, 1, 1, 1], [15, 15]),
        (0, [9, 1, 1, 1], 2, [0, 1, 1, 1], [9, 3]),
        (3, [1], 3, [1], [3, 1, 0]),
        (7, [], 2, [], [7, 0]),
        (1, [2, 2], 1, [0, 0], [5]),
    ],
)
def test_the_fullest_device_holds_as_little_as_possible(
    outside: int, sizes: list[int], num_devices: int, places: list[int], held: list[int]
) -> None:
    assert shares(outside, sizes, num_devices) == (places, held)


def test_decoder_layers_stay_whole() -> None:
    model = tiny_model("deepseek_v3")
    places = spread(model, 2)
    assert {places[unit] for unit in units_of(model)} == {0, 1}
    assert {place for name, place in places.items() if name not in units_of(model)} == {0}
    names = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    assert all(sum(f"{name}.".startswith(f"{part}.") for part in places) == 1 for name in names)


def test_layers_that_share_weights_are_not_parted() -> None:
    model = tiny_model("mixtral")
    model.model.layers[2].mlp.gate.weight = model.model.layers[0].mlp.gate.weight
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.0\.mlp\.gate\.weight and \S+2\.mlp\.gate\.weight are one"
    ):
        spread(model, 2)
