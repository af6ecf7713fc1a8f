"""Text from a model: answers to prompts, and a conversation in the terminal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from depthmix.data.spec import Template
from depthmix.decoding.lazy_depth import LazyDepth
from depthmix.libraries.extras import require
from depthmix.method.mixture import Mixture
from depthmix.method.norm import set_top_k
from depthmix.method.placement import to_accelerator
from depthmix.models.continuation import (
    continue_inputs,
    continue_tokens,
    pad_prompts,
    read_generation_options,
)
from depthmix.models.fast import prepare_fast
from depthmix.models.loading import load_model, load_tokenizer
from depthmix.models.sources import find_base
from depthmix.models.spec import ModelSpec, to_spec
from depthmix.models.speed_meter import FastSpeed, SpeedMeter
from depthmix.models.template import recall_template


def generate(
    model: str | Path | ModelSpec,
    prompts: Sequence[str],
    *,
    template: Template | None = None,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    top_k: int | None = None,
    lazy: bool = False,
    fast: bool = False,
    exits: str | Path | None = None,
    verify: bool = True,
    against_dense: bool = False,
    on_speed: Callable[[FastSpeed], None] | None = None,
) -> list[str]:
    """Let a model, with its adapter, answer prompts.

    Args:
        model: A model as `load_model` takes it: a name, or a spec.
        prompts: Questions or beginnings of text.
        template: What stands around a prompt: nothing (`plain`), Alpaca's words or the chat
            template. By default what the run was trained with; for other models `plain`.
        options: Keyword arguments of `transformers.GenerationConfig`, such as `max_new_tokens`,
            `do_sample` or `temperature`; text is read as numbers and switches.
        batch_size: Prompts that are run together.
        top_k: Layers of the mixture that vote per token, fewer than it was trained with.
        lazy: Run late layers only when a token needs them (`LazyDepth`): the same text, sooner.
        fast: Let exits draft, and the top verify (`FastGeneration`): the same text, sooner.
        exits: Folder of the exits, where they do not lie beside the model.
        verify: Whether the top verifies what exits draft; without it `fast` is faster, and the text
            no longer the model's own.
        against_dense: Generate densely, too, by turns, to say how many times as fast `fast` is and
            whether the texts are the same.
        on_speed: Gets what `fast` took, once all is generated.

    Returns:
        The new text for each prompt, or each of `num_return_sequences` in turn.

    Raises:
        ValueError: If an option is unknown, two of them exclude each other, or there is no prompt.
        OSError: If the model cannot be found.
    """
    if lazy and fast:
        raise ValueError(
            "`lazy` and `fast` are two ways to generate, got both; leave one of them out."
        )
    _check_fast(fast, exits, verify=verify)
    if against_dense and not fast:
        raise ValueError(
            "`against_dense=True` needs `fast`, which it measures; ask for it, or leave the other "
            "out."
        )
    if not prompts or not all(prompts):
        raise ValueError(f"`prompts` must hold text to go on from, got {list(prompts)!r}.")
    spec, settings = to_spec(model), read_generation_options(options or {})
    tokenizer = load_tokenizer(spec)
    asked = recall_template(spec, template, otherwise="plain")
    rendered = [asked.render(prompt, tokenizer) for prompt in prompts]
    loaded = _load(spec)
    if top_k is not None:
        set_top_k(loaded, top_k)
    run: Callable[[Mapping[str, Tensor]], Tensor]
    meter = None
    if fast:
        quick = prepare_fast(loaded, find_base(spec), exits=exits, verify=verify)
        meter = SpeedMeter(quick, tokenizer, settings, against_dense=against_dense)
        run = meter.run
    else:
        generator = LazyDepth(loaded) if lazy else loaded
        if isinstance(generator, LazyDepth):
            warn_of_dense_routing(generator.mixture)
        run = partial(continue_tokens, generator, tokenizer, settings=settings)
    answers: list[str] = []
    for start in range(0, len(rendered), batch_size):
        batch = [prompt.token_ids for prompt in rendered[start : start + batch_size]]
        new_tokens = run(pad_prompts(batch, tokenizer))
        answers += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    if meter is not None and on_speed is not None:
        on_speed(meter.read())
    return answers


def chat(
    model: str | Path | ModelSpec,
    *,
    system: str | None = None,
    template: Template | None = None,
    depth: bool = False,
    fast: bool = False,
    exits: str | Path | None = None,
    verify: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[dict[str, str]]:
    """Talk with a model in the terminal, until `/exit`, Ctrl-D or Ctrl-C.

    Answers appear word by word. `/clear` forgets what was said.

    Args:
        model: A model as `load_model` takes it: a name, or a spec.
        system: Instruction that stands before the conversation.
        template: How the conversation becomes text: by the tokenizer's chat template (`chat`), as a
            series of Alpaca's prompts (`alpaca`), or each message by itself (`plain`). By default
            as the run was trained; for other models `chat`.
        depth: Colour each token by the mean depth `Σ G_i i` of its routing weights, and say after
            each answer how much every late layer counted (`DepthStreamer`); with `fast`, by the
            layer at which it was drafted (`DraftStreamer`).
        fast: Let exits draft, and the top verify, as for `generate`.
        exits: As for `generate`.
        verify: As for `generate`.
        options: As for `generate`.

    Returns:
        The conversation as messages.

    Raises:
        ValueError: If an option is unknown, the tokenizer has no chat template, `system` has no
            place in the template, or `depth` is asked of a model without a mixture or of passes
            that predict several tokens.
        OSError: If the model cannot be found.
    """
    require("lab", "A conversation in the terminal", "rich")
    from depthmix.models.draft_streamer import DraftStreamer
    from depthmix.models.streamers import DepthStreamer, VisibleStreamer

    _check_fast(fast, exits, verify=verify)
    spec, settings = to_spec(model), read_generation_options(options or {})
    tokenizer = load_tokenizer(spec)
    opening = [{"role": "system", "content": system}] if system else []
    asked = recall_template(spec, template, otherwise="chat")
    # Rendered once before the model loads, so that a missing chat template is told at once.
    asked.converse([*opening, {"role": "user", "content": "Hello"}], tokenizer)
    loaded = _load(spec)
    generator: Any = loaded
    if fast:
        generator = prepare_fast(loaded, find_base(spec), exits=exits, verify=verify)
    if depth:
        _check_single_tokens(loaded, settings)
        streamer = DraftStreamer(generator, tokenizer) if fast else DepthStreamer(loaded, tokenizer)
        streamer.print_legend()
    else:
        streamer = VisibleStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if not (asked.is_chat or asked.is_alpaca):
        print("Prompts stand alone here, as in training: no message sees those before it.")
    print("Type a message; /clear starts anew, /exit or Ctrl-D ends.")
    messages = list(opening)
    while True:
        try:
            said = input("> ").strip()
            if said == "/exit":
                return messages
            if said == "/clear":
                messages = list(opening)
            elif said:
                turn = [*messages, {"role": "user", "content": said}]
                inputs = pad_prompts([asked.converse(turn, tokenizer).token_ids], tokenizer)
                (answer,) = continue_inputs(
                    generator, tokenizer, inputs, settings, streamer=streamer
                )
                messages = [*turn, {"role": "assistant", "content": answer}]
        except (EOFError, KeyboardInterrupt):
            print()
            return messages


def _check_single_tokens(model: PreTrainedModel | PeftModel, settings: Mapping[str, Any]) -> None:
    """Refuse ways to generate whose passes predict several tokens, or guess by a shorter model."""
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit"):
        if value := settings.get(name, getattr(model.generation_config, name, None)):
            raise ValueError(
                f"`depth` needs one forward pass per token, and `generation.{name}` makes several "
                f"tokens of one, got {value}; leave one of the two out."
            )


def _check_fast(fast: bool, exits: str | Path | None, *, verify: bool) -> None:
    """Refuse what is for drafts where nothing drafts."""
    if not fast and (exits is not None or not verify):
        given = "verify=False" if exits is None else f"exits={str(exits)!r}"
        raise ValueError(
            f"`{given}` needs `fast`, which drafts; ask for it, or leave the other out."
        )


def warn_of_dense_routing(mixture: Mixture) -> None:
    """Say so where every token needs every layer, and lazy depth skips none."""
    top_k, num_routes = mixture.top_k, len(mixture.late_layers)
    if top_k is None or top_k >= num_routes:
        warnings.warn(
            f"`lazy` skips no layer while each token keeps all {num_routes} routes; ask for fewer "
            "by `top_k`, or let exits draft by `fast`.",
            stacklevel=3,
        )


def _load(spec: ModelSpec) -> PreTrainedModel | PeftModel:
    """Load a model for inference, on the accelerator if there is one."""
    return to_accelerator(load_model(spec)).eval()
