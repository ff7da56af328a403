import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import htsr
from htsr.training.lora import adapter_ranks, lora_config
from htsr.training.sampling.sampler import LayerSampler
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


def test_by_default_ranks_follow_hills_alpha_within_each_role():
    model = llama(3)
    with torch.no_grad():  # one block's spectra are broad, so its α is small
        for parameter in model.model.layers[1].parameters():
            if parameter.ndim == 2:
                U, S, V = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_(U * S.sort(descending=True).values * torch.arange(1, len(S) + 1) ** -1.0 @ V)
    ranks = adapter_ranks(model, htsr.analyze(model, null=False), rank=8)
    assert ranks == adapter_ranks(model, htsr.analyze(model, null=False, fit="hill"), rank=8)  # whatever the fit
    by_block = [[r for name, r in ranks.items() if f"layers.{i}." in name] for i in range(3)]
    assert max(by_block[1]) < min(by_block[0] + by_block[2])
    means = {}  # shape alone decides nothing: over its blocks every role gets the uniform rank
    for name, r in ranks.items():
        means.setdefault(name.rsplit(".", 1)[1], []).append(r)
    assert all(abs(np.mean(own) - 8) <= 1 for own in means.values())
    alpha = {row.name: row.alpha for row in htsr.analyze(model, null=False, fit="hill")}
    for role, own in means.items():
        names = [name for name in ranks if name.endswith(role)]
        expected = 8 * np.array([alpha[name] for name in names]) / np.mean([alpha[name] for name in names])
        assert np.abs(np.array(own) - expected).max() < 2


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
    for make, name in (
        (llama, r"model\.layers\.0\.self_attn\.q_proj"),
        (gpt2, r"transformer\.h\.0\.attn\.c_attn\[q\]"),
    ):
        with pytest.raises(htsr.UsageError, match=rf"is of another model: {name} is 32×32 there"):
            adapter_ranks(make(width=64), htsr.analyze(make(), null=False), rank=4, score="stable_rank")


class Net(nn.Module):
    """`layers` is the longest list, and the names of `teacher.layers` end as its names do."""

    def __init__(self, blocks=3, teachers=2):
        super().__init__()

        def block():
            part = nn.Module()
            part.self_attn = nn.ModuleDict({"q_proj": nn.Linear(64, 64)})
            return part

        self.teacher = nn.Module()
        self.teacher.layers = nn.ModuleList(block() for _ in range(teachers))
        self.layers = nn.ModuleList(block() for _ in range(blocks))


@pytest.mark.parametrize("own", [None, ["layers.2.self_attn.q_proj"], r".*layers\.2\..*"])
def test_names_that_end_alike_are_not_adapted(own):
    """PEFT matches endings: 0.1.0 adapted the teacher too, and spent 10 modules' parameters where 6 were budgeted."""
    torch.manual_seed(0)
    model = Net()
    wanted = [f"layers.{i}.self_attn.q_proj" for i in range(3)]
    options = {} if own is None else {"exclude_modules": own}
    config = lora_config(model, htsr.analyze(model, null=False), rank=4, score="stable_rank", **options)
    assert sorted(config.target_modules) == wanted
    get_peft_model(model, config)
    assert [n for n, m in model.named_modules() if hasattr(m, "lora_A")] == wanted[: 3 if own is None else 2]


def test_ranks_of_names_that_end_alike_are_their_own():
    torch.manual_seed(0)
    model = Net(3, 3)
    names = [f"{where}layers.{i}.self_attn.q_proj" for where in ("teacher.", "") for i in range(3)]
    with torch.no_grad():
        for i, name in enumerate(names):
            model.get_submodule(name).weight.copy_(torch.diag(torch.arange(1, 65.0) ** (i / 4)))
    analysis = htsr.analyze(model, null=False)
    ranks = adapter_ranks(model, analysis, rank=8, score="stable_rank")
    assert all(ranks[f"teacher.{name}"] > ranks[name] for name in names[3:])
    get_peft_model(model, lora_config(model, analysis, rank=8, score="stable_rank"))
    assert {name: model.get_submodule(name).r["default"] for name in names} == ranks


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
