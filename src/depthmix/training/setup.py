"""A run's trainer, built from its material: arguments, mixture, adapter, what it must keep."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from pydantic import TypeAdapter
from trl import SFTConfig

from depthmix.adapters.baseline import to_lora
from depthmix.adapters.config import MoDEConfig
from depthmix.adapters.ledger import Ledger, parameter_ledger
from depthmix.data.templates import check_label_tokens
from depthmix.depth.layer_choice import LayerChoice, choose_on_records
from depthmix.libraries.releases import CHECKPOINTING
from depthmix.training.config import RunConfig
from depthmix.training.material import Material
from depthmix.training.start import Start, read_beginning
from depthmix.training.tokenizer import train_tokens
from depthmix.training.trainers.checkpoints import CheckpointLimit
from depthmix.training.trainers.mixin import MoDESFTTrainer


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A trainer that is ready to begin."""

    trainer: MoDESFTTrainer
    """The trainer."""

    tuned: PeftModel
    """Its model, with the adapter in place."""

    choice: LayerChoice | None
    """What the late layers were chosen by, where `late_layers` is `auto`."""

    ledger: Ledger
    """Trainable parameters by part."""

    checkpoint_limit: int
    """Checkpoints that are kept; 0 for all."""

    @property
    def num_devices(self) -> int:
        """Devices among which batches are divided."""
        processes = self.trainer.accelerator.num_processes // self.trainer.get_tp_size()
        return processes * max(self.trainer.args.n_gpu, 1)


def build(config: RunConfig, output_dir: Path, start: Start, material: Material) -> Setup:
    """Build the trainer of a run.

    Args:
        config: The run's settings.
        output_dir: Its folder.
        start: How it begins.
        material: What it is made of.

    Returns:
        The trainer and what is known of it.

    Raises:
        ValueError: If a setting or the model does not fit, the records are not those with which
            the run began, or one has no token to learn.
    """
    arguments = _training_arguments(config, output_dir)
    kept = _recall_beginning(config, output_dir, start, material)
    mode, choice = _settle_layers(config, material, arguments, kept.get("layer_choice"))
    trainer = _make_trainer(config, mode, arguments, material)
    assert isinstance(trainer.train_dataset, Dataset)
    check_label_tokens(trainer.train_dataset, material.selection.numbers)
    assert isinstance(trainer.model, PeftModel)
    return Setup(
        trainer=trainer,
        tuned=trainer.model,
        choice=choice,
        ledger=_count_parameters(trainer.model, mode, material),
        checkpoint_limit=_find_limit(config),
    )


def _recall_beginning(
    config: RunConfig, output_dir: Path, start: Start, material: Material
) -> dict[str, Any]:
    """Read what a run that goes on found out at first; its records must be the same."""
    kept = {} if start.checkpoint is None else read_beginning(output_dir)
    if kept.get("records", material.digest) != material.digest:
        raise ValueError(
            f"`data.train` must hold the records with which the run in {output_dir} began, and "
            f"{config.data.train} gives others now; put them back, or start the run again by "
            "`overwrite`."
        )
    return kept


def _make_trainer(
    config: RunConfig, mode: MoDEConfig, arguments: SFTConfig, material: Material
) -> MoDESFTTrainer:
    """Make the trainer, which puts the adapter on the model."""
    limit = _find_limit(config)
    return MoDESFTTrainer(
        model=material.model,
        args=arguments,
        train_dataset=material.train_dataset,
        eval_dataset=material.eval_dataset,
        processing_class=material.tokenizer,
        peft_config=mode if config.method == "mode" else to_lora(mode, material.model),
        callbacks=[CheckpointLimit(limit)] if limit > 0 else None,
    )


def _find_limit(config: RunConfig) -> int:
    """Read how many checkpoints are kept; 0 for all."""
    return config.training.get("save_total_limit") or 0


def _count_parameters(model: PeftModel, mode: MoDEConfig, material: Material) -> Ledger:
    """Count what is trained, by the parts that the mixture has or would have."""
    num_layers = material.model.config.get_text_config().num_hidden_layers
    return parameter_ledger(
        model,
        first_late_layer=mode.resolve_late_layers(num_layers)[0],
        final_norm=mode.final_norm,
        decoder_layers=mode.decoder_layers,
    )


def _settle_layers(
    config: RunConfig, material: Material, arguments: SFTConfig, kept: dict[str, Any] | None
) -> tuple[MoDEConfig, LayerChoice | None]:
    """Make the mixture's options, with the layers that a probe chooses where it is to choose."""
    mode = train_tokens(MoDEConfig(**config.mode), material.model, material.new_tokens)
    if config.model.revision is not None:
        # Says beside the adapter which weights are under it.
        mode = replace(mode, revision=config.model.revision)
    if mode.late_layers != "auto":
        # Before the trainer makes an adapter of them.
        mode.resolve_late_layers(material.model.config.get_text_config().num_hidden_layers)
        return mode, None
    if kept is not None:
        choice = TypeAdapter(LayerChoice).validate_python(kept)
        return replace(mode, late_layers=list(choice.late_layers)), choice
    choice = choose_on_records(
        material.model.to(arguments.device),  # pyrefly: ignore[bad-argument-type]
        material.tokenizer,
        material.records,
        mode,
        template=config.data.template,
        max_length=arguments.max_length,
        keeps_end=arguments.truncation_mode == "keep_end",
        variables=material.template.variables,
    )
    material.model.to("cpu")  # pyrefly: ignore[bad-argument-type]
    [choice] = broadcast_object_list([choice])  # rounding must not part the processes
    if arguments.process_index == 0:
        print(choice, file=sys.stderr)
    return replace(mode, late_layers=list(choice.late_layers)), choice


def _training_arguments(config: RunConfig, output_dir: Path) -> SFTConfig:
    """Build TRL's arguments; where the file is silent, a CPU gets what a CPU can do well."""
    has_gpu, given = torch.cuda.is_available(), config.training
    defaults: dict[str, Any] = {
        "logging_nan_inf_filter": False,
        # TRL's own default and older files have names that transformers, since 5.23, warns of.
        CHECKPOINTING: given.get("gradient_checkpointing", has_gpu),
        f"{CHECKPOINTING}_kwargs": given.get("gradient_checkpointing_kwargs"),
    }
    if not has_gpu:
        # Adapters are float32 over a bfloat16 trunk, and their products are slow unless autocast.
        defaults |= {
            "use_cpu": not torch.backends.mps.is_available(),
            "bf16": config.model.dtype == "bfloat16",
            "dataloader_pin_memory": False,
        }
    arguments: dict[str, Any] = {**defaults, **config.training, "output_dir": str(output_dir)}
    arguments.pop("save_total_limit", None)  # `CheckpointLimit` sees to it
    arguments.pop("pad_token", None)  # the tokenizer has it, and TRL warns of the option
    try:
        return SFTConfig(**arguments)
    except ValueError as error:
        reason = " ".join(str(error).split())
        named = [name for name, value in arguments.items() if reason.startswith(f"{value} is not")]
        option = f"training.{named[0]}" if named else "training"
        raise ValueError(f"`{option}` is refused by TRL: {reason}") from error
