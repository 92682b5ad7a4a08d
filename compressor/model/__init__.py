"""A transformers MoE model: structure, routing, capture, skipping; nothing else knows transformers' conventions."""
