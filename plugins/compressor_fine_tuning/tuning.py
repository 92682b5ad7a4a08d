"""Training, as small as it can be. Dimensions: B sequences, S positions, N real tokens that have a next one, V words.

Models stay in evaluation mode: no dropout, so the same seed trains the same weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from compressor.plugin import OptionError

if TYPE_CHECKING:
    from compressor.plugin import Training
    from compressor_fine_tuning.method import FineTuningOptions

_STATE = "state.safetensors"
_WEIGHT, _MOMENT = "weight.", "moment."
"""Tensors of it: what is trained, by name, and what the optimiser keeps of each, by its number and key."""
_WARMING = 0.05
_LARGEST_NORM = 1.0


def kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """[N] nats: KL(p ‖ q) of the next-token distributions, in float32."""
    p_NV, q_NV = teacher_NV.float().log_softmax(-1), student_NV.float().log_softmax(-1)
    return functional.kl_div(q_NV, p_NV, reduction="none", log_target=True).sum(-1)


def token_losses(model: Any, teacher: Any | None, batch: Any) -> Tensor:
    """[N] nats, of every token that has a next one: KL to the teacher, or without one −log q of what comes."""
    device = next(model.parameters()).device
    ids_BS, mask_BS = batch.input_ids.to(device), batch.attention_mask.to(device)
    has_next = mask_BS[:, 1:].bool()

    def answers(of: Any) -> Tensor:
        logits_BSV: Tensor = of(input_ids=ids_BS, attention_mask=mask_BS.long(), use_cache=False).logits
        return logits_BSV[:, :-1][has_next]

    student_NV = answers(model)
    if teacher is None:
        return functional.cross_entropy(student_NV.float(), ids_BS[:, 1:][has_next], reduction="none")
    with torch.no_grad():
        teacher_NV = answers(teacher)
    return kl(teacher_NV, student_NV)


@torch.no_grad()
def mean_loss(model: Any, teacher: Any | None, batches: Sequence[Any]) -> float:
    """Nats a token, over all of these batches' tokens."""
    found = torch.cat([token_losses(model, teacher, batch).double().cpu() for batch in batches])
    return float(found.mean())


def learning_rate(step: int, steps: int, largest: float) -> float:
    """That of a step, counted from 0: rising over the first twentieth, then falling to nothing in a line."""
    warming = max(1, round(_WARMING * steps))
    return largest * min((step + 1) / warming, (steps - step) / max(1, steps - warming + 1))


def order(num_batches: int, seed: int) -> Iterator[int]:
    """Which batch comes next: all in a new order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(num_batches, generator=generator).tolist()


def tuned(
    model: Any, teacher: Any | None, names: Sequence[str] | None, options: FineTuningOptions, training: Training
) -> Any:
    """The model, trained and merged; `names`: weights with lora beside them, None to train all in float32, but for the
    zeros in matrices, which a pass before may have made.
    """
    dtypes = {name: one.dtype for name, one in model.named_parameters()}
    before = {name: model.get_parameter(name).detach().cpu().clone() for name in names or ()}
    if names is None:
        wrapped = model.float().requires_grad_(True)
    else:
        wrapped = with_lora(model, names, options.rank, training.seed)
    zeros = {name: one == 0 for name, one in wrapped.named_parameters() if names is None and one.ndim > 1}
    _train(wrapped, teacher, zeros, options, training)
    if names is None:
        for name, one in model.named_parameters():
            one.data = one.data.to(dtypes[name])
    else:
        model = wrapped.merge_and_unload()
        refuse_unchanged(model, before)
    return model.requires_grad_(False)


def with_lora(model: Any, names: Sequence[str], rank: int, seed: int) -> Any:
    """The model with lora beside these weights, which are frozen with all others: `target_modules` where they are a
    linear layer's, else `target_parameters`.
    """
    from peft import LoraConfig, get_peft_model

    owners = {name: name.rpartition(".")[0] for name in names}
    linear = [owner for owner in owners.values() if isinstance(model.get_submodule(owner), nn.Linear)]
    others = [name for name, owner in owners.items() if owner not in linear]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=linear,
        target_parameters=others or None,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
        )  # peft asks for it
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def refuse_unchanged(model: Any, before: dict[str, Tensor]) -> None:
    """Raise OptionError where a trained weight is, merged and rounded, what it was."""
    same = [name for name, one in before.items() if torch.equal(model.get_parameter(name).detach().cpu(), one)]
    if same:
        raise OptionError(
            None,
            f"{len(same)} of {len(before)} trained weights are what they were, such as {same[0]}: train for more steps "
            f"or with a larger learning_rate, or leave the part out",
        )


def _train(
    model: Any, teacher: Any | None, zeros: Mapping[str, Tensor], options: FineTuningOptions, training: Training
) -> None:
    """All steps that are left; what is trained and the optimiser's state are written into the work folder. Weights have
    no gradient, and so no step, where `zeros`, by name, say so.
    """
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), betas=(0.9, 0.95), weight_decay=0.0)
    done = _resumed(training.work / _STATE, trained, optimiser)
    numbers = order(len(training.batches), training.seed)
    with training.progress.task("fine_tuning: steps") as update:
        for step, number in zip(range(options.steps), numbers, strict=False):
            if step < done:
                continue
            optimiser.param_groups[0]["lr"] = learning_rate(step, options.steps, options.learning_rate)
            loss = token_losses(model, teacher, training.batches[number]).mean()
            if not torch.isfinite(loss):
                raise OptionError("learning_rate", f"in step {step} the loss is {loss.item()}: give a smaller one")
            torch.autograd.backward(loss)
            for name, mask in zeros.items():
                if (gradient := trained[name].grad) is not None:
                    gradient.masked_fill_(mask, 0)
            nn.utils.clip_grad_norm_(trained.values(), _LARGEST_NORM)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if (step + 1) % options.save_every == 0:
                _save(training.work / _STATE, step + 1, trained, optimiser)
            update(step + 1, options.steps)


def _save(path: Path, done: int, trained: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    tensors = {f"{_WEIGHT}{name}": one.detach().contiguous() for name, one in trained.items()}
    for number, kept in optimiser.state_dict()["state"].items():
        tensors |= {f"{_MOMENT}{number}.{key}": one.contiguous() for key, one in kept.items()}
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, {"done": str(done)})
    partial.replace(path)


@torch.no_grad()
def _resumed(path: Path, trained: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    """How many steps a run before has done, whose state is taken over."""
    if not path.exists():
        return 0
    moments: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for name, one in trained.items():
            one.copy_(file.get_tensor(f"{_WEIGHT}{name}"))
        for name in file.keys():  # noqa: SIM118 - no mapping
            if name.startswith(_MOMENT):
                number, _, key = name.removeprefix(_MOMENT).partition(".")
                moments.setdefault(int(number), {})[key] = file.get_tensor(name)
        done = int(file.metadata()["done"])
    optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    return done
