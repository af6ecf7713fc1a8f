"""Tables of what generation costs on a tuned model."""

from __future__ import annotations

from typing import Any

from cells import made_by, number, table

WAYS = {
    "generate": "`generate` of the merged model",
    "dense": "dense mixture on it",
    "early_exit": "transformers' `assistant_early_exit`",
    "lookup": "transformers' `prompt_lookup_num_tokens`",
    "lazy_depth": "`LazyDepth` before",
    "self_speculation": "`SelfSpeculation` before",
    "earlier_generate": "`generate` in that process",
    "fast_lossless": "**`FastGeneration`**",
    "fast_lossy": "**`FastGeneration`**, `verify=False`",
    "fast": "**`FastGeneration`**",
}

FOREIGN = {"alpaca": "Alpaca's prompts", "untuned": "the untuned model"}


def generation_table(results: dict[str, Any]) -> str:
    """Compare the ways to generate, by batch size, and where calibration has not been."""
    groups = [(f"batch {size}", found) for size, found in results["batches"].items()]
    groups += [(FOREIGN[name], found) for name, found in results["foreign"].items()]
    rows = [
        [_label(name, results["settings"]), where, *_cells(found[name])]
        for where, found in groups
        for name in WAYS
        if name in found
    ]
    header = ["way", "on", "tokens/s", "against `generate`", "95 %", "texts the same"]
    tuned = results["tuned"]
    plan, expected = results["plan"], results["expected"]
    text = (
        f"Model {tuned['model']['sha256'][:8]} (seed {tuned['model']['training']['seed']}, "
        f"{tuned['model']['num_steps']} steps of 16), exits at "
        f"{', '.join(map(str, tuned['exits']['layers']))}, of which "
        f"{', '.join(map(str, plan['exits']))} draft; {results['num_prompts']} prompts. The model "
        f"of costs expected {expected['lossless_here']['speed_up']:.2f} on their texts at batch "
        f"1, and {expected['lossless']['speed_up']:.2f} on others. {made_by(results)}"
    )
    return f"{text}\n\n{table(header, rows)}"


TEXTS = {
    "problems": "word problems",
    "new-templates": "word problems of templates that it has not seen",
    "gsm8k": "GSM8K, worked answers",
    "alpaca": "Alpaca's instructions",
}


def texts_table(results: dict[str, Any]) -> str:
    """Compare fast generation with the model's own on other texts, and in bfloat16."""
    rows = []
    for key, case in results["cases"].items():
        steps = case["model"]["num_steps"]
        rows.append(
            [
                f"`{key}`",
                f"{TEXTS[case['records']]}, {steps} steps, {case['dtype']}",
                f"{case['ratio']:.2f}",
                f"{case['low']:.2f}-{case['high']:.2f}",
                f"{case['expected']['speed_up']:.2f}",
                f"{case['num_same']} of {case['num_texts']}",
            ]
        )
    header = ["ratio", "tuned on and asked", "measured", "95 %", "expected", "texts the same"]
    return f"{made_by(results)}\n\n{table(header, rows)}"


def generation_ratios(results: dict[str, Any]) -> str:
    """List the ratios with their intervals."""
    rows = [
        [f"`{key}`", f"{value:.2f}", "{:.2f}-{:.2f}".format(*results["intervals"][key])]
        for key, value in results["ratios"].items()
    ]
    return table(["ratio", "measured", "95 %"], rows)


def _label(name: str, settings: dict[str, str]) -> str:
    """Name a way, with the setting that was chosen."""
    setting = settings.get(name)
    return WAYS[name] if setting is None else f"{WAYS[name]} ({setting})"


def _cells(way: dict[str, float]) -> list[str]:
    """Give the numbers of a way."""
    return [
        number(way["tokens_per_second"]),
        f"{way['ratio']:.2f}",
        f"{way['low']:.2f}-{way['high']:.2f}",
        f"{way['num_same']} of {way['num_texts']}",
    ]
