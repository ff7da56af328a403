from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

import htsr
from htsr.finetuning.arguments import training_arguments
from htsr.finetuning.check import planned
from htsr.finetuning.memory import predicted_memory
from htsr.finetuning.reading import read_recipe
from htsr.finetuning.recipe import Data, Gum, Lora, LowRank, Recipe, Sampling
from tests.transformer import llama

pytest.importorskip("trl.trainer.sft_trainer")


class Asked:
    """A simulation that says what it was asked for."""

    def __init__(self, _label, _config, setting, **_more):
        self.setting = setting

    def trace(self, batch):
        return batch

    def plan(self, _trace, batch):
        return SimpleNamespace(**vars(self.setting), batch=batch, projectors=1, total=1)

    def evaluated(self):
        return SimpleNamespace(total=0)


def test_every_method_of_a_recipe_has_the_plan_of_its_own_settings(tmp_path, monkeypatch):
    """What is simulated is compared, and not the plans, which take a second each."""
    monkeypatch.setattr("htsr.training.memory.simulation.Simulation", Asked)
    llama(4).save_pretrained(tmp_path)
    training = {"per_device_train_batch_size": 3, "max_length": 32, "gradient_checkpointing": True}

    def plan(method, longest=None, data=None, own=None, **more):
        content = {"data": data or Data(train="t"), "method": method, "training": training | (own or {})}
        recipe = Recipe(model=str(tmp_path), output="out", **content, **more)
        return predicted_memory(recipe, training_arguments(recipe), longest)

    def expected(method, **more):
        given = {"dtype": "float32", "batch": 3, "sequence": 32, "checkpointing": True, "logits": "chunked"}
        return htsr.predict_memory(str(tmp_path), method, **(given | more))

    assert plan("full") == expected("full")
    assert plan("full", longest=20) == expected("full", sequence=20) != expected("full")
    assert plan("full", longest=99) == expected("full")
    assert plan("lora", lora=Lora(rank=4)) == expected("lora", rank=4)
    assert plan("lora", lora=Lora(rank=4, merge=False)) == expected("lora", rank=4, merge=False)
    options = {"init_lora_weights": "pissa", "use_dora": True}  # a start is over before training, DoRA is not
    kept = {"use_dora": True, "lora_dropout": 0.1}
    assert plan("lora", lora=Lora(rank=4, dropout=0.1, options=options)) == expected("lora", rank=4, lora_options=kept)
    sampled = plan("lora", lora=Lora(rank=4), sampling=Sampling(active=1))
    assert sampled == expected("lora", rank=4, active_blocks=1)
    assert plan("qlora", dtype="bfloat16", sampling=Sampling()).method == "qlora"
    assert plan("galore", low_rank=LowRank(rank=8, state_dtype="8bit", gradients="project")) == expected(
        "galore", rank=8, state_dtype="8bit", gradients="project"
    )
    for embedding, counted in (("freeze", "freeze"), ("train", "train"), ("sampled", "train")):
        found = plan("lisa", sampling=Sampling(active=1, embedding=embedding), frozen_weights="host")
        assert found == expected("lisa", active_blocks=1, embeddings=counted, frozen_weights="host")
    frozen = plan("galore", low_rank=LowRank(rank=8, embedding="freeze"))
    assert frozen == expected("galore", rank=8, embeddings="freeze")
    assert frozen != plan("galore", low_rank=LowRank(rank=8))
    drawn = plan("gum", low_rank=LowRank(rank=8), gum=Gum(active=1, unit="matrix"))
    assert drawn == expected("gum", rank=8, active_blocks=1, unit="matrix")
    matrices = plan("lisa", sampling=Sampling(active=1, unit="matrix"))
    assert matrices == expected("lisa", active_blocks=1, unit="matrix")
    kept = Sampling(active=1, frozen_state="keep")
    assert plan("lisa", sampling=kept) == expected("lisa", active_blocks=1, frozen_state="keep")
    exact = plan("apollo", low_rank=LowRank(rank=8, method="svd"))
    assert exact == expected("apollo", rank=8, projector="svd") != expected("apollo", rank=8)
    assert plan("full", own={"gradient_accumulation_steps": 4}) == expected("full", accumulation=4)
    evaluates = {"own": {"per_device_eval_batch_size": 9}}
    assert plan("full", **evaluates, data=Data(train="t", evaluation="e")) == expected("full", evaluation=9)
    assert plan("full", **evaluates, data=Data(train="t", evaluation_share=0)) == expected("full")
    low = plan("owlore", sampling=Sampling(active=1, embedding="lowrank"), low_rank=LowRank(rank=8))
    assert low == expected("owlore", active_blocks=1, embeddings="lowrank", rank=8)


def test_the_recipe_of_gum_for_24_gb_fits(tmp_path):
    """With room for a longer batch, and not with its gradients kept."""
    wide = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    LlamaConfig(**wide, vocab_size=32000).save_pretrained(tmp_path)
    recipe = read_recipe("one_gpu_24gb_gum", {"model": str(tmp_path)})
    found = planned(recipe, training_arguments(recipe), None, 24 * 10**9)
    assert found is not None
    budget, setting = found
    plan = htsr.predict_memory(recipe.model, **setting)
    assert 0.75 * budget.size < budget.needed(plan) < 0.9 * budget.size
    assert plan.total + 2 * plan.parameters > budget.size
