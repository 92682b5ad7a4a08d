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
    """Converted by llama.cpp's own converter, as 32-bit numbers."""
    import torch
    from llama_cpp import Llama

    target = Path(folder).with_suffix(".gguf")
    _convert(folder, target)
    model = Llama(str(target), n_ctx=512, logits_all=True, verbose=False)

    def logits(ids: Sequence[int]) -> Any:
        model.reset()
        model.eval(list(ids))
        return torch.from_numpy(model.scores[: len(ids)].copy())

    return [by_logits(logits, row) for row in rows]


def _convert(folder: str, target: Path) -> None:
    """The tokenizer of these models is known to no converter: it is taken for GPT-2's, since ids are what is asked."""
    sys.path.insert(0, os.environ["LLAMA_CPP"])
    import convert_hf_to_gguf as converter

    for name in ("ModelBase", "TextModel"):
        getattr(converter, name).get_vocab_base_pre = lambda *_: "gpt-2"
    sys.argv = ["convert", folder, "--outfile", str(target), "--outtype", "f32"]
    converter.main()


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
