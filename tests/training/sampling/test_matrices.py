"""Matrices as the unit of sampling, and draws by the gradients that they have had."""

import io
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare

import htsr
from htsr.calibration.outliers import OutlierRow
from htsr.matrices.blocks import find_blocks
from htsr.training.lowrank.groups import low_rank_groups
from htsr.training.lowrank.optimizer import LowRankAdamW
from htsr.training.sampling.probabilities import matrix_probabilities
from htsr.training.sampling.sampler import LayerSampler
from tests.training.runs import batches, loss_of, train
from tests.transformer import gpt2, llama


def sampler_of(model, strategy="uniform", **options):
    return LayerSampler(model, strategy, unit="matrix", **{"active": 1, "interval": 2} | options)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_matrices_are_all_of_the_blocks_and_fit_into_those_of_one(make):
    model = make(3)
    sampler = sampler_of(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    members = [name for names in sampler._members for name in names]
    blocks = [name for name in sizes if sampler.blocks.index_of(name) is not None]
    assert sorted(members) == sorted(blocks)
    assert len(sampler.names) == {"llama": 3 * 7, "gpt2": 3 * 4}[make.__name__]
    own = np.array([sum(sizes[name] for name in names) for names in sampler._members])
    room, draws = own.sum() // 3, [sampler.draw(number) for number in range(2000)]
    assert max(own[list(drawn)].sum() for drawn in draws) <= room
    assert np.mean([own[list(drawn)].sum() for drawn in draws]) > 0.6 * room
    counts = np.bincount([i for drawn in draws for i in drawn], minlength=len(own)) / 2000
    np.testing.assert_allclose(counts, sampler._draws.inclusion(), atol=0.05)
    first = sampler_of(make(3), np.arange(len(own)) + 1.0)  # what is drawn first is drawn by its probability
    orders = first._draws._orders(np.random.default_rng(0), 20_000)[:, 0]
    assert chisquare(np.bincount(orders, minlength=len(own)), 20_000 * first.probabilities).pvalue > 0.01


def test_adapters_of_a_matrix_go_together():
    model = get_peft_model(llama(2), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    sampler = sampler_of(model)
    assert {len(names) for names in sampler._members} == {2}
    assert len(sampler.names) == 14


@pytest.mark.parametrize("frozen_state", ["drop", "offload"])
def test_exactly_the_drawn_matrices_move_and_have_state(frozen_state):
    model = llama(3)
    optimizer = LowRankAdamW(low_rank_groups(model, 4), lr=1e-2)
    sampler = sampler_of(model, frozen_state=frozen_state)
    sampler.attach(optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    visited = set()
    for tokens in batches(8):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        drawn = {name for index in sampler.active for name in sampler._members[index]} | {"model.norm.weight"}
        held = {p for p in optimizer.state if optimizer.state[p]}
        visited |= set(sampler.active)
        train(model, optimizer, [tokens])
        assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == drawn
        if frozen_state == "drop":
            assert {names[id(p)] for p in held} <= drawn
    assert len(visited) > 7
    assert sum(row.intervals for row in sampler.coverage()) == sum(len(sampler.draw(n)) for n in range(4))


@pytest.mark.parametrize(("strategy", "low"), [("gradient_norm", False), ("decrease", True)])
def test_resumed_is_uninterrupted_bit_for_bit(strategy, low):
    def make():
        model = llama(3)
        parameters = low_rank_groups(model, 4) if low else model.parameters()
        sampler, optimizer = sampler_of(model, strategy, interval=3), LowRankAdamW(parameters, lr=1e-2)
        sampler.attach(optimizer)
        return model, optimizer, sampler

    model, optimizer, sampler = make()
    data = batches(14)
    train(model, optimizer, data[:7])  # in the middle of an interval
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, data[7:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, optimizer_again, sampler_again = make()
    again.load_state_dict(saved["model"])
    optimizer_again.load_state_dict(saved["optimizer"])
    train(again, optimizer_again, data[7:])
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert json.loads(json.dumps(sampler.state_dict())) == sampler_again.state_dict()
    assert sampler.coverage() == sampler_again.coverage()
    other = LayerSampler(llama(3), "increase", unit="matrix", active=1)
    if strategy == "gradient_norm":
        with pytest.raises(htsr.UsageError, match="draws by gradients: take its strategy"):
            other.load_state_dict(sampler.state_dict())


def test_gradient_norms_are_those_that_the_drawn_matrices_had():
    model = llama(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sampler = sampler_of(model, "gradient_norm", active=1, interval=2)
    sampler.attach(optimizer)
    np.testing.assert_allclose(sampler.probabilities, 1 / len(sampler.names))
    known = np.zeros(len(sampler.names))
    for start in range(0, 8, 2):
        drawn, seen = sampler.active, []
        for tokens in batches(8)[start : start + 2]:
            loss_of(model, tokens).backward()
            gradients = [[p.grad for p in own if p.ndim > 1] for own in (sampler._parameters[i] for i in drawn)]
            seen.append([torch.cat([g.flatten() for g in own]).square().mean().sqrt().item() for own in gradients])
            optimizer.step()
            optimizer.zero_grad()
        for index, mean in zip(drawn, np.mean(seen, axis=0), strict=True):
            known[index] = (known[index] + mean) / 2 if known[index] else mean
        relative = np.where(known > 0, known, known[known > 0].mean()) / known.max()
        expected = np.exp(math.log(5) * relative)
        np.testing.assert_allclose(sampler.probabilities, expected / expected.sum(), rtol=1e-5)
    assert len(set(sampler.probabilities.round(6))) > 4
    rows = sampler.coverage()
    assert sum(row.expected for row in rows) == pytest.approx(sum(row.intervals for row in rows), rel=0.3)


@pytest.mark.parametrize("fused", [None, True])
def test_clipping_accumulation_and_a_scaler_change_no_gradient_norm(fused):
    tokens = batches(6)

    def estimates(clipped, parts=1, scaler=None):
        model = llama(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=fused if scaler else None)
        sampler = sampler_of(model, "gradient_norm")
        sampler.attach(optimizer)
        for batch in tokens:
            for part in batch.chunk(parts):
                loss = loss_of(model, part) / parts
                (scaler.scale(loss) if scaler else loss).backward()
            if scaler and clipped:
                scaler.unscale_(optimizer)
            if clipped:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-4)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad()
        return sampler._norms.estimates

    whole = estimates(False)
    assert (whole > 0).sum() > 3
    np.testing.assert_allclose(estimates(True), whole, rtol=1e-6)
    np.testing.assert_allclose(estimates(True, parts=2), whole, rtol=1e-4)
    for clipped in (False, True):  # with a scale that grows
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
        np.testing.assert_allclose(estimates(clipped, scaler=scaler), whole, rtol=1e-4)


def test_norms_of_a_block_do_not_count_beside_its_matrix_and_gradients_without_backward_do():
    model = llama(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sampler = sampler_of(model, "gradient_norm", active=1, interval=1)
    sampler.attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0 if parameter.ndim > 1 else 1000.0)
    optimizer.step()
    np.testing.assert_allclose(sampler._norms.estimates[sampler._norms.estimates > 0], 3.0)


def test_scores_are_those_of_the_matrix():
    model = llama(2)
    blocks, names = find_blocks(model), sampler_of(model).names
    analysis = htsr.analyze(model)
    alphas = np.array([next(row.alpha for row in analysis if row.name == name) for name in names])
    found = matrix_probabilities("alpha", names, blocks, analysis)
    assert np.argsort(found).tolist() == np.argsort(alphas).tolist()
    assert found.max() == pytest.approx(5 * found.min())
    rows = tuple(OutlierRow(name, "mlp", blocks.index_of(name), 1000, 1.0, (0,), (i,)) for i, name in enumerate(names))
    scores = htsr.Outliers("test", (13.0,), rows, blocks.names, 1, 1)
    weights = np.arange(len(names))
    np.testing.assert_allclose(matrix_probabilities("owlore", names, blocks, scores), weights / weights.sum())
    fused = gpt2(2)
    spectral = sampler_of(fused, "alpha", scores=htsr.analyze(fused))
    assert len(set(spectral.probabilities)) == len(spectral.names)  # parts of a fused matrix are found


def test_what_has_no_meaning_is_refused():
    for arguments, message in (
        ({"unit": "head"}, "unknown unit 'head': block or matrix"),
        ({"unit": "matrix", "embedding": "sampled"}, "take unit='block'"),
        ({"unit": "matrix", "active": 4}, "between 1 and the 3 blocks, not 4"),
        ({"unit": "matrix", "strategy": [1.0, 2.0]}, "21 finite numbers"),
        ({"strategy": "gradient_norm", "top": True}, "top takes the most probable for good"),
    ):
        with pytest.raises(htsr.UsageError, match=message):
            LayerSampler(llama(3), **arguments)
    model = llama(3)
    released = LowRankAdamW(low_rank_groups(model, 4), gradients="update")
    with pytest.raises(htsr.UsageError, match="gradients that are kept"):
        sampler_of(model, "gradient_norm").attach(released)
    model = llama(3)
    with pytest.raises(htsr.UsageError, match="unit='matrix' trains parts of all"):
        htsr.stream_frozen(model, sampler_of(model), device="cpu")
