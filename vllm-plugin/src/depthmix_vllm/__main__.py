"""Hold vLLM to what an export said when it was made: `python -m depthmix_vllm OUT`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

TOLERANCES = {"float32": 0.01, "bfloat16": 0.5, "float16": 0.1}
"""Nats by which a log-probability may differ, by the type in which vLLM computes."""


def main() -> int:
    """Compare log-probabilities and greedy tokens; the exit code is 1 where they differ."""
    parser = argparse.ArgumentParser(prog="python -m depthmix_vllm", description=__doc__)
    parser.add_argument("folder", type=Path, help="an export of the form vllm or transformers")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    options = parser.parse_args()
    expected = json.loads((options.folder / "check.json").read_text("utf-8"))

    import vllm
    from vllm import LLM, SamplingParams

    longest = max(map(len, expected["prompts"])) + len(expected["tokens"][0]) + 1
    model = LLM(str(options.folder), dtype=options.dtype, max_model_len=longest)
    prompts = [{"prompt_token_ids": ids} for ids in expected["prompts"]]
    num_tokens = len(expected["tokens"][0])
    greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    said = [one.outputs[0].token_ids for one in model.generate(prompts, greedy)]
    rows = [a + b for a, b in zip(expected["prompts"], expected["tokens"], strict=True)]
    reading = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    read = model.generate([{"prompt_token_ids": ids} for ids in rows], reading)
    difference, num_equal = 0.0, 0
    for number, tokens in enumerate(expected["tokens"]):
        found = read[number].prompt_logprobs[-num_tokens:]
        own = [place[token].logprob for place, token in zip(found, tokens, strict=True)]
        pairs = zip(own, expected["logprobs"][number], strict=True)
        difference = max(difference, *(abs(a - b) for a, b in pairs))
        same = [a == b for a, b in zip(said[number], tokens, strict=True)]
        num_equal += [*same, False].index(False)
    allowed = TOLERANCES[options.dtype]
    total = sum(map(len, expected["tokens"]))
    print(
        f"vLLM {vllm.__version__} in {options.dtype}: log-probabilities differ by at most "
        f"{difference:.2g} nats, where {allowed:g} is allowed, and {num_equal} of {total} greedy "
        "tokens are the run's."
    )
    return 0 if difference <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())
