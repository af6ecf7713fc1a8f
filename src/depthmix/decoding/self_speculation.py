"""Decoding in which a late layer drafts and the ensemble verifies, each position once a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from depthmix.decoding.calls import last_position, mask_missed
from depthmix.decoding.deferral import Deferral
from depthmix.decoding.lookahead import Guess, Lookahead
from depthmix.decoding.stand_ins import Claim

LOOP_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
"""What the decoding loop passes that is made anew for tokens ahead of it."""


class SelfSpeculation(Deferral):
    r"""Lossless self-speculation that keeps the draft's work: `SelfSpeculation(model).generate(…)`.

    Layers 1 … m alone draft a few tokens, by $\phi(N_m(h_m))$. The layers above m then process all
    of these positions in one pass, and the ensemble says how many it agrees with. So the layers up
    to m process each token once, and not twice as with `assistant_early_exit`
    (docs/lazy-depth.md).

    The decoding loop is transformers' own. It asks for one token's logits at a time, and gets the
    ensemble's, which are there already if the token was guessed; a guess that it does not choose
    is taken back. So tokens are those of the dense model, in greedy decoding and, with the same
    random state, in sampling: batched and left-padded, with logits processors, stopping criteria
    and streamers. Each row of a batch is ahead by its own number of tokens. Drafts do not know of
    logits processors, which therefore lower the acceptance.

    While it generates, another call may use the model as ever, but not defer its layers.
    `model.generate(…, custom_generate=SelfSpeculation(model))` does the same, except that
    transformers keeps a streamer from it.

    Args:
        model: A model with a mixture, by `attach` or as a PEFT adapter.
        draft_layer: m, a late layer below the final one; `None` takes the first.
        num_draft_tokens: Tokens drafted between two verifications, at least 1.

    Raises:
        ValueError: If the model has no active mixture, or it has no such late layer.
    """

    name = "Self-speculation"
    door = "`draft_layer` or `custom_generate`"

    def __init__(
        self, model: nn.Module, *, draft_layer: int | None = None, num_draft_tokens: int = 4
    ) -> None:
        super().__init__(model)
        *lower, final = self.mixture.late_layers
        if not lower:
            raise ValueError(
                f"`model` must have a late layer below layer {final} to draft with, got a mixture "
                "of that one alone; call the model's own `generate`."
            )
        if draft_layer is not None and draft_layer not in lower:
            raise ValueError(
                f"`draft_layer` must be a late layer below the final one ({lower}), which has a "
                f"norm to predict with, got {draft_layer}."
            )
        if num_draft_tokens < 1:
            raise ValueError(
                f"`num_draft_tokens` must be at least 1, got {num_draft_tokens}; without drafts "
                "call the model's own `generate`."
            )
        self.draft_layer = lower[0] if draft_layer is None else draft_layer
        self.num_draft_tokens = num_draft_tokens
        self.num_steps = 0
        self.num_layer_runs = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self._stage: Literal["prompt", "draft", "verify"] = "prompt"
        self._gives_tuple = False
        self._lookahead: Any = None
        self._model_forward: Any = None
        self._seen: Int[Tensor, "batch columns"] | None = None
        self._kept: dict[int, list[Float[Tensor, "batch seq hidden"]]] = {}
        self._names: list[list[str]] = []
        self._recorded: list[tuple[Any, bool]] = []

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were generated, by all calls so far."""
        return self.num_accepted / max(self.num_drafted, 1)

    @property
    def layers_per_token(self) -> float:
        """Layers that ran for the mean token of a row, its prompt's among them."""
        return self.num_layer_runs / max(self.num_steps, 1)

    def _claim(self) -> Sequence[Claim]:
        """Stand in front of all layers, and of the norm."""
        model = self.norm.backbone.model
        if "position_ids" not in signature(model.forward).parameters:
            raise ValueError(
                "Self-speculation needs a model that takes `position_ids`, and "
                f"{type(model).__name__} does not; leave out {self.door} for this model."
            )
        layers = self.norm.backbone.layers
        fronts = [
            (layer, "forward", partial(self._run_layer, index))
            for index, layer in enumerate(layers)
        ]
        return [*fronts, (self.norm, "_replaced_forward", self._run_norm)]

    def _begin(self, input_ids: Int[Tensor, "batch seq"], config: GenerationConfig) -> None:
        """Make room for guesses, and let the cache's sliding layers keep what they may need."""
        self._lookahead = Lookahead(
            self._cache,
            batch_size=len(input_ids),
            num_new_tokens=config.max_length - input_ids.shape[1],
        )
        self._padding_token, self._endings = find_endings(config, input_ids.device)
        self._next = input_ids.new_zeros(len(input_ids))
        self._names = [list(signature(layer.forward).parameters) for layer in self._modules]
        self._recorded = [
            (layer, layer.record_past)
            for layer in self._cache.layers
            if hasattr(layer, "record_past")
        ]
        self._cache.activate_past_recording()

    def _forget(self) -> None:
        """Let go of guesses, and let the cache's layers record as before."""
        for layer, own in self._recorded:
            layer.record_past = own
        self._lookahead = self._model_forward = self._seen = None
        self._kept, self._recorded = {}, []

    def _complete_cache(self) -> None:
        """Take out what is ahead of the loop."""
        self._lookahead.withdraw()

    def _step(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Answer the decoding loop, which asks for the logits after its newest tokens."""
        self._model_forward = forward
        self.num_steps += 1
        input_ids = kwargs.get("input_ids")
        ahead = self._lookahead
        if input_ids is None or input_ids.shape[1] > 1:  # a prompt, or a part of one
            ahead.withdraw()
            self._stage = "prompt"
            output = self._model_forward(*args, **kwargs)
            ahead.confirm_prompt()
            return output
        guesses = ahead.take(input_ids[:, 0].tolist())
        self.num_accepted += sum(guess.is_draft for guess in guesses if guess is not None)
        if None in guesses:
            self._read_ahead(input_ids[:, 0], kwargs)
        logits = [(guess or ahead.pop(row)).logits for row, guess in enumerate(guesses)]
        return CausalLMOutputWithPast(
            logits=torch.stack(logits)[:, None], past_key_values=self._cache
        )

    def _read_ahead(self, tokens: Int[Tensor, " batch"], kwargs: dict[str, Any]) -> None:
        """Let each row go on with drafts, and keep what the ensemble would choose too.

        Args:
            tokens: The loop's newest ones, for rows that have not guessed them; others are ahead.
            kwargs: What the loop passed for them.
        """
        options = {name: value for name, value in kwargs.items() if name not in LOOP_ARGUMENTS}
        unknown = sorted(name for name, value in options.items() if isinstance(value, Tensor))
        if unknown:
            raise ValueError(
                f"Self-speculation cannot foresee `{unknown[0]}` of tokens that it drafts; leave "
                "it out, or call the model's own `generate`."
            )
        ahead, device = self._lookahead, tokens.device
        ahead.align()
        offset = torch.tensor(ahead.offsets, device=device)
        room = torch.tensor(ahead.room, device=device)
        longest, width = max(ahead.lengths), min(self.num_draft_tokens + 1, int(room.max()))
        # Rows with less room process tokens for nothing, at their last position.
        last = (room - 1).clamp(min=0)[:, None]
        steps = torch.arange(width, device=device).minimum(last)  # (B, width)
        positions = kwargs["position_ids"] + offset[:, None] + steps
        seen = ahead.padding(self._padding, num_new=width, device=device)

        self._stage, self._seen = "draft", seen
        self._kept = {depth: [] for depth in self.mixture.depths if 0 < depth <= self.draft_layer}
        proposed = torch.where(offset == 0, tokens, self._next)[:, None]
        for step in range(width - 1):
            output = self._model_forward(
                input_ids=proposed[:, -1:],
                position_ids=positions[..., step : step + 1],
                attention_mask=None if seen is None else seen[:, : longest + step + 1],
                **options,
            )
            drafted = self._choose(proposed[:, -1:], output.logits)
            proposed = torch.cat([proposed, drafted], dim=1)
        self._stage = "verify"  # each layer makes a mask of its own
        output = self._model_forward(input_ids=proposed, position_ids=positions, **options)
        self._keep(proposed, output.logits, room)

    def _keep(
        self,
        proposed: Int[Tensor, "batch width"],
        logits: Float[Tensor, "batch width vocab"],
        room: Int[Tensor, " batch"],
    ) -> None:
        """Keep the tokens of each row up to the first that the ensemble would not choose."""
        expected = self._choose(proposed, logits)  # (B, width)
        agreed = (proposed[:, 1:] == expected[:, :-1]).cumprod(dim=1).sum(dim=1) + 1
        num_kept = agreed.minimum(room)
        following = expected.take_along_dim((num_kept - 1).clamp(min=0)[:, None], dim=1)[:, 0]
        self._next = torch.where(num_kept > 0, following, self._next)
        # A row's first token is no draft, nor is the padding after its end.
        is_draft = torch.arange(proposed.shape[1], device=room.device) < room[:, None]
        is_draft[:, 1:] &= torch.isin(proposed[:, :-1], self._endings, invert=True)
        is_draft[:, 0] = False
        self.num_drafted += int(is_draft.sum())
        tokens, drafts = proposed.tolist(), is_draft.tolist()
        for row, count in enumerate(num_kept.tolist()):
            guesses = [
                # A view would keep the logits of all rows.
                Guess(token=tokens[row][i], logits=logits[row, i].clone(), is_draft=drafts[row][i])
                for i in range(count)
            ]
            self._lookahead.add(row, guesses, num_processed=len(tokens[row]))

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
        """Run a layer at the positions that it has missed, or not at all."""
        layer = self._modules[index]
        call = self._read_call(layer, self._names[index], args, kwargs)
        if self._stage == "prompt":
            self._check_mask(layer, index, hidden_states, call)
        is_early = index < self.draft_layer
        if self._stage == "draft" and not is_early:
            return (hidden_states,) if self._gives_tuple else hidden_states
        if self._stage == "verify":
            if is_early:  # it has processed the others while drafting
                hidden_states, call = hidden_states[:, -1:], last_position(call)
            call["attention_mask"] = mask_missed(
                hidden_states, cache=self._cache, index=index, padding=self._seen
            )
        output = forward(hidden_states, **call)
        self.num_layer_runs += 1
        self._gives_tuple = isinstance(output, tuple)
        if self._stage == "prompt" or index + 1 not in self._kept:
            return output
        kept = self._kept[index + 1]
        kept.append(output[0] if isinstance(output, tuple) else output)
        if self._stage == "draft":
            return output
        hidden_states = torch.cat(kept, dim=1)
        return (hidden_states,) if self._gives_tuple else hidden_states

    def _run_norm(
        self, forward: Callable[..., Any], hidden_states: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """Let the draft layer predict in place of the mixture while drafting."""
        if self._stage == "draft":
            return self.norm.answer_alone(self.draft_layer, hidden_states)
        return forward(hidden_states)


def find_endings(
    generation_config: GenerationConfig, device: torch.device
) -> tuple[int, Int[Tensor, " endings"]]:
    """Say what pads rows that have ended, and after which tokens padding follows."""
    ends, padding = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    if ends is None or padding is None:
        return 0, torch.empty(0, dtype=torch.long, device=device)
    return int(padding), torch.cat([ends.view(-1), padding.view(-1)]).to(device)
