"""Settings for all tests: one thread, no network, and nothing left behind; layers and tokens made by hand."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from compressor import MoELayer
    from compressor.plugin import RoutedTokens, RoutingRule

_MODULES = tempfile.TemporaryDirectory(prefix="hf-modules-")
os.environ["HF_MODULES_CACHE"] = _MODULES.name  # before transformers is imported: code that comes with models goes here
os.environ["HF_HUB_OFFLINE"] = "1"
logging.raiseExceptions = False  # a library's handler keeps the stderr of the test that imported it, closed since

import pytest  # noqa: E402
import torch  # noqa: E402

pytest_plugins = ["cpu_limit", "nightly"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models run fastest so, and to the bit alike from run to run; `OMP_NUM_THREADS=2` tries another number."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session", autouse=True)
def _no_power_cut() -> Iterator[None]:
    """No test pulls the plug, so none waits until its files are on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _structures_found_once() -> Iterator[None]:
    """Of a class of transformers' own and an equal config a structure is found once a session: a third of the time of
    all tests went into that. Those that are about finding it call `find_structure` themselves.
    """
    from compressor.model import adapter

    find, found = adapter.find_structure, {}

    def once(factory: Any, config: Any) -> Any:
        if not (isinstance(factory, type) and factory.__module__.startswith("transformers.models.")):
            return find(factory, config)
        key = (factory, type(config), config.to_json_string(use_diff=False))
        if key not in found:
            found[key] = find(factory, config)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "find_structure", once)
        yield


@pytest.fixture(scope="session", autouse=True)
def _command_made_once() -> Iterator[None]:
    """What a process does once for its one command: typer's objects, and where plugins are on this search path."""
    import typer

    from compressor import plugins

    get_command, look, named = typer.main.get_command, plugins.entry_points, plugins._distribution

    @cache
    def on_path(path: tuple[str, ...], group: str) -> Any:
        return look(group=group)

    @cache
    def of_distribution(distribution: Any, entry: Any) -> tuple[str, str]:
        return named(entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(get_command))
        patch.setattr(plugins, "entry_points", lambda group: on_path(tuple(sys.path), group))
        patch.setattr(plugins, "_distribution", lambda entry: of_distribution(getattr(entry, "dist", None), entry))
        yield


@pytest.fixture(scope="session", autouse=True)
def _rehearsed_once() -> Iterator[None]:
    """As with structures: of a class of transformers' own and an equal config a forward does the same."""
    from compressor.run import check

    rehearse, seen = check.rehearse, {}

    def once(model: Any, structure: Any) -> Any:
        if not type(model).__module__.startswith("transformers.models."):
            return rehearse(model, structure)
        paths = tuple(layer.path for layer in structure.layers)
        key = (type(model), model.dtype, model.config.to_json_string(use_diff=False), paths)
        if key not in seen:
            seen[key] = rehearse(model, structure)
        return seen[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "rehearse", once)
        yield


@pytest.fixture(scope="session", autouse=True)
def _tiny_models_removed() -> Iterator[None]:
    yield
    if "tiny_models" in sys.modules:
        sys.modules["tiny_models"].remove_session_folder()


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Call the command in this process: a hundred times quicker than in one of its own."""
    from compressor.cli import _exit_status

    monkeypatch.setenv("COLUMNS", "200")  # tables are not folded

    def call(*arguments: str | Path) -> Answer:
        capsys.readouterr()
        status = _exit_status([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    return call


@pytest.fixture
def install_from(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Have the distributions that are laid out in a folder installed until the test ends."""

    def install(folder: Path) -> None:
        monkeypatch.syspath_prepend(folder)
        for path in folder.glob("*.py"):
            monkeypatch.delitem(sys.modules, path.stem, raising=False)

    return install


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """Calibration sequences of unequal length."""
    from tiny_models import token_ids, write_token_file

    rows = [token_ids(length, seed=length).tolist() for length in (40, 33, 48, 21, 48, 40)]
    return write_token_file(tmp_path / "tokens.jsonl", rows)


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return Path(__file__).parent / "golden" / "mixtral_seed1"


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., MoELayer]:
    """A layer of which only the counts matter."""

    from compressor import MoELayer

    def make(
        num_experts: int, top_k: int, *, num_groups: int = 1, num_chosen_groups: int = 1, path: str = "layers.0.mlp",
        **others: Any,
    ) -> MoELayer:  # fmt: skip
        return MoELayer(
            path=path,
            num_experts=num_experts,
            top_k=top_k,
            num_groups=num_groups,
            num_chosen_groups=num_chosen_groups,
            router="layers.0.mlp.gate",
            experts="layers.0.mlp.experts",
            tensors={},
            integers={},
            containers={},
            id_tensors=(),
            parameters_per_expert=1,
            router_probe=None,  # type: ignore[arg-type]
            **others,
        )

    return make


@pytest.fixture(scope="session")
def make_tokens(make_layer: Callable[..., MoELayer]) -> Callable[..., RoutedTokens]:
    """Tokens [T, H] at a layer whose experts are the matrices [N, H, H], the last `num_extra` of them no experts but
    what else can be chosen. `choose` is the router: logits, K → ids, weights; it must leave logits of −inf alone.
    """

    from compressor.plugin import RoutedTokens

    def make(
        hidden_TH: Tensor,
        matrices_NHH: Tensor,
        logits_TN: Tensor,
        top_k: int,
        choose: Callable[[Tensor, int], tuple[Tensor, Tensor]],
        rule: RoutingRule | None,
        num_extra: int = 0,
    ) -> RoutedTokens:
        layer = make_layer(len(matrices_NHH) - num_extra, top_k, num_extra_choices=num_extra)

        def replay(kept: Sequence[int], top_k: int | None = None) -> tuple[Tensor, Tensor]:
            dropped = [expert for expert in range(layer.num_experts) if expert not in kept]
            masked = logits_TN.clone()
            masked[:, dropped] = float("-inf")
            return choose(masked, layer.top_k if top_k is None else top_k)

        index_TK, weights_TK = choose(logits_TN, top_k)
        return RoutedTokens(
            layer=layer,
            hidden_TH=hidden_TH,
            logits_TE=logits_TN,
            index_TK=index_TK,
            weights_TK=weights_TK,
            rule=rule,
            replay=replay,
            evaluate_experts=lambda x, e: torch.einsum("ch,cmhg->cmg", x, matrices_NHH[e]),
        )

    return make
