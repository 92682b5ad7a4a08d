"""What linear maps are given, whatever the layout: experts' matrices, and the maps beside them; beside an original."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from compressor import MoEModel, PluginError, UnsupportedModelError
from compressor.checkpoint.find import Checkpoint
from compressor.checkpoint.layerwise_weights import StreamedWeights
from compressor.checkpoint.load import load_model
from compressor.data.sequences import TokenBatch
from compressor.machine.progress import Progress
from compressor.model.expert_products import expert_matrices, own_tensors
from compressor.model.modules import evaluating, tensor_at
from compressor.observe import forward, layerwise
from compressor.plugin import InputStatistic, RoutedTokens, Statistic
from compressor.run.passes import statistics_of
from compressor.testing.tiny import tiny_model

REPRESENTATIVES = (
    "mixtral", "qwen2_moe", "phimoe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "gpt_oss", "dbrx", "ernie4_5_moe",
    "gemma4", "llama4_text", "minimax_m2", "switch_transformers", "zaya", "nemotron_h", "aria_text",
)  # fmt: skip
MASK = torch.arange(7)[None] < torch.tensor([7, 4, 6])[:, None]
IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0)).masked_fill(~MASK, 0)
BATCHES = [TokenBatch(IDS, MASK, "one"), TokenBatch(IDS.flip(0), MASK.flip(0), "two")]


class Products(InputStatistic):
    """Σ x xᵀ [I, I], of each expert."""

    def __init__(self) -> None:
        self.of: dict[int | None, Tensor] = {}
        self.tokens: dict[int | None, int] = {}

    def update(self, inputs_TI: Tensor, expert: int | None) -> None:
        wide = inputs_TI.double()
        self.of[expert] = self.of.get(expert, 0) + wide.T @ wide
        self.tokens[expert] = self.tokens.get(expert, 0) + len(inputs_TI)

    def tensors(self) -> dict[str, Tensor]:
        return {"all": sum(self.of.values(), start=torch.zeros(())), "tokens": torch.tensor(sum(self.tokens.values()))}


class Everything(Statistic):
    """The tokens of a layer with their outputs, one by one."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, int, Tensor]] = []
        self.target: list[Tensor] = []

    def update(self, tokens: RoutedTokens) -> None:
        outputs = tokens.evaluate_experts(tokens.hidden_TH, tokens.index_TK)
        for hidden, ids, answers in zip(tokens.hidden_TH, tokens.index_TK.tolist(), outputs, strict=True):
            self.seen += [(hidden.double(), expert, one.double()) for expert, one in zip(ids, answers, strict=True)]
        if tokens.target_TH is not None:
            self.target.append(tokens.target_TH)

    def tensors(self) -> dict[str, Tensor]:
        return {"same.seen": torch.tensor(len(self.seen))}


class Method:
    """As much of one as gathering asks for."""

    name, progressive = "watching", False

    def __init__(self, places: Sequence[str], *, alone: bool = False) -> None:
        self.places, self.alone = places, alone
        self.sites: dict[tuple[str, str], Products] = {}
        self.layers: dict[str, Everything] = {}

    def statistic(self, layer: Any) -> Statistic | None:
        return None if self.alone else self.layers.setdefault(layer.path, Everything())

    def input_statistic(self, site: Any) -> InputStatistic | None:
        if site.place not in self.places:
            return None
        return self.sites.setdefault((site.layer.path, site.name), Products())


def gathered(method: Method, moe: MoEModel, batches: Any = BATCHES, **options: Any) -> layerwise.Figures:
    statistics, linears = statistics_of(method, moe)  # type: ignore[arg-type]
    return layerwise.observe(moe, batches, statistics, Progress(), linears=linears, **options)


@pytest.mark.parametrize("model_type", REPRESENTATIVES)
def test_inputs_and_matrices_give_the_experts_outputs(model_type: str) -> None:
    """Σ f fᵀ = W (Σ x xᵀ) Wᵀ for the last matrix, as [outputs, inputs]; the first ones are given hidden states."""
    moe, method = MoEModel(tiny_model(model_type).eval()), Method(["expert"])
    figures = gathered(method, moe)
    for layer in moe.layers:
        used = expert_matrices(moe.model, layer)
        first, *_, last = used.input_dims
        tensors = {own.name: own for own in own_tensors(moe.model, layer) if own.expert is None}
        lists = {(own.name, own.expert): own.tensor for own in own_tensors(moe.model, layer)}
        for expert in range(layer.num_experts):
            rows = [(hidden, output) for hidden, of, output in method.layers[layer.path].seen if of == expert]
            for name in used.input_dims:
                assert method.sites[layer.path, name].tokens.get(expert, 0) == len(rows)
            if not rows:
                continue
            hidden_PH, outputs_PH = (torch.stack(of) for of in zip(*rows, strict=True))
            one = lists[last, expert] if layer.containers else _of_expert(tensors[last], expert)
            weight_OI = (one if used.input_dims[last] else one.T).double()
            if layer.router_probe.call != "scaled inputs":  # there tokens are given times their scores
                torch.testing.assert_close(method.sites[layer.path, first].of[expert], hidden_PH.T @ hidden_PH)
                if model_type == "gpt_oss":
                    outputs_PH = outputs_PH - _of_expert(tensors["experts.down_proj_bias"], expert)
                found = weight_OI @ method.sites[layer.path, last].of[expert] @ weight_OI.T
                torch.testing.assert_close(found, outputs_PH.T @ outputs_PH, rtol=1e-4, atol=1e-5)
            else:
                assert method.sites[layer.path, last].of[expert].trace() > 0
        total = sum(of.trace() for of in method.sites[layer.path, last].of.values())
        torch.testing.assert_close(figures[layer.path][f"inputs.{last}.all"].trace(), total)


def _of_expert(own: Any, expert: int) -> Tensor:
    found = own.tensor.narrow(own.axis.dim, own.axis.stride * expert, own.axis.stride)
    return found.squeeze(own.axis.dim) if own.axis.stride == 1 else found


def test_scaled_inputs_are_the_tokens_times_their_scores() -> None:
    moe, method = MoEModel(tiny_model("llama4_text").eval()), Method(["expert"])
    gathered(method, moe)
    layer = moe.layers[0]
    router = tensor_at(moe.model, layer.router_weights[0]).double()
    for expert in range(layer.num_experts):
        rows = [
            hidden * (router[expert] @ hidden).sigmoid()
            for hidden, of, _ in method.layers[layer.path].seen
            if of == expert
        ]
        if rows:
            expected = torch.stack(rows).T @ torch.stack(rows)
            torch.testing.assert_close(
                method.sites[layer.path, "experts.gate_up_proj"].of[expert], expected, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_maps_beside_the_experts_see_all_tokens_without_padding(model_type: str) -> None:
    """Against hooks on plain runs of each sequence alone. Blocks that are run again to probe them do not count."""
    moe, method = MoEModel(tiny_model(model_type).eval()), Method(["block", "layer"], alone=True)
    figures = gathered(method, moe)
    expected: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            wide = args[0].flatten(0, -2).double()
            expected[name] = expected.get(name, 0) + wide.T @ wide

        return hook

    names = {(path, name): at for layer in moe.layers for (path, name), at in _linears(layer)}
    hooks = [
        moe.model.get_submodule(at[: -len(".weight")]).register_forward_pre_hook(keep(at)) for at in names.values()
    ]
    with torch.no_grad(), evaluating(moe.model):
        for batch in BATCHES:
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
                moe.model(ids[mask][None])
    for hook in hooks:
        hook.remove()
    assert names.keys() == method.sites.keys()
    places = {name.split(".")[0] for _, name in names}
    assert "self_attn" in places
    for (path, name), at in names.items():
        assert method.sites[path, name].tokens == {None: 2 * int(MASK.sum())}
        torch.testing.assert_close(figures[path][f"inputs.{name}.all"], expected[at], rtol=1e-4, atol=1e-5)


def _linears(layer: Any) -> list[tuple[tuple[str, str], str]]:
    return [((layer.path, name), at) for name, at in layer.linears.items()]


def test_routers_and_experts_are_no_maps_beside_them() -> None:
    layer = MoEModel(tiny_model("qwen2_moe")).layers[0]
    assert sorted(layer.linears) == [
        "mlp.shared_expert.down_proj.weight", "mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight",
        "mlp.shared_expert_gate.weight", "self_attn.k_proj.weight", "self_attn.o_proj.weight",
        "self_attn.q_proj.weight", "self_attn.v_proj.weight",
    ]  # fmt: skip
    assert all(at == f"model.layers.0.{name}" for name, at in layer.linears.items())


def test_a_second_look_counts_nothing_twice() -> None:
    class Twice(Everything):
        looks = 2

        def again(self) -> bool:
            self.looks -= 1
            return self.looks > 0

    moe = MoEModel(tiny_model("qwen2_moe").eval())
    once, twice = Method(["expert", "block", "layer"]), Method(["expert", "block", "layer"])
    twice.statistic = lambda layer: twice.layers.setdefault(layer.path, Twice())  # type: ignore[method-assign]
    gathered(once, moe)
    gathered(twice, moe)
    assert [one.tokens for one in once.sites.values()] == [one.tokens for one in twice.sites.values()]
    assert all(len(twice.layers[path].seen) == 2 * len(of.seen) for path, of in once.layers.items())


def test_implementations_that_copy_weights_are_run_as_another() -> None:
    model = tiny_model("mixtral").eval()
    moe, direct, copied = MoEModel(model), Method(["expert"], alone=True), Method(["expert"], alone=True)
    gathered(direct, moe)
    model.config._experts_implementation_internal = "batched_mm"
    gathered(copied, moe)
    assert model.config._experts_implementation == "batched_mm"
    for site, one in direct.sites.items():
        for expert, expected in one.of.items():
            torch.testing.assert_close(copied.sites[site].of[expert], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("longcat_flash", r"what experts\.\w+ is multiplied with cannot be seen"),
        ("jetmoe", "cannot be told|cannot be asked"),
    ],
)
def test_what_cannot_be_seen_is_refused_by_name(model_type: str, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        gathered(Method(["expert"], alone=True), MoEModel(tiny_model(model_type).eval()), BATCHES[:1])


def test_progressive_methods_cannot_ask() -> None:
    method = Method(["layer"])
    method.progressive = True
    with pytest.raises(PluginError, match="watching: it is progressive"):
        statistics_of(method, MoEModel(tiny_model("mixtral")))  # type: ignore[arg-type]


# How an expert uses its tensors ----------------------------------------------------------------------------


class Gated(nn.Module):
    """One expert after another, by hand: `[inputs, outputs]` first, `[outputs, inputs]` last, biases in both."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 4, 6))
        self.first_bias = nn.Parameter(torch.randn(3, 6))
        self.last = nn.Parameter(torch.randn(3, 4, 6))
        self.last_bias = nn.Parameter(torch.randn(3, 4))
        self.norm = nn.LayerNorm(4) if norm else nn.Identity()

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for token, experts in enumerate(index.tolist()):
            for rank, expert in enumerate(experts):
                inner = (hidden[token : token + 1] @ self.first[expert] + self.first_bias[expert]).relu()
                answer = nn.functional.linear(inner, self.last[expert], self.last_bias[expert])
                out[token] += weights[token, rank] * self.norm(answer)[0]
        return out


@pytest.mark.parametrize("norm", [False, True])
def test_orientation_and_output_by_hand(norm: bool) -> None:
    torch.manual_seed(0)
    layer = copy.copy(MoEModel(tiny_models.tiny_model("mixtral")).layers[0])
    model = nn.ModuleDict({"experts": Gated(norm=norm)})
    axis = next(iter(layer.tensors.values())).__class__(0)
    probe = SimpleNamespace(call="choices", experts_order=(0, 1, 2), experts_width=4)
    names = ["first", "first_bias", "last", "last_bias"]
    own: Any = SimpleNamespace(
        path="", experts="experts", tensors={f"experts.{name}": axis for name in names}, containers={}, num_experts=3,
        router_weights=(), selection_biases=(), id_tensors=(), router_probe=probe,
    )  # fmt: skip
    for expert in range(3):
        found = expert_matrices(model, own, expert)
        assert dict(found.input_dims) == {"experts.first": 0, "experts.last": 1}
        assert list(found.input_dims) == ["experts.first", "experts.last"]
        assert set(found.output) == (set() if norm else {"experts.last", "experts.last_bias"})


# Beside the original ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["live", "disk"])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3"])
def test_beside_the_original(name: str, kind: str) -> None:
    """Each layer sees the smaller model's tokens, and as its target what the original put out on its own."""
    folder = tiny_models.tiny_folder(name)
    original, smaller = MoEModel(tiny_models.tiny_model(name).eval()), MoEModel(tiny_models.tiny_model(name).eval())
    smaller.keep(tiny_models.keep_six(smaller))
    method, alone, targets = Method([]), Method([]), Method([])
    beside = layerwise.Original(original)
    if kind == "disk":
        found = Checkpoint(str(folder), folder)
        skeleton = load_model(found, device="meta")
        beside = layerwise.Original(MoEModel(skeleton), StreamedWeights(skeleton, found))
    before = forward.logits(original.model, BATCHES[0])
    gathered(method, smaller, original=beside)
    gathered(alone, smaller)
    statistics = {layer.path: Outputs() for layer in original.layers}
    layerwise.observe(original, BATCHES, statistics, Progress())
    assert torch.equal(forward.logits(original.model, BATCHES[0]), before)
    for path, seen in method.layers.items():
        for (a, expert, b), (c, same, d) in zip(seen.seen, alone.layers[path].seen, strict=True):
            assert expert == same
            assert torch.equal(a, c)
            assert torch.equal(b, d)
        torch.testing.assert_close(torch.cat(seen.target), torch.cat(statistics[path].outputs), rtol=1e-5, atol=1e-6)
    assert not targets.layers


class Outputs(Statistic):
    """What a layer puts out."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def update(self, tokens: RoutedTokens) -> None:
        for _ in tokens.ranked_outputs(tokens.layer.top_k):
            pass
        assert tokens.output_TH is not None
        self.outputs.append(tokens.output_TH)

    def tensors(self) -> dict[str, Tensor]:
        return {"same.seen": torch.tensor(len(self.outputs))}


def test_layers_that_share_their_experts_each_have_all_of_them() -> None:
    model = tiny_models.tiny_model("mixtral")
    first, second = (model.model.layers[number].mlp.experts for number in (1, 2))
    second.gate_up_proj = first.gate_up_proj
    names = [[own.name for own in own_tensors(model, layer)] for layer in MoEModel(model).layers]
    assert names[0] == names[1] == names[2]
