"""Which expert should stand in a hash layer's table (`tid2eid`) where a dropped one stood: squared error of the layer's
output on held-out demo text, in small DeepSeek-V4 models that are trained here.

    OMP_NUM_THREADS=1 python benchmarks/hash_layers.py
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch.nn.functional import cross_entropy, normalize

from compressor.checkpoint.find import find_checkpoint
from compressor.checkpoint.load import load_tokenizer
from compressor.data.demo import corpus
from compressor.testing.tiny import tiny_model

NUM_EXPERTS, NUM_DROPPED, LENGTH, BATCH, STEPS = 16, 6, 64, 8, 300


def ids_of(split: Any, number: int) -> torch.Tensor:
    tokenizer, rows = load_tokenizer(find_checkpoint("demo")), []
    for domain in corpus.DOMAINS:
        texts = islice(corpus.documents(domain, split), 60)
        stream = [token for text in texts for token in tokenizer(text, truncation=True)["input_ids"]]
        windows = torch.tensor(stream[: len(stream) // LENGTH * LENGTH]).view(-1, LENGTH)
        rows.append(windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))][: number // 3])
    return torch.cat(rows)


def trained(seed: int, ids: torch.Tensor) -> Any:
    """A DeepSeek-V4 of three layers whose first two look experts up by token, in a random table."""
    sizes = {"mlp_layer_types": ["hash_moe", "hash_moe", "moe"], "vocab_size": 2048, "hidden_size": 64}
    model: Any = tiny_model("deepseek_v4", seed=seed, num_experts=NUM_EXPERTS, **sizes).train()
    optimiser, draw = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95)), torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
        batch = ids[torch.randint(len(ids), (BATCH,), generator=draw)]
        optimiser.zero_grad()
        cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimiser.step()
    return model.requires_grad_(False).eval()


def errors(block: Any, hidden: torch.Tensor, ids: torch.Tensor, dropped: torch.Tensor) -> dict[str, float]:
    """Way → squared error of the layer's output, of the squared norm of what its routed experts add."""
    experts, flat, table, wanted = block.experts, hidden.flatten(0, 1), block.gate.tid2eid.clone(), block(hidden, ids)
    one, rows = torch.ones(len(flat), 1), normalize(block.gate.weight)
    outputs = torch.stack([experts(flat, one.long() * e, one).flatten() for e in range(NUM_EXPERTS)])
    weights = normalize(torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], dim=1))
    alike = {"router rows": rows @ rows.T, "weights": weights @ weights.T, "in turn": rows}
    alike["most used"] = table[ids].flatten().bincount(minlength=NUM_EXPERTS).float().expand(NUM_EXPERTS, -1)
    found, scale = {}, (wanted - block.shared_experts(hidden)).square().sum()
    for way, alike_EE in {**alike, "outputs on this text": -torch.cdist(outputs, outputs)}.items():
        new = table.clone()
        for column in range(new.shape[1]):
            where = torch.isin(new[:, column], dropped).nonzero()[:, 0]
            turn = (torch.arange(NUM_EXPERTS) - torch.arange(len(where))[:, None]) % NUM_EXPERTS
            score = -turn.float() if way == "in turn" else alike_EE[new[where, column]]
            score = score.index_fill(1, dropped, float("-inf")).scatter(1, new[where], float("-inf"))
            new[where, column] = score.argmax(1)
        block.gate.tid2eid.copy_(new)
        found[way] = round(float((block(hidden, ids) - wanted).square().sum() / scale), 3)
        block.gate.tid2eid.copy_(table)
    return found


if __name__ == "__main__":
    train, held_out = ids_of("train", 1200), ids_of("held-out", 60)
    for seed in range(3):
        model, seen = trained(seed, train), []
        blocks = [layer.mlp for layer in model.model.layers[:2]]
        for block in blocks:
            block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        print(f"seed {seed}: {model(held_out, labels=held_out).loss:.2f} nats a token")
        for number, (block, hidden) in enumerate(zip(blocks, tuple(seen), strict=True)):
            used = block.gate.tid2eid[held_out].flatten().bincount(minlength=NUM_EXPERTS)
            drawn = torch.randperm(NUM_EXPERTS, generator=torch.Generator().manual_seed(seed))
            for which, order in (("least used", used.argsort()), ("by chance", drawn)):
                print(f"layer {number}, {which}:", errors(block, hidden, held_out, order[:NUM_DROPPED]))
