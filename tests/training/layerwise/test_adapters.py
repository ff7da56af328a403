"""Layerwise rates of what PEFT trains: an adapter follows the matrix that it changes, whatever its kind."""

import pytest
import torch

import htsr
from htsr.errors import UsageError
from tests.reference.layerwise import hill_alpha, linear
from tests.training.models import SpyingAdamW, TinyLM, loss
from tests.transformer import llama

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "up_proj", "o_proj"]
KINDS = {
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["up_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS),
    "randlora": lambda: peft.RandLoraConfig(r=4, target_modules=TARGETS),
    "shira": lambda: peft.ShiraConfig(r=4, target_modules=TARGETS),
    "road": lambda: peft.RoadConfig(target_modules=TARGETS, group_size=8),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=TARGETS),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=TARGETS),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_modules=TARGETS, total_step=10),
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def first_step(model, **changes):
    optimizer = htsr.layerwise(SpyingAdamW(trained(model), lr=1.0), model, **({"min_size": 8} | changes))
    tokens = torch.randint(3, 64, (4, 20), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return {name: lr for name, (lr, _) in optimizer.seen[0].items()}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_follow_their_matrix(kind):
    """New adapters change nothing, so that the scores are those of the matrices alone."""
    base = llama(2)
    expected = {
        name.removesuffix(".weight"): hill_alpha(p.detach().numpy())
        for name, p in base.named_parameters()
        if name.split(".")[-2] in TARGETS
    }
    found = first_step(peft.get_peft_model(base, KINDS[kind]()))
    if kind in ("shira", "randlora", "lokr", "adalora"):  # which do not begin at W exactly, or not in all versions
        assert found.keys() == expected.keys()
        assert {min(found.values()), max(found.values())} == {1.0, 5.0}
    else:
        assert found == pytest.approx(linear(expected, 1, 5), abs=1e-2)


def test_a_head_that_is_trained_whole_is_the_head():
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    found = first_step(peft.get_peft_model(llama(2), config))
    assert found["lm_head"] == max(found.values()) == 5.0


def test_norms_alone_are_told(caplog):
    found = first_step(peft.get_peft_model(llama(2), peft.LNTuningConfig()))
    assert found == {"rest": 1.0}
    assert caplog.text.count("nothing to set") == 1


def adapted(**options):
    return peft.get_peft_model(llama(2), peft.LoraConfig(**{"r": 4, "target_modules": "all-linear"} | options))


def stepped(model, optimizer, steps):
    for step in steps:
        tokens = torch.randint(3, 64, (4, 20), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class TestPatternsOfAdapters:
    """LoRA+ is a pattern; what an adapter trains and no pattern names follows its matrix."""

    @pytest.mark.parametrize("options", [{}, {"use_dora": True, "modules_to_save": ["lm_head"]}])
    def test_lora_plus_is_that_of_peft(self, options):
        from peft.optimizers import create_loraplus_optimizer

        model, twin = adapted(**options), adapted(**options)
        model.load_state_dict(twin.state_dict())
        policy = dict.fromkeys(["*.lora_B", "*.lora_magnitude_vector"][: 1 + len(options)], 16)  # PEFT's: all vectors
        optimizer = htsr.layerwise(torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.0), model, policy)
        theirs = create_loraplus_optimizer(twin, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16)
        stepped(model, optimizer, range(3))
        stepped(twin, theirs, range(3))
        assert htsr.multipliers(optimizer) == {"rest": 1.0} | {pattern[2:]: 16.0 for pattern in policy}
        rates = {id(p): g["lr"] * g["multiplier"] for g in optimizer.param_groups for p in g["params"]}
        expected = {id(p): g["lr"] for g in theirs.param_groups for p in g["params"]}
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert rates.get(id(p)) == expected.get(id(q)), name
            assert torch.equal(p, q), name

    def test_by_role_and_beside_what_is_measured(self):
        model = adapted(target_modules=TARGETS)
        optimizer = SpyingAdamW(trained(model), lr=1.0)
        htsr.layerwise(optimizer, model, min_size=8, pin={"attn.*.lora_B": 16, "mlp.up": 3, "*.lora_B": 9})
        stepped(model, optimizer, range(1))
        found = {name: lr for name, (lr, _) in optimizer.seen[0].items()}
        measured = {name: m for name, m in found.items() if name.endswith(("q_proj", "o_proj"))}
        assert found.pop("lora_B") == 16  # of q_proj and o_proj
        assert {m for name, m in found.items() if name.endswith("up_proj")} == {3}  # the adapter follows its matrix
        assert {min(measured.values()), max(measured.values())} == {1.0, 5.0}  # the other factor
        sizes = {group["name"]: len(group["params"]) for group in optimizer.param_groups}
        assert sizes == dict.fromkeys(found, 2) | dict.fromkeys(measured, 1) | {"lora_B": 4}

    def test_resumed_is_uninterrupted(self):
        def run(start, steps, state=None):
            model = adapted()
            model.load_state_dict(start)
            optimizer = htsr.layerwise(torch.optim.AdamW(trained(model), lr=1e-2), model, {"*.lora_B": 16})
            if state is not None:
                optimizer.load_state_dict(state)
            stepped(model, optimizer, steps)
            return {name: p.clone() for name, p in model.state_dict().items()}, optimizer.state_dict()

        start = adapted().state_dict()
        whole, _ = run(start, range(4))
        weights, state = run(start, range(2))
        resumed, _ = run(weights, range(2, 4), state)
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def test_that_match_nothing(self):
        model = adapted()
        with pytest.raises(UsageError, match=r"'\*\.lora_b'.*nearest is \*\.lora_B"):
            htsr.layerwise(torch.optim.AdamW(trained(model)), model, {"*.lora_b": 16})
        with pytest.raises(UsageError, match="lora_B"):
            htsr.layerwise(torch.optim.AdamW(llama(2).parameters()), llama(2), {"*.lora_B": 16})


class TestOtherSpectra:
    """What has no gradient of its own is never scored by its weights in its place."""

    def test_adapters(self, caplog):
        model = peft.get_peft_model(llama(2), peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]))
        found = first_step(model, spectrum="gradients", embeddings="measured")
        assert {m for name, m in found.items() if name != "lm_head"} == {1.0}
        assert "has no gradient or momentum of its own" in caplog.text

    @pytest.mark.parametrize("spectrum", ["gradients", "momentum"])
    def test_weight_norm(self, spectrum):
        model = TinyLM()
        for layer in model.layers:
            torch.nn.utils.parametrizations.weight_norm(layer.mlp["up_proj"])
        optimizer = htsr.layerwise(
            SpyingAdamW(model.parameters(), lr=1.0), model, spectrum=spectrum, interval=1, ramp=0, embeddings="leave"
        )
        for step in range(2):
            optimizer.zero_grad()
            loss(model, step).backward()
            optimizer.step()
        found = {name: lr for name, (lr, _) in optimizer.seen[1].items()}
        assert found["layers.0.mlp.up_proj"] == found["layers.1.mlp.up_proj"] == 1.0
        others = [m for name, m in found.items() if name.endswith(("q_proj", "down_proj"))]
        assert (min(others), max(others)) == (1.0, 5.0)

    def test_gradients_of_a_module_that_is_trained_whole(self):
        model = peft.get_peft_model(
            llama(2), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"])
        )
        found = first_step(model, spectrum="gradients", embeddings="leave")
        assert sorted(m for name, m in found.items() if "up_proj" in name) == [1.0, 5.0]


class TestPatterns:
    @pytest.mark.parametrize(
        ("policy", "changes", "match"),
        [
            ({"emebd": 10}, {}, "'emebd'.*nearest is embed"),
            ("llr", {"pin": {"layers.*.up_porj": 2}}, "up_porj"),
            ("llr", {"exclude": ("mlp.dwon",)}, "nearest is mlp.down"),
            ("llr", {"exclude": ("norm",)}, "'norm'"),  # norms are measured by no policy
        ],
    )
    def test_that_match_nothing(self, policy, changes, match, tmp_path):
        model = TinyLM()
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(UsageError, match=match):
            htsr.layerwise(optimizer, model, policy, **changes)
        assert len(optimizer.param_groups) == 1
        with pytest.raises(UsageError, match=match):
            htsr.layerwise_plan(model, policy, **changes)
        with pytest.raises(UsageError, match=match):
            htsr.layerwise_plan(model.state_dict(), policy, **changes)

    def test_that_match_a_part_only(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=4, n_layer=1, vocab_size=99, n_positions=16))
        name = "transformer.h.0.attn.c_attn[q]"
        for wrong in ({"pin": {"attn.q": 2}}, {"exclude": ("attn.q",)}, {"pin": {name: 2}}):
            with pytest.raises(UsageError, match=r"part of transformer\.h\.0\.attn\.c_attn, .* or attn\.qkv"):
                htsr.layerwise_plan(model, **wrong)
        for right in ({"attn.q": 2, "attn.[kv]": 5}, {"attn.qkv": 4}, {"*.c_attn": 4}):
            rows = {row.name: row.multiplier for row in htsr.layerwise_plan(model, pin=right)}
            assert rows["transformer.h.0.attn.c_attn"] == 4

    def test_vectors_have_roles_and_names(self):
        model = TinyLM()
        for pin in ({"norm": 2}, {"layers.0.norm.*": 2}, {"norm.weight": 2}):
            htsr.layerwise(torch.optim.AdamW(model.parameters()), model, pin=pin)
            htsr.layerwise_plan(model, pin=pin)
