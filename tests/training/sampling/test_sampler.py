import copy
import io
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from scipy.stats import chisquare
from torch import nn
from transformers import TrainerCallback

import htsr
from htsr.calibration.outliers import OutlierRow
from htsr.matrices.blocks import find_blocks
from htsr.training.callbacks import LayerSamplerCallback
from htsr.training.sampling.members import EMBEDDING
from htsr.training.sampling.probabilities import block_probabilities, inclusion_probabilities
from htsr.training.sampling.sampler import LayerSampler
from tests.training.runs import SAMPLED, batches, loss_of, run_distributed, train
from tests.transformer import bert, gpt2, llama


def outliers(shares, threshold=13.0):
    names = tuple(f"model.layers.{i}" for i in range(len(shares)))
    rows = tuple(
        OutlierRow(f"{name}.mlp.up_proj", "mlp.up", i, 1000, 1.0, (0,), (round(1000 * share),))
        for i, (name, share) in enumerate(zip(names, shares, strict=True))
    )
    return htsr.Outliers("test", (threshold,), rows, names, 1, 1)


def draws(sampler, number):
    return [sampler.draw(i) for i in range(number)]


def sequential(p, members):
    """Probability that draws without replacement end in the set `members`, by all orders."""
    total = 0.0
    for order in itertools.permutations(members):
        left, product = 1.0, 1.0
        for i in order:
            product *= p[i] / left
            left -= p[i]
        total += product
    return total


def test_frequencies_are_the_probabilities():
    shares = (0.2, 0.05, 0.1, 0.15)
    sampler = LayerSampler(llama(4), "owlore", scores=outliers(shares), active=1, seed=3)
    np.testing.assert_allclose(sampler.probabilities, np.array(shares) / 0.5)
    counts = np.bincount([i for (i,) in draws(sampler, 4000)], minlength=4)
    assert chisquare(counts, 4000 * sampler.probabilities).pvalue > 0.01
    assert chisquare(counts, [1000] * 4).pvalue < 1e-6

    pairs = LayerSampler(llama(4), shares, active=2, seed=4)
    found = draws(pairs, 4000)
    sets = list(itertools.combinations(range(4), 2))
    expected = [4000 * sequential(pairs.probabilities, s) for s in sets]
    assert chisquare([found.count(s) for s in sets], expected).pvalue > 0.01


def test_inclusion_probabilities_are_those_of_all_orders():
    p = np.array([0.4, 0.3, 0.2, 0.07, 0.03, 0.0])
    for size in (1, 2, 3, 5):
        expected = [
            sum(sequential(p, s) for s in itertools.combinations(range(5), size) if i in s) if i < 5 else 0.0
            for i in range(6)
        ]
        np.testing.assert_allclose(inclusion_probabilities(p, size), expected, atol=2e-6)


def test_strategies():
    blocks = find_blocks(llama(4))
    np.testing.assert_allclose(block_probabilities("uniform", blocks), 0.25)
    np.testing.assert_allclose(block_probabilities("increase", blocks), [0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(block_probabilities("decrease", blocks), [0.4, 0.3, 0.2, 0.1])
    scores = outliers((0.3, 0.1, 0.1, 0.1))
    np.testing.assert_allclose(block_probabilities("reverse", blocks, scores), [0.1, 0.3, 0.3, 0.3])
    for strategy, message in (
        ("owlore", "give scores=Outliers"),
        ("alpha", "give scores=htsr.analyze"),
        ("beta", "unknown strategy 'beta'"),
        ([1.0, 2.0], "4 finite numbers"),
    ):
        with pytest.raises(htsr.UsageError, match=message):
            block_probabilities(strategy, blocks)
    for thresholds, advice in (((13.0,), "a lower one, measured with it"), ((3.0, 5.0, 7.0, 13.0), "5, which some")):
        none = outliers((0, 0, 0, 0))
        rows = tuple(replace(row, block_counts=(9, 2, 0, 0)[-len(thresholds) :]) for row in none.rows)
        none = replace(none, thresholds=thresholds, rows=rows)
        with pytest.raises(htsr.UsageError, match=rf"set sampling\.threshold \(threshold=\) to {advice}"):
            block_probabilities("owlore", blocks, none)
    with pytest.raises(htsr.UsageError, match=r"are of model\.layers\.0, and this model's are transformer\.h\.0"):
        block_probabilities("owlore", find_blocks(gpt2(4)), scores)
    with pytest.raises(htsr.UsageError, match="are of 3 blocks, and this model has 4"):
        block_probabilities("owlore", blocks, outliers((0.1, 0.1, 0.1)))


def test_too_few_blocks_with_outliers_are_refused_with_the_threshold_that_has_enough():
    high = outliers([0.1, 0, 0])
    rows = tuple(
        replace(row, counts=(n, *row.counts), block_counts=(n, *row.block_counts))
        for row, n in zip(high.rows, (200, 100, 0), strict=True)
    )
    scores = replace(high, thresholds=(5.0, 13.0), rows=rows)
    sentence = (
        r"active=\) is 2, and 1 of the 3 blocks of test has an entry above 13 times .* to 5, which entries of 2 blocks"
    )
    with pytest.raises(htsr.UsageError, match=sentence):
        LayerSampler(llama(3), "owlore", scores=scores, active=2)
    with pytest.raises(htsr.UsageError, match="to a lower one, measured with it"):
        LayerSampler(llama(3), "owlore", scores=scores, active=3)
    assert set(LayerSampler(llama(3), "owlore", scores=scores, active=2, threshold=5.0).active) == {0, 1}


def test_spectral_strategies_follow_the_analysis():
    model = llama(3)
    analysis = htsr.analyze(model, bulk=True)
    by_block = {i: [row for row in analysis if row.name.startswith(f"model.layers.{i}.")] for i in range(3)}
    blocks = find_blocks(model)
    means = np.array([np.mean([row.alpha for row in rows]) for rows in by_block.values()])
    weights = 1 + 4 * (means - means.min()) / (means.max() - means.min())
    np.testing.assert_allclose(block_probabilities("alpha", blocks, analysis), weights / weights.sum())
    ratios = []
    for rows in by_block.values():
        of_rows = []
        for row in rows:
            s = np.linalg.svd(model.get_submodule(row.name).weight.detach().double().numpy(), compute_uv=False)
            edge = np.sqrt(row.lambda_plus)
            of_rows.append(s[s > edge].sum() / s[s <= edge].sum() / s.max())
        ratios.append(np.mean(of_rows))
    np.testing.assert_allclose(block_probabilities("snr", blocks, analysis), ratios / np.sum(ratios), rtol=1e-4)
    assert block_probabilities("erg", blocks, analysis).max() == pytest.approx(
        5 * block_probabilities("erg", blocks, analysis).min()
    )
    with pytest.raises(htsr.UsageError, match="takes bulk=True"):
        block_probabilities("snr", blocks, htsr.analyze(model))
    with pytest.raises(htsr.UsageError, match="no alpha of this model's blocks"):
        block_probabilities("alpha", find_blocks(bert()), analysis)


@pytest.mark.parametrize("frozen_state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_exactly_the_drawn_blocks_move(make, frozen_state):
    model = make(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    sampler = LayerSampler(model, active=1, interval=3, seed=1, frozen_state=frozen_state)
    sampler.attach(optimizer)
    seen = set()
    for tokens in batches(5):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        active = sampler.active
        train(model, optimizer, [tokens] * 3)
        prefixes = tuple(f"{sampler.names[i]}." for i in active)
        inside = tuple(f"{name}." for name in sampler.names)
        moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
        assert {n for n in moved if n.startswith(inside)} == {
            n for n, p in model.named_parameters() if n.startswith(prefixes)
        }
        assert not any("embed" in n or "wte" in n or "lm_head" in n for n in moved)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert all(p.grad is None for p in frozen)
        with_state = [p for p in frozen if p in optimizer.state]
        assert bool(with_state) == (frozen_state != "drop" and bool(seen | set(active) - set(sampler.active)))
        seen |= set(active)
    assert sampler.steps == 15
    assert len(seen) > 1


def test_the_embedding_as_chosen():
    for embedding, moves in (("train", True), ("lowrank", True), ("freeze", False)):
        model = llama(3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        before = model.lm_head.weight.clone(), model.model.embed_tokens.weight.clone(), model.model.norm.weight.clone()
        sampler = LayerSampler(model, active=1, embedding=embedding)
        sampler.attach(optimizer)
        train(model, optimizer, batches(1))
        assert torch.equal(before[0], model.lm_head.weight) != moves
        assert torch.equal(before[1], model.model.embed_tokens.weight) != moves
        assert not torch.equal(before[2], model.model.norm.weight)
    sampler = LayerSampler(llama(3, tie_word_embeddings=True), active=2, embedding="sampled")
    assert sampler.names[3] == EMBEDDING
    np.testing.assert_allclose(sampler.probabilities, 0.25)


_SIDES = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def _encoder_decoder(name, **more):
    sides = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in _SIDES.items()}
    config = getattr(transformers, f"{name}Config")(vocab_size=100, d_model=32, **sides, **more)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _opt():
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=100, **sizes))


@pytest.mark.parametrize(
    ("make", "trains"),
    [
        (lambda: _encoder_decoder("Bart"), set()),
        (lambda: _encoder_decoder("MBart"), {"encoder.layer_norm", "decoder.layer_norm"}),
        (
            lambda: _encoder_decoder("Whisper", num_mel_bins=8, **dict.fromkeys(_TOKENS, 1)),
            {"encoder.layer_norm", "decoder.layer_norm"},
        ),
        (_opt, {"decoder.final_layer_norm"}),
    ],
    ids=["BART", "mBART", "Whisper", "OPT"],
)
def test_the_embedding_is_all_that_stands_before_the_blocks_of_each_tower(make, trains):
    """0.1.0 went by the order of registration: BART's and Whisper's tables of positions trained, OPT's norm did not."""
    model = make()
    LayerSampler(model, active=1).attach(torch.optim.AdamW(model.parameters()))
    outside = {n for n, p in model.named_parameters() if p.requires_grad and ".layers." not in n}
    assert {name.removeprefix("model.").rpartition(".")[0] for name in outside} == trains


def test_a_copy_of_model_sampler_and_optimizer_is_attached_anew_and_goes_on(caplog):
    """0.1.0's copy sampled nothing, and attach took it for attached."""
    model = llama(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sampler = LayerSampler(model, active=1, interval=2, seed=1)
    sampler.attach(optimizer)
    train(model, optimizer, batches(3))
    twins = copy.deepcopy((model, sampler, optimizer))
    assert "samples nothing until it is attached" in caplog.text
    twins[1].attach(twins[2])
    for one, _, its in ((model, sampler, optimizer), twins):
        train(one, its, batches(9)[3:])
    assert twins[1].coverage() == sampler.coverage()
    assert twins[1].steps == sampler.steps == 9
    for name, value in model.state_dict().items():
        assert torch.equal(twins[0].state_dict()[name], value), name


def test_backward_ends_at_the_lowest_active_block():
    for checkpointing in (False, True):
        model = llama(4)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        LayerSampler(model, [0, 0, 1, 1], active=2).attach(torch.optim.SGD(model.parameters()))
        reached = {}
        for i, layer in enumerate(model.model.layers):
            layer.register_forward_hook(lambda m, _, out, i=i, to=reached: to.update({i: out.requires_grad}))
        model.train()(input_ids=batches(1)[0], labels=batches(1)[0]).loss.backward()
        assert reached == {0: False, 1: False, 2: True, 3: True}


def test_a_sampler_belongs_to_one_optimizer():
    model = llama(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sampler = LayerSampler(model, active=1)
    sampler.attach(optimizer)
    sampler.attach(optimizer)
    train(model, optimizer, batches(2))
    assert sampler.steps == 2  # counted once
    with pytest.raises(htsr.UsageError, match="attached to an optimizer already"):
        sampler.attach(torch.optim.SGD(model.parameters(), lr=1e-3))
    with pytest.raises(htsr.UsageError, match="no state of a sampler over 3 blocks: load it before the sampler"):
        sampler.load_state_dict({})


def test_top_is_a_fixed_choice():
    model = llama(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sampler = LayerSampler(model, [0.1, 0.4, 0.2, 0.3], active=2, interval=5, top=True)
    assert set(draws(sampler, 5)) == {(1, 3)}
    sampler.attach(optimizer)
    train(model, optimizer, batches(4))
    assert [row.expected for row in sampler.coverage()] == [0, 1, 0, 1]


def test_coverage():
    model = llama(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sampler = LayerSampler(model, [0.1, 0.4, 0.2, 0.3], active=2, interval=2)
    sampler.attach(optimizer)
    train(model, optimizer, batches(9))
    rows = sampler.coverage()
    drawn = draws(sampler, 5)
    assert [row.intervals for row in rows] == [sum(i in s for s in drawn) for i in range(4)]
    assert sum(row.expected for row in rows) == pytest.approx(10)


class FullyShardedDataParallel(torch.nn.Module):
    """A stand-in: FSDP1 itself wants an accelerator."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


def test_what_fsdp1_has_flattened_is_refused():
    model = llama(3)
    sampler = LayerSampler(model, active=1)
    model.model.layers[1] = FullyShardedDataParallel(model.model.layers[1])
    optimizer = torch.optim.AdamW(model.parameters())
    for use in (
        lambda: sampler.attach(optimizer),
        lambda: htsr.layerwise(optimizer, model),
        lambda: htsr.low_rank_groups(model, 4),
    ):
        with pytest.raises(htsr.UsageError, match="FSDP1 flattens parameters"):
            use()


def test_gradient_accumulation_counts_optimizer_steps():
    model = llama(3)
    optimizer = torch.optim.AdamW(model.parameters())
    sampler = LayerSampler(model, active=1, interval=2)
    sampler.attach(optimizer)
    for tokens in batches(8):
        model(input_ids=tokens, labels=tokens).loss.backward()
        if tokens[0, 0] % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert sampler.steps == sum(int(t[0, 0]) % 2 for t in batches(8))


@pytest.mark.parametrize("frozen_state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("attach_first", [True, False])
def test_resumed_is_uninterrupted_bit_for_bit(frozen_state, attach_first):
    def make():
        model = llama(4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, LayerSampler(model, "increase", active=2, interval=3, frozen_state=frozen_state)

    model, optimizer, sampler = make()
    sampler.attach(optimizer)
    data = batches(14)
    train(model, optimizer, data[:8])  # in the middle of an interval
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, data[8:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, optimizer_again, sampler_again = make()
    again.load_state_dict(saved["model"])
    if attach_first:
        sampler_again.attach(optimizer_again)
    optimizer_again.load_state_dict(saved["optimizer"])
    if not attach_first:
        sampler_again.attach(optimizer_again)
    assert sampler_again.steps == 8
    train(again, optimizer_again, data[8:])
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert json.loads(json.dumps(sampler.state_dict())) == sampler_again.state_dict()


def test_a_block_that_was_frozen_before_is_left_out_of_the_draws(caplog):
    shares, data = (0.2, 0.4, 0.1, 0.3), batches(8)

    def make(frozen=1):
        model = llama(4)
        model.model.layers[frozen].requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return model, optimizer, LayerSampler(model, shares, active=2, interval=1, seed=1)

    model, optimizer, sampler = make()
    assert "left out of the draws, since nothing in them trains: model.layers.1" in caplog.text
    assert sampler.names == ("model.layers.0", "model.layers.2", "model.layers.3")
    np.testing.assert_allclose(sampler.probabilities, np.array([2, 1, 3]) / 6)
    with pytest.raises(htsr.UsageError, match="between 1 and the 3 blocks, not 4"):
        LayerSampler(model, active=4)
    matrices = LayerSampler(model, "uniform", unit="matrix", active=1)
    assert len(matrices.names) == 3 * 7
    assert not any(name.startswith("model.layers.1.") for name in matrices.names)
    logged = []
    callback = LayerSamplerCallback(LayerSampler(model, (0, 1, 1, 0), active=1))  # the second that can be drawn
    callback._log = lambda logs, step: logged.append(logs)
    callback.on_log(None, SimpleNamespace(global_step=1), None, {"loss": 1.0})
    assert logged == [{"lowest_active_block": 2}]
    before = copy.deepcopy(model.state_dict())
    sampler.attach(optimizer)
    train(model, optimizer, data[:4])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, data[4:])
    after = model.state_dict()
    moved = {name.split(".")[2] for name in after if "layers" in name and not torch.equal(before[name], after[name])}
    assert moved == {"0", "2", "3"}

    again, optimizer_again, sampler_again = make()
    sampler_again.attach(optimizer_again)
    again.load_state_dict(saved[0])
    optimizer_again.load_state_dict(saved[1])
    train(again, optimizer_again, data[4:])
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())
    with pytest.raises(htsr.UsageError, match="draws other blocks: freeze the same ones"):
        make(2)[2].load_state_dict(sampler.state_dict())
    for sampled in (model, copy.deepcopy(model)):  # what a sampler has frozen is another matter
        with pytest.raises(htsr.UsageError, match="is frozen by a LayerSampler that was attached to this model"):
            LayerSampler(sampled)
    sampler.detach()
    assert LayerSampler(model).names == sampler.names


def test_what_would_train_nothing_is_refused():
    model = llama(3)
    model.model.layers.requires_grad_(False)
    with pytest.raises(htsr.UsageError, match=r"no block of LlamaForCausalLM has trainable parameters"):
        LayerSampler(model)

    model = llama(3)
    optimizer = torch.optim.AdamW(model.model.layers[0].parameters())
    with pytest.raises(htsr.UsageError, match=r"the optimizer lacks parameters of model\.layers\.1"):
        LayerSampler(model).attach(optimizer)

    model = llama(3)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    optimizer = torch.optim.AdamW(model.parameters())
    LayerSampler(model, [0, 1, 0], active=1).attach(optimizer)
    with pytest.raises(htsr.HtsrError, match=r"model\.layers\.1 is to train and the optimizer did not update it"):
        train(model.train(), optimizer, batches(1))

    for arguments, message in (
        ({"active": 4}, "between 1 and the 3 blocks, not 4"),
        ({"strategy": [1, 0, 0], "active": 2}, "between 1 and the 1 blocks with a probability above 0, not 2"),
        ({"interval": 0}, "number of optimizer steps"),
        ({"embedding": "melt"}, "embedding 'melt'"),
    ):
        with pytest.raises(htsr.UsageError, match=message):
            LayerSampler(llama(3), **arguments)
    with pytest.raises(htsr.SourceError, match="blocks"):
        LayerSampler(nn.Linear(2, 2))


def test_a_hook_that_updates_during_backward_outlives_freezing():
    model = llama(3)
    touched = set()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: touched.add(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sampler = LayerSampler(model, active=1, interval=1, seed=2)
    sampler.attach(optimizer)
    for _ in range(6):
        active = sampler.names[sampler.active[0]]
        touched.clear()
        train(model, optimizer, batches(1))
        assert {name.rsplit(".", 2)[0] for name in touched if ".mlp." in name} == {f"{active}.mlp"} or all(
            name.startswith((active, "model.norm")) for name in touched
        )
        assert any(name.startswith(active) for name in touched)


def test_two_processes_draw_the_same_and_end_as_one(tmp_path):
    ranks = run_distributed(tmp_path, ranks=2)
    for wrapper, (strategy, options) in SAMPLED.items():
        one = llama(3).double()
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        sampler = LayerSampler(one, strategy, active=1, interval=2, seed=1, **options)
        sampler.attach(optimizer)
        train(one, optimizer, batches(8))
        assert ranks[0][wrapper][1] == ranks[1][wrapper][1]
        for weights, state in (result[wrapper] for result in ranks):
            expected = sampler.state_dict()
            norms, own = (one.pop("norms", {"estimates": []})["estimates"] for one in (state, expected))
            assert norms == pytest.approx(own)  # sums of gradients have another order
            assert state.pop("expected", []) == pytest.approx(expected.pop("expected", []))
            assert state == expected, wrapper
            for name, value in one.state_dict().items():
                torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-12)
        assert len({tuple(sampler.draw(i)) for i in range(4)}) > 1


def moved_blocks(model, before, names):
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    return tuple(i for i, block in enumerate(names) if any(f"{block}." in name for name in changed))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_freezing_holds_against_adapters_that_are_switched_off_and_on(checkpointing):
    """PEFT's disable_adapter makes all adapters trainable at its end: before a forward, or between it and backward."""
    model = get_peft_model(llama(4), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sampler = LayerSampler(model, active=1, interval=1, seed=2)
    sampler.attach(optimizer)
    drawn, moved = [], []
    for step, tokens in enumerate(batches(6)):
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        if step % 2:
            with model.disable_adapter():
                model(input_ids=tokens)
            loss = loss_of(model.train(), tokens)
        else:
            loss = loss_of(model.train(), tokens)
            with model.disable_adapter(), torch.no_grad():
                model(input_ids=tokens)
        loss.backward()
        drawn.append(sampler.active)
        optimizer.step()
        optimizer.zero_grad()
        moved.append(moved_blocks(model, before, sampler.names))
    assert moved == drawn
    assert len(set(drawn)) > 1
    assert [row.intervals for row in sampler.coverage()] == [sum(i in s for s in drawn) for i in range(4)]


def test_gradients_that_came_around_the_hooks_are_dropped():
    model = llama(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sampler = LayerSampler(model, [1, 0, 0], active=1)
    sampler.attach(optimizer)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert moved_blocks(model, before, sampler.names) == (0,)
    assert [row.intervals for row in sampler.coverage()] == [1, 0, 0]
    assert not model.lm_head.weight.requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_with_adapters_trains_the_blocks_that_are_drawn(tmp_path, checkpointing):
    """TRL's own DPOTrainer, whose reference is the model with its adapters switched off."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.transformer import save_work

    save_work(tmp_path)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    )
    sampler = LayerSampler(model, active=1, interval=1, seed=4)
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.before = {name: value.detach().clone() for name, value in model.named_parameters()}
            self.drawn = sampler.active

        def on_step_end(self, *_, **__):
            seen.append((self.drawn, moved_blocks(model, self.before, sampler.names)))

    pairs = [{"prompt": "the cat", "chosen": " sat down", "rejected": " ran away"}] * 8
    given = {"max_steps": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    given |= {"save_strategy": "no", "per_device_train_batch_size": 2, "max_length": 32, "bf16": False}
    arguments = trl.DPOConfig(
        str(tmp_path / "out"),
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        **given,
    )
    trl.DPOTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
        callbacks=[Watch(), LayerSamplerCallback(sampler)],
    ).train()
    assert len(seen) == 4
    assert all(drawn == moved for drawn, moved in seen[1:])  # the first begins before attach
    assert seen[0][1] == sampler.draw(0)
    assert sum(row.intervals for row in sampler.coverage()) == 4


def test_a_step_that_a_grad_scaler_skips_is_not_counted():
    model = llama(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)  # called, with found_inf, to do nothing
    sampler = LayerSampler(model, active=1, interval=2)
    sampler.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, tokens in enumerate(batches(5)):
        (scaler.scale(loss_of(model, tokens)) * (float("inf") if step in (0, 2) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert sampler.steps == (0, 1, 1, 2, 3)[step]
    assert sum(row.intervals for row in sampler.coverage()) == 2


def test_detach_gives_model_and_optimizer_back():
    model = llama(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sampler = LayerSampler(model, active=1, interval=2, frozen_state="offload")
    sampler.attach(optimizer)
    train(model, optimizer, batches(3))
    sampler.detach()
    assert "layer_sampler" not in optimizer.param_groups[0]
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train(model, optimizer, batches(1))
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert sampler.steps == 3
    assert not any(module._forward_pre_hooks for module in model.modules())
    sampler.attach(torch.optim.SGD(model.parameters(), lr=1e-3))
    assert sum(p.requires_grad for p in model.model.layers.parameters()) == len(
        list(model.model.layers[0].parameters())
    )


@pytest.mark.parametrize("frozen_state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("order", [1, -1])
def test_two_optimizers_under_one_sampler(order, frozen_state):
    """One for matrices and one for the rest end where a single one with the same rule does, also when resumed."""

    def make(two):
        model = llama(3)
        parts = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
        sampler = LayerSampler(model, active=1, interval=2, seed=1, frozen_state=frozen_state)
        optimizers = [torch.optim.AdamW(part, lr=1e-2) for part in (parts if two else [[*parts[0], *parts[1]]])]
        return model, optimizers, sampler

    def run(model, optimizers, data):
        for tokens in data:
            loss_of(model, tokens).backward()
            for optimizer in optimizers[::order]:
                optimizer.step()
                optimizer.zero_grad()

    data = batches(7)
    one, single, sampler = make(two=False)
    sampler.attach(*single)
    run(one, single, data)
    model, optimizers, pair = make(two=True)
    with pytest.raises(htsr.UsageError, match="lacks parameters"):
        pair.attach(optimizers[0])
    pair.attach(*optimizers)
    pair.attach(*optimizers)
    run(model, optimizers, data[:3])
    saved = copy.deepcopy([model.state_dict(), *(optimizer.state_dict() for optimizer in optimizers)])
    again, others, resumed = make(two=True)
    resumed.attach(*others)
    for part, state in zip((again, *others), saved, strict=True):
        part.load_state_dict(state)
    run(again, others, data[3:])
    assert resumed.steps == sampler.steps == 7
    assert resumed.state_dict() == sampler.state_dict()
    assert all(map(torch.equal, again.state_dict().values(), one.state_dict().values()))


def test_a_copy_of_the_model_is_nobodys():
    model = llama(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sampler = LayerSampler(model, [0, 1, 0], active=1)
    sampler.attach(optimizer)
    reference = copy.deepcopy(model).requires_grad_(True)
    loss_of(reference, batches(1)[0]).backward()
    assert all(parameter.grad is not None for parameter in reference.parameters())
    file = io.BytesIO()
    torch.save(model, file)


def test_the_state_of_a_sampler_of_0_1_0_is_taken_up():
    sampler = LayerSampler(llama(3), active=1, interval=4)
    sampler.load_state_dict({"seed": 3, "steps": 5, "active": [2], "counts": [1, 0, 1]})
    assert (sampler.steps, sampler.active, sampler.seed) == (5, (2,), 3)
    assert sampler.state_dict()["moved"] == [2]


def vision_language():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text | {"num_attention_heads": 4, "num_key_value_heads": 2},
            vision_config=vision | {"image_size": 16, "patch_size": 4},
            mm_tokens_per_image=4,
        )
    )


def test_of_a_vision_language_model_the_language_model_is_sampled_and_the_rest_is_said(caplog, tmp_path):
    model = vision_language()
    sampler = LayerSampler(model, active=1)
    assert sampler.names == tuple(f"model.language_model.layers.{i}" for i in range(3))
    with caplog.at_level("INFO", "htsr"):
        sampler.attach(torch.optim.AdamW(model.parameters()))
    assert "1 of 3 blocks train at a time: model.language_model.layers.0, " in caplog.text
    assert "train in every step, more than a block has: model.vision_tower.encoder.layers" in caplog.text
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {int(n.split("layers.")[1][0]) for n in trains if "language_model.layers" in n} == set(sampler.active)
    assert any("vision_tower" in name for name in trains)
    assert not any("embed_tokens" in name for name in trains)

    caplog.clear()
    model = vision_language()
    model.model.vision_tower.requires_grad_(False)
    LayerSampler(model, active=1).attach(torch.optim.AdamW(model.parameters()))
    assert "more than a block" not in caplog.text
    named = LayerSampler(vision_language(), active=1, blocks="model.vision_tower.encoder.layers")
    assert len(named.names) == 5
    with pytest.raises(htsr.UsageError, match=r"no blocks 'visual'; there are .*layers \(5 blocks\), .*\(3 blocks\)"):
        LayerSampler(vision_language(), blocks="visual")

    analysis = htsr.analyze(vision_language(), null=False)
    assert block_probabilities("alpha", find_blocks(vision_language()), analysis).size == 3
    config = htsr.lora_config(vision_language(), analysis, rank=2)
    assert all("language_model.layers" in name for name in config.target_modules)

    model = vision_language()
    LayerSampler(model, [1, 0, 0], active=1).attach(torch.optim.AdamW(model.parameters()))
    model.config.save_pretrained(tmp_path)
    plan = htsr.predict_memory(str(tmp_path), "lisa", active_blocks=1, sequence=8)
    assert plan.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_of_encoder_and_decoder_both_are_sampled_however_many_blocks_they_have():
    from transformers import T5Config, T5ForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration

    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(T5Config(num_layers=3, num_decoder_layers=2, d_model=16))
        whisper = WhisperForConditionalGeneration(WhisperConfig(encoder_layers=4, decoder_layers=2))
    assert find_blocks(t5).names == (*(f"encoder.block.{i}" for i in range(3)), "decoder.block.0", "decoder.block.1")
    assert find_blocks(t5).index_of("block.0.layer.0.SelfAttention.q.weight") is None
    assert len(find_blocks(whisper)) == 6


def test_names_of_older_files_find_their_blocks():
    blocks = find_blocks(vision_language())
    for name, index in (
        ("language_model.model.layers.2.mlp.up_proj.weight", 2),
        ("model.layers.1.mlp.up_proj.weight", 1),
        ("model.vision_tower.encoder.layers.1.mlp.fc1.weight", None),
        ("vision_tower.vision_model.encoder.layers.1.mlp.fc1", None),
        ("teacher.layers.1.mlp.up_proj.weight", None),
    ):
        assert blocks.index_of(name) == index
