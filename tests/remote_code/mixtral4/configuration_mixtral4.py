from transformers import PreTrainedConfig


class Mixtral4Config(PreTrainedConfig):
    model_type = "mixtral4"

    vocab_size: int = 64
    hidden_size: int = 32
    intermediate_size: int = 24
    num_hidden_layers: int = 3
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 128
