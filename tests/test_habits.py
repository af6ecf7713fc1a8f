"""What users of PEFT, TRL and Transformers do every day, and what these then do to a mixture."""

from __future__ import annotations

from inspect import unwrap

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from checkpoints import make_model, make_tokenizer
from depthmix import MoDEConfig, attach, parameter_ledger
from depthmix.adapters.readout import reading_out
from depthmix.evaluation.folder import EvaluationFolder
from depthmix.evaluation.harness import default_output
from depthmix.evaluation.plan import EvaluationPlan
from depthmix.evaluation.provenance import describe_model
from depthmix.libraries.releases import CHECKPOINTING
from depthmix.method.norm import active_mixture, find_mixture_norm
from depthmix.models.loading import load_model
from depthmix.models.spec import ModelSpec
from depthmix.training.trainers.mixin import MoDESFTTrainer
from models import random_ids, randomise, tiny_model

TOKENIZER = make_tokenizer()


def make_dataset():
    ids = random_ids(8, 8)
    columns = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    return Dataset.from_dict({name: values.tolist() for name, values in columns.items()})


def tune(**options):
    """Put LoRA and a mixture on a tiny model whose norms are as in a pretrained one."""
    model = make_model(TOKENIZER)
    nn.init.ones_(model.model.norm.weight)
    return get_peft_model(model, MoDEConfig(target_modules=["q_proj"], r=2, **options))


def sft_config(folder, **options):
    common = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no"}
    common |= {CHECKPOINTING: True}
    common |= {"disable_tqdm": True, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return SFTConfig(output_dir=str(folder), **common | options)


def make_quantised(model):
    """What bitsandbytes sets on a model; TRL asks for no more, and narrows its adapters."""
    model.get_base_model().is_loaded_in_4bit = True
    return model


class TestQuantisedModels:
    def test_norms_and_router_are_trained_in_float32(self, tmp_path):
        model = make_quantised(tune(late_layers=3))
        options = {"max_steps": 3, "learning_rate": 3e-4, "lr_scheduler_type": "constant"}
        trainer = MoDESFTTrainer(
            model=model,
            args=sft_config(tmp_path, per_device_train_batch_size=4, **options),
            train_dataset=make_dataset(),
            processing_class=TOKENIZER,
        )
        model.get_base_model().is_loaded_in_4bit = False  # or accelerate asks for bitsandbytes
        mixture = active_mixture(model)
        before = {name: value.clone() for name, value in mixture.state_dict().items()}
        trainer.train()
        for name, value in mixture.state_dict().items():
            assert value.dtype == torch.float32
            assert (value != before[name]).float().mean() > 0.9, name

    def test_a_plain_trainer_tells_of_narrow_norms(self, tmp_path):
        model = make_quantised(tune(late_layers=3, distillation_weight=0.0))
        trainer = SFTTrainer(
            model=model,
            args=sft_config(tmp_path, max_steps=1),
            train_dataset=make_dataset(),
            processing_class=TOKENIZER,
        )
        model.get_base_model().is_loaded_in_4bit = False
        with pytest.warns(UserWarning, match="narrower than float32"):
            trainer.train()

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
    def test_a_quantised_head_takes_states_as_they_are(self, dtype):
        class QuantisedLinear(nn.Linear):
            """As bitsandbytes has it: a weight in another type, and a forward of its own."""

            def __init__(self, linear):
                super().__init__(linear.in_features, linear.out_features, bias=False)
                self.original = linear.weight.detach().clone()
                quantised = (10 * linear.weight.detach()).round().clamp(-99, 99).to(dtype)
                packed = quantised.flatten()[:, None]  # 4-bit weights have no shape of a matrix
                self.weight = nn.Parameter(packed, requires_grad=False)

            def forward(self, x):
                return F.linear(x.to(self.original.dtype), self.original).to(x.dtype)

        ids, losses, gradients = random_ids(2, 7), [], []
        for quantised in (False, True):
            model = tiny_model(tie_word_embeddings=False)
            if quantised:
                model.lm_head = QuantisedLinear(model.lm_head)
            config = MoDEConfig(
                target_modules=["q_proj"], r=2, late_layers=2, router_init="gaussian"
            )
            tuned = get_peft_model(model, config)
            randomise(tuned, seed=5, only_trainable=True)
            loss = tuned.train()(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
            router = active_mixture(tuned).router.weight
            gradients.append(router.grad)
            assert find_mixture_norm(tuned).backbone.vocab_size == model.config.vocab_size
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


class TestLossesWithoutLabels:
    @pytest.mark.parametrize("weight", [0.1, 0.0])
    def test_label_smoothing_in_a_plain_trainer_is_told(self, tmp_path, weight, recwarn):
        options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
        arguments = TrainingArguments(
            output_dir=str(tmp_path), label_smoothing_factor=0.1, max_steps=1, **options
        )
        model = tune(late_layers=3, distillation_weight=weight)
        Trainer(model=model, args=arguments, train_dataset=make_dataset()).train()
        told = [one for one in recwarn if "distillation loss is left out" in str(one.message)]
        assert bool(told) == (weight > 0)


class TestTargets:
    @pytest.mark.parametrize(
        ("options", "lost"),
        [
            ({"layers_to_transform": [3]}, "layers_to_transform=3"),
            ({"layers_to_transform": [0, 3]}, "layers_to_transform=3"),
            ({"target_modules": ["layers.3.self_attn.q_proj"]}, "target_modules='layers.3.self"),
            ({"target_modules": ["layers.3.self_attn.q_proj", "k_proj"]}, "layers.3.self_attn"),
            (
                {"target_modules": [], "target_parameters": ["layers.3.self_attn.q_proj.weight"]},
                "target_parameters='layers.3.self",
            ),
            ({"target_modules": r".*layers\.3\..*q_proj"}, "target_modules='.*layers"),
        ],
    )
    def test_targets_in_the_late_layers_alone_are_refused(self, options, lost):
        options = {"target_modules": ["q_proj"], "r": 2, "late_layers": 2, **options}
        with pytest.raises(ValueError, match="puts no adapter into the late layers") as caught:
            get_peft_model(tiny_model("llama"), MoDEConfig(**options))
        assert lost in str(caught.value)
        tuned = get_peft_model(tiny_model("llama"), MoDEConfig(**options, adapt="all"))
        assert any("layers.3.self_attn.q_proj" in n and "lora_A" in n for n in tuned.state_dict())

    def test_one_text_is_a_regular_expression(self):
        config = MoDEConfig(target_modules="q_proj", r=2)
        with pytest.raises(ValueError, match=r"matches none of the model's; .*\['q_proj'\]"):
            get_peft_model(tiny_model("llama"), config)


class TestOneModelInManyWays:
    def test_a_disabled_adapter_is_read_out_at_the_final_layer(self):
        model = tune(late_layers=2).eval()
        randomise(model, seed=3, only_trainable=True)
        ids = random_ids(1, 5)
        with torch.no_grad(), model.disable_adapter():
            expected = model(ids).logits
            with reading_out(model, "final"):
                assert torch.equal(model(ids).logits, expected)
            with pytest.raises(ValueError, match="while the adapter is disabled, got 2"):
                reading_out(model, 2).__enter__()

    def test_a_model_with_adapters_gets_its_mixture_by_peft(self):
        lora = LoraConfig(target_modules=["q_proj"], r=2)
        with pytest.raises(TypeError, match=r"by `MoDEConfig.from_lora`, or fold"):
            unwrap(attach)(get_peft_model(tiny_model("llama"), lora))  # past the check of types
        plain = get_peft_model(tiny_model("llama"), lora).targeted_module_names
        tuned = get_peft_model(tiny_model("llama"), MoDEConfig.from_lora(lora))
        assert set(plain) < set(tuned.targeted_module_names)

    def test_parts_that_cannot_be_found_are_named(self):
        model = tiny_model("llama")
        model.model.last = model.model.norm
        del model.model.norm
        model.model.forward = lambda **_: None  # never called
        names = {"final_norm": "model.last", "decoder_layers": "model.layers"}
        tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
        with pytest.raises(ValueError, match="pass its name as `final_norm`"):
            parameter_ledger(tuned, first_late_layer=3)
        ledger = parameter_ledger(tuned, first_late_layer=3, **names)
        assert ledger.lora_late == ledger.lora_below > 0


class TestModelsOnTheHub:
    """Nothing is fetched: what is there is what an earlier download has left."""

    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        """Downloads a model, by name and commit."""
        cache = tmp_path / "hub"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))

        def download(name, commit, save=lambda folder: None):
            folder = cache / f"models--{name.replace('/', '--')}"
            snapshot = folder / "snapshots" / commit
            snapshot.mkdir(parents=True)
            (snapshot / "config.json").write_text("{}")
            save(snapshot)
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / "main").write_text(commit)

        return download

    @pytest.mark.parametrize("known", [True, False])
    def test_two_of_one_name_are_two_evaluations(self, tmp_path, hub, known):
        if known:
            hub("one/model", "1" * 40)
            hub("two/model", "2" * 40)
        one, two = (ModelSpec(name=name) for name in ("one/model", "two/model"))
        assert describe_model(one)["weights"] == ("1" * 12 if known else None)
        plan = EvaluationPlan(tasks=("arc_easy",))
        assert default_output(one, plan) != default_output(two, plan)
        EvaluationFolder(tmp_path / "out", describe_model(one)).begin()
        EvaluationFolder(tmp_path / "out", describe_model(one))  # goes on
        with pytest.raises(FileExistsError, match="of the same evaluation"):
            EvaluationFolder(tmp_path / "out", describe_model(two))

    def test_what_was_begun_out_of_reach_goes_on(self, tmp_path, hub):
        section = ModelSpec(name="one/model")
        EvaluationFolder(tmp_path / "out", describe_model(section)).begin()
        hub("one/model", "1" * 40)
        EvaluationFolder(tmp_path / "out", describe_model(section))

    def test_a_mixture_is_loaded_with_its_model(self, hub):
        model = tiny_model("llama").eval()
        plain, ids = ModelSpec(name="one/plain"), random_ids(1, 5)
        hub("one/plain", "2" * 40, model.save_pretrained)
        randomise(attach(model, late_layers=2).mixture, seed=3)
        section = ModelSpec(name="one/model")
        hub("one/model", "1" * 40, model.save_pretrained)
        with torch.no_grad():
            assert torch.equal(load_model(section).eval()(ids).logits, model(ids).logits)
        assert describe_model(section)["method"] == "MoDE"
        assert find_mixture_norm(load_model(plain)) is None
        assert describe_model(plain)["method"] == "pretrained"

    def test_a_newer_commit_is_another_model(self, tmp_path, hub):
        section = ModelSpec(name="one/model")
        hub("one/model", "1" * 40)
        EvaluationFolder(tmp_path / "out", describe_model(section)).begin()
        hub("one/model", "3" * 40)
        with pytest.raises(FileExistsError, match="another `weights`"):
            EvaluationFolder(tmp_path / "out", describe_model(section))

    def test_an_adapter_is_not_taken_for_a_pretrained_model(self, monkeypatch):
        monkeypatch.setattr(
            "depthmix.evaluation.provenance.find_adapter_config_file", lambda *_, **__: "x.json"
        )
        with pytest.raises(ValueError, match="one/adapter is an adapter on the hub"):
            describe_model(ModelSpec(name="one/adapter"))
