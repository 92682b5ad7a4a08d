"""Another program reads what we write: mlx-lm, with its own code for config keys and tensor names, on the CPU.

transformers alone would not notice a key that only transformers writes.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tiny_models import tiny_folder, token_ids, write_token_file

from compressor import compress

IDS = token_ids(2, 24, seed=5)


@pytest.fixture(scope="module")
def mlx():
    if find_spec("mlx") is None or find_spec("mlx_lm") is None:
        wanted = sys.platform == "linux" and os.environ.get("CI")
        assert not wanted, "the `test` extra installs mlx-lm on Linux; it is not there"
        pytest.skip("mlx-lm is not installed")
    import mlx.core

    mlx.core.set_default_device(mlx.core.cpu)
    return mlx.core


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def pruned(request, tmp_path_factory):
    """A pruned checkpoint and the live model it was written from; the source's config has only the newest spellings."""
    folder = tmp_path_factory.mktemp("mlx")
    source = json.loads((tiny_folder(request.param) / "config.json").read_text())
    assert "rope_theta" not in source
    assert ("num_experts" in source) != ("num_local_experts" in source)
    tokens = write_token_file(folder / "tokens.jsonl", [token_ids(32, seed=seed).tolist() for seed in range(6)])
    result = compress(
        {
            "model": str(tiny_folder(request.param)),
            "calibration": {"batch_size": 2, "data": [{"tokens": str(tokens)}]},
            "passes": [{"expert_pruning": {"keep": 5}}],
            "output": str(folder / request.param),
        }
    )
    return result.folder, result.model


@pytest.mark.filterwarnings("ignore")  # mlx-lm's own imports
def test_mlx_reads_the_same_model(pruned, mlx):
    from mlx_lm.utils import load_model

    folder, model = pruned
    reader, config = load_model(folder)
    assert {config["num_experts"], config["num_local_experts"]} == {5}
    logits = reader(mlx.array(IDS.tolist())).astype(mlx.float32)
    read = torch.from_numpy(np.array(logits)).log_softmax(-1)
    with torch.no_grad():
        written = model(IDS).logits.float().log_softmax(-1)
    assert read.shape == written.shape
    assert (read - written).abs().max() <= 1e-4
    assert written.std() > 0.1  # a model that says something
