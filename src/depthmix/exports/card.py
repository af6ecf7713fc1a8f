"""The card of an export: what it is, how it is loaded, what it lacks."""

from __future__ import annotations

from pathlib import Path

from depthmix.data.forms import ALPACA_PROMPT
from depthmix.exports.losses import ExportLoss
from depthmix.files.markdown import escape
from depthmix.models.sources import HUB_ID
from depthmix.models.template import RunTemplate

TITLES = {
    "transformers": "A mixture of depths for transformers",
    "vllm": "A mixture of depths for vLLM",
    "layer": "One late layer of a mixture of depths",
    "plain": "A tuned model without its mixture of depths",
}
"""What each form is."""

USES = {
    "transformers": """\
`modeling_depthmix.py` beside the weights is the code that runs them; read it, and then say so:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

Without `trust_remote_code=True` it is refused, since no class of transformers is this model.""",
    "vllm": """\
```
pip install depthmix-vllm
vllm serve {name}
```

Without the plug-in vLLM refuses it. `check.json` holds what it says to some prompts, and
`python -m depthmix_vllm {name}` holds vLLM to that.""",
    "layer": """\
It is an ordinary model of its architecture, with fewer layers, and shares the tokenizer of the
model that it was taken from, so that it can draft for it:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
```""",
    "plain": """\
It is an ordinary model of its architecture:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
```""",
}
"""How each form is loaded."""

EXITS_LEFT_OUT = "Exits are left out: they draft in depthmix alone."
"""What becomes of exits in every form."""


def write_card(
    form: str,
    name: str,
    *,
    base: str,
    layer: int | None,
    late_layers: tuple[int, ...],
    template: RunTemplate,
    loss: ExportLoss | None,
) -> str:
    """Write the card of an export, without the check, which comes after it.

    Args:
        form: Its form.
        name: Name of its folder.
        base: The model that was tuned; left out of the card where it is no id on the hub.
        layer: The layer that answers alone; `None` where the mixture does.
        late_layers: Layers of the mixture; the final one alone where there is none.
        template: How the run is asked.
        loss: What the form loses, if that was measured.

    Returns:
        Markdown, with the fields that the hub reads.
    """
    fields = ["library_name: transformers", "pipeline_tag: text-generation"]
    if HUB_ID.fullmatch(base) and "/" in base and not Path(base).exists():
        fields.append(f"base_model: {base}")
    fields += ["tags:", "- mixture-of-depths-ensemble", "- depthmix"]
    voters = ", ".join(map(str, late_layers))
    if form in ("transformers", "vllm"):
        what = (
            f"Layers {voters} vote on each token: the model's head reads a mixture of their normed "
            "states, routed for each token (Mixture-of-Depths Ensemble, arXiv 2410.13077). LoRA "
            "weights are merged."
        )
    elif len(late_layers) == 1:
        what = "LoRA weights are merged; the run had no mixture."
    else:
        what = (
            f"Layer {layer} of a model in which layers {voters} vote on each token "
            "(Mixture-of-Depths Ensemble, arXiv 2410.13077), and here alone answers. LoRA weights "
            "are merged."
        )
    paragraphs = [what, EXITS_LEFT_OUT]
    if loss is not None:
        paragraphs.append(escape(str(loss)))
    asked = "It was trained on texts as they are."
    if template.is_chat:
        asked = "It was trained by the chat template that lies beside it: ask it as a chat."
    elif template.is_alpaca:
        asked = f"It was trained on Alpaca's prompt:\n\n```\n{ALPACA_PROMPT}```"
    use = USES[form].replace("{name}", name)
    head = "\n".join(["---", *fields, "---"])
    return "\n\n".join([head, f"# {TITLES[form]}", *paragraphs, "## Use", use, asked]) + "\n"
