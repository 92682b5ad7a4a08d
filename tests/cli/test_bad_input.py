"""Whatever is wrong with what the user gives: one error that says what, status 2, nothing changed or left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from compressor.checkpoint import output as output_folder
from compressor.edit import backend, verify
from compressor.observe import layerwise
from compressor.run import passes, pipeline, record

Cli = Callable[..., Any]
Refused = Callable[..., str]
WriteRecipe = Callable[..., Path]
MakeModel = Callable[..., Path]
CopyOf = Callable[[Path], Path]

EXPERT = "model.layers.0.block_sparse_moe.experts"
MOE = "model.layers.0.mlp"


@pytest.fixture
def refused_run(refused: Refused, recipe: WriteRecipe) -> Refused:
    """`refused` for `run --quiet` and `check --quiet` of the working recipe with `changes`: they say the same."""

    def check(*options: str | Path, says: str, **changes: Any) -> str:
        path = recipe(**changes)
        message = refused("check", "--quiet", path, *options, says=says)
        assert refused("run", "--quiet", path, *options, says=says) == message
        return message

    return check


@pytest.fixture
def refused_later(cli: Cli, refused: Refused, recipe: WriteRecipe) -> Refused:
    """The same where only weights tell, or all of the text: `check` does not know."""

    def check(*options: str | Path, says: str, **changes: Any) -> str:
        path = recipe(**changes)
        assert cli("check", "--quiet", path, *options).status == 0
        return refused("run", "--quiet", path, *options, says=says)

    return check


def test_the_recipe_that_is_spoilt_here_works(cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    answer = cli("run", "--quiet", recipe())
    assert (answer.status, answer.out, answer.err) == (0, "", "")
    assert (tmp_path / "out" / "model.safetensors").exists()


# --- the recipe


def test_every_mistake_in_a_recipe_at_once(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "model: demo\n"
        "colour: red\n"
        "seed: -1\n"
        "calibration: {batch_size: many, data: [{tokens: x}]}\n"
        "passes:\n"
        "  - expert_pruning: {kep: 6}\n"
        "  - expert_prunning: {keep: 6}\n"
        "  - expert_pruning: {keep: six}\n"
    )
    message = refused("run", path, says=f"error: {path}:2:1 colour: unknown key. Known keys: model, dtype")
    assert [line.partition(": ")[0] for line in message.removeprefix("error: ").splitlines()] == [
        f"{path}:2:1 colour",
        f"{path}:3:7 seed",
        f"{path}:4:27 calibration.batch_size",
        f"{path}:6:22 passes[0].expert_pruning.kep",
        f"{path}:7:5 passes[1].expert_prunning",
        f"{path}:8:28 passes[2].expert_pruning.keep",
    ]
    assert "seed: found -1, expected a number of at least 0" in message
    assert "unknown key; did you mean 'keep'?" in message
    assert "unknown method; did you mean 'expert_pruning'? Known methods: command, dynamic_skipping, " in message


def test_yaml_that_is_none(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("model: [demo\npasses: x\n")
    refused("run", path, says=f"error: {path}:2:7: not valid YAML: ")


def test_no_recipe(refused: Refused) -> None:
    refused("run", "nope.yaml", says="error: nope.yaml: cannot be read, expected a recipe (YAML): No such file")
    refused("check", "nope.yaml", says="error: nope.yaml: cannot be read, expected a recipe (YAML): No such file")


def test_no_output(refused_run: Refused) -> None:
    says = "recipe.yaml:1:1: no `output`. Name a folder for the smaller model there, or with --output."
    refused_run(output=None, says=says)


def test_a_setting_that_leads_nowhere(refused_run: Refused) -> None:
    refused_run("--set", "passes.1.expert_pruning.keep=4", says="--set passes.1.expert_pruning.keep=4: passes has 1 en")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing argument"),
        (["--nope", "x"], "No such option: --nope"),
        (["x", "--output", "a\0b"], "embedded null byte"),
    ],
)
def test_wrong_usage(cli: Cli, arguments: list[str], says: str) -> None:
    answer = cli("run", *arguments)
    assert answer.status == 2
    assert says in answer.err
    assert "Traceback" not in answer.err


def test_unknown_command(cli: Cli) -> None:
    answer = cli("prune")
    assert answer.status == 2
    assert "No such command 'prune'" in answer.err


# --- counts of experts


@pytest.mark.parametrize(
    ("options", "option", "says"),
    [
        (
            {"keep": 1},
            "keep",
            "cannot keep 1 experts: each token chooses 2, and fewer than 2 is no choice. The nearest",
        ),
        (
            {"drop": 7},
            "drop",
            "cannot keep 1 experts: each token chooses 2, and fewer than 2 is no choice. The nearest",
        ),
        ({"keep": 0.1}, "keep", "cannot keep 1 experts: each token chooses 2, and fewer than 2 is no choice. The near"),
        ({"keep": 8}, "keep", "all 8 experts would stay: nothing to prune."),
        ({"keep": 0.99}, "keep", "all 8 experts would stay: nothing to prune."),
        ({"keep": 9}, "keep", "it has 8 experts and cannot keep 9."),
        ({"drop": 8}, "drop", "dropping 8 of 8 experts would leave none."),
        ({"drop": 9}, "drop", "dropping 9 of 8 experts would leave none."),
    ],
)
@pytest.mark.parametrize("command", [["run", "--quiet"], ["check"]])
def test_impossible_counts(
    command: list[str], options: dict[str, Any], option: str, says: str, refused: Refused, recipe: WriteRecipe
) -> None:
    path = recipe(passes=[{"expert_pruning": options}])
    refused(*command, path, says=f"error: {path}:9:11 passes[0].expert_pruning.{option}: {MOE}: {says}")


@pytest.mark.parametrize(
    ("top_k", "keep", "says"),
    [
        (3, 2, "cannot keep 2 experts: each token chooses 3, and fewer than 2 is no choice. The nearest possible coun"),
        (1, 1, "cannot keep 1 experts: each token chooses 1, and fewer than 2 is no choice. The nearest possible coun"),
        (8, 6, "cannot keep 6 experts: each token chooses 8, and fewer than 2 is no choice. The nearest possible coun"),
        (9, 6, "none of its 8 experts can go: each token chooses 9."),
    ],
)  # fmt: skip
def test_fewer_experts_than_a_token_chooses(
    top_k: int, keep: int, says: str, refused_run: Refused, copy_of: CopyOf, mixtral: Path
) -> None:
    model = copy_of(mixtral)
    change_config(model, num_experts_per_tok=top_k)
    refused_run(model=model, passes=[{"expert_pruning": {"keep": keep}}], says=f"expert_pruning.keep: {MOE}: {says}")


def test_keep_and_drop(refused_run: Refused) -> None:
    says = "say how many experts stay with one of `keep` and `drop`, for example `keep: 6`"
    refused_run(passes=[{"expert_pruning": {"keep": 6, "drop": 2}}], says=f":9:5 passes[0].expert_pruning: {says}")
    refused_run(passes=[{"expert_pruning": {}}], says=f"passes[0].expert_pruning: {says}")


def test_more_sets_than_can_be_looked_at(refused: Refused, recipe: WriteRecipe, copy_of: CopyOf, mixtral: Path) -> None:
    model = copy_of(mixtral)
    change_config(model, num_local_experts=64)
    many = (
        "keeping 32 of 64 experts means 1,832,624,140,942,590,534 possible sets per layer, too many to look at all of"
    )
    path = recipe(model=model, passes=[{"expert_pruning": {"keep": 32, "search": "exact"}}])
    refused(
        "run", path, says=f"passes[0].expert_pruning.search: {MOE}: {many} them: the limit is 20,000 (`max_subsets`)"
    )
    limits = {"keep": 32, "search": "exact", "max_subsets": 2 * 10**18}
    path = recipe(model=model, passes=[{"expert_pruning": limits}])
    refused("run", path, says=f"{many} them: each token would need its best 34 experts, the limit is 20.")


def test_the_second_pass_is_checked_before_the_first_runs(refused_run: Refused) -> None:
    passes = [{"expert_pruning": {"keep": 6}}, {"expert_pruning": {"keep": 6}}]
    refused_run(
        passes=passes, says=f"passes[1].expert_pruning.keep: {MOE}: all 6 experts would stay: nothing to prune."
    )


# --- the model's folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def both_commands(refused: Refused, recipe: WriteRecipe, model: Path | str, says: str) -> None:
    refused("run", "--quiet", recipe(model=model), says=says)
    refused("inspect", model, says=says)


def test_dense_model(refused: Refused, recipe: WriteRecipe, dense: Path) -> None:
    both_commands(refused, recipe, dense, "llama: no routed experts found. ")
    refused(
        "check",
        recipe(model=dense),
        says="so this is a dense model, or one whose structure needs an adapter from a plugin.",
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, ": no config.json, so this is no checkpoint."),
        ("{oops", "/config.json: cannot be read as JSON: Expecting property name enclosed in double quotes: line 1"),
        ("\xff", "/config.json: cannot be read as JSON: "),
        ("[" * 100_000, "/config.json: cannot be read as JSON: maximum recursion depth"),
        ("[1]", "/config.json: expected a JSON object, found list."),
        ("{}", ": transformers cannot read config.json (model_type None): "),
        ('{"model_type": "own"}', ": transformers cannot read config.json (model_type 'own'): "),
        ('{"model_type": "mixtral", "num_local_experts": "eight"}', "expected int, got str (value: 'eight')"),
        ('{"model_type": "vit"}', "vit: no routed experts found."),
    ],
)
def test_folder_that_is_no_checkpoint(
    config: str | None, says: str, refused: Refused, recipe: WriteRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config, encoding="latin-1")
    both_commands(refused, recipe, folder, f"{folder}{says}" if says.startswith((":", "/")) else says)


def test_model_that_is_a_file(refused: Refused, recipe: WriteRecipe, tokens: Path) -> None:
    both_commands(refused, recipe, tokens, f"{tokens} is a file; expected the folder of a checkpoint")


@pytest.mark.parametrize("reference", ["/no/such/folder", "./model", "mixtral", "a/b/c"])
def test_model_that_is_not_there(reference: str, refused: Refused, recipe: WriteRecipe) -> None:
    says = f"{reference}: there is no such folder, nor is it a hub id (`owner/name`); the built-in model is"
    both_commands(refused, recipe, reference, says)


def test_hub_model_offline(refused: Refused, recipe: WriteRecipe) -> None:
    says = f"owner/name: there is no folder {Path.cwd() / 'owner' / 'name'}, it is not in the hub's cache, and the hub"
    both_commands(refused, recipe, "owner/name", says)


@pytest.mark.parametrize("code", [{"AutoConfig": "configuration_own.OwnConfig"}, "configuration_own.OwnConfig"])
def test_remote_code_without_consent(
    code: Any, refused: Refused, recipe: WriteRecipe, copy_of: CopyOf, mixtral: Path
) -> None:
    model = copy_of(mixtral)
    change_config(model, model_type="own", auto_map=code)
    (model / "configuration_own.py").write_text("raise SystemExit('it ran')\n")
    says = (
        f"{model}: the model's code comes with its checkpoint (configuration_own.OwnConfig). It runs only with "
        f"`trust_remote_code: true` in the recipe, or --trust-remote-code; read it first."
    )
    both_commands(refused, recipe, model, says)


def test_remote_code_that_is_not_there(refused_run: Refused, copy_of: CopyOf, mixtral: Path) -> None:
    model = copy_of(mixtral)
    change_config(model, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    refused_run(model=model, trust_remote_code=True, says="does not appear to have a file named configuration_own.py")


def test_quantised_checkpoint(refused_run: Refused, copy_of: CopyOf, mixtral: Path) -> None:
    model = copy_of(mixtral)
    change_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    says = (
        "mixtral: the checkpoint is quantised (gptq), and its weights cannot be read as numbers: transformers reads "
        "this format in its packed form only. Decide on the unquantised model, then apply the decision to this one"
    )
    refused_run(model=model, says=says)


def test_a_config_that_names_its_own_file(refused_run: Refused, copy_of: CopyOf, mixtral: Path) -> None:
    model = copy_of(mixtral)
    change_config(model, transformers_weights="other.safetensors")
    refused_run(model=model, says="its config.json names a file of weights itself (`transformers_weights`)")


# --- the shards


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def rewrite_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def missing(folder: Path) -> str:
    first_shard(folder).unlink()
    return f"{folder}: model.safetensors.index.json names 1 shard(s) that are not there: {first_shard_name}."


first_shard_name = "model-00001-of-00002.safetensors"


def truncated(folder: Path) -> str:
    path = first_shard(folder)
    path.write_bytes(path.read_bytes()[:-100])
    return (
        f"{path}: damaged, cut short, or not a safetensors file: Error while deserializing header: incomplete metadata"
    )


def cut_to_nothing(folder: Path) -> str:
    path = first_shard(folder)
    path.write_bytes(b"")
    return f"{path}: damaged, cut short, or not a safetensors file: Error while deserializing header: header too small"


def a_single_file_too(folder: Path) -> str:
    shutil.copy(first_shard(folder), folder / "model.safetensors")
    return f"{folder}: it holds both model.safetensors and model.safetensors.index.json: two models; move "


def garbage(folder: Path) -> str:
    path = first_shard(folder)
    path.write_bytes(b"\x89garbage" * 100)
    return f"{path}: damaged, cut short, or not a safetensors file: Error while deserializing header: header too large"


def in_another_file(folder: Path) -> str:
    rewrite_index(folder, lambda names: names.update({"lm_head.weight": "model-00002-of-00002.safetensors"}))
    return (
        f"{folder}: model.safetensors.index.json says that lm_head.weight is in model-00002-of-00002.safetensors, but "
        f"it is in {first_shard_name}: they do not belong together."
    )


def in_no_file(folder: Path) -> str:
    rewrite_index(folder, lambda names: names.update({"model.extra.weight": first_shard_name}))
    return f"says that model.extra.weight is in {first_shard_name}, but it is in none of the shards: "


def index_of_nothing(folder: Path) -> str:
    rewrite_index(folder, lambda names: names.clear())
    return "index.json: cannot be read as an index of shards: `weight_map` does not map names of tensors to names of"


def index_of_numbers(folder: Path) -> str:
    rewrite_index(folder, lambda names: names.update({"lm_head.weight": 3}))  # type: ignore[dict-item]
    return "index.json: cannot be read as an index of shards: `weight_map` does not map names of tensors to names of"


def index_cut(folder: Path) -> str:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text()[:-10])
    return f"{path}: cannot be read as an index of shards: "


SPOILT_SHARDS = [
    missing, truncated, a_single_file_too, cut_to_nothing, garbage, in_another_file, in_no_file, index_of_nothing,
    index_of_numbers, index_cut,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT_SHARDS)
def test_shards(spoil: Callable[[Path], str], refused_run: Refused, copy_of: CopyOf, sharded: Path) -> None:
    model = copy_of(sharded)
    says = spoil(model)
    refused_run(model=model, says=says)


def test_truncated_single_file(refused_run: Refused, copy_of: CopyOf, mixtral: Path) -> None:
    model = copy_of(mixtral)
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused_run(model=model, says=f"{path}: damaged, cut short, or not a safetensors file: ")


def test_only_pickled_weights(refused: Refused, recipe: WriteRecipe, copy_of: CopyOf, mixtral: Path) -> None:
    model = copy_of(mixtral)
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    says = (
        f"{model}: expected model.safetensors or model.safetensors.index.json, found pytorch_model.bin; convert other"
    )
    refused("run", "--quiet", recipe(model=model), says=says)
    (model / "pytorch_model.bin").unlink()
    refused(
        "run",
        "--quiet",
        recipe(model=model),
        says="found no weights at all; convert other formats with transformers' `save_pretrained`.",
    )


def with_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model.norm.weight": None},
            "1 tensor(s) are missing from the checkpoint: model.norm.weight.",
        ),
        (
            {"model.norm.weight": torch.ones(17)},
            "1 tensor(s) have other shapes in the checkpoint: model.norm.weight ([17], by its config [16]).",
        ),
        ({f"{EXPERT}.3.w1.weight": None}, f"transformers cannot load it: {EXPERT}.3.w1.weight is missing."),
        (
            {f"{EXPERT}.3.w1.weight": torch.ones(16, 17)},
            f"transformers cannot load it: {EXPERT}.3.w1.weight is [16, 17], that of the other experts [16, 16].",
        ),
        (
            {f"{EXPERT}.8.w1.weight": torch.ones(16, 16)},
            f"transformers cannot load it: {EXPERT}.8.w1.weight belongs to no expert that is whole.",
        ),
        (
            {f"{EXPERT}.8.w{number}.weight": torch.ones(16, 16) for number in (1, 2, 3)},
            "have other shapes in the checkpoint: model.layers.0.mlp.experts.down_proj ([9, 16, 16], by its config [8,",
        ),
        (
            {f"{EXPERT}.7.w4.weight": torch.ones(16, 16)},
            "1 tensor(s) are not expected in the checkpoint: model.layers.0.mlp.experts.7.w4.weight.",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    changes: dict[str, torch.Tensor | None], says: str, refused_run: Refused, copy_of: CopyOf, mixtral: Path
) -> None:
    model = copy_of(mixtral)
    with_tensors(model, **changes)
    refused_run(model=model, says=f"{model}: {says}" if not says.startswith("have") else says)


def test_tensor_in_neither_shard_nor_index(refused_run: Refused, copy_of: CopyOf, sharded: Path) -> None:
    model = copy_of(sharded)
    rewrite_index(model, lambda names: names.pop("lm_head.weight"))
    path = first_shard(model)
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    refused_run(model=model, says=f"{model}: 1 tensor(s) are missing from the checkpoint: lm_head.weight.")


def test_config_that_counts_other_experts_than_the_weights(
    refused_run: Refused, copy_of: CopyOf, mixtral: Path
) -> None:
    model = copy_of(mixtral)
    change_config(model, num_local_experts=4)
    says = (
        "6 tensor(s) have other shapes in the checkpoint: model.layers.0.mlp.experts.down_proj ([8, 16, 16], by its con"
    )
    refused_run(model=model, passes=[{"expert_pruning": {"keep": 2}}], says=says)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, refused_later: Refused, copy_of: CopyOf, mixtral: Path) -> None:
    model = copy_of(mixtral)
    weight = load_file(model / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    weight[0, :3] = value
    with_tensors(model, **{"model.layers.1.self_attn.q_proj.weight": weight})
    says = f"{model}: tensor model.layers.1.self_attn.q_proj.weight holds 3 value(s) that are NaN or infinite."
    refused_later(model=model, says=says)


def huge_experts(model: Any) -> None:
    model.model.layers[1].mlp.experts.gate_up_proj.mul_(1e30)


def huge_half_experts(model: Any) -> Any:
    model.model.layers[1].mlp.experts.gate_up_proj.fill_(6e4)
    return model.half()


def huge_attention(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj.weight.fill_(3e38)


def huge_head(model: Any) -> None:
    model.lm_head.weight.fill_(3e38)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (huge_experts, "model.layers.1.mlp: the experts' output on text is not finite: damaged, or too large for"),
        (huge_half_experts, "model.layers.1.mlp: the experts' output on text is not finite: damaged, or too large for"),
        (huge_half_experts, "damaged, or too large for torch.float16."),
        (huge_attention, "model.layers.0.mlp: the router's logits are not finite: damaged weights, or too large"),
        (huge_head, "the model's logits on calibration text are not finite, though its weights are:"),
    ],
)  # fmt: skip
def test_finite_weights_of_which_nothing_finite_comes(
    edit: Callable[[Any], Any], says: str, refused_later: Refused, make_model: MakeModel, tmp_path: Path
) -> None:
    refused_later(model=make_model(tmp_path / "model", edit=edit), says=says)


# --- calibration text


DEEP = "[" * 100_000
NOT_IDS = ':1: expected {"input_ids": [token ids ≥ 0]}.'


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("text", "", "source 'data' is empty, less than one sequence of 8 tokens: lower `length:`."),
        ("text", " \n ", "source 'data' is empty, less than one sequence of 8 tokens: lower"),
        ("text", "w1 w2", "source 'data' has only 3 tokens, less than one sequence of 8 tokens: lower `leng"),
        ("text", None, "source 'data': there is no file {path}."),
        ("text", "é", "source 'data': {path} is no UTF-8: 'utf-8' codec can't decode byte 0xe9"),
        ("jsonl", "", "source 'data' is empty, less than one sequence of 8 tokens: lower"),
        ("jsonl", '{"text": "w1"}\n{oops', "{path}:2: not JSON: Expecting property name enclosed in double quotes at"),
        ("jsonl", '{"words": "w1"}', "{path}:1: no text under 'text'; found the keys ['words']. `field:` names the"),
        ("jsonl", '{"text": 3}', "{path}:1: the value under 'text' is 3; a text or the messages of a chat go there."),
        ("jsonl", "[1]", "{path}:1: expected a JSON object, found list."),
        ("jsonl", DEEP, "{path}:1: not a document: nested too deeply."),
        ("jsonl", None, "source 'data': there is no file {path}."),
        ("tokens", "", "calibration source 'data' ({path}) is empty."),
        ("tokens", None, "source 'data': there is no file {path}."),
        ("tokens", '{"input_ids": [1, 2', "{path}:1: not JSON: Expecting ',' delimiter at column 20."),
        ("tokens", '{"ids": [1, 2]}', "{path}" + NOT_IDS),
        ("tokens", '{"input_ids": "12"}', "{path}" + NOT_IDS),
        ("tokens", '{"input_ids": [1, -2]}', "{path}" + NOT_IDS),
        ("tokens", '{"input_ids": [1, 2.5]}', "{path}" + NOT_IDS),
        ("tokens", '{"input_ids": [true, 2]}', "{path}" + NOT_IDS),
        ("tokens", '{"input_ids": [1, 9223372036854775808]}', "{path}" + NOT_IDS),
        ("tokens", '{"input_ids": [1]}', "{path}:1: a sequence needs at least 2 tokens, found 1."),
        ("tokens", '{"input_ids": [1, 64]}', "source 'data' holds token id 64, but the model has only 64 embeddings ("),
        ("tokens", '{"input_ids": [1, 9223372036854775807]}', "holds token id 9223372036854775807, but the model has"),
    ],
)  # fmt: skip
def test_calibration_text(kind: str, text: str | None, says: str, refused_run: Refused, tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    refused_run(data=[{kind: str(path), "length": 8}], says=says.replace("{path}", str(path)))


def test_sequences_longer_than_the_models_positions(refused_run: Refused, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"input_ids": [1] * 33}))
    says = "source 'long' has sequences of 33 tokens, the limit is 32: lower `length:`."
    refused_run(data=[{"tokens": str(path)}], says=says)
    refused_run(evaluate={"perplexity": [{"tokens": str(path)}]}, says=says)


def test_text_without_a_tokenizer(refused_run: Refused, copy_of: CopyOf, mixtral: Path, tmp_path: Path) -> None:
    model = copy_of(mixtral)
    for path in model.glob("tokenizer*"):
        path.unlink()
    (tmp_path / "words.txt").write_text("w1 w2 w3 " * 9)
    says = "calibration source 'words' is text, but there is no tokenizer; add it, or give `tokens:`."
    refused_run(model=model, data=[{"text": "words.txt", "length": 8}], says=says)
    says = "tasks demo_code: the model has no tokenizer; add it, or measure `perplexity` on `tokens:`."
    refused_run(model=model, evaluate={"tasks": ["demo_code"], "limit": 2}, says=says)


def test_tokenizer_that_is_damaged(refused_run: Refused, copy_of: CopyOf, mixtral: Path) -> None:
    model = copy_of(mixtral)
    (model / "tokenizer.json").write_text("{")
    refused_run(model=model, says=f"{model}: its tokenizer cannot be loaded: ")


def test_tokenizer_of_another_model(refused_run: Refused, make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("w1 w2 w50 " * 9)
    says = "model: its tokenizer knows 64 ids, but the model has only 40 embeddings: it belongs to another model. Put"
    model = make_model(tmp_path / "small", vocab_size=40)
    refused_run(model=model, data=[{"text": "words.txt", "length": 8}], says=says)


@pytest.mark.parametrize(
    ("line", "changes", "says"),
    [
        (
            '{"text": "w1 w2 w3"}',
            {"field": "words"},
            ", row 1: no text under 'words'; found the keys ['text']. `field:` names the",
        ),
        ('{"text": "w1 w2 w3"}', {"split": "test"}, " cannot be opened: Bad split: test. Available splits: ['train']."),
        ("{oops", {}, " cannot be read: "),
        (None, {}, " cannot be opened: "),
    ],
)
def test_datasets(line: str | None, changes: dict[str, Any], says: str, refused_run: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    if line is not None:
        folder.mkdir()
        (folder / "train.jsonl").write_text(line + "\n")
    refused_run(data=[{"dataset": str(folder), "length": 8, **changes}], says=f"dataset {str(folder)!r}{says}")


# --- evaluation


def test_unknown_task(refused: Refused, recipe: WriteRecipe) -> None:
    path = recipe(evaluate={"tasks": ["demo_cod"]})
    says = "unknown task 'demo_cod'. Did you mean demo_code, demo_prose, demo_arithmetic?"
    refused("run", "--quiet", path, says=says)


def test_evaluate_without_anything_to_measure(refused: Refused, recipe: WriteRecipe, mixtral: Path) -> None:
    path = recipe()
    says = f"{path}:1:1: the recipe has no `evaluate:`, so there is nothing to measure"
    refused("evaluate", mixtral, "--recipe", path, says=says)


# --- devices


def test_device_that_is_not_there(refused_run: Refused) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    refused_run(device="cuda", says=":5:9 device: 'cuda' cannot be used: ")


def test_memory_of_a_device_that_is_not_used(refused_run: Refused) -> None:
    says = "device_memory: would have no effect with `device: cpu`; give `memory`, or a device"
    refused_run("--device-memory", "1kB", says=says)


# --- decisions

OTHER = "model.layers.1.mlp"


def a_pass(layers: Any, method: str = "expert_pruning", options: Any = None) -> str:
    done = {"method": method, "version": "1", "options": options or {"keep": 6}, "decision": {"layers": layers}}
    return json.dumps({"format": 2, "passes": [done]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{oops", "not a decision that a run has written: Expecting property name"),
        ("[]", "not a decision that a run has written: list indices must be integers"),
        ('{"format": 3, "passes": []}', "not a decision that a run has written: its format is 3, this version reads 2"),
        ('{"format": 2}', "not a decision that a run has written: it has no key 'passes'"),
        ('{"format": 2, "passes": []}', "not a decision that a run has written: it has no passes"),
        ('{"format": 2, "passes": 3}', "not a decision that a run has written: 'int' object is not iterable"),
        (DEEP, "not a decision that a run has written: maximum recursion depth"),
        (a_pass({}, method="magic"), "no installed plugin offers the method 'magic'."),
        (a_pass({}, options={"kep": 6}), "options of 'expert_pruning' that it does not know: "),
        (a_pass({MOE: [0, 1]}), "not a decision that a run has written: its layers are no mappings"),
        (
            a_pass({}),
            " does not fit {model}: the decision was made for 0 MoE layers, the model has ",
        ),
        (
            a_pass({"nope": {"kept": [0]}}),
            " does not fit {model}: the decision was made for 1 MoE layers, the model has 2: nope: the model has ",
        ),
        (
            a_pass({MOE: {"kept": [0, 1, 8]}, OTHER: {"kept": [0, 1]}}),
            f" does not fit {{model}}: {MOE}: kept experts must be different ids from 0 to 7, got [0, 1, 8]",
        ),
        (a_pass({MOE: {"kept": [0]}, OTHER: {"kept": [0]}}), f" does not fit {{model}}: {MOE}: cannot keep 1 experts"),
    ],
)
def test_decisions(text: str, says: str, refused: Refused, mixtral: Path, tmp_path: Path) -> None:
    path = tmp_path / "decision.json"
    path.write_text(text)
    says = says.replace("{model}", str(mixtral))
    message = refused("apply", "--quiet", path, mixtral, "--output", "out", says=says)
    assert message.startswith(f"error: {path}")


def test_no_decision(refused: Refused, mixtral: Path) -> None:
    refused("apply", "nope.json", mixtral, "--output", "out", says="nope.json: not a decision that a run has written: ")


# --- the output


def test_output_that_exists(refused_run: Refused, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    for output in (tmp_path / "there", tmp_path / "there" / "file"):
        says = f"{output} exists already. Choose another output, or pass --overwrite to replace it."
        refused_run(output=output, says=says)
        says = f"{output} was not written by compressor, so --overwrite does not replace it. Remove it yourself."
        refused_run("--overwrite", output=output, says=says)


@pytest.mark.parametrize("inside", ["file/out", "file/more/out"])
def test_output_below_a_file(inside: str, refused_run: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / inside
    refused_run(output=output, says=f"{output}: the output cannot be written there: Not a directory.")


def test_output_that_cannot_be_made(refused_run: Refused, tmp_path: Path) -> None:
    output = tmp_path / ("o" * 250)  # the hidden folder beside it has a longer name
    refused_run(output=output, says=f"{output}: the output cannot be written there: File name too long.")
    refused_run(output=tmp_path / ("o" * 300), says=" output: found a name of 300 bytes in a path of ")
    if sys.platform == "linux":
        refused_run(output="/proc/nope/out", says="output: /proc/nope/out: ")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_output_in_a_folder_that_may_not_be_written(refused_run: Refused, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    output = tmp_path / "locked" / "out"
    refused_run(output=output, says=f"{output}: the output cannot be written there: Permission denied.")


def test_output_that_is_a_link(refused_run: Refused, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    refused_run(output=link, says=f"{link} is a link. Give the folder that it should lead to as the output.")


def test_output_that_is_holds_or_is_in_the_model(
    cli: Cli, refused: Refused, recipe: WriteRecipe, mixtral: Path, tmp_path: Path
) -> None:
    assert cli("run", "--quiet", recipe(output="run/first")).status == 0
    model = Path("run/first")
    says = "is the model's own folder, holds it, or is in it. Choose another one."
    for output in (model, tmp_path / "run" / "first", Path("run"), tmp_path, model / "in" / "it"):
        path = recipe(model=model, output=output, passes=[{"expert_pruning": {"keep": 4}}])
        refused("run", "--quiet", path, "--overwrite", says=f"output {output} {says}")
    decision = model / "compressor" / "decision.json"
    refused("apply", decision, model, "--output", model, "--overwrite", says=f"output {model} {says}")


def test_folders_made_for_an_output_that_does_not_appear(refused_run: Refused, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    refused_run(output="there/new/newer/out", device_memory="1kB", device="cuda", says="")


def test_going_on_and_starting_anew_exclude_each_other(refused_run: Refused) -> None:
    refused_run("--resume", "--overwrite", says="--resume goes on with an interrupted run, --overwrite starts anew: ")


def test_interrupted_work_in_the_way_of_apply(cli: Cli, recipe: WriteRecipe, mixtral: Path, tmp_path: Path) -> None:
    assert cli("run", "--quiet", recipe(output="first")).status == 0
    journal = tmp_path / ".out.partial" / "journal"
    journal.mkdir(parents=True)
    (journal / "evaluation before.json").write_text("{}")
    says = f"an interrupted run's work is in {tmp_path / '.out.partial'}: --resume goes on, --overwrite drops it."
    decision = Path("first") / "compressor" / "decision.json"
    answer = cli("apply", decision, mixtral, "--output", tmp_path / "out")
    assert (answer.status, answer.out) == (2, "")
    assert says in answer.err
    assert (journal / "evaluation before.json").exists()


# --- the disk


def test_too_little_disk(refused_run: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixtral: Path) -> None:
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**4))
    says = f"{tmp_path / 'out'}: the run, with what it keeps of the text, needs "
    monkeypatch.setattr(pipeline, "load_moe", lambda *_: pytest.fail("weights were read"))
    refused_run(says=says)


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_safetensors(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def kept(folder: Path) -> str:
    """The line that says, quiet or not, that there is something to go on from."""
    hidden = folder / ".out.partial"
    return f"what was done so far is kept in {hidden}: --resume goes on with it, --overwrite starts anew\n"


@pytest.mark.parametrize(
    ("where", "name", "failure"),
    [
        (passes, "save_statistics", no_space_for_safetensors),
        (record, "write_json", no_space),
        (verify, "save_checkpoint", no_space_for_safetensors),
        (record, "model_card", no_space),
    ],
)
def test_disk_that_fills_up(
    where: Any,
    name: str,
    failure: Any,
    cli: Cli,
    recipe: WriteRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(where, name, failure)
    says = f"{tmp_path / 'out'}: writing failed: No space left on device. Nothing is left under that name."
    path = recipe()
    answer = cli("run", "--quiet", path)
    assert (answer.status, answer.out, answer.err) == (2, "", f"{kept(tmp_path)}error: {says}\n")
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".out.partial", path]  # what was observed is kept


# --- stopping


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (pipeline, "load_moe"),
        (layerwise, "observe"),
        (passes, "save_statistics"),
        (backend, "save_verified"),
        (record, "model_card"),
    ],
)
def test_ctrl_c(
    where: Any, name: str, cli: Cli, recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        assert (tmp_path / ".out.partial").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(where, name, interrupt)
    path = recipe()
    answer = cli("run", "--quiet", path)
    assert (answer.status, answer.out) == (130, "")
    is_kept = name not in ("load_moe", "observe")  # before anything is done there is nothing to keep
    says = "interrupted; nothing is left half done under the output's name\n"
    assert answer.err == (kept(tmp_path) if is_kept else "") + says
    assert sorted(tmp_path.iterdir()) == [*([tmp_path / ".out.partial"] if is_kept else []), path]


def test_ctrl_c_keeps_what_was_to_be_overwritten(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("run", "--quiet", recipe()).status == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "model_card", interrupt)
    path = recipe(passes=[{"expert_pruning": {"keep": 4}}])
    assert cli("run", "--quiet", path, "--overwrite").status == 130
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert sorted(tmp_path.iterdir()) == sorted([path, tmp_path / "out", tmp_path / ".out.partial"])


def test_our_own_bug_shows_its_traceback_and_leaves_nothing(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(layerwise, "observe", bug)
    path = recipe()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli("run", path)
    assert list(tmp_path.iterdir()) == [path]


# --- as a command of its own


def test_error_leaves_one_line(cli: Cli, recipe: WriteRecipe, copy_of: CopyOf, mixtral: Path, tmp_path: Path) -> None:
    model = copy_of(mixtral)
    with_tensors(model, **{f"{EXPERT}.3.w1.weight": None})
    path = recipe(model=model)
    answer = cli("run", "--quiet", path)
    assert answer.status == 2
    assert answer.err == (
        f"error: {path}:5:8 model: {model}: transformers cannot load it: {EXPERT}.3.w1.weight is missing.\n"
    )
    assert answer.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "recipe.yaml"]


def test_offline(cli: Cli) -> None:
    answer = cli("inspect", "owner/name")
    assert answer.status == 2
    assert answer.err.startswith(f"error: owner/name: there is no folder {Path.cwd() / 'owner' / 'name'}, it")
    assert len(answer.err.splitlines()) == 1


# --- skipping


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 2}, "passes[0].dynamic_skipping.threshold: found 2; a threshold is a number above 0, up to 1"),
        ({"threshold": "mean"}, "passes[0].dynamic_skipping.threshold: found 'mean', expected 'median'"),
        ({"mean_experts": 0.5}, "passes[0].dynamic_skipping.mean_experts: found 0.5; a token chooses 2 experts"),
        ({"mean_experts": 2}, "passes[0].dynamic_skipping.mean_experts: found 2; a token chooses 2 experts"),
        ({"keep_mass": 1.5}, "passes[0].dynamic_skipping.keep_mass"),
        ({"threshold": 0.3, "mean_experts": 1.5}, "`threshold` and `mean_experts` both say how much is skipped"),
        (
            {"threshold": {9: 0.3}},
            "threshold: there is no MoE layer 9; the MoE layers are 0, 1",
        ),
        ({"top_k": 2}, "passes[0].dynamic_skipping.top_k: model.layers.0.mlp: each token chooses 2 experts"),
        ({"tresholt": 0.3}, "unknown key; did you mean 'threshold'?"),
    ],
)
def test_skipping_that_cannot_be(refused_run: Refused, options: dict[str, Any], says: str) -> None:
    refused_run(passes=[{"dynamic_skipping": options}], says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mean_experts": 1.5, "precision": 0.001}, "is asked for (`precision`). Calibrate on about"),
        ({}, "74 tokens of calibration text tell how many experts a token uses to ±0.12, and ±0.1 is asked for"),
    ],
)
def test_too_little_text_for_a_threshold(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    answer = cli("run", "--quiet", recipe(passes=[{"dynamic_skipping": options}]))
    assert answer.status == 2
    assert says in answer.err
    kept = tmp_path / "out.statistics.safetensors"
    assert f"`compressor decide {kept} --method dynamic_skipping" in answer.err
    assert sorted(tmp_path.glob("*out*")) == [kept]
    assert not list(tmp_path.glob(".*"))


def test_skipping_of_a_model_that_chooses_one_expert(
    refused_run: Refused, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "models" / "top1", num_experts_per_tok=1)
    refused_run(
        model=model, passes=[{"dynamic_skipping": {}}], says="each token chooses one expert, so there is nothing"
    )


def test_rules_in_a_config_that_do_not_fit(
    refused: Refused, copy_of: CopyOf, mixtral: Path, recipe: WriteRecipe
) -> None:
    folder = copy_of(mixtral)
    config = json.loads((folder / "config.json").read_text())
    rule = {"rule": "ratio", "renormalise": True, "beta": 0.5}
    part = {"version": 1, "layers": {"model.layers.5.mlp": rule}}
    (folder / "config.json").write_text(json.dumps(config | {"compressor": {"format": 1, "skipping": part}}))
    path = recipe(model=folder)
    refused("run", "--quiet", path, says="`compressor.skipping`: there is no MoE layer 'model.layers.5.mlp'")
