"""The mixture's options: what the paper defines, what it leaves open, and our defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from depthmix.method.exit_options import (
    EXIT_OPTIONS,
    check_exit_layers,
    check_exit_options,
    check_rate_factor,
)
from depthmix.options.types import checked_options

IGNORE_INDEX = -100
"""Label of a position that does not count in any loss (Hugging Face's value)."""

Readout = int | Literal["ensemble", "final"]
"""Which depth answers: a layer's number, `final` for the last one, or `ensemble` for the model as
it predicts."""


@checked_options
@dataclass(kw_only=True)
class MixtureConfig:
    """Options of a Mixture-of-Depths Ensemble, whatever tunes the rest of the model.

    Layers are numbered as `hidden_states` are: 0 is the embeddings, 1 the first layer,
    `num_hidden_layers` the last.
    """

    late_layers: int | list[int] | Literal["auto"] = 3
    """Layers that predict: k for the last k, or an increasing list that ends at the last layer.
    `auto`: `depthmix train` probes the model on its training data and chooses (docs/method.md)."""

    top_k: int | None = None
    """Routes kept per token, their weights renormalised; `None` keeps all (dense routing)."""

    router_init: Literal["gaussian", "identity"] = "identity"
    """`identity`: weights 0 and a trained bias that gives the final layer a share of 0.99, so that
    step 0 is near the base model, not equal to it: the late layers share 1 %. `gaussian`: weights
    from N(0, 0.02²), no bias (paper)."""

    router_input: Literal["raw", "normed"] = "normed"
    """`raw`: the residual stream below the first late layer (paper). `normed`: the same divided by
    its root mean square. A raw stream is so large that each optimiser step moves the router's
    logits by whole units, and the routing collapses onto one layer (docs/evidence.md)."""

    router_temperature: float = 1.0
    """Divides the router's logits; below 1 sharpens, above 1 flattens the mixture."""

    train_late_norms: bool = True
    """Give each late layer below the final one a trained copy of the final norm (paper). `False`
    shares the frozen pretrained norm (the paper's ablation)."""

    train_final_norm: bool = False
    """Also give the final layer a trained copy (the paper keeps the pretrained norm frozen)."""

    task_loss: Literal["ensemble", "layers"] | int = "ensemble"
    """Whose cross-entropy `L_task` is. `ensemble`: the mixture's (paper). A late layer's number:
    that layer's own prediction alone. `layers`: the mean over all late layers of each one's own
    (deep supervision). The last two are ablations, in which the router gets no gradient;
    predictions and evaluation losses stay the ensemble's, so evaluate such a run with `--layer`.
    Each layer costs one head product each way beside the distillation's."""

    distillation_weight: float = 0.1
    """λ in `L_task + λ L_distill`; 0 switches distillation off, and its cost with it. The paper's
    1e-4 carries next to no weight under `mean`."""

    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    """`reverse_kl`: KL(P_i ‖ P_n), student first (paper). `forward_kl`: KL(P_n ‖ P_i). `jsd`:
    Jensen-Shannon divergence, at most ln 2 nats."""

    reduction: Literal["mean", "batchmean", "sum"] = "mean"
    """How the divergence is reduced over label tokens: their mean, the sum over each sequence
    averaged over the batch, or the plain sum."""

    distillation_top_m: int | None = None
    """Distil on the ensemble's M likeliest vocabulary entries, renormalised, which spares k - 1
    head products each way; `None` distils on all entries (exact). A good stand-in only while
    several layers have a say in the ensemble (docs/cost.md)."""

    distillation_token_share: float = 1.0
    """Distil on this share of the label tokens, drawn anew at each step and scaled to stand for
    all (unbiased); 1 distils on all (exact). See docs/cost.md."""

    log_layer_losses: bool = False
    """Also log each late layer's own cross-entropy in training, as `layer_loss/layer_<i>`. Costs k
    more head products forward on the label tokens of every step, and none with
    `task_loss="layers"`, which has them already."""

    exits: list[int] | None = None
    """Layers far below the top that get exits of their own, trained together with all the rest: an
    increasing list such as `[8, 14, 20]` of 30, each below the final one; `None` for none. Exits
    draft in generation and are no members of the ensemble, whose predictions are the same whatever
    they say. They change what is learnt all the same, at a cost for the model itself
    (docs/method.md); `depthmix add-exits` puts them on a finished model at none."""

    exit_rank: int = 64
    """Rank of each exit's translator; 0 gives it a norm alone."""

    exit_weight: float = 0.1
    """Weight of `L_exits`, the mean over the exits, in the whole loss. The larger it is, the better
    they draft, and the worse is the model."""

    exit_distillation: float = 0.5
    """κ, from 0 to 1: share of an exit's loss that is its cross-entropy with the model's own
    prediction (detached), beside the one with the labels. Under another loss than the labels'
    cross-entropy (DPO, GRPO) it counts as 1, for there a label need not be what is to be said."""

    exit_vocabulary: int | None = 2048
    """Vocabulary entries, drawn anew at each pass, that an exit's loss tells apart beside the
    pass's own labels; `None` takes all entries, at a head product per exit each way."""

    exit_learning_rate_factor: float = 1.0
    """Multiplies the learning rate for the exits, in trainers with `MoDETrainerMixin`."""

    router_learning_rate_factor: float = 1.0
    """Multiplies the learning rate for the router, in trainers with `MoDETrainerMixin`."""

    final_norm: str | None = None
    """Name of the module that is the final norm, where it cannot be found by itself."""

    decoder_layers: str | None = None
    """Name of the `ModuleList` of decoder layers, where it cannot be found by itself."""

    def __post_init__(self) -> None:
        if self.task_loss not in ("ensemble", "layers") and isinstance(self.task_loss, str):
            raise ValueError(
                "`task_loss` must be 'ensemble', 'layers' or the number of a late layer, "
                f"got {self.task_loss!r}."
            )
        if not 0 < self.router_temperature < math.inf:
            raise ValueError(
                f"`router_temperature` must be a positive number, got {self.router_temperature}; "
                "1 leaves the router's logits as they are."
            )
        if not 0 <= self.distillation_weight < math.inf:
            raise ValueError(
                "`distillation_weight` must be a number of at least 0, got "
                f"{self.distillation_weight}; 0 switches distillation off."
            )
        if self.distillation_top_m is not None and self.distillation_top_m < 2:
            raise ValueError(
                "`distillation_top_m` must be at least 2 (one entry alone, renormalised, is always "
                f"certain), got {self.distillation_top_m}; leave it out to distil on all entries."
            )
        if not 0 < self.distillation_token_share <= 1:
            raise ValueError(
                "`distillation_token_share` must be above 0 and at most 1, got "
                f"{self.distillation_token_share}; `distillation_weight=0` switches "
                "distillation off."
            )
        exits = {name: getattr(self, name) for name in EXIT_OPTIONS}
        said = [name for name, value in exits.items() if value != getattr(type(self), name)]
        check_exit_options(exits, said=said)
        check_rate_factor("router_learning_rate_factor", self.router_learning_rate_factor)
        self.exits = None if self.exits is None else list(self.exits)
        self._check_late_layers()
        auto = self.late_layers == "auto"  # the number of routes is not known yet
        if self.top_k is not None and (
            self.top_k < 1 or (not auto and self.top_k > self.num_routes)
        ):
            routes = "routes" if auto else f"{self.num_routes} routes"
            raise ValueError(
                f"`top_k` must be between 1 and the {routes} of `late_layers`, "
                f"got {self.top_k}; leave it out to keep all routes."
            )

    @property
    def num_routes(self) -> int:
        """Number k of layers in the ensemble."""
        late_layers = self._chosen()
        return late_layers if isinstance(late_layers, int) else len(late_layers)

    @property
    def distils(self) -> bool:
        """Whether any late layer learns from the final one."""
        return self.distillation_weight > 0 and self.num_routes > 1

    @property
    def has_term(self) -> bool:
        """Whether the objective has a term beside the task loss: distillation, or exits'."""
        return self.distils or self.exits is not None

    def list_given(self) -> dict[str, Any]:
        """Give the mixture's options by name, as files hold them: exits' only where there are some.

        A model without exits is saved as it was before there were any.
        """
        options = {field.name: getattr(self, field.name) for field in fields(MixtureConfig)}
        return {name: value for name, value in options.items() if not is_idle(self, name)}

    def resolve_late_layers(self, num_hidden_layers: int) -> tuple[int, ...]:
        """Name the layers of the ensemble in a model of `num_hidden_layers` layers.

        Args:
            num_hidden_layers: Decoder layers of the model, n.

        Returns:
            Increasing layer numbers from 1 to n; the last one is n.

        Raises:
            ValueError: If `late_layers` asks for more layers than the model has, a list does not
                end at the last layer, they are still to be chosen, `task_loss` is the number of no
                late layer, or an exit is not below the last layer.
        """
        n, late_layers = num_hidden_layers, self._chosen()
        if self.exits is not None:
            check_exit_layers(self.exits, num_hidden_layers=n)
        if isinstance(late_layers, int):
            if late_layers > n:
                raise ValueError(
                    f"`late_layers` must be between 1 and {n} (the model has {n} layers), "
                    f"got {late_layers}."
                )
            layers = tuple(range(n - late_layers + 1, n + 1))
        elif late_layers[-1] != n:
            raise ValueError(
                f"`late_layers` must end at the final layer, which is {n} in this model, "
                f"got {list(late_layers)}."
            )
        else:
            layers = tuple(late_layers)
        if isinstance(self.task_loss, int) and self.task_loss not in layers:
            raise ValueError(
                f"`task_loss` must be one of the mixture's late layers "
                f"{', '.join(map(str, layers))} (or 'ensemble' or 'layers'), got {self.task_loss}; "
                "name a layer in `late_layers` to put the loss on it."
            )
        return layers

    def _chosen(self) -> int | list[int]:
        """Give `late_layers`, unless they are still to be chosen."""
        if isinstance(self.late_layers, str):
            raise ValueError(
                "`late_layers='auto'` needs a probe: leave it to `depthmix train`, give "
                "`depthmix info` a `probe`, or pass "
                "`late_layers=choose_late_layers(probe_layers(model, sequences))`."
            )
        return self.late_layers

    def _check_late_layers(self) -> None:
        """Check what can be known of `late_layers` without a model."""
        if self.late_layers == "auto":
            return
        if isinstance(self.late_layers, str):
            raise ValueError(
                "`late_layers` must be a number of layers or a list of layer numbers (or `auto` "
                f"for `depthmix train`), got {self.late_layers!r}."
            )
        if isinstance(self.late_layers, int):
            if self.late_layers < 1:
                raise ValueError(
                    "`late_layers` must be at least 1 (1 is the final layer alone), "
                    f"got {self.late_layers}."
                )
            return
        layers = self.late_layers = list(self.late_layers)
        increasing = all(a < b for a, b in pairwise(layers))
        if not layers or layers[0] < 1 or not increasing:
            raise ValueError(
                "`late_layers` must be an increasing list of different layer numbers from 1 to "
                f"the last layer (0 would be the embeddings), got {layers}."
            )


def is_idle(config: MixtureConfig, name: str) -> bool:
    """Tell whether an option says nothing, so that files are as they were before there was one.

    Args:
        config: The mixture's options.
        name: One of them.
    """
    if name == "router_learning_rate_factor":
        return config.router_learning_rate_factor == 1
    return config.exits is None and name in EXIT_OPTIONS
