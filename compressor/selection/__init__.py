"""Choosing the experts that stay, from figures gathered at a MoE layer. Nothing here runs a model.

* ``activation_sums``: raw sums per domain and expert, from which every criterion is computed
* ``criteria``: what a criterion is: sums → a score for each expert
* ``exact``: the paper's objective for every set of kept experts, where there are few enough
* ``token_grams``: what is kept of each token for the search among too many sets: best ranks and their Gram matrix
* ``greedy``: the same objective, searched: exact greedy removal, then best swaps
* ``objective``: losses per batch and domain → the one number that is minimised
* ``allocation``: a number of experts shared out among layers
"""
