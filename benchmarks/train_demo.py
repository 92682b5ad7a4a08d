"""Train the demo model that ships in ``compressor/data/demo/model``: ``prepare`` once, then ``train``.

    python benchmarks/train_demo.py prepare
    python benchmarks/train_demo.py train --minutes 30 --threads 1 --output compressor/data/demo/model
    python benchmarks/train_demo.py train --experts 64 --top-k 8 --expert-width 64 --output fine-grained
    python benchmarks/train_demo.py train --model-type olmoe --experts 64 --top-k 8 --expert-width 64 --output olmoe

``prepare`` trains the tokenizer on the train split and writes it, with the token ids of both splits, to the
cache folder. ``train`` makes a Mixtral from random weights, a Qwen3-MoE, or an OLMoE, whose router does not
renormalise. It ran on CPU, CUDA is untried; the learning rate follows the clock, so that a run of ``--minutes``
ends annealed on any machine (its figures depend on the speed).

The matrices inside the layers are trained with Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon:
momentum, then the nearest orthogonal matrix by five Newton-Schulz steps; every expert is a matrix of its
own), everything else with AdamW. Not covered: a comparison of the two, and data that does not fit in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from compressor.data.demo import corpus

CACHE = Path(".cache/demo")
VOCABULARY = 2048
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SHARES = {"code": 0.40, "prose": 0.40, "arithmetic": 0.20}
BETAS = (0.9, 0.95)


# ------------------------------------------------------------------------------------ tokenizer and ids


def prepare(cache: Path) -> None:
    """Train the tokenizer on the train split and write the token ids of every domain and split."""
    texts = {
        (domain, split): list(corpus.documents(domain, split)) for domain in corpus.DOMAINS for split in corpus.SPLITS
    }
    tokenizer = train_tokenizer([text for (_, split), docs in texts.items() if split == "train" for text in docs])
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(cache / "tokenizer")
    num_tokens = {}
    for (domain, split), docs in texts.items():
        encoded = tokenizer(docs, add_special_tokens=True)["input_ids"]
        stream = np.concatenate([np.array([*ids, tokenizer.eos_token_id], np.uint16) for ids in encoded])
        np.save(cache / f"{domain}.{split}.npy", stream)
        num_tokens[f"{domain}/{split}"] = len(stream)
    facts = {"fingerprint": python_fingerprint(texts), "tokens_in_corpus": num_tokens}
    (cache / "corpus.json").write_text(json.dumps(facts, indent=2))
    print(json.dumps(facts, indent=2))


def python_fingerprint(texts: dict[tuple[str, str], list[str]]) -> dict[str, str]:
    """Python's version, and a digest of the documents of each domain and split."""
    fingerprint = {"python": platform.python_version()}
    for (domain, split), documents in texts.items():
        digest = hashlib.blake2b(digest_size=16)
        for document in documents:
            digest.update(document.encode() + b"\0")
        fingerprint[f"{domain}/{split}"] = digest.hexdigest()
    return fingerprint


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every digit is a token and every text begins with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def draw_batch(
    streams: dict[str, np.ndarray], rng: np.random.Generator, batch: int, context: int, device: str
) -> torch.Tensor:
    """Windows of the streams in the fixed proportions, int64 [batch, context]. Half begin with BOS."""
    counts = {domain: round(share * batch) for domain, share in SHARES.items()}
    rows = []
    for domain, count in counts.items():
        stream = streams[domain]
        starts = rng.integers(0, len(stream) - context - 1, size=count)
        rows += [stream[start : start + context] for start in starts]
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    ids[::2, 0] = 0  # BOS, as at the start of whatever the model is later given
    return ids.to(device)


# -------------------------------------------------------------------------------------------- optimizer


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for parameters of shape [..., rows, columns]."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
                buffer.lerp_(param.grad, 1 - group["momentum"])
                update = orthogonalised(param.grad.lerp(buffer, group["momentum"]))
                scale = 0.2 * math.sqrt(max(param.shape[-2:]))  # the root mean square of an AdamW step
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * scale)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """Nearest orthogonal matrix of each [..., rows, columns], by five quintic Newton-Schulz steps."""
    x = matrices.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


def muon_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """The layers' matrices, without the router's."""
    return [
        p for name, p in model.named_parameters() if ".layers." in name and p.ndim > 1 and ".gate.weight" not in name
    ]


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Load balance of Switch Transformers (Fedus et al. 2021, equation 4), 1 when even, mean over the layers.

    transformers' own pools the layers before it compares experts, so that a layer's idle expert is excused by
    a busy one of the same number elsewhere; with it several experts here were idle after four minutes. The batch is a
    mixture, so an expert may still serve one domain alone. ``router_logits``: [tokens, experts] of each.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        chosen = probabilities.topk(top_k, dim=-1).indices
        share_of_tokens = torch.zeros_like(probabilities).scatter_(1, chosen, 1 / top_k).mean(dim=0)
        losses.append(logits.shape[-1] * (share_of_tokens * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def learning_rate_factor(progress: float) -> float:
    """Warm-up over the first 2 %, then a cosine down to a hundredth; ``progress`` in 0–1."""
    if progress < 0.02:
        return progress / 0.02
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.02) / 0.98)))


# --------------------------------------------------------------------------------------------- training


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.hidden,
        "intermediate_size": args.expert_width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": args.top_k,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "router_aux_loss_coef": args.router_aux_loss_coef / args.top_k,  # transformers' loss is top_k when even, ours 1
        "output_router_logits": False,
        "use_cache": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if args.model_type == "olmoe":
        config: Any = OlmoeConfig(**shape, num_experts=args.experts, norm_topk_prob=False)
    elif args.model_type == "qwen3_moe":
        experts = {"num_experts": args.experts, "moe_intermediate_size": args.expert_width, "norm_topk_prob": True}
        config = Qwen3MoeConfig(**shape, **experts, head_dim=args.hidden // 4, max_window_layers=args.layers)
    else:
        config = MixtralConfig(**shape, num_local_experts=args.experts, sliding_window=None)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.cache / "tokenizer")
    streams = {
        split: {domain: np.load(args.cache / f"{domain}.{split}.npy") for domain in corpus.DOMAINS}
        for split in corpus.SPLITS
    }
    model = make_model(args, tokenizer).to(device)
    model.router_aux_loss_coef = 0.0  # balance_loss stands in for transformers' own
    if args.experts_implementation:
        model.set_experts_implementation(args.experts_implementation)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    muon_params = muon_parameters(model)
    chosen = {id(p) for p in muon_params}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(muon_params, lr=args.lr, momentum=0.95, weight_decay=args.weight_decay),
        torch.optim.AdamW(rest, lr=args.lr, betas=BETAS, weight_decay=0.0),
    ]
    curve: list[dict[str, Any]] = []
    start, step, next_report = time.monotonic(), 0, 0.0
    while True:
        progress = (time.monotonic() - start) / (60 * args.minutes)
        if progress >= next_report or progress >= 1:
            losses = held_out_losses(model, streams["held-out"], args.context, windows=24)
            curve.append({"step": step, "tokens": step * args.batch * args.context, **losses})
            minutes = (time.monotonic() - start) / 60
            print(f"{minutes:5.1f} min  {curve[-1]}", flush=True)
            next_report = progress + args.report_every
            if step and progress < 1:
                save(model, tokenizer, args, curve=curve, minutes=minutes, losses=losses)
        if progress >= 1:
            break
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate_factor(progress)
        model.train()
        ids = draw_batch(streams["train"], rng, args.batch, args.context, device)
        with torch.autocast(device, dtype=torch.bfloat16):
            output = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
            loss = output.loss + args.router_aux_loss_coef * balance_loss(output.router_logits, args.top_k)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
    minutes = (time.monotonic() - start) / 60
    losses = held_out_losses(model, streams["held-out"], args.context, windows=200)
    save(model, tokenizer, args, curve=curve, minutes=minutes, losses=losses)


@torch.no_grad()
def held_out_losses(
    model: PreTrainedModel, streams: dict[str, np.ndarray], context: int, windows: int
) -> dict[str, float]:
    """Mean cross-entropy in nats per token of evenly spaced held-out windows, for each domain."""
    model.eval()
    losses = {}
    for domain, stream in streams.items():
        starts = np.linspace(0, len(stream) - context - 1, windows).astype(int)
        ids = torch.from_numpy(np.stack([stream[s : s + context] for s in starts]).astype(np.int64))
        ids[:, 0] = 0
        total = 0.0
        for chunk in ids.to(model.device).split(24):
            with torch.autocast(model.device.type, dtype=torch.bfloat16):
                total += float(model(input_ids=chunk, labels=chunk, use_cache=False).loss) * len(chunk)
        losses[domain] = round(total / windows, 4)
    return losses


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
    *,
    curve: list[dict[str, Any]],
    minutes: float,
    losses: dict[str, float],
) -> None:
    """Write the checkpoint in bfloat16, the tokenizer, and ``training.json``: how the model came about."""
    args.output.mkdir(parents=True, exist_ok=True)
    copy = type(model)(model.config).to(torch.bfloat16)
    copy.load_state_dict({name: tensor.to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()})
    copy.generation_config = model.generation_config
    copy.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    settings_file = args.output / "tokenizer_config.json"
    tokenizer_settings = json.loads(settings_file.read_text())
    del tokenizer_settings["is_local"], tokenizer_settings["local_files_only"]  # where it was read from
    tokenizer_settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name other clients know
    settings_file.write_text(json.dumps(tokenizer_settings, indent=2) + "\n")
    on_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path) and name != "run"}
    record = {
        "seed": args.seed,
        "settings": settings,
        "shares": SHARES,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": device,
        "minutes": round(minutes, 1),
        "tokens_seen": curve[-1]["tokens"],
        **json.loads((args.cache / "corpus.json").read_text()),
        "held_out_loss": losses,
        "held_out_perplexity": {domain: round(math.exp(loss), 2) for domain, loss in losses.items()},
        "curve": curve,
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    preparing = commands.add_parser("prepare", help="train the tokenizer and tokenise the corpus")
    preparing.set_defaults(run=lambda args: prepare(args.cache))
    training = commands.add_parser("train", help="train the model")
    training.set_defaults(run=train)
    for command in (preparing, training):
        command.add_argument("--cache", type=Path, default=CACHE)
    training.add_argument("--output", type=Path, default=Path("compressor/data/demo/model"))
    training.add_argument("--minutes", type=float, default=30.0, help="wall-clock time of the training loop")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", default="auto")
    training.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    training.add_argument("--model-type", choices=("mixtral", "olmoe", "qwen3_moe"), default="mixtral")
    training.add_argument("--layers", type=int, default=4)
    training.add_argument("--hidden", type=int, default=128)
    training.add_argument("--expert-width", type=int, default=256)
    training.add_argument("--experts", type=int, default=8)
    training.add_argument("--top-k", type=int, default=2)
    training.add_argument("--batch", type=int, default=20, help="windows a step")
    training.add_argument("--context", type=int, default=256, help="tokens a window")
    training.add_argument("--lr", type=float, default=0.006)
    training.add_argument("--weight-decay", type=float, default=0.1)
    training.add_argument("--router-aux-loss-coef", type=float, default=0.02)
    training.add_argument("--experts-implementation", default=None, help="eager, batched_mm or grouped_mm")
    training.add_argument("--report-every", type=float, default=0.05, help="fraction of the run between reports")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
