"""Commands that let a model answer."""

from __future__ import annotations

from typing import Literal

from depthmix_cli.options import Adapter, Dtype, Generation, Model, TopK


def generate(
    model: Model,
    prompts: list[str],
    *,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    template: Literal["plain", "alpaca", "chat"] | None = None,
    top_k: TopK = None,
    lazy: bool = False,
    draft_layer: int | None = None,
    num_draft_tokens: int | None = None,
    generation: Generation = None,
) -> None:
    """Print a model's answers to prompts.

    Args:
        prompts: One or more texts to answer.
        template: What stands around a prompt: nothing (`plain`), Alpaca's words or the chat
            template. By default what the run was trained with; for other models `plain`.
        lazy: Run late layers only when a token needs them: the same text, sooner.
        draft_layer: Let this late layer draft, and the ensemble verify: the same text.
        num_draft_tokens: Tokens that it drafts at a time, 4 by default.
    """
    from depthmix.models.generation import generate
    from depthmix.models.spec import ModelSpec

    section = ModelSpec(name=model, adapter=adapter, dtype=dtype)
    answers = generate(
        section,
        prompts,
        template=template,
        options=generation,
        top_k=top_k,
        lazy=lazy,
        draft_layer=draft_layer,
        num_draft_tokens=num_draft_tokens,
    )
    print(*answers, sep="\n\n")


def chat(
    model: Model,
    *,
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    top_k: TopK = None,
    system: str | None = None,
    template: Literal["plain", "alpaca", "chat"] | None = None,
    depth: bool = False,
    generation: Generation = None,
) -> None:
    """Talk with a model; `/exit` or Ctrl-D ends.

    Args:
        system: Instruction that stands before the conversation.
        template: How the conversation becomes text: by the chat template (`chat`), as Alpaca's
            prompts (`alpaca`), or each message by itself (`plain`). By default as the run was
            trained; for other models `chat`.
        depth: Colour each token by the mean depth that its routing weights give.
    """
    from depthmix.models.generation import chat
    from depthmix.models.spec import ModelSpec

    section = ModelSpec(name=model, adapter=adapter, dtype=dtype, top_k=top_k)
    chat(section, system=system, template=template, depth=depth, options=generation)
