import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import htsr
from htsr.training.adapters import adapter_ranks, lora_config
from htsr.training.sampling import LayerSampler
from tests.training.runs import batches, train
from tests.transformer import gpt2, llama


@pytest.mark.parametrize("make", [llama, gpt2])
def test_budget_is_that_of_the_uniform_rank_and_scores_order_the_ranks(make):
    model = make(3)
    analysis = htsr.analyze(model)
    options = {"fan_in_fan_out": make is gpt2}
    config = lora_config(model, analysis, rank=4, score="stable_rank", **options)
    adapted = get_peft_model(make(3), config)
    uniform = get_peft_model(make(3), LoraConfig(r=4, target_modules=config.target_modules, **options))
    trainable, budget = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (adapted, uniform))
    smallest = min(p.numel() for n, p in uniform.named_parameters() if "lora_A" in n) // 4
    assert budget - 4 * smallest < trainable <= budget
    modules = {n: m for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert len(modules) == len(config.rank_pattern) == (21 if make is llama else 12)
    assert all(m.scaling["default"] == 2.0 for m in modules.values())
    ranks = adapter_ranks(model, analysis, rank=4, score="stable_rank")
    assert {n.removeprefix("base_model.model."): m.r["default"] for n, m in modules.items()} == ranks
    assert len(set(ranks.values())) > 1
    score = {row.name: row.stable_rank for row in analysis}
    same_shape = [n for n in ranks if n in score and n.endswith(("gate_proj", "up_proj"))]
    for a in same_shape:
        for b in same_shape:
            assert score[a] <= score[b] or ranks[a] >= ranks[b]


def test_what_has_no_meaning_is_refused():
    model = llama()
    analysis = htsr.analyze(model)
    for arguments, message in (
        ({"score": "beta"}, "no metric 'beta'"),
        ({"roles": ["conv"]}, "inside the blocks of LlamaForCausalLM matches 'conv'; there are attn.k"),
        ({"score": "num_spikes"}, "has no num_spikes of these modules"),
        ({"minimum": 9}, "less than the minimum"),
    ):
        with pytest.raises(htsr.UsageError, match=message):
            adapter_ranks(model, analysis, rank=4, **arguments)


def test_adapters_are_sampled_by_block_and_analyzed_before_and_after_merging():
    model = get_peft_model(llama(3), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sampler = LayerSampler(model, active=1, interval=2, seed=5)
    sampler.attach(optimizer)
    for _ in range(3):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        active = sampler.names[sampler.active[0]]
        train(model, optimizer, batches(2))
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n in before if f".{active}." in n and "lora_" in n}
    live = htsr.analyze(model)
    merged = htsr.analyze(model.merge_and_unload())
    assert [row.name for row in live] == [row.name for row in merged]
    np.testing.assert_allclose([r.norm for r in live], [r.norm for r in merged], rtol=1e-5)
