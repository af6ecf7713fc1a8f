"""Generation in which exits draft, and the top verifies what is pending when it runs anyway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from depthmix.decoding.deferral import Deferral
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.drafting import Drafter
from depthmix.decoding.layer_stack import LayerStack
from depthmix.decoding.lookahead import Guess, Lookahead
from depthmix.decoding.origins import Origins
from depthmix.decoding.pace import Pace
from depthmix.decoding.predictors import (
    Predictor,
    check_exits,
    check_made_for,
    check_plan,
    find_predictor,
)
from depthmix.decoding.requirements import check_mode
from depthmix.decoding.rounds import Rounds
from depthmix.decoding.stand_ins import Claim
from depthmix.libraries.releases import record_past
from depthmix.method.norm import MixtureNorm


class FastGeneration(Deferral):
    r"""Generation that drafts at exits: `FastGeneration(model, exits).generate(**inputs)`.

    A token is drafted at its first exit that is sure of it (`DraftPlan`), and the layers above are
    put off. A token of which no exit is sure goes to the top, and with it go all positions that the
    upper layers have missed, in one pass; there the model says of each pending draft whether it
    agrees (docs/speed.md). So each layer processes each position once.

    The decoding loop is transformers' own. It asks for one token's logits at a time, and gets the
    model's, which are there already if the token was drafted; a draft that it does not choose is
    taken back. So tokens are those of the model's own `generate`, in greedy decoding and, with the
    same random state, in sampling: batched and left-padded, with logits processors, stopping
    criteria and streamers. Each row of a batch is ahead by its own number of tokens. Drafts do not
    know of logits processors, which therefore lower the acceptance. Where drafting does not pay, it
    stops for a while by itself.

    `origins` says, row by row, at which layer each token of the last call was drafted, the top's
    where none drafted it. A streamer that is given a token finds its origin there already.

    With `verify=False` a sure exit has the last word: faster, and no longer the model's own text.

    While it generates, another call may use the model as ever, but not defer its layers.
    `model.generate(…, custom_generate=FastGeneration(model, exits))` does the same, except that
    transformers keeps a streamer from it.

    Args:
        model: A decoder, with or without a mixture or an adapter.
        exits: Its exits, from `train_exits` or `load_exits`; `None` takes those that the model was
            trained with, or else lets the late layers of its mixture draft.
        plan: Which exits draft, and when; `None` lets all of them draft from 0.8 on.
        verify: Whether the top verifies what exits draft.

    Raises:
        TypeError: If the model is not a decoder-only language model with a head.
        ValueError: If there is nothing that drafts, the plan does not fit, or exits of another
            model would draft without being verified; verified, they are warned of.
    """

    name = "Fast generation"
    door = "`fast` or `custom_generate`"

    def __init__(
        self,
        model: nn.Module,
        exits: Predictor | None = None,
        plan: DraftPlan | None = None,
        *,
        verify: bool = True,
    ) -> None:
        super().__init__(model)
        self.exits = find_predictor(model) if exits is None else exits
        check_exits(self.exits, self.backbone)
        self.plan = DraftPlan.for_all(self.exits.layers) if plan is None else plan
        self.verify = verify
        check_plan(self.plan, self.exits, self.backbone)
        if not self.plan.stay_dense:
            check_made_for(self.exits, self.backbone, verify=verify)
        self._drafter = Drafter(self.backbone, self.exits, self.plan, verify=verify)
        self._pace = Pace(self.plan.row_costs, num_layers=self.backbone.num_hidden_layers)
        self._stack = LayerStack(
            self.backbone,
            self._drafter,
            norm=self.norm,
            depths=() if self.mixture is None else self.mixture.depths,
            verify=verify,
        )
        self.num_steps = 0
        self.num_rounds = 0
        self.num_drafted: Counter[int] = Counter()
        self.num_accepted: Counter[int] = Counter()
        self.origins: list[list[int]] = []
        self._stop_recording: Callable[[], None] | None = None
        self._forget()

    @property
    def num_layer_runs(self) -> int:
        """Layers that ran, a prompt or several positions at once being one run."""
        return self._stack.num_runs

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were generated, by all calls so far."""
        return self.num_accepted.total() / max(self.num_drafted.total(), 1)

    @property
    def layers_per_token(self) -> float:
        """Layers that ran for the mean token of a row, its prompt's among them."""
        return self.num_layer_runs / max(self.num_steps, 1)

    def generate(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """Generate as the model's own `generate` does, with the same arguments and result.

        See `Deferral.generate`. Where the plan says so, it is the model's own.
        """
        if self.plan.stay_dense:
            self.origins = []
            return self.model.generate(*args, streamer=streamer, **kwargs)
        return super().generate(*args, streamer=streamer, **kwargs)

    def __call__(
        self,
        model: Any,
        input_ids: Int[Tensor, "batch seq"],
        generation_config: GenerationConfig,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Decode in the place of transformers' own loop, which calls this (`Deferral`)."""
        options = {"generation_config": generation_config, "streamer": streamer, **kwargs}
        if self.plan.stay_dense:
            check_mode(generation_config, name=self.name, door=self.door)
            self.origins = []
            return model._sample(input_ids, **options)
        return super().__call__(model, input_ids, **options)

    def _claim(self) -> Sequence[Claim]:
        """Stand in front of all layers, the norm and the head."""
        model = self.backbone.model
        if "position_ids" not in signature(model.forward).parameters:
            raise ValueError(
                "Fast generation needs a model that takes `position_ids`, and "
                f"{type(model).__name__} does not; leave out {self.door} for this model."
            )
        fronts: list[Claim] = [
            (layer, "forward", partial(self._run_layer, index))
            for index, layer in enumerate(self.backbone.layers)
        ]
        norm = self.backbone.final_norm
        name = "_replaced_forward" if isinstance(norm, MixtureNorm) else "forward"
        return [
            *fronts,
            (norm, name, self._stack.run_norm),
            (self.backbone.head, "forward", self._stack.run_head),
        ]

    def _begin(
        self, input_ids: Int[Tensor, "batch seq"], config: GenerationConfig, streamer: Any
    ) -> Origins:
        """Make room for guesses, and let the cache's sliding layers keep what they may need."""
        self._lookahead = Lookahead(
            self._cache,
            batch_size=len(input_ids),
            num_new_tokens=config.max_length - input_ids.shape[1],
        )
        self._stack.begin(self._modules, self._cache, self._pace)
        self._drafter.begin(len(input_ids))
        self._rounds = Rounds(
            self._stack,
            self._drafter,
            self._pace,
            self._lookahead,
            input_ids=input_ids,
            config=config,
            num_drafted=self.num_drafted,
        )
        self._origins = Origins(
            num_rows=len(input_ids),
            top=self.backbone.num_hidden_layers,
            endings=self._rounds.endings.tolist(),
            accepted=self.num_accepted,
            streamer=streamer,
        )
        self.origins = self._origins.layers
        self._num_unread = max(input_ids.shape[1] - self._cache.get_seq_length(), 1)
        self._stop_recording = record_past(self._cache)
        return self._origins

    def _forget(self) -> None:
        """Let go of guesses, and let the cache's layers record as before."""
        if self._stop_recording is not None:
            self._stop_recording()
        self._stop_recording = None
        self._stack.end()
        self._lookahead: Any = None
        self._rounds: Any = None
        self._origins: Any = None

    def _complete_cache(self) -> None:
        """Let layers process what they have missed, and take out what is ahead of the loop."""
        if self.verify:
            self._lookahead.withdraw()
            return
        self._stack.begin_round(self._padding)
        self._stack.begin_pass(None)
        self._stack.run_missed()

    def _step(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer the decoding loop, which asks for the logits after its newest tokens."""
        self.num_steps += 1
        input_ids = kwargs.get("input_ids")
        in_prompt = self._num_unread > 0
        self._num_unread -= self._num_unread if input_ids is None else input_ids.shape[1]
        # What an exit would say at the end of a prompt nothing verifies, so the top reads it all.
        is_part = self._num_unread > 0 or (in_prompt and not self.verify)
        if input_ids is None or input_ids.shape[1] > 1 or is_part:
            return self._read_prompt(forward, *args, **kwargs)
        if not self.verify:
            return self._answer_unverified(forward, *args, **kwargs)
        ahead = self._lookahead
        guesses = ahead.take(input_ids[:, 0].tolist())
        if not any(guesses) and not self._pace.drafts and ahead.is_level():
            self._run_densely(forward, *args, **kwargs)
        elif None in guesses:
            self._rounds.read_ahead(forward, input_ids[:, 0], self._padding, kwargs)
            self.num_rounds += 1
        logits = [(guess or ahead.pop(row)).logits for row, guess in enumerate(guesses)]
        self._origins.expect([ahead.draft(row) for row in range(len(guesses))], anew=in_prompt)
        return CausalLMOutputWithPast(
            logits=torch.stack(logits)[:, None], past_key_values=self._cache
        )

    def _read_prompt(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a prompt, or a part of one, through all layers."""
        self._lookahead.withdraw()
        with self._stack.reading_prompt():
            output = forward(*args, **kwargs)
        self._lookahead.confirm_prompt(is_whole=self._num_unread <= 0)
        self._origins.expect([None] * len(self.origins), anew=True)
        return output

    def _run_densely(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run a pass as the model itself would, while drafting pauses and no row is ahead."""
        assert self._turn is not None  # or there were no pass
        with self._turn.passing(ours=False):
            output = forward(*args, **kwargs)
        tokens = kwargs["input_ids"][:, 0].tolist()
        for row, token in enumerate(tokens):
            guess = Guess(token=token, logits=output.logits[row, -1], exit=None)
            self._lookahead.add(row, [guess], num_processed=1)
        self._stack.num_runs += len(self._stack.layers)
        self.num_rounds += 1
        self._pace.end_round(1.0)

    def _answer_unverified(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a pass in which a sure exit has the last word."""
        tokens = kwargs["input_ids"][:, 0]
        active = torch.isin(tokens, self._rounds.endings, invert=True)
        self._stack.begin_round(self._padding)
        self._stack.begin_pass(active)
        self._drafter.begin_round(tokens.device)
        output = forward(*args, **kwargs)
        drafted = self._stack.draft
        proposal = None if drafted is None else (None, drafted.layer)
        self._origins.expect([proposal] * len(tokens))
        if drafted is None:
            self.num_rounds += 1
            return output
        self.num_drafted[drafted.layer] += int(active.sum())
        logits = self._drafter.head.spread(drafted.logits)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=self._cache)

    def _run_layer(
        self,
        index: int,
        forward: Callable[..., Any],
        hidden_states: Float[Tensor, "batch seq hidden"],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run a layer at the prompt, or at the positions that it has missed, or put it off."""
        layer = self._stack.layers[index]
        layer.forward = forward
        call = self._read_call(layer.module, layer.names, args, kwargs)
        if self._stack.in_prompt:
            self._check_mask(layer.module, index, hidden_states, call)
            return self._stack.read(layer, hidden_states, call)
        return self._stack.run(layer, hidden_states, call)
