"""Several processes: what they exchange, by hand and between threads; and whole runs that torchrun starts."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from in_threads import Threads, together
from test_plugin_files import HALVE
from tiny_models import random_model, tiny_model, token_ids, write_checkpoint, write_token_file

from compressor import MoEModel, PluginError, ProcessError, Processes, RecipeError, compress
from compressor.data.sequences import Sequences, TokenBatch, make_batches
from compressor.evaluation.perplexity import perplexity
from compressor.machine.distributed import ends_when_told
from compressor.machine.memory_estimate import PLACEMENTS, Placement
from compressor.machine.progress import Progress
from compressor.model.find_structure import find_structure
from compressor.observe.layerwise import observe
from compressor.observe.measuring import CANDIDATES
from compressor.observe.reductions import joined_figures
from compressor.observe.statistics_file import load_statistics
from compressor.plugin import Criterion, ExpertSelection, JoinedStatistic, RankedStatistic, SelectionOptions, Statistic
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe
from compressor.run.elsewhere import agreed
from compressor.run.loading import own_devices
from compressor.run.preview import Limits, Preview
from compressor.selection.activation_sums import ExpertSums
from compressor.selection.exact import SubsetErrors
from compressor.selection.greedy import GreedySearch
from compressor.selection.objective import Objective
from compressor.selection.pair_losses import PairLosses
from compressor.selection.reference import SetLosses
from compressor_dynamic_skipping.curves import SkipCurves, median

SCRIPT = Path(__file__).parents[1] / "processes_script.py"


def alike(work: Callable[[Processes], Any], size: int = 3) -> Any:
    """The same in all of them."""
    found = together(size, work)
    for error in found:
        if isinstance(error, Exception):
            raise error
    assert all(repr(one) == repr(found[0]) for one in found)
    return found[0]


def test_alone_nothing_is_exchanged() -> None:
    alone, tensor = Processes(), torch.tensor([1.0, 2.0])
    assert (alone.rank, alone.size, alone.is_first, list(alone.own(3))) == (0, 1, True, [0, 1, 2])
    assert alone.sum(tensor) is alone.largest(tensor) is tensor
    assert alone.in_order(["a", "b"]) == ["a", "b"]
    assert (alone.any(False), alone.all(True)) == (False, True)
    alone.wait()
    alone.tell(ValueError("nobody is there to hear it"))


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # of some other launcher
    with Processes.joined() as processes:
        assert type(processes) is Processes
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with Processes.joined() as processes:
        assert type(processes) is Processes
    assert not torch.distributed.is_initialized()


def test_what_is_exchanged() -> None:
    assert alike(lambda p: p.exchange({"rank": p.rank, "x": [0.1] * p.rank})) == [
        {"rank": 0, "x": []},
        {"rank": 1, "x": [0.1]},
        {"rank": 2, "x": [0.1, 0.1]},
    ]
    assert alike(lambda p: p.sum(torch.tensor([1.0, 10.0 * p.rank]))).tolist() == [3.0, 30.0]
    assert alike(lambda p: p.largest(torch.tensor([1.0 * p.rank, -1.0 * p.rank]))).tolist() == [2.0, 0.0]
    assert alike(lambda p: (p.any(p.rank == 1), p.any(False), p.all(p.rank < 3), p.all(p.rank == 1))) == (
        True, False, True, False,
    )  # fmt: skip
    sizes = alike(lambda p: [one["x"].shape for one in p.gather({"x": torch.zeros(p.rank, 2)})])
    assert sizes == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_things_come_back_in_order(count: int) -> None:
    assert [list(own) for own in together(3, lambda p: p.own(5))] == [[0, 3], [1, 4], [2]]
    assert alike(lambda p: p.in_order([f"thing {n}" for n in p.own(count)])) == [f"thing {n}" for n in range(count)]


def test_a_sum_is_alike_to_the_bit() -> None:
    found = together(3, lambda p: p.sum(torch.rand(50, generator=torch.Generator().manual_seed(p.rank)).double()))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_processes_out_of_step_are_found_out() -> None:
    def work(processes: Processes) -> None:
        if processes.rank == 0:
            processes.wait()
        else:
            processes.sum(torch.ones(1))

    assert [str(one) for one in together(2, work)] == [
        "the processes are out of step: ('exchange', 1), ('gather', 1)"
    ] * 2


def test_one_that_fails_tells_the_others() -> None:
    """They fail at the exchange that they come to next, and all go on from there."""

    def work(processes: Processes) -> list[str]:
        said = []
        for failing in (1, 2, None):
            try:
                processes.wait()
                if processes.rank == failing:
                    raise ValueError(f"text {failing} is bad")
                processes.sum(torch.ones(1))
                processes.wait()
                said.append("good")
            except (ValueError, ProcessError) as error:
                processes.tell(error)
                said.append(str(error))
        return said

    assert together(3, work) == [
        ["process 1 of 3: text 1 is bad", "process 2 of 3: text 2 is bad", "good"],
        ["text 1 is bad", "process 2 of 3: text 2 is bad", "good"],
        ["process 1 of 3: text 1 is bad", "text 2 is bad", "good"],
    ]


def test_all_that_fail_alike_stay_together() -> None:
    def work(processes: Processes) -> list[int]:
        processes.tell(ValueError("the same everywhere"))
        return processes.exchange(processes.rank)

    assert together(2, work) == [[0, 1], [0, 1]]


def test_an_end_is_not_something_to_tell() -> None:
    with pytest.raises(ProcessError, match="is not there"):
        Threads(0, 2, threading.Barrier(2), [b""] * 2).tell(ProcessError("it is not there", ended=True))


# How figures are joined ------------------------------------------------------------------------------------


def test_figures_by_their_rules() -> None:
    """Batches 0 to 4 of domains a, b, b, a, c: one process saw 0, 2, 4 (a, b, c), another 1, 3 (b, a)."""
    one = {
        "sums.tokens": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "sums.largest": torch.tensor([[1.0, 9.0], [3.0, 4.0], [5.0, 6.0]]),
        "batch.domain": torch.tensor([0, 1, 2]),
        "batch.squared_output": torch.tensor([0.0, 2.0, 4.0]),
        "path": torch.tensor([[0.0, 2.0, 4.0], [10.0, 12.0, 14.0]]),
        "own": torch.tensor([[1.0], [2.0], [3.0]]),
        "counts": torch.tensor([1.0, 2.0]),
        "same.answer": torch.tensor(1),
        "weights.l1": torch.tensor([1.0, 2.0]),
        "unknown": torch.tensor(1),
    }
    other = {
        "sums.tokens": torch.tensor([[10.0, 20.0], [30.0, 40.0]]),
        "sums.largest": torch.tensor([[10.0, 2.0], [3.0, 40.0]]),
        "batch.domain": torch.tensor([0, 1]),
        "batch.squared_output": torch.tensor([1.0, 3.0]),
        "path": torch.tensor([[1.0, 3.0], [11.0, 13.0]]),
        "own": torch.tensor([[10.0], [20.0]]),
        "counts": torch.tensor([10.0, 20.0]),
        "same.answer": torch.tensor(1),
        "weights.l1": torch.tensor([1.0, 2.5]),
        "sums.only_here": torch.zeros(2, 1),
    }
    rules = {
        "sums.": "summed",
        "sums.largest": "largest",
        "batch.": "batches",
        "path": "columns",
        "own": "summed",
        "counts": "total",
    }
    figures, lost = joined_figures(
        [one, other],
        [[0, 1, 2], [1, 0]],
        3,
        rules={**rules, "same.": "same", "weights.": "same"},  # type: ignore[arg-type]
        order_B=torch.tensor([0, 2, 4, 1, 3]).argsort(),
    )
    assert lost == ["sums.only_here", "unknown", "weights.l1"]
    assert {name: tensor.tolist() for name, tensor in figures.items()} == {
        "sums.tokens": [[31.0, 42.0], [13.0, 24.0], [5.0, 6.0]],
        "sums.largest": [[3.0, 40.0], [10.0, 4.0], [5.0, 6.0]],
        "batch.domain": [0, 1, 1, 0, 2],
        "batch.squared_output": [0.0, 1.0, 2.0, 3.0, 4.0],
        "path": [[0.0, 1.0, 2.0, 3.0, 4.0], [10.0, 11.0, 12.0, 13.0, 14.0]],
        "own": [[21.0], [12.0], [3.0]],
        "counts": [11.0, 22.0],
        "same.answer": 1,
    }


@pytest.mark.parametrize(
    ("scores", "middle"),
    [
        ([[0.5], [0.1, 0.9], [0.3]], 0.4),  # an even number: the mean of 0.3 and 0.5
        ([[0.5], [0.1, 0.9], []], 0.5),
        ([[], [0.25, 0.25], [0.75, 0.75]], 0.5),
        ([[0.5001, 0.5002], [0.5003], []], 0.5002),  # all in one bin
        ([[], [1.0], []], 1.0),
        ([[0.0, 0.0], [1e-6], [1.0]], 5e-7),  # below 2⁻¹⁶
    ],
)
def test_a_median_is_that_of_all(scores: list[list[float]], middle: float) -> None:
    found = alike(lambda p: median(torch.tensor(scores[p.rank], dtype=torch.float64), p))
    assert float(found) == pytest.approx(middle, rel=1e-12)


def test_an_objective_is_that_of_all_batches() -> None:
    """Squared errors 1, 4, 9 and outputs 100, 25, 100 of domains a, b, a: (1 + 3) / 20 and 2 / 5, in the mean 0.3."""
    errors, outputs, domains = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([100.0, 25.0, 100.0]), ["a", "b", "a"]

    def work(processes: Processes) -> float:
        own = list(processes.own(3))
        objective = Objective.of_batches([domains[n] for n in own], outputs[own], "mean", processes)
        return float(objective(errors[own]))

    assert alike(work, 2) == pytest.approx(0.3)
    assert alike(work, 4) == pytest.approx(0.3)  # one of them has none


# The walk, in threads --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches() -> list[TokenBatch]:
    """Six batches of two domains, of which the second process sees the second one first."""
    rows = {"a": [40, 33, 48, 21, 17], "b": [40, 30, 20, 48], "c": [9]}
    found = []
    for number, (domain, lengths) in enumerate(rows.items()):
        ids = [token_ids(length, seed=100 * number + length) for length in lengths]
        found += make_batches(ids, 2, domain, held_out=domain == "c")
    return [found[n] for n in (0, 3, 1, 4, 2, 5)]


def fine_model(name: str = "qwen3_moe") -> Any:
    model = random_model(name, num_experts=16, num_experts_per_tok=4, num_hidden_layers=2)
    return MoEModel(model, find_structure(type(model), model.config))


def of_everything(layer: Any) -> JoinedStatistic:
    sums = ExpertSums(layer, outputs=True)
    parts = [
        sums,
        PairLosses(layer),
        SubsetErrors(layer, [14]),
        SetLosses(layer, [[0, 1, 2, 3, 5, 8]]),
        GreedySearch(layer, [6, 9], num_ranks=5, num_starts=2, protected=lambda: [int(sums.largest().argmax())]),
    ]
    return JoinedStatistic(parts)


def observed(make: Callable[[Any], Statistic], batches: list[TokenBatch], processes: Processes, **options: Any) -> Any:
    moe = fine_model()
    statistics = {layer.path: make(layer) for layer in moe.layers}
    return observe(moe, batches, statistics, Progress(), processes=processes, **options)


def assert_close(found: Any, expected: Any) -> None:
    """The same JSON, its numbers to 1e-9."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            assert_close(one, two)
    else:
        assert found == pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else found == expected


def assert_alike(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for path, figures in expected.items():
        assert found[path].keys() == figures.keys()
        for name, tensor in figures.items():
            if name == CANDIDATES:  # JSON, with numbers in it
                assert_close(*(json.loads(bytes(one.tolist())) for one in (found[path][name], tensor)))
                continue
            difference = (found[path][name].double() - tensor.double()).abs()
            assert found[path][name].shape == tensor.shape, name
            assert not (difference > 1e-9 * tensor.double().abs().max()).any(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "size"), [(of_everything, 4), (SkipCurves, 2), pytest.param(SkipCurves, 4, marks=pytest.mark.nightly)]
)
def test_figures_are_those_of_one_process(
    make: Callable[[Any], Statistic], size: int, batches: list[TokenBatch]
) -> None:
    alone = observed(make, batches, Processes())
    if make is of_everything:
        assert len(alone["model.layers.0.mlp"]["greedy.ranks"]) > 1  # more than one look
    for found in together(size, lambda p: observed(make, batches, p)):
        assert_alike(found, alone)


@pytest.mark.parametrize("make", [of_everything, SkipCurves])
def test_processes_without_text_take_part(make: Callable[[Any], Statistic], batches: list[TokenBatch]) -> None:
    """As where no token comes to a layer in one of them."""
    few = batches[:2]
    alone = observed(make, few, Processes())
    for found in together(3, lambda p: observed(make, few, p)):
        assert_alike(found, alone)


class Looks(RankedStatistic):
    """A statistic by somebody else, who has not thought of several processes."""

    def __init__(self, name: str = "sums.mine") -> None:
        self.name, self.num_batches, self.more = name, 0, -1

    def num_ranks(self, tokens: Any) -> int:
        return int(tokens.layer.top_k)

    def add(self, tokens: Any, chunk: Any) -> None:
        """Nothing."""

    def end_batch(self, tokens: Any) -> None:
        self.num_batches += 1

    def again(self) -> bool:
        return self.num_batches == self.more

    def tensors(self) -> dict[str, torch.Tensor]:
        return {self.name: torch.tensor([[1.0 * self.num_batches]])}


class LogitSizes(Statistic):
    """A criterion's own: Σ |router logit|, [D, E]; it looks at no expert's output."""

    def __init__(self, layer: Any) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def update(self, tokens: Any) -> None:
        sizes_E = tokens.logits_TE.double().abs().sum(0)
        self.sums[tokens.domain] = self.sums.get(tokens.domain, 0) + sizes_E

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"sums.confident.logit": torch.stack(list(self.sums.values()))}


def test_a_criterions_own_figures_are_those_of_one_process(batches: list[TokenBatch]) -> None:
    confident = Criterion("confident", lambda figures: figures.own["logit"], "a test", statistic=LogitSizes)
    options = SelectionOptions(keep=12, criterion="confident")
    make = KeepConfident(options, {"confident": confident}).statistic
    alone = observed(make, batches, Processes())
    assert alone["model.layers.1.mlp"]["sums.confident.logit"].shape == (3, 16)
    for found in together(2, lambda p: observed(make, batches, p)):
        assert_alike(found, alone)


class KeepConfident(ExpertSelection[SelectionOptions]):
    name, version, api, options_type = "keep_confident", "1", 2, SelectionOptions


def test_figures_of_other_plugins_are_joined_by_their_names_or_refused(batches: list[TokenBatch]) -> None:
    same_domain = [batches[0], batches[2], batches[4]]
    for found in together(2, lambda p: observed(lambda _: Looks(), same_domain, p)):
        assert found["model.layers.1.mlp"]["sums.mine"].tolist() == [[3.0]]
    assert "mine" in observed(lambda _: Looks("mine"), same_domain, Processes())["model.layers.0.mlp"]
    for error in together(2, lambda p: observed(lambda _: Looks("mine"), same_domain, p)):
        assert isinstance(error, PluginError)
        assert "model.layers.0.mlp: what 2 processes found cannot be joined: mine of Looks." in str(error)


def test_a_second_look_is_taken_by_all_or_by_none(batches: list[TokenBatch]) -> None:
    def make(layer: Any) -> Looks:
        looks = Looks()
        looks.more = 2
        return looks

    for error in together(2, lambda p: observed(make, batches[:3], p)):
        assert isinstance(error, PluginError)
        assert "Looks wants to see its tokens again in one process and not in another" in str(error)


def test_perplexity_is_that_of_one_process() -> None:
    ids = tuple(token_ids(length, seed=length) for length in (40, 33, 1, 48, 21))
    alone = perplexity(tiny_model("mixtral"), Sequences("text", ids, "sha256:0"), 2)
    work = lambda p: perplexity(tiny_model("mixtral"), Sequences("text", ids, "sha256:0"), 2, processes=p)  # noqa: E731
    assert together(2, work) == [alone] * 2
    assert together(4, work) == [alone] * 4  # one without a batch


def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"model": "demo", "calibration": {"data": [{"demo": "mix"}]}, "passes": [{"expert_pruning": {"keep": 6}}]}
    plugins = load_plugins()
    third = Threads(6, 8, threading.Barrier(8), [b""] * 8)
    third.local_rank = 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)

    def device(name: str, processes: Processes) -> tuple[str, ...]:
        loaded = load_recipe({**asked, "device": name}, methods=plugins.methods, criteria=plugins.criteria)
        return own_devices(loaded, processes, (name,))

    assert [device(name, third) for name in ("cpu", "cuda", "cuda:1")] == [("cpu",), ("cuda:2",), ("cuda:1",)]
    assert device("cuda", Processes()) == ("cuda",)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError, match=r"device: process 6 is number 2 on its machine, which has 2 GPUs, numbered"):
        device("cuda", third)


def test_all_hold_weights_as_the_one_with_the_least_room() -> None:
    """Machines differ; processes of which one reads from disk, and another does not, would wait for each other."""
    places = [Placement("memory", "file"), Placement("disk", "memory"), Placement("memory", "memory")]

    def place(processes: Processes, held: Placement) -> Placement:
        preview = Preview(None, None, "", None, {}, Limits(1, None), held)
        return agreed(processes, preview).place

    assert alike(lambda p: place(p, places[p.rank])) == Placement("disk", "memory")
    assert [alike(lambda p, one=one: place(p, one)) for one in PLACEMENTS] == [*PLACEMENTS]
    assert [*PLACEMENTS] == sorted(PLACEMENTS, key=dataclasses.astuple, reverse=True)
    assert place(Processes(), Placement("memory", "memory", 2)).num_gpus == 2


def test_one_that_is_told_to_end_while_it_is_leaving_tidies_up() -> None:
    tidied = []
    with pytest.raises(KeyError), ends_when_told():  # noqa: PT012
        try:
            raise KeyError
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            tidied.append(True)
    assert tidied
    with pytest.raises(SystemExit), ends_when_told():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")


# Whole runs ------------------------------------------------------------------------------------------------


def torchrun(*arguments: str | Path, size: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--standalone"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment(), check=False
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@dataclass(frozen=True)
class Ended:
    """What became of two processes: statuses by rank, and what they said."""

    statuses: list[int]
    out: str
    err: str


@pytest.fixture(scope="module")
def forked() -> Iterator[Callable[..., Ended]]:
    """Have two processes do something as torchrun would, without starting an interpreter for each."""
    with subprocess.Popen(
        [sys.executable, SCRIPT, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def do(*words: str | Path) -> Ended:
            print(json.dumps([str(word) for word in words]), file=server.stdin, flush=True)
            return Ended(**json.loads(server.stdout.readline()))

        yield do
        server.stdin.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fine-grained model, one of eight experts, and token files: of two domains, and a third text."""
    folder = tmp_path_factory.mktemp("processes")
    fine = random_model("qwen3_moe", num_experts=24, num_experts_per_tok=4, num_hidden_layers=2)
    write_checkpoint(fine, folder / "fine")
    write_checkpoint(random_model("mixtral"), folder / "mixtral")
    for name, lengths in {"a": [40, 33, 48, 21, 48, 40, 17], "b": [30, 29, 44], "c": [31, 27, 45]}.items():
        rows = [token_ids(length, seed=len(name) + length).tolist() for length in lengths]
        write_token_file(folder / f"{name}.jsonl", rows)
    return folder


def write_recipe(
    text: Path, path: Path, model: str, *passes: str, evaluate: str = "", weights: str = "memory", more: str = ""
) -> Path:
    data = ", ".join(f"{{tokens: {text / name}.jsonl, name: {name}{more}}}" for name in ("a", "b"))
    model = model if model == "demo" else str(text / model)
    path.write_text(
        f"model: {model}\nweights: {weights}\ncalibration: {{batch_size: 2, data: [{data}]}}\npasses:\n"
        + "".join(f"  - {one}\n" for one in passes)
        + (f"evaluate: {evaluate}\n" if evaluate else "")
    )
    return path


def assert_near(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected.keys() - {"seconds", "date"}:
            assert_near(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def runs(text: Path, forked: Callable[..., Ended], request: pytest.FixtureRequest) -> Path:
    """Every recipe asked for in one process and, all with one start, in two: folders NAME-one and NAME-several."""
    folder = text / "runs"
    folder.mkdir()
    greedy = "search: greedy, ranks: 5, starts: 2"
    measure = "{tasks: [demo_arithmetic], limit: 6, perplexity: [{demo: code, samples: 5, length: 64}], random: 1}"
    skip = "dynamic_skipping: {threshold: median, rule: contribution, precision: 9}"
    write_recipe(text, folder / "exact.yaml", "mixtral", "expert_pruning: {keep: 6, gather: [pairs, outputs]}")
    write_recipe(text, folder / "greedy.yaml", "fine", f"expert_pruning: {{keep: 10, {greedy}}}")
    write_recipe(text, folder / "criterion.yaml", "fine", "expert_pruning: {keep: {0: 9}, criterion: quad_mix}")
    write_recipe(
        text, folder / "progressive.yaml", "fine", f"expert_pruning: {{keep: 10, progressive: true, {greedy}}}"
    )
    both = ("expert_pruning: {keep: {mean: 20}, multiple_of: 4}", skip)
    alone = f"{{perplexity: [{{tokens: {text / 'b.jsonl'}}}], each_pass: true}}"
    write_recipe(text, folder / "skipping.yaml", "fine", *both, evaluate=alone)
    write_recipe(text, folder / "tasks.yaml", "demo", "expert_pruning: {drop: 2}", evaluate=measure)
    progressive = f"expert_pruning: {{keep: 16, progressive: true, {greedy}}}"
    measure = f"{{perplexity: [{{tokens: {text / 'b.jsonl'}}}]}}"
    write_recipe(text, folder / "disk.yaml", "fine", progressive, skip, evaluate=measure, weights="disk")
    edits = ("expert_pruning: {keep: 10, criterion: reap}", "output_scale: {}", "wanda: {attention: true}")
    other = f"{{perplexity: [{{tokens: {text / 'c.jsonl'}}}]}}"  # nothing is measured on what weights are fitted to
    write_recipe(text, folder / "edits.yaml", "fine", *edits, evaluate=other, more=", samples: 4")
    wanted = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    for recipe in folder.glob("*.yaml"):
        if recipe.stem not in wanted:
            recipe.unlink()
    for recipe in folder.glob("*.yaml"):
        compress(recipe, output=folder / f"{recipe.stem}-one")
    ended = forked("recipes", folder)
    assert ended.statuses == [0, 0], ended.err
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("disk", "edits"),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("exact", "greedy", "criterion", "skipping")),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("progressive", "tasks")),
    ],
)
def test_a_run_in_two_processes_is_one_in_one(name: str, runs: Path) -> None:
    one, several = ((runs / f"{name}-{kind}") / "compressor" for kind in ("one", "several"))
    decisions = [json.loads((folder / "decision.json").read_text()) for folder in (several, one)]
    assert_near(*decisions)
    found, expected = (load_statistics(folder / "statistics.safetensors")[0] for folder in (several, one))
    assert found.keys() == expected.keys()
    for label in expected:
        assert_alike(found[label], expected[label])
    records = [json.loads((folder / "record.json").read_text()) for folder in (several, one)]
    if "evaluation" in records[1]:
        for when in ("before", "after"):
            perplexities = [record["evaluation"][when]["perplexity"] for record in records]
            assert_near(*perplexities)
            assert_near(*(record["evaluation"][when].get("experts_per_token") for record in records))
            assert records[0]["evaluation"][when]["tasks"] == records[1]["evaluation"][when]["tasks"]
        alone = [record["evaluation"].get("alone", []) for record in records]
        assert_near(*([one.get("decision") for one in entries] for entries in alone))
        assert_near(*([one.get("random") for one in record["passes"]] for record in records))


@pytest.fixture
def recipe(text: Path, tmp_path: Path) -> Path:
    return write_recipe(text, tmp_path / "r.yaml", "mixtral", "expert_pruning: {keep: 6, criterion: reap}")


def assert_nothing_left(folder: Path, name: str = "out") -> None:
    assert [path.name for path in folder.iterdir() if path.name.strip(".").startswith(name)] == []


@pytest.mark.nightly
def test_the_command_in_two_processes(recipe: Path) -> None:
    """One writes and speaks."""
    answer = torchrun("-m", "compressor", "run", recipe, "--output", recipe.parent / "out")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("Written to") == 1
    assert answer.stderr.count("expert_pruning: observing: done") == 1
    assert json.loads((recipe.parent / "out" / "compressor" / "record.json").read_text())["processes"] == 2
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["out", "r.yaml"]


@pytest.mark.nightly
def test_torchrun_says_who_was_the_first_to_fail(recipe: Path) -> None:
    """It stops the other, which works for ten more minutes, and nothing is left behind."""
    started = time.monotonic()
    answer = torchrun(SCRIPT, "fails_busy", recipe, "--output", recipe.parent / "out")
    assert time.monotonic() - started < 300
    assert answer.returncode != 0
    assert answer.stderr.count("error: this text cannot be used\n") == 1
    assert "exitcode  : 2" in answer.stderr.partition("Root Cause")[2]
    assert "Written to" not in answer.stdout
    assert_nothing_left(recipe.parent)


@pytest.mark.slow
def test_an_error_is_said_once(recipe: Path, forked: Callable[..., Ended]) -> None:
    """Only the first process looks at the output; the others are cut off where they wait."""
    (recipe.parent / "out").mkdir()
    ended = forked("run", recipe, "--output", recipe.parent / "out")
    assert ended.statuses[0] == 2
    assert ended.statuses[1] != 0
    assert ended.err.count("error: ") == 1
    assert "out exists already. Choose another output" in ended.err
    assert list((recipe.parent / "out").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "says", "status"),
    [
        pytest.param("fails", "error: this text cannot be used\n", 2, marks=pytest.mark.nightly),
        ("has_bug", "KeyError: 'a bug'", 1),
        ("dies_busy", "", -signal.SIGKILL),
    ],
)
def test_what_breaks_one_process_ends_all(
    word: str, says: str, status: int, recipe: Path, forked: Callable[..., Ended]
) -> None:
    """At once, whether the others wait or work for ten more minutes, and nothing is left behind."""
    started = time.monotonic()
    ended = forked(word, recipe, "--output", recipe.parent / "out")
    assert time.monotonic() - started < 300
    assert ended.statuses[1] == status
    assert ended.statuses[0] not in (0, -signal.SIGKILL)
    assert ended.err.count(says) == 1 or not says
    assert "Written to" not in ended.out
    assert_nothing_left(recipe.parent)


@pytest.mark.nightly
def test_a_plugins_file_in_two_processes(text: Path, tmp_path: Path, forked: Callable[..., Ended]) -> None:
    """Both read it; and a run that was killed while it decided goes on with the same file only."""
    recipe, halve = write_recipe(text, tmp_path / "r.yaml", "mixtral", "halve: {}"), tmp_path / "halve.py"
    kill = "        import os\n        os.kill(os.getpid(), 9)\n"
    halve.write_text(HALVE.replace("        found = {}\n", "        found = {}\n" + kill))
    words = ("run", recipe, "--plugin", halve, "--output", tmp_path / "out")
    assert -signal.SIGKILL in forked(*words).statuses
    halve.write_text(HALVE)
    ended = forked(*words, "--resume")
    assert ended.statuses[0] == 2
    assert ended.err.count("versions.halve.py was 'sha256:") == 1
    ended = forked(*words, "--overwrite")
    assert ended.statuses == [0, 0], ended.err
    compress(recipe, output=tmp_path / "one", plugin_files=[halve])
    decisions = [json.loads((tmp_path / one / "compressor" / "decision.json").read_text()) for one in ("out", "one")]
    assert_near(*decisions)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "statuses"),
    [pytest.param("fails_late", [143, 2], marks=pytest.mark.nightly), ("told_late", [143, 143])],
)
def test_processes_go_on_where_they_stood(
    word: str, statuses: list[int], text: Path, tmp_path: Path, forked: Callable[..., Ended]
) -> None:
    """One fails, or all are told to end by SIGTERM: what a scheduler does that gives the machine to others."""
    recipe = write_recipe(text, tmp_path / "r.yaml", "fine", "expert_pruning: {keep: 16, progressive: true}")
    ended = forked(word, recipe, "--output", tmp_path / "out")
    assert ended.statuses[1] == statuses[1], ended.err
    assert ended.statuses[0] in (statuses[0], 2)  # told to end, or cut off before
    assert "what was done so far is kept in" in ended.err
    journal = tmp_path / ".out.partial" / "journal" / "0.expert_pruning"
    assert {path.name for path in journal.iterdir()} >= {
        "model.layers.0.mlp.safetensors", "streams-0-model.layers.1", "streams-1-model.layers.1",
    }  # fmt: skip
    ended = forked("run", recipe, "--output", tmp_path / "out", "--resume")
    assert ended.statuses == [0, 0], ended.err
    assert "going on with what was done" in ended.err
    compress(recipe, output=tmp_path / "one")
    decisions = [json.loads((tmp_path / one / "compressor" / "decision.json").read_text()) for one in ("out", "one")]
    assert_near(*decisions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "r.yaml"]


@pytest.mark.parametrize("rank", [0, 1])
def test_wrong_usage_is_said_by_the_first(rank: int, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("compressor.cli._LONGEST_SAYING", 0.0)
    answer = cli("run", "--no-such-option")
    assert answer.status == 2
    assert ("No such option" in answer.err) == (rank == 0)
