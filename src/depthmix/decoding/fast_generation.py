"""Generation in which exits draft, and the top verifies what is pending when it runs anyway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from depthmix.decoding.deferral import Deferral
from depthmix.decoding.draft_plan import DraftPlan
from depthmix.decoding.drafting import Draft, Drafter
from depthmix.decoding.endings import find_endings
from depthmix.decoding.few_rows import multiply_few
from depthmix.decoding.layer_queue import LayerQueue, queue_layers
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
from depthmix.decoding.stand_ins import Claim
from depthmix.libraries.releases import record_past
from depthmix.method.norm import MixtureNorm

LOOP_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
"""What the decoding loop passes that is made anew for tokens ahead of it."""


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
        self.num_steps = 0
        self.num_layer_runs = 0
        self.num_rounds = 0
        self.num_drafted: Counter[int] = Counter()
        self.num_accepted: Counter[int] = Counter()
        self.origins: list[list[int]] = []
        self._stop_recording: Callable[[], None] | None = None
        self._forget()

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
            (norm, name, self._run_norm),
            (self.backbone.head, "forward", self._run_head),
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
        self._padding_token, self._endings = find_endings(config, input_ids.device)
        self._next = input_ids.new_zeros(len(input_ids))
        self._layers = queue_layers(self._modules)
        self._drafter.begin(len(input_ids))
        self._origins = Origins(
            num_rows=len(input_ids),
            top=self.backbone.num_hidden_layers,
            endings=self._endings.tolist(),
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
        self._lookahead: Any = None
        self._origins: Any = None
        self._model_forward: Any = None
        self._layers: list[LayerQueue] = []
        self._kept: dict[int, list[Float[Tensor, "batch seq hidden"]]] = {}
        self._seen: Int[Tensor, "batch columns"] | None = None
        self._masks: dict[Any, Any] = {}
        self._active: Bool[Tensor, " batch"] | None = None
        self._draft: Draft | None = None
        self._normed: Float[Tensor, "batch pending hidden"] | None = None
        self._in_prompt = self._asks_exit = False

    def _complete_cache(self) -> None:
        """Let layers process what they have missed, and take out what is ahead of the loop."""
        if self.verify:
            self._lookahead.withdraw()
            return
        self._seen, self._masks = self._padding, {}
        for layer in self._layers:
            if layer.calls:
                self._run(layer)

    def _step(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer the decoding loop, which asks for the logits after its newest tokens."""
        self._model_forward = forward
        self.num_steps += 1
        input_ids = kwargs.get("input_ids")
        in_prompt = self._num_unread > 0
        self._num_unread -= self._num_unread if input_ids is None else input_ids.shape[1]
        # What an exit would say at the end of a prompt nothing verifies, so the top reads it all.
        is_part = self._num_unread > 0 or (in_prompt and not self.verify)
        if input_ids is None or input_ids.shape[1] > 1 or is_part:
            return self._read_prompt(*args, **kwargs)
        if not self.verify:
            return self._answer_unverified(*args, **kwargs)
        ahead = self._lookahead
        guesses = ahead.take(input_ids[:, 0].tolist())
        if not any(guesses) and not self._pace.drafts and ahead.is_level():
            self._run_densely(*args, **kwargs)
        elif None in guesses:
            self._read_ahead(input_ids[:, 0], kwargs)
        logits = [(guess or ahead.pop(row)).logits for row, guess in enumerate(guesses)]
        self._origins.expect([ahead.draft(row) for row in range(len(guesses))], anew=in_prompt)
        return CausalLMOutputWithPast(
            logits=torch.stack(logits)[:, None], past_key_values=self._cache
        )

    def _read_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Run a prompt, or a part of one, through all layers."""
        self._lookahead.withdraw()
        self._in_prompt = True
        try:
            output = self._model_forward(*args, **kwargs)
        finally:
            self._in_prompt = False
        self._lookahead.confirm_prompt(is_whole=self._num_unread <= 0)
        self._origins.expect([None] * len(self.origins), anew=True)
        return output

    def _run_densely(self, *args: Any, **kwargs: Any) -> None:
        """Run a pass as the model itself would, while drafting pauses and no row is ahead."""
        assert self._turn is not None  # or there were no pass
        with self._turn.passing(ours=False):
            output = self._model_forward(*args, **kwargs)
        tokens = kwargs["input_ids"][:, 0].tolist()
        for row, token in enumerate(tokens):
            guess = Guess(token=token, logits=output.logits[row, -1], exit=None)
            self._lookahead.add(row, [guess], num_processed=1)
        self.num_layer_runs += len(self._layers)
        self.num_rounds += 1
        self._pace.end_round(1.0)

    def _answer_unverified(self, *args: Any, **kwargs: Any) -> Any:
        """Run a pass in which a sure exit has the last word."""
        tokens = kwargs["input_ids"][:, 0]
        self._seen, self._masks, self._draft = self._padding, {}, None
        self._active = torch.isin(tokens, self._endings, invert=True)
        self._drafter.begin_round(tokens.device)
        output = self._model_forward(*args, **kwargs)
        drafted: Draft | None = self._draft
        proposal = None if drafted is None else (None, drafted.layer)
        self._origins.expect([proposal] * len(tokens))
        if drafted is None:
            self.num_rounds += 1
            return output
        self.num_drafted[drafted.layer] += int(self._active.sum())
        logits = self._drafter.head.spread(drafted.logits)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=self._cache)

    def _read_ahead(self, tokens: Int[Tensor, " batch"], kwargs: dict[str, Any]) -> None:
        """Let each row go on with drafts, and keep what the model would choose too.

        Args:
            tokens: The loop's newest ones, for rows that have not guessed them; others are ahead.
            kwargs: What the loop passed for them.
        """
        options = {name: value for name, value in kwargs.items() if name not in LOOP_ARGUMENTS}
        unknown = sorted(name for name, value in options.items() if isinstance(value, Tensor))
        if unknown:
            raise ValueError(
                f"Fast generation cannot foresee `{unknown[0]}` of tokens that it drafts; leave "
                "it out, or call the model's own `generate`."
            )
        ahead, device = self._lookahead, tokens.device
        ahead.align()
        offset = torch.tensor(ahead.offsets, device=device)
        room = torch.tensor(ahead.room, device=device)
        longest, most = max(ahead.lengths), int(room.max())
        width = min(self.plan.max_drafts + 1, most) if self._pace.drafts else 1
        # Rows with less room process tokens for nothing, at their last position.
        last = (room - 1).clamp(min=0)[:, None]
        positions = kwargs["position_ids"] + offset[:, None]
        positions = positions + torch.arange(width, device=device).minimum(last)  # (B, width)
        seen = self._seen = ahead.padding(self._padding, num_new=width, device=device)
        mixture = self.mixture
        self._kept = {depth: [] for depth in (() if mixture is None else mixture.depths)}
        self._drafter.begin_round(device)

        current = torch.where(offset == 0, tokens, self._next)
        proposed, drafts, logits = [current], [], None
        for step in range(width):
            active = (step < room) & torch.isin(current, self._endings, invert=True)
            # A draft at the end of the room would never be looked at.
            self._active = active if step + 1 < width and bool(active.any()) else None
            self._masks, self._draft, self._normed = {}, None, None
            output = self._model_forward(
                input_ids=current[:, None],
                position_ids=positions[..., step : step + 1],
                attention_mask=None if seen is None else seen[:, : longest + step + 1],
                **options,
            )
            drafted: Draft | None = self._draft
            if drafted is None:
                logits = output.logits if self._normed is None else self._unembed()
                break
            ended = torch.isin(current, self._endings)
            drafts.append(drafted)
            current = drafted.tokens.to(device).masked_fill(ended, self._padding_token)
            going_on = (step + 1 < room) & torch.isin(current, self._endings, invert=True)
            if not bool(going_on.any()):  # nothing comes after the ends of all rows
                logits = self._catch_up()
                break
            proposed.append(current)
        assert logits is not None  # the last step drafts nothing
        self.num_rounds += 1
        self._keep(torch.stack(proposed, dim=1), logits, room, drafts)

    def _catch_up(self) -> Float[Tensor, "batch pending vocab"]:
        """Take what is pending to the top without another token."""
        self._masks, self._draft, self._normed = {}, None, None
        states: Any = None
        for layer in self._layers:
            if layer.calls:
                states = self._run(layer)
        states = self._final_norm(states)
        self._normed = states if self._normed is None else self._normed
        return self._unembed()

    def _unembed(self) -> Float[Tensor, "batch pending vocab"]:
        """Give the model's logits at all that was pending."""
        normed, self._normed = self._normed, None
        assert normed is not None  # the norm has kept it
        backbone = self.backbone
        normed = normed.to(backbone.head_weight.device, backbone.head_dtype(normed.dtype))
        return backbone.unembed(normed)

    def _keep(
        self,
        proposed: Int[Tensor, "batch width"],
        logits: Float[Tensor, "batch width vocab"],
        room: Int[Tensor, " batch"],
        drafts: Sequence[Draft],
    ) -> None:
        """Keep the tokens of each row up to the first that the model would not choose."""
        expected = self._choose(proposed, logits)  # (B, width)
        agreed = (proposed[:, 1:] == expected[:, :-1]).cumprod(dim=1).sum(dim=1) + 1
        num_kept = agreed.minimum(room)
        following = expected.take_along_dim((num_kept - 1).clamp(min=0)[:, None], dim=1)[:, 0]
        self._next = torch.where(num_kept > 0, following, self._next)
        # Neither what pads a row after its end nor what is beyond its room was drafted.
        counts = torch.arange(proposed.shape[1], device=room.device) < room[:, None]
        counts[:, 1:] &= torch.isin(proposed[:, :-1], self._endings, invert=True)
        tokens, kept, counting = proposed.tolist(), num_kept.tolist(), counts.tolist()
        confidences = [draft.confidences.tolist() for draft in drafts]
        for row, count in enumerate(kept):
            judged = [
                confidences[i - 1][row] for i in range(1, len(tokens[row])) if counting[row][i]
            ]
            self._drafter.judge(row, judged, num_right=max(count - 1, 0))
            for draft, counts_here in zip(drafts, counting[row][1:], strict=False):
                self.num_drafted[draft.layer] += counts_here
            guesses = [
                Guess(
                    token=tokens[row][i],
                    # A view would keep the logits of all rows.
                    logits=logits[row, i].clone(),
                    exit=drafts[i - 1].layer if i and counting[row][i] else None,
                )
                for i in range(count)
            ]
            self._lookahead.add(row, guesses, num_processed=len(tokens[row]))
        in_use = [count for count in kept if count]
        self._pace.end_round(sum(in_use) / max(len(in_use), 1))

    def _choose(
        self, tokens: Int[Tensor, "batch seq"], logits: Float[Tensor, "batch seq vocab"]
    ) -> Int[Tensor, "batch seq"]:
        """Guess what follows tokens: padding where a row has ended, else the likeliest token."""
        best = logits.argmax(-1)
        return best.masked_fill(torch.isin(tokens, self._endings), self._padding_token)

    def _run_layer(
        self,
        index: int,
        forward: Callable[..., Any],
        hidden_states: Float[Tensor, "batch seq hidden"],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run a layer at the positions that it has missed, or put it off."""
        layer = self._layers[index]
        layer.forward = forward
        call = self._read_call(layer.module, layer.names, args, kwargs)
        if self._in_prompt:
            self._check_mask(layer.module, index, hidden_states, call)
            output = forward(hidden_states, **call)
            self.num_layer_runs += 1
            layer.gives_tuple = isinstance(output, tuple)
            return output
        if index == 0:
            layer.inputs.append(hidden_states)
            if 0 in self._kept:
                self._kept[0].append(hidden_states)
        layer.calls.append(call)
        if self._draft is None:
            states = self._run(layer)
            hidden_states = states[:, -hidden_states.shape[1] :]
            if self._active is not None and index + 1 in self.plan.exits:
                self._ask(index + 1, hidden_states[:, -1])
            if self.verify and layer.above is None:  # the top looks at all that was pending
                hidden_states = states
        return self._layers[0].wrap(hidden_states)  # the lowest always runs

    def _run(self, layer: LayerQueue) -> Float[Tensor, "batch missed hidden"]:
        """Process all positions that a layer has missed."""
        states = layer.run(cache=self._cache, padding=self._seen, masks=self._masks)
        self.num_layer_runs += 1
        self._pace.run(states.shape[1], batch_size=len(states))
        if layer.index + 1 in self._kept:
            self._kept[layer.index + 1].append(states)
        return states

    def _ask(self, depth: int, hidden_states: Float[Tensor, "batch hidden"]) -> None:
        """Ask an exit for a draft."""
        assert self._active is not None
        self._pace.check()
        self._asks_exit = True
        try:
            self._draft = self._drafter.draft(depth, hidden_states, self._active)
        finally:
            self._asks_exit = False

    def _run_norm(
        self, forward: Callable[..., Any], hidden_states: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch last hidden"]:
        """Norm what came to the top; after a draft there is nothing to norm.

        Where several positions were pending, all are kept, and the model goes on with the last one,
        as some models give what the norm returns the shape of their input.
        """
        if self._draft is not None:
            return hidden_states
        if self._kept and self.norm is not None and not self._in_prompt:
            last = self.backbone.num_hidden_layers - 1
            kept = {depth: torch.cat(states, dim=1) for depth, states in self._kept.items()}
            self.norm.capture.replace({last: hidden_states, **kept})
        normed = forward(hidden_states)
        if self._in_prompt or normed.shape[1] == 1:
            return normed
        self._normed = normed
        return normed[:, -1:]

    def _run_head(
        self,
        forward: Callable[..., Any],
        states: Float[Tensor, "*batch hidden"],
        *args: Any,
        **kwargs: Any,
    ) -> Float[Tensor, "*batch vocab"]:
        """Predict what came to the top; nobody looks at other logits."""
        is_idle = self._draft is not None or self._normed is not None
        if is_idle and not self._asks_exit:
            return states.new_zeros(*states.shape[:-1], 1)
        logits = multiply_few(self.backbone.head, states, forward)
        return forward(states, *args, **kwargs) if logits is None else logits
