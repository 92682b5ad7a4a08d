"""Skip experts while a model runs: only the (token, expert) pairs that stay are evaluated. On, off, and counted.

What a layer needs while it skips is a `LayerSkip` on one of its modules. It is copied with the model, belongs to this
model alone, and is gone when skipping is switched off. `layers` has the ways of doing it, `rule` the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from compressor.errors import CheckpointError, UnsupportedModelError
from compressor.model.block_rule import rule_of_block
from compressor.model.config_entry import KEY, read_entry
from compressor.model.skipping.layers import INSTALLERS
from compressor.model.skipping.rule import VERSION, SkipRule
from compressor.model.skipping.state import STATE, LayerSkip, Raised, Switch
from compressor.model.skipping.usage import Counter
from compressor.model.structure import MoELayer, Structure

_SWITCH = "_compressor_switch"
"""The attribute of a model that holds its Switch within a context, whether it has layers that skip or not yet."""


def rules_of(config: Any) -> dict[str, SkipRule]:
    """Layer path → rule, as far as the config says. Raises CheckpointError where it is damaged or newer than we."""
    part = read_entry(config).get("skipping")
    if part is None:
        return {}
    is_known = set(part) == {"version", "layers"} and type(part["version"]) is int and part["version"] == VERSION
    if not is_known or not isinstance(part["layers"], Mapping):
        raise CheckpointError(
            f'config.json: `{KEY}.skipping` should be {{"version": {VERSION}, "layers": {{layer path: rule}}}}, found '
            f"version {part.get('version')!r} and the keys {', '.join(part) or 'nothing'}. A newer version of "
            f"moe-compressor may read it."
        )
    rules = {}
    for path, rule in part["layers"].items():
        try:
            rules[path] = SkipRule.from_json(rule if isinstance(rule, Mapping) else {})
        except ValueError as error:
            raise CheckpointError(f"config.json: `{KEY}.skipping`: {path}: {error}.") from error
    return rules


def fitting_rules(structure: Structure, config: Any) -> dict[str, SkipRule]:
    """The same; also CheckpointError where they do not fit, UnsupportedModelError where a layer cannot skip."""
    rules = rules_of(config)
    try:
        refuse_rules(structure, rules)
    except ValueError as error:
        raise CheckpointError(f"config.json: `{KEY}.skipping`: {error}.") from error
    return rules


def rules_json(rules: Mapping[str, SkipRule]) -> dict[str, Any]:
    """The part of the config that `rules_of` reads; empty without rules."""
    return {"version": VERSION, "layers": {path: rule.to_json() for path, rule in rules.items()}} if rules else {}


@contextmanager
def counting(model: nn.Module, counter: Counter) -> Iterator[None]:
    """Within the context every layer that skips adds what it does to the counter."""
    with _switch_on(model) as switch, counter.listening(model):
        switch.counters.append(counter)
        try:
            yield
        finally:
            switch.counters.remove(counter)


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Within the context nothing skips, in all of the model that this is a part of."""
    with _switch_on(model) as switch:
        switch.pause()
        try:
            yield
        finally:
            switch.resume()


@contextmanager
def _switch_on(model: nn.Module) -> Iterator[Switch]:
    """The model's switch, which layers that begin to skip within the context get too."""
    is_outermost = _SWITCH not in model.__dict__
    switch = model.__dict__[_SWITCH] = _switch(model)
    try:
        yield switch
    finally:
        if is_outermost:
            del model.__dict__[_SWITCH]


def _switch(model: nn.Module) -> Switch:
    """That of the layers that skip, or of a context that the model or a part of it is in; else a new one."""
    held = next((module.__dict__[_SWITCH] for module in model.modules() if _SWITCH in module.__dict__), None)
    return next((state.switch for state in states(model).values()), held or Switch())


def states(model: nn.Module) -> dict[str, LayerSkip]:
    """Layer path → what it knows, of the layers that skip, paused or not."""
    found = (module.__dict__.get(STATE) for module in model.modules())
    return {state.path: state for state in found if isinstance(state, LayerSkip)}


def install(model: nn.Module, structure: Structure, rules: Mapping[str, SkipRule], *, zeroed: bool = False) -> None:
    """Let the layers named skip by these `rules` (through `refuse_rules`) in place of others, which stay if it fails.
    Raises ValueError where layers share experts and not rules, UnsupportedModelError where a block's choice is unknown.
    """
    reinstate(model, structure, {path: (rule, zeroed) for path, rule in rules.items()}, states(model))


def reinstate(
    model: nn.Module, structure: Structure, wanted: Mapping[str, tuple[SkipRule, bool]], before: Mapping[str, LayerSkip]
) -> None:
    """Layer path → (rule, whether zeroed), in place of `before`; what was found out about a layer is kept."""
    own = {layer.path for layer in structure.layers}
    foreign = next((path for path in before if path not in own), None)
    if foreign is not None:
        raise ValueError(f"this is a part of a model that skips experts ({foreign}); change its rules as a whole")
    switch = next((state.switch for state in before.values()), None) or _switch(model)
    remove(model)
    try:
        for layer in structure.layers:
            if layer.path in wanted:
                _install_layer(model, structure, layer, *wanted[layer.path], switch, before.get(layer.path))
    except BaseException:
        remove(model)
        for layer in structure.layers:
            if layer.path in before:
                old = before[layer.path]
                _install_layer(model, structure, layer, old.rule, old.zeroed, switch, old)
        raise


def restore(model: nn.Module, structure: Structure, config: Any) -> None:
    """Switch on what the config says. Raises CheckpointError where its rules do not fit the model."""
    rules = fitting_rules(structure, config)
    try:
        install(model, structure, rules)
    except ValueError as error:  # layers that share their experts
        raise CheckpointError(f"config.json: `compressor.skipping`: {error}.") from error


def remove(model: nn.Module) -> None:
    """Let all layers run as they would without us."""
    for module in model.modules():
        state = module.__dict__.pop(STATE, None)
        if isinstance(state, LayerSkip):
            for undo in state.removals:
                undo()
            for one in state.switch.raised:
                one.lower()
            state.removals.clear()
            state.switch.raised.clear()


def refuse_rules(structure: Structure, rules: Mapping[str, SkipRule]) -> None:
    """Raise ValueError or UnsupportedModelError if these layers cannot skip like this."""
    layers = {layer.path: layer for layer in structure.layers}
    for path, rule in rules.items():
        if path not in layers:
            raise ValueError(f"there is no MoE layer {path!r} to skip experts in; the layers are {', '.join(layers)}")
        layer = layers[path]
        problem = rule.problem(layer.num_experts, layer.top_k)
        if problem:
            raise ValueError(f"{path}: {problem}")
        problem = _wider_problem(layer, rule)
        if problem:
            raise UnsupportedModelError(f"{path}: {problem}.")
        if len(layer.containers) > 1:
            raise UnsupportedModelError(
                f"{path}: its experts are in {len(layer.containers)} lists; this needs a plugin."
            )


def skip_problem(layer: MoELayer, rule: SkipRule) -> str | None:
    """Why a layer cannot skip by this rule; None if it can."""
    return rule.problem(layer.num_experts, layer.top_k) or _wider_problem(layer, rule)


def _wider_problem(layer: MoELayer, rule: SkipRule) -> str | None:
    """Why its router cannot be asked for as many experts as the rule normalises over."""
    if rule.normalise_over is None or rule.normalise_over <= layer.top_k:
        return None
    size = layer.num_experts // layer.num_groups * layer.num_chosen_groups
    if layer.wider_problem is None and rule.normalise_over > size:
        return f"its router chooses among {size} experts, so it cannot name {rule.normalise_over}"
    return layer.wider_problem


def _install_layer(
    model: nn.Module,
    structure: Structure,
    layer: MoELayer,
    rule: SkipRule,
    zeroed: bool,
    switch: Switch,
    before: LayerSkip | None,
) -> None:
    state = LayerSkip(
        layer.path,
        rule,
        layer.num_experts,
        top_k=max(layer.top_k, rule.normalise_over or 0),
        zeroed=zeroed,
        has_identity=layer.num_extra_choices > 0,
        switch=switch,
        routing=before.routing if before else None,
    )
    call = layer.router_probe.call
    owner = model.get_submodule({"list": layer.path, "pairs": layer.router}.get(call, layer.experts))
    other: LayerSkip | None = owner.__dict__.get(STATE)
    if other is not None:  # a module that stands in two places of the model
        if (other.rule, other.zeroed) != (rule, zeroed):
            raise ValueError(f"{layer.path} and {other.path} share their experts, so they must skip by the same rule")
        state = other
    if state.top_k > layer.top_k:
        _ask_for_more(model, structure, layer, state)
    if other is not None:
        return
    if call == "list" and layer.router_probe.index_position is None and state.routing is None:
        state.routing = rule_of_block(model, layer)
    INSTALLERS[call](model, layer, state)
    owner.__dict__[STATE] = state


def _ask_for_more(model: nn.Module, structure: Structure, layer: MoELayer, state: LayerSkip) -> None:
    """Let the layer's router name more experts than the model takes. The config stays as it is."""
    for (path, attribute), (stride, extra) in structure.top_k_integers.items():
        if path == layer.path or path.startswith(layer.path + "."):
            own, wider = (stride * number + extra for number in (layer.top_k, state.top_k))
            raised = Raised(state.switch, model.get_submodule(path), attribute, own, wider)
            state.switch.raised.append(raised)
            state.removals.append(model.get_submodule(layer.path).register_forward_pre_hook(raised).remove)
            if state.is_on:
                raised.lift()
