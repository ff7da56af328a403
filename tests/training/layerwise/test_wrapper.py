"""The law lr·b(t)·m_i(t), what is split how, and the arms that a study needs."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import htsr
from htsr.errors import UsageError
from htsr.training.layerwise.hooks import engine_of
from tests.reference.layerwise import Multipliers, hill_alpha, linear
from tests.training.models import (
    MATRICES,
    SpyingAdamW,
    SpyingSGD,
    TinyLM,
    decay_groups,
    loss,
    train,
    warmup_cosine,
)

LR = 3e-3


def weights(model):
    parameters = dict(model.named_parameters())
    return {name: parameters[f"{name}.weight"].detach().numpy() for name in MATRICES}


@pytest.mark.parametrize("ramp", [0, 3, 7])
def test_effective_learning_rate_is_the_law(ramp):
    """Warm-up, cosine, events at 1, 5, 10 and 15 (three in the active phase), ramps across events."""
    total, interval, s1, s2 = 24, 5, 1.0, 5.0
    model = TinyLM()
    optimizer = SpyingAdamW(decay_groups(model), lr=LR)
    returned = htsr.layerwise(
        optimizer, model, total_steps=total, interval=interval, ramp=ramp, active_fraction=10 / 24, dtype="float64"
    )
    assert returned is optimizer
    schedule = warmup_cosine(total, warmup=6)
    scheduler = LambdaLR(optimizer, schedule)
    reference = Multipliers(s1, s2, interval, ramp, last_event=10)
    before = [reference.at(1, lambda: weights(model))]
    train(
        model, optimizer, range(total), scheduler, lambda s: before.append(reference.at(s + 2, lambda: weights(model)))
    )

    changed = 0
    for t, seen in enumerate(optimizer.seen, start=1):
        base, expected = LR * schedule(t - 1), before[t - 1]
        for name in MATRICES:
            assert seen[name][0] == pytest.approx(base * expected[name], rel=1e-9)
            assert seen[name][1] == 0.1
        assert seen["layers.0.self_attn.q_proj.bias"][0] == seen["layers.0.self_attn.q_proj"][0]
        assert seen["embed_tokens"][0] == seen["lm_head"][0] == pytest.approx(base * s2, rel=1e-9)
        assert seen["rest"] == (base, 0.0)
        changed += t > 1 and expected != before[t - 2]
    assert changed >= 2
    assert all(group["lr"] == LR * schedule(total) for group in optimizer.param_groups)


@pytest.mark.parametrize("fraction", [0.29, 0.2, 0.57, 1.0])
def test_the_event_at_the_end_of_the_active_phase_is_held(fraction):
    model = TinyLM()
    changes = {"total_steps": 100, "active_fraction": fraction, "interval": 1}
    engine = engine_of(htsr.layerwise(torch.optim.SGD(model.parameters(), lr=1.0), model, **changes))
    assert [step for step in range(1, 101) if engine.event_at(step)] == list(range(1, round(100 * fraction) + 1))


def test_weights_follow_a_plain_optimizer_with_the_same_rates():
    """AdamW under layerwise moves as AdamW whose groups were given lr·m_i by hand."""
    model, twin = TinyLM(), TinyLM()
    optimizer = htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=LR), model, interval=None, dtype="float64")
    m = linear({name: hill_alpha(W) for name, W in weights(twin).items()}, 1, 5)
    m |= {"embed_tokens": 5.0, "lm_head": 5.0}
    rates = [LR * m.get(name.rsplit(".", 1)[0], 1.0) for name, _ in twin.named_parameters()]
    plain = torch.optim.AdamW([{"params": [p], "lr": r} for p, r in zip(twin.parameters(), rates, strict=True)])
    train(model, optimizer, range(4))
    train(twin, plain, range(4))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)


def test_float32_events_agree_with_float64():
    found = {}
    for dtype in ("float32", "float64"):
        model = TinyLM()
        optimizer = htsr.layerwise(SpyingAdamW(model.parameters(), lr=1.0), model, dtype=dtype)
        train(model, optimizer, [0])
        found[dtype] = htsr.multipliers(optimizer)
    assert found["float32"] == pytest.approx(found["float64"], abs=1e-3)


def multipliers_at_start(policy="llr", model=None, optimizer=SpyingAdamW, **changes):
    model = model or TinyLM()
    wrapped = htsr.layerwise(optimizer(model.parameters(), lr=1.0, weight_decay=0.5), model, policy, **changes)
    train(model, wrapped, [0])
    return wrapped.seen[0]


def alphas():
    return {name: hill_alpha(W) for name, W in weights(TinyLM()).items()}


def rates(seen):
    return {name: lr for name, (lr, _) in seen.items()}


class TestArms:
    """Every arm of the study, by the public call."""

    def test_llr(self):
        expected = linear(alphas(), 1, 5) | {"embed_tokens": 5, "lm_head": 5, "rest": 1}
        assert rates(multipliers_at_start()) == pytest.approx(expected, abs=1e-3)

    def test_without_boost(self):
        expected = linear(alphas(), 1, 5) | {"rest": 1}
        assert rates(multipliers_at_start(embeddings="leave")) == pytest.approx(expected, abs=1e-3)

    @pytest.mark.parametrize(
        ("changes", "embedding", "head"),
        [
            ({"embeddings": 40, "head": 2}, 40, 2),
            ({"embeddings": "leave", "head": 3}, 1, 3),
            ({"embeddings": 3, "head": "max"}, 3, 5),
            ({"head": "leave"}, 5, 1),
            ({"head": 0.0}, 5, 0),
        ],
    )
    def test_embedding_and_head_apart(self, changes, embedding, head):
        expected = linear(alphas(), 1, 5) | {"embed_tokens": embedding, "lm_head": head}
        assert rates(multipliers_at_start(**changes)) == pytest.approx(
            {name: m for name, m in expected.items() if m != 1 or name in alphas()} | {"rest": 1}, abs=1e-3
        )

    def test_a_measured_head_beside_a_fixed_embedding(self):
        every = alphas() | {"lm_head": hill_alpha(TinyLM().lm_head.weight.detach().numpy())}
        expected = linear(every, 1, 5) | {"embed_tokens": 7, "rest": 1}
        assert rates(multipliers_at_start(embeddings=7, head="measured")) == pytest.approx(expected, abs=1e-3)

    def test_a_tied_head_has_the_multiplier_of_the_embedding(self):
        found = rates(multipliers_at_start(model=TinyLM(tied=True), score=None, embeddings=3))
        assert found == {"embed_tokens": 3, "rest": 1}
        for source in (TinyLM(tied=True), {k: v for k, v in TinyLM(tied=True).state_dict().items() if "head" not in k}):
            with pytest.raises(UsageError, match="no output head of its own"):
                htsr.layerwise_plan(source, score=None, embeddings=3, head=2)
        with pytest.raises(UsageError, match="no output head of its own"):
            multipliers_at_start(model=TinyLM(tied=True), head=2)

    def test_embeddings_alone(self):
        assert rates(multipliers_at_start("ends")) == {"embed_tokens": 5.0, "lm_head": 5.0, "rest": 1.0}
        assert rates(multipliers_at_start(score=None, embeddings=3)) == {"embed_tokens": 3, "lm_head": 3, "rest": 1}

    def test_static_by_shape(self):
        found = rates(multipliers_at_start(score="alpha_null"))
        assert found["layers.0.self_attn.q_proj"] == found["layers.1.self_attn.q_proj"] == 1.0  # square: least α
        assert found["layers.0.mlp.up_proj"] == found["layers.1.mlp.down_proj"] == 5.0

    def test_reversed(self):
        expected = {name: 6 - m for name, m in linear(alphas(), 1, 5).items()}
        found = rates(multipliers_at_start(reverse=True, embeddings="leave"))
        assert found == pytest.approx(expected | {"rest": 1}, abs=1e-3)

    def test_shape_corrected(self):
        from htsr.spectra.scores import null_of_shape

        shapes = {name: W.shape for name, W in weights(TinyLM()).items()}
        expected = linear({name: a - null_of_shape(shapes[name]) for name, a in alphas().items()}, 1, 5)
        found = rates(multipliers_at_start(score="alpha_minus_null"))
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=3e-3)

    def test_farms(self):
        windows = htsr.Windows(rows=40, count=2)
        expected = {}
        for name, W in weights(TinyLM()).items():
            m, n = W.shape
            parts = [W[i : i + 40, j : j + 40] for i in (0, m - 40) for j in (0, n - 40)]
            values = np.sort(np.concatenate([np.linalg.svd(p.astype(float), compute_uv=False) ** 2 for p in parts]))
            tail = values[len(values) // 2 :]
            expected[name] = 1 + len(tail) / np.log(tail / tail[0]).sum()
        found = rates(multipliers_at_start(windows=windows))
        expected = linear(expected, 1, 5)
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-3)

    def test_alphadecay_sets_the_decay_and_nothing_else(self):
        seen = multipliers_at_start("alphadecay")
        assert all(lr == 1.0 for lr, _ in seen.values())
        expected = {name: 0.5 * m for name, m in linear(alphas(), 2 / 3, 3).items()} | {"rest": 0.5}
        assert {name: wd for name, (_, wd) in seen.items()} == pytest.approx(expected, abs=1e-3)

    def test_fixed_ratios_by_role(self):
        ratios = {"norm": 1, "attn.[qk]": 8, "mlp.*": 6, "embed": 10, "head": 10}
        found = rates(multipliers_at_start(ratios))
        assert found["layers.0.self_attn.q_proj"] == 8
        assert found["layers.1.mlp.down_proj"] == 6
        assert found["embed_tokens"] == found["lm_head"] == 10
        assert {m for name, m in found.items() if "proj" not in name} == {1, 10}

    def test_uniform_is_untouched(self):
        model, twin = TinyLM(), TinyLM()
        train(model, htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=LR), model, {}), range(3))
        train(twin, torch.optim.AdamW(twin.parameters(), lr=LR), range(3))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)


class TestPolicies:
    def test_tempbalance_leaves_the_ends_out(self):
        expected = linear(alphas(), 0.5, 1.5) | {"rest": 1}
        assert rates(multipliers_at_start("tempbalance", interval=10)) == pytest.approx(expected, abs=1e-3)
        with pytest.raises(UsageError, match="once an epoch"):
            multipliers_at_start("tempbalance")

    def test_tempbalance_without_embeddings_leaves_out_first_and_last(self):
        model = nn.Sequential(*(nn.Linear(60, 60, bias=False) for _ in range(4)))
        optimizer = htsr.layerwise(SpyingSGD(model.parameters(), lr=1.0), model, "tempbalance", interval=1)
        model(torch.randn(3, 60)).square().mean().backward()
        optimizer.step()
        assert sorted(rates(optimizer.seen[0])) == ["1", "2", "rest"]

    @pytest.mark.parametrize("last", ["fc4", "head"])
    def test_tempbalance_does_not_go_by_names(self, last):
        torch.manual_seed(0)
        sizes = {"fc1": (784, 300), "fc2": (300, 200), "fc3": (200, 100), last: (100, 60)}
        model = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
        alphas = {name: hill_alpha(model[name].weight.detach().numpy()) for name in ("fc2", "fc3")}
        optimizer = htsr.layerwise(SpyingSGD(model.parameters(), lr=1.0), model, "tempbalance", interval=1)
        optimizer.step()
        assert rates(optimizer.seen[0]) == pytest.approx(linear(alphas, 0.5, 1.5) | {"rest": 1}, abs=1e-3)

    def test_tempbalance_counts_the_eigenvalues_of_a_kernel_together(self):
        """As its code does: those with fewer than 50 are left out, and a kernel of 9 slices of 16 has 144."""
        torch.manual_seed(0)
        convs = [
            nn.Conv2d(*channels, kernel_size=3, bias=False) for channels in ((3, 16), (16, 16), (16, 24), (24, 24))
        ]
        model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(24, 5))
        alphas = {}
        for i in (1, 2, 3):
            slices = convs[i].weight.detach().flatten(2).permute(2, 0, 1).double()
            values = torch.linalg.svdvals(slices).flatten().sort().values.square()
            tail = values[len(values) // 2 :]
            alphas[str(i)] = float(1 + len(tail) / (tail / tail[0]).log().sum())
        optimizer = htsr.layerwise(SpyingSGD(model.parameters(), lr=1.0), model, "tempbalance", interval=1)
        optimizer.step()
        assert rates(optimizer.seen[0]) == pytest.approx(linear(alphas, 0.5, 1.5) | {"rest": 1}, abs=1e-3)

    def test_tempbalance_of_tied_embeddings(self):
        """The table is the head, too, and the last matrix before it is measured."""
        found = rates(multipliers_at_start("tempbalance", TinyLM(tied=True), interval=10))
        assert found == pytest.approx(linear(alphas(), 0.5, 1.5) | {"rest": 1}, abs=1e-3)

    def test_model_balancing_by_block(self):
        means = [np.mean([a for name, a in alphas().items() if name.startswith(f"layers.{i}.")]) for i in range(2)]
        found = rates(multipliers_at_start("model_balancing"))
        for i, mean in enumerate(means):
            expected = 10 ** (1 / (1 + math.exp(-10 * (mean - np.mean(means)))) - 0.5)
            assert found[f"layers.{i}.mlp.up_proj"] == pytest.approx(expected, rel=1e-3)
            assert found[f"layers.{i}.self_attn.q_proj"] == found[f"layers.{i}.mlp.up_proj"]

    def test_role_unit(self):
        found = rates(multipliers_at_start(unit="role"))
        for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
            assert found[f"layers.0.{part}"] == found[f"layers.1.{part}"]

    def test_pin_and_exclude(self):
        found = rates(multipliers_at_start(pin={"*.q_proj": 2.5}, exclude=("mlp.down",)))
        assert found["layers.1.self_attn.q_proj"] == 2.5
        assert "layers.0.mlp.down_proj" not in found  # in the rest, at 1

    def test_callable_score(self):
        found = rates(multipliers_at_start(score=lambda spectrum: spectrum.eigenvalues[-1]))
        largest = {name: np.linalg.norm(W, 2) ** 2 for name, W in weights(TinyLM()).items()}
        assert found[max(largest, key=largest.get)] == 5.0
        assert found[min(largest, key=largest.get)] == 1.0

    def test_measured_embeddings(self):
        found = rates(multipliers_at_start(embeddings="measured"))
        state = TinyLM().state_dict()
        ends = {name: hill_alpha(state[f"{name}.weight"]) for name in ("embed_tokens", "lm_head")}
        expected = linear(alphas() | ends, 1, 5) | {"rest": 1}
        assert found == pytest.approx(expected, abs=1e-3)

    @pytest.mark.parametrize("spectrum", ["gradients", "momentum"])
    def test_other_spectra(self, spectrum):
        model = TinyLM()
        optimizer = htsr.layerwise(
            SpyingAdamW(model.parameters(), lr=1e-3, betas=(0.0, 0.99)),
            model,
            spectrum=spectrum,
            interval=2,
            ramp=0,
            dtype="float64",
        )
        train(model, optimizer, [0])
        snapshots = {n: p.grad.clone() for n, p in model.named_parameters()}
        train(model, optimizer, [1])
        if spectrum == "gradients":
            snapshots = {n: p.grad for n, p in model.named_parameters()}
        expected = linear({name: hill_alpha(snapshots[f"{name}.weight"]) for name in MATRICES}, 1, 5)
        found = {name: lr / 1e-3 for name, lr in rates(optimizer.seen[1]).items()}
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=5e-3)
        if spectrum == "momentum":
            assert set(rates(optimizer.seen[0]).values()) == {1e-3}  # there is none before the first step

    def test_decoupled_decay(self):
        seen = multipliers_at_start(decouple_weight_decay=True)
        assert {round(lr * wd, 12) for lr, wd in seen.values()} == {0.5}


class TestGroups:
    def test_every_hyper_parameter_survives(self):
        model = TinyLM()
        groups = decay_groups(model)
        groups[0] |= {"betas": (0.8, 0.95), "name": "decay"}
        plain = torch.optim.AdamW(copy.deepcopy(groups), lr=LR, fused=False, eps=1e-6)
        optimizer = htsr.layerwise(torch.optim.AdamW(groups, lr=LR, fused=False, eps=1e-6), model)
        by_parameter = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        assert (
            len(by_parameter) == sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
        )
        assert all(g["params"] for g in optimizer.param_groups)
        names = [g["name"] for g in optimizer.param_groups]
        assert len(set(names)) == len(names)
        for index, parameters in enumerate(([p for p in model.parameters() if p.ndim > 1],
                                            [p for p in model.parameters() if p.ndim == 1])):  # fmt: skip
            for parameter in parameters:
                group, original = by_parameter[id(parameter)], plain.param_groups[index]
                assert all(group[k] == original[k] for k in original if k not in ("params", "name"))
        assert "decay: lm_head" in names

    def test_parameter_names_of_torch_are_split_along(self):
        model = TinyLM()
        optimizer = htsr.layerwise(torch.optim.AdamW(model.named_parameters(), lr=LR), model)
        own = {id(p): n for n, p in model.named_parameters()}
        for group in optimizer.param_groups:
            assert [own[id(p)] for p in group["params"]] == group["param_names"]

    def test_tied_weights_once(self):
        model = TinyLM(tied=True)
        seen = multipliers_at_start(model=model)
        assert seen["embed_tokens"][0] == 5.0
        assert "lm_head" not in seen

    def test_frozen_parameters_are_legal_and_not_measured(self):
        model = TinyLM()
        model.layers[0].requires_grad_(False)
        seen = rates(multipliers_at_start(model=model))
        expected = linear({n: a for n, a in alphas().items() if n.startswith("layers.1")}, 1, 5)
        assert {name: seen[name] for name in expected} == pytest.approx(expected, abs=1e-3)
        assert seen["layers.0.mlp.up_proj"] == 1.0

    def test_small_matrices_stay_at_one(self, caplog):
        model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 49), nn.Linear(49, 70))
        with caplog.at_level("INFO", "htsr"):
            optimizer = htsr.layerwise(torch.optim.SGD(model.parameters(), lr=1.0), model)
        assert [g["name"] for g in optimizer.param_groups] == ["0", "rest"]
        assert "2 of 3 matrices have fewer eigenvalues than min_size, 50, and stay at 1: 1, 2" in caplog.text

    def test_broken_and_low_rank_matrices_never_give_nan(self):
        model = TinyLM()
        with torch.no_grad():
            model.layers[0].mlp["up_proj"].weight.zero_()
            model.layers[0].mlp["down_proj"].weight[0, 0] = float("nan")
            w = model.layers[1].mlp["up_proj"].weight
            w.copy_(w[:, :4] @ w[:4])
        optimizer = htsr.layerwise(SpyingSGD(model.parameters(), lr=1.0), model)
        loss(model, 0).backward()
        optimizer.step()
        found = rates(optimizer.seen[0])
        assert all(math.isfinite(m) for m in found.values())
        assert found["layers.0.mlp.up_proj"] == found["layers.0.mlp.down_proj"] == 1.0

    def test_fused_tensors_have_the_mean_of_their_parts(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=99, n_positions=16))
        optimizer = htsr.layerwise(SpyingSGD(model.parameters(), lr=1.0), model, dtype="float64")
        model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
        expected = {}
        for name, p in model.named_parameters():
            if p.ndim == 2 and "h." in name:
                parts = p.detach().split(64, dim=1) if "c_attn" in name else [p.detach()]
                expected[name.removesuffix(".weight")] = np.mean([hill_alpha(part) for part in parts])
        optimizer.step()
        found = rates(optimizer.seen[0])
        assert {name: found[name] for name in expected} == pytest.approx(linear(expected, 1, 5), rel=1e-9)
        roles = {g["name"]: g["role"] for g in optimizer.param_groups}
        assert roles["transformer.h.0.attn.c_attn"] == "attn.qkv"

    def test_lora_factors_follow_their_matrix(self):
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
                             num_key_value_heads=2, vocab_size=50)  # fmt: skip
        model = get_peft_model(
            LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "up_proj", "o_proj"])
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = htsr.layerwise(SpyingAdamW(trained, lr=1.0), model)
        model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
        optimizer.step()
        assert all(len(g["params"]) == 2 for g in optimizer.param_groups)
        assert sorted(optimizer.seen[0]) == sorted(g["name"] for g in optimizer.param_groups)
        assert {lr for lr, _ in optimizer.seen[0].values()} >= {1.0, 5.0}
        assert engine_of(optimizer).seconds > 0

    def test_nothing_of_it_in_the_optimizer_between_steps(self):
        model = TinyLM()
        optimizer = htsr.layerwise(torch.optim.AdamW(model.parameters(), lr=LR), model)

        def broken():
            raise ArithmeticError

        with pytest.raises(ArithmeticError):
            optimizer.step(broken)
        assert {g["lr"] for g in optimizer.state_dict()["param_groups"]} == {LR}
        train(model, optimizer, [0])
        assert {g["htsr_step"] for g in optimizer.param_groups} == {1}
        assert {g["lr"] for g in optimizer.param_groups} == {LR}

    def test_a_step_that_calls_its_parents_counts_once(self):
        """torch runs the hooks of both, once the parent class has been used by itself."""
        torch.optim.AdamW([nn.Parameter(torch.ones(1))])
        model = TinyLM()
        optimizer = htsr.layerwise(SpyingAdamW(model.parameters(), lr=LR), model)
        train(model, optimizer, range(3))
        assert {g["htsr_step"] for g in optimizer.param_groups} == {3}
        assert optimizer.seen[0]["embed_tokens"][0] == 5 * LR

    def test_muon_for_the_matrices_and_adamw_for_the_rest(self):
        """Two optimizers, two calls: the embeddings' own optimizer measures nothing and gives them the upper bound."""
        model = TinyLM()
        body = [p for n, p in model.named_parameters() if n.startswith("layers") and p.ndim == 2]
        rest = [p for p in model.parameters() if all(p is not q for q in body)]
        muon = htsr.layerwise(torch.optim.Muon(body, lr=LR), model)
        adamw = htsr.layerwise(SpyingAdamW(rest, lr=1.0), model)
        train(model, muon, [0])
        adamw.step()
        assert htsr.multipliers(muon) == pytest.approx(linear(alphas(), 1, 5), abs=1e-3)
        found = rates(adamw.seen[0])
        assert found["embed_tokens"] == found["lm_head"] == 5.0
        assert {m for name, m in found.items() if name not in ("embed_tokens", "lm_head")} == {1.0}

    def test_groups_that_are_added_later_are_left_alone(self):
        model = TinyLM()
        extra = nn.Parameter(torch.ones(3))
        optimizer = htsr.layerwise(SpyingAdamW(model.parameters(), lr=LR), model)
        optimizer.add_param_group({"params": [extra], "name": "extra"})
        extra.grad = torch.ones(3)
        train(model, optimizer, [0])
        assert optimizer.seen[0]["extra"][0] == LR


class TestRefusals:
    def test_scheduler(self):
        model = TinyLM()
        optimizer = torch.optim.AdamW(model.parameters())
        LambdaLR(optimizer, lambda _: 1.0)
        with pytest.raises(UsageError, match="scheduler already"):
            htsr.layerwise(optimizer, model)

    def test_twice(self):
        model = TinyLM()
        optimizer = htsr.layerwise(torch.optim.AdamW(model.parameters()), model)
        with pytest.raises(UsageError, match="layerwise already"):
            htsr.layerwise(optimizer, model)

    def test_another_model(self):
        with pytest.raises(UsageError, match="no parameter of this model"):
            htsr.layerwise(torch.optim.AdamW(TinyLM().parameters()), TinyLM())

    @pytest.mark.parametrize(
        ("policy", "changes", "match"),
        [
            ("lr", {}, "unknown policy"),
            ("llr", {"steps": 4}, "has no steps"),
            ("llr", {"map": "cubic"}, "unknown map"),
            ("llr", {"score": "beta"}, "unknown score"),
            ("llr", {"bounds": (5, 1)}, "s1 ≤ s2"),
            ("llr", {"embeddings": "most"}, "unknown embeddings"),
            ("llr", {"active_fraction": 0.0}, "active_fraction"),
            ("llr", {"interval": 0}, "interval"),
            ("llr", {"total_steps": 0}, "total_steps"),
            ("alphadecay", {"decouple_weight_decay": True}, "decouple"),
            ({"mlp.*": -1}, {}, "^a multiplier is .* ≥ 0"),
            *[("llr", {"bounds": value}, "^bounds are") for value in ((1, math.inf), (1,), "15", 5, (math.nan, 2))],
            ("llr", {"head": "most"}, "unknown head"),
            ("llr", {"head": -1.0}, "^head is"),
            *[("llr", {"embeddings": value}, "^embeddings is") for value in (math.inf, math.nan, None, True)],
            *[("llr", {"pin": {"attn.q": value}}, "^a multiplier is.*attn.q") for value in (math.inf, "4", None)],
            ("llr", {"pin": ["attn.q"]}, "^pin is"),
            *[("llr", {"interval": value}, "^interval is") for value in (1.5, True, math.inf)],
            *[("llr", {"total_steps": value}, "^total_steps is") for value in (10.5, "10", math.inf)],
            *[("llr", {"ramp": value}, "^ramp is") for value in (-1, 0.5, None)],
            *[("llr", {"min_size": value}, "^min_size is") for value in (-1, 0.5, None)],
            ("llr", {"active_fraction": "1"}, "^active_fraction lies"),
            ("llr", {"windows": 3}, "^windows is"),
            ("llr", {"exclude": "mlp.*"}, "^exclude is"),
            (3, {}, "^a policy is"),
        ],
    )
    def test_policies_without_meaning(self, policy, changes, match):
        model = TinyLM()
        with pytest.raises(UsageError, match=match):
            htsr.layerwise(torch.optim.AdamW(model.parameters()), model, policy, **changes)

    def test_numbers_of_numpy(self):
        numbers = {"bounds": (np.float32(1), np.float64(4)), "interval": np.int64(2), "total_steps": np.int32(4)}
        found = rates(multipliers_at_start(embeddings=np.float32(2.5), **numbers))
        assert (found["embed_tokens"], max(found.values())) == (2.5, 4.0)

    def test_what_steps_during_backward(self):
        model = TinyLM()
        optimizer = htsr.LowRankAdamW(model.parameters(), gradients="update")
        with pytest.raises(UsageError, match=r"during backward.*gradients='project'"):
            htsr.layerwise(optimizer, model)

    def test_a_callback_without_its_trainer(self):
        with pytest.raises(UsageError, match="make the Trainer first"):
            htsr.LayerwiseCallback("llr")

    def test_the_callback_hands_on_whether_ranks_share_a_model(self):
        model = TinyLM()
        trainer = SimpleNamespace(model=model, create_optimizer=lambda: torch.optim.AdamW(model.parameters()))
        htsr.LayerwiseCallback(trainer, distributed=False)
        assert engine_of(trainer.create_optimizer()).distributed is False

    def test_relative_step(self):
        from transformers.optimization import Adafactor

        model = TinyLM()
        with pytest.raises(UsageError, match="relative_step"):
            htsr.layerwise(Adafactor(model.parameters()), model)


def test_logged_values_count_what_no_policy_moves():
    model = TinyLM()
    optimizer = htsr.layerwise(torch.optim.SGD(model.parameters(), lr=LR), model, score=None, embeddings=5.0)
    train(model, optimizer, range(1))
    values = htsr.log_values(optimizer)
    assert (values["layerwise/multiplier_min"], values["layerwise/multiplier_max"]) == (1.0, 5.0)
    assert values["layerwise/multiplier/rest"] == 1.0
    assert values["layerwise/multiplier/embed"] == 5.0
    assert set(htsr.multipliers(optimizer).values()) == {1.0, 5.0}
    plain = torch.optim.SGD(model.parameters(), lr=LR)
    assert htsr.log_values(plain) == htsr.multipliers(plain) == {}
    for takes in (htsr.log_values, htsr.multipliers):
        with pytest.raises(UsageError, match="TinyLM is no optimizer"):
            takes(model)
