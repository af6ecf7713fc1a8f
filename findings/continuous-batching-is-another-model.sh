#!/usr/bin/env bash
# Continuous batching answers BLOOM, MPT, Falcon, GPT-Neo and a soft-capped Gemma 2 as other models.
#
# transformers 5.23.0, torch 2.13.0.
#
# Expected: `generate_batch`, greedy, gives the tokens and log-probabilities of `generate`, or refuses
# a family that it cannot serve, as it does LFM2 and Llama 4 ("Invalid layer type").
# Seen: so it is for Llama, GPT-2 and many others. BLOOM, MPT, Falcon and GPT-Neo are served with other
# tokens (GPT-Neo from the second on), a single request, too; a log line says that their attention
# implementation cannot be set, and the answers come back as finished, without an error. Gemma 2,
# loaded with "eager" attention for the sake of its soft cap, is served without the cap, and no line
# says so. Apart from that, `min_new_tokens` is left out: an answer may end at its first token.
# Why it matters: it is the fast way to answer an evaluation's prompts. Compare a few answers with
# those of `generate` first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 transformers==5.23.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

transformers.logging.set_verbosity_error()
draw = torch.Generator().manual_seed(1)
prompts = [torch.randint(3, 24, (length,), generator=draw) for length in (14, 3, 9)]
greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
batching = ContinuousBatchingConfig(
    page_size=16, num_blocks=16, max_batch_tokens=64, return_logprobs=True
)


def tiny(family, **sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=24, hidden_size=32, eos_token_id=None, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(2 * torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return model


def served(model, texts, eos=-1, **options):
    config = GenerationConfig(eos_token_id=eos, **greedy, **options)
    inputs = [text.tolist() for text in texts]
    answers = model.generate_batch(inputs, config, batching, warmup=False)
    assert all(answer.error is None for answer in answers.values()), "not as expected"
    return list(answers.values())


@torch.no_grad()
def measure(model):
    """Give the error of the first tokens' log-probabilities, the right answers, one asked alone."""
    errors, right, alone = [], 0, None
    first = served(model, prompts[:1])[0].generated_tokens
    for text, answer in zip(prompts, served(model, prompts)):
        mask = torch.ones_like(text[None])
        plain = model.generate(text[None], attention_mask=mask, eos_token_id=None, **greedy)
        expected = plain[0, len(text) :].tolist()
        right += answer.generated_tokens == expected
        alone = first == expected if text is prompts[0] else alone
        scores = model(input_ids=text[None], use_cache=False).logits[0, -1].log_softmax(dim=-1)
        errors.append(abs(scores[answer.generated_tokens[0]].item() - answer.logprobs[0]))
    return max(errors), right, alone


two = {"num_hidden_layers": 2, "num_attention_heads": 4}
grouped = two | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
llama = tiny("llama", **grouped)
right = {
    "llama": measure(llama),
    "gpt2": measure(tiny("gpt2", n_layer=2, n_head=4)),
    "gemma2, no soft cap": measure(tiny("gemma2", attn_logit_softcapping=None, **grouped)),
}
wrong = {
    "gemma2, soft cap": measure(tiny("gemma2", attn_logit_softcapping=0.2, **grouped)),
    "bloom": measure(tiny("bloom", n_layer=2, n_head=4)),
    "mpt": measure(tiny("mpt", n_layers=2, n_heads=4, expansion_ratio=2)),
    "falcon": measure(tiny("falcon", num_kv_heads=4, new_decoder_architecture=True, **two)),
    "gpt_neo": measure(tiny("gpt_neo", num_layers=2, attention_types=[[["global"], 2]], num_heads=4)),
}
every = list(range(24))
lengths = [len(a.generated_tokens) for a in served(llama, prompts, every, min_new_tokens=4)]
for family, (error, right_answers, alone) in (right | wrong).items():
    print(f"{family}: log-probability off by {error:.2g}; as by generate {right_answers} of 3; "
          f"one alone {alone}")
print("lengths with min_new_tokens=4:", lengths)
assert all(e < 1e-4 and n == 3 and a for e, n, a in right.values()), "not as expected"
assert wrong.pop("gemma2, soft cap")[0] > 1e-3, "the behaviour has changed"
assert all(n < 3 and not a for _, n, a in wrong.values()), "the behaviour has changed"
assert lengths == [1, 1, 1], "the behaviour has changed"
PY
