"""The generic MoE adapter: the only package that knows transformers' conventions.

structure   everything that is indexed by expert, found by building the model twice on the meta device
probe       how a block routes, found by running a part of it on random weights
modules     any model's modules and tensors: by name, in evaluation mode
logits      the linear map inside a router: seen, masked, replaced
routing     masking experts inside a router; the rule that turns logits into weights
adapter     who explains a model: adapters of plugins, or what is found by itself
counts      numbers of experts that differ from layer to layer: config, building, slicing
tokens      what a statistic sees: the tokens of one batch at one layer
tap         watching a layer while the model runs
entry       our own key of the config
skip_rule   which of a token's experts are skipped: formulas, and the JSON that says so
skip_state  what a layer knows while it skips
counter     how many experts the tokens of a running model use
skip_layers how each kind of block is made to skip
skipping    on, off, and counted
pairs       routers that return lists of (token, expert) pairs
weights     norms of the experts' weights
stored      what becomes of a checkpoint's tensors when experts are removed, by names and shapes
model       MoEModel: layers, masked, watched, keep
"""

from compressor.moe.adapter import Adapter, structure_of
from compressor.moe.counter import Counter
from compressor.moe.counts import settle, uneven_class, uneven_counts
from compressor.moe.entry import KEY, read_entry
from compressor.moe.model import Kept, MoEModel, Removal, check_kept, count_problem, refuse_quantised
from compressor.moe.modules import evaluating, tensor_at
from compressor.moe.probe import SWITCHED_OFF
from compressor.moe.routing import RoutingRule, relabelled
from compressor.moe.skip_layers import is_decorated
from compressor.moe.skip_rule import SkipRule
from compressor.moe.skipping import fitting_rules, skip_problem
from compressor.moe.stored import Fate, fates, ignored_names, loading_info
from compressor.moe.structure import ConfigLeaf, ExpertAxis, MoELayer, Structure, find_structure, layers_said
from compressor.moe.tap import RealTokens
from compressor.moe.tokens import RankedChunk, RoutedTokens, gram_of
from compressor.moe.weights import expert_weight_norms

__all__ = [
    "KEY",
    "SWITCHED_OFF",
    "Adapter",
    "ConfigLeaf",
    "Counter",
    "ExpertAxis",
    "Fate",
    "Kept",
    "MoELayer",
    "MoEModel",
    "RankedChunk",
    "RealTokens",
    "Removal",
    "RoutedTokens",
    "RoutingRule",
    "SkipRule",
    "Structure",
    "check_kept",
    "count_problem",
    "evaluating",
    "expert_weight_norms",
    "fates",
    "find_structure",
    "fitting_rules",
    "gram_of",
    "ignored_names",
    "is_decorated",
    "layers_said",
    "loading_info",
    "read_entry",
    "refuse_quantised",
    "relabelled",
    "settle",
    "skip_problem",
    "structure_of",
    "tensor_at",
    "uneven_class",
    "uneven_counts",
]
