"""Run by test_vllm.py with the Python of an environment that has vLLM and no klas_hf: tokens for prompts, as JSON.

Usage: vllm_run.py CHECKPOINT PROMPTS RESULT OPTIONS, of which the last three are JSON and its files: lists of token ids
in, `{"tokens": …, "cached": …}` out, and options for `vllm.LLM`.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path


def main(checkpoint: str, prompts: str, result: str, options: str) -> None:
    from vllm import LLM, SamplingParams

    assert find_spec("klas_hf") is None
    llm = LLM(
        checkpoint,
        trust_remote_code=True,
        model_impl="transformers",
        enforce_eager=True,
        dtype="float32",
        max_model_len=256,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        block_size=32,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        **json.loads(options),
    )
    asked = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    answers = llm.generate(asked, SamplingParams(temperature=0, max_tokens=16, detokenize=False))
    found = {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "cached": sum(answer.num_cached_tokens for answer in answers),
    }
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
