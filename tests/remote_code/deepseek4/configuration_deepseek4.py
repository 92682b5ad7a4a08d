from transformers import PreTrainedConfig


class Deepseek4Config(PreTrainedConfig):
    model_type = "deepseek4"

    vocab_size: int = 64
    hidden_size: int = 32
    intermediate_size: int = 48
    moe_intermediate_size: int = 24
    num_hidden_layers: int = 3
    first_k_dense_replace: int = 1
    n_routed_experts: int = 8
    n_shared_experts: int = 2
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.5
    max_position_embeddings: int = 128
