"""Optimizers × schedulers × resume: schedules are untouched, and a resumed run is the uninterrupted one."""

import copy
import io
import math

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from transformers import get_scheduler
from transformers.optimization import Adafactor as TransformersAdafactor

import htsr
from htsr.errors import UsageError
from htsr.training.layerwise.groups import plain_state_dict
from tests.training.models import Spying, TinyLM, decay_groups, loss, train, warmup_cosine

TOTAL, LR = 16, 2e-3
POLICY = {"interval": 3, "ramp": 4, "active_fraction": 10 / 16}  # events at 1, 3, 6, 9; at rest from step 13 on


def without_layerwise(optimizer):
    """The class under the spying one."""
    return type(optimizer).__mro__[2]


def spying(cls):
    return type(f"Spying{cls.__name__}", (Spying, cls), {})


def _muon(model, **options):
    return spying(torch.optim.Muon)([p for p in model.parameters() if p.ndim == 2], lr=LR, **options)


def _bitsandbytes(model):
    bnb = pytest.importorskip("bitsandbytes")
    return spying(bnb.optim.AdamW8bit)(decay_groups(model), lr=LR, min_8bit_size=512)


AdamW = spying(torch.optim.AdamW)
OPTIMIZERS = {
    "adamw": lambda m: AdamW(decay_groups(m), lr=LR),
    "adamw-loop": lambda m: AdamW(decay_groups(m), lr=LR, foreach=False),
    "adamw-foreach": lambda m: AdamW(decay_groups(m), lr=LR, foreach=True),
    "adamw-fused": lambda m: AdamW(decay_groups(m), lr=LR, fused=True),
    "adamw-tensor-lr": lambda m: AdamW(decay_groups(m), lr=torch.tensor(LR), foreach=False),
    "adamw-fused-tensor-lr": lambda m: AdamW(decay_groups(m), lr=torch.tensor(LR), fused=True),
    "adamw-amsgrad": lambda m: AdamW(decay_groups(m), lr=LR, amsgrad=True),
    "sgd": lambda m: spying(torch.optim.SGD)(decay_groups(m), lr=LR, momentum=0.9, nesterov=True),
    "muon": _muon,
    "adafactor": lambda m: spying(torch.optim.Adafactor)(decay_groups(m), lr=LR),
    "adafactor-transformers": lambda m: spying(TransformersAdafactor)(
        decay_groups(m), lr=LR, scale_parameter=False, relative_step=False
    ),
    "nadam": lambda m: spying(torch.optim.NAdam)(decay_groups(m), lr=LR),
    "adamw8bit": _bitsandbytes,
}


def _one_cycle(optimizer):
    cycled = "momentum" in optimizer.defaults or "betas" in optimizer.defaults
    return schedulers.OneCycleLR(optimizer, LR, total_steps=TOTAL + 1, cycle_momentum=cycled)


def _sequential(optimizer):
    warmup = schedulers.LinearLR(optimizer, 0.1, total_iters=4)
    return schedulers.SequentialLR(optimizer, [warmup, schedulers.CosineAnnealingLR(optimizer, TOTAL - 4)], [4])


def _chained(optimizer):
    return schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(optimizer, 0.9), schedulers.StepLR(optimizer, 5, gamma=0.5)], optimizer
    )


SCHEDULERS = {
    "lambda": lambda o: schedulers.LambdaLR(o, warmup_cosine(TOTAL, 4)),
    "one-cycle": _one_cycle,
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, TOTAL, eta_min=1e-4),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5),
    "sequential": _sequential,
    "chained": _chained,
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda _: 0.95),
    "multi-step": lambda o: schedulers.MultiStepLR(o, [3, 8]),
    "polynomial": lambda o: schedulers.PolynomialLR(o, TOTAL, power=2),
    "cyclic": lambda o: schedulers.CyclicLR(o, 1e-4, LR, 3, cycle_momentum=False),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.7, patience=0),
    **{
        f"transformers-{name}": lambda o, name=name, more=more: get_scheduler(name, o, 3, TOTAL, more)
        for name, more in {
            "linear": {},
            "cosine": {},
            "cosine_with_restarts": {"num_cycles": 2},
            "polynomial": {},
            "constant_with_warmup": {},
            "inverse_sqrt": {},
            "cosine_with_min_lr": {"min_lr": 1e-4},
            "warmup_stable_decay": {"num_decay_steps": 5},
        }.items()
    },
}
PAIRS = [(o, s) for o in OPTIMIZERS for s in ("lambda", "one-cycle")]
PAIRS += [("adamw", s) for s in SCHEDULERS if s not in ("lambda", "one-cycle")]
PAIRS += [("adamw-fused-tensor-lr", s) for s in ("cosine", "sequential", "chained", "transformers-cosine")]


def make(optimizer_name, scheduler_name, layerwise=True, policy="llr", **changes):
    model = TinyLM()
    optimizer = OPTIMIZERS[optimizer_name](model)
    if layerwise:
        htsr.layerwise(optimizer, model, policy, total_steps=TOTAL, **(POLICY | changes))
    return model, optimizer, SCHEDULERS[scheduler_name](optimizer)


def saved(*parts):
    """Through a file, as a checkpoint goes."""
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(a, b):
    """Weights and everything an optimizer keeps, bit for bit."""
    for (name, p), q in zip(a[0].named_parameters(), b[0].parameters(), strict=True):
        assert torch.equal(p, q), name
    x, y = a[1].state_dict(), b[1].state_dict()
    for group, other in zip(x["param_groups"], y["param_groups"], strict=True):
        assert group.keys() == other.keys()
        for key in group:
            same = group[key] == other[key] or (isinstance(group[key], float) and math.isnan(group[key]))
            assert same, f"{group['name']}: {key}"


@pytest.mark.parametrize(("optimizer_name", "scheduler_name"), PAIRS)
def test_resumed_equals_uninterrupted(optimizer_name, scheduler_name):
    """Cut in the middle of a ramp, and after the active phase; and every step sees the scheduler's lr times m."""
    whole, multipliers = make(optimizer_name, scheduler_name), []
    train(*whole[:2], range(TOTAL), whole[2], lambda _: multipliers.append(htsr.multipliers(whole[1])))
    for cut in (7, 14):
        first = make(optimizer_name, scheduler_name)
        train(*first[:2], range(cut), first[2])
        model_state, scheduler_state, optimizer_state = saved(first[0], first[2], first[1])
        again = make(optimizer_name, scheduler_name)
        again[0].load_state_dict(model_state)
        again[2].load_state_dict(scheduler_state)
        again[1].load_state_dict(optimizer_state)
        train(*again[:2], range(cut, TOTAL), again[2])
        assert_same(whole, again)
        assert first[1].seen + again[1].seen == whole[1].seen

    if scheduler_name != "plateau":  # which follows the loss, and that is not the plain run's
        _, plain, scheduler = make(optimizer_name, scheduler_name, layerwise=False)
        for seen, m in zip(whole[1].seen, multipliers, strict=True):
            rate = float(plain.param_groups[0]["lr"])
            for name, (lr, _) in seen.items():
                assert lr == pytest.approx(rate * m[name], rel=1e-6 if "tensor" in optimizer_name else 1e-12)
            without_layerwise(plain).step(plain)  # there are no gradients, so it only counts
            scheduler.step()


def test_the_table_moves():
    """The runs above have different multipliers in every phase, or they would prove nothing."""
    model, optimizer, scheduler = make("adamw", "lambda")
    seen = []
    train(model, optimizer, range(TOTAL), scheduler, lambda _: seen.append(tuple(htsr.multipliers(optimizer).values())))
    assert len(set(seen[:13])) == 11  # the same until the second event begins at 3, then always moving
    assert len(set(seen[12:])) == 1


@pytest.mark.parametrize(
    ("policy", "changes"),
    [
        ("alphadecay", {"interval": 4}),
        ("model_balancing", {}),
        ("tempbalance", {"interval": 4, "active_fraction": 1.0}),
        ("llr", {"spectrum": "momentum"}),
        ("llr", {"spectrum": "gradients"}),
        ("llr", {"decouple_weight_decay": True}),
        ("llr", {"score": "trace_log", "fit": "ks"}),
        ("llr", {"score": "erg_gap", "fit": "ks", "map": "rank"}),
        ("llr", {"score": "stable_rank", "map": "sqrt", "bounds": (0.1, 9.0), "unit": "role"}),
    ],
)
def test_other_policies_resume(policy, changes):
    whole = make("adamw", "sequential", policy=policy, **changes)
    train(*whole[:2], range(TOTAL), whole[2])
    first = make("adamw", "sequential", policy=policy, **changes)
    train(*first[:2], range(7), first[2])
    again = make("adamw", "sequential", policy=policy, **changes)
    for part, state in zip((again[0], again[2], again[1]), saved(first[0], first[2], first[1]), strict=True):
        part.load_state_dict(state)
    train(*again[:2], range(7, TOTAL), again[2])
    assert_same(whole, again)


class TestForeignCheckpoints:
    def test_made_without_htsr(self):
        """Moments and lr are taken over; multipliers begin anew."""
        plain = make("adamw", "lambda", layerwise=False)
        for step in range(5):
            plain[1].zero_grad()
            loss(plain[0], step).backward()
            without_layerwise(plain[1]).step(plain[1])
            plain[2].step()
        ours = make("adamw", "lambda")
        model_state, optimizer_state = saved(plain[0], plain[1])
        ours[0].load_state_dict(model_state)
        ours[1].load_state_dict(optimizer_state)
        for p, q in zip(plain[0].parameters(), ours[0].parameters(), strict=True):
            assert torch.equal(plain[1].state[p]["exp_avg"], ours[1].state[q]["exp_avg"])
        by_parameter = {id(p): g for g in ours[1].param_groups for p in g["params"]}
        for group, twin in zip(plain[1].param_groups, decay_groups(ours[0]), strict=True):
            assert all(by_parameter[id(p)]["weight_decay"] == group["weight_decay"] for p in twin["params"])
        assert {g["lr"] for g in ours[1].param_groups} == {plain[1].param_groups[0]["lr"]}
        train(*ours[:2], range(5, 8))
        assert {g["htsr_step"] for g in ours[1].param_groups} == {3}
        assert htsr.multipliers(ours[1])["embed_tokens"] == 5.0

    def test_loaded_without_htsr(self):
        ours = make("adamw", "lambda")
        train(*ours[:2], range(5), ours[2])
        twin = make("adamw", "lambda", layerwise=False)
        twin[0].load_state_dict(ours[0].state_dict())
        with pytest.raises(ValueError, match="different number of parameter groups"):
            twin[1].load_state_dict(ours[1].state_dict())
        twin[1].load_state_dict(plain_state_dict(ours[1].state_dict()))
        for p, q in zip(ours[0].parameters(), twin[0].parameters(), strict=True):
            assert torch.equal(ours[1].state[p]["exp_avg_sq"], twin[1].state[q]["exp_avg_sq"])
        assert not any(key.startswith("htsr") or key == "name" for g in twin[1].param_groups for key in g)
        assert [g["weight_decay"] for g in twin[1].param_groups] == [0.1, 0.0]

    def test_of_another_model(self):
        tied = TinyLM(tied=True)
        other = htsr.layerwise(torch.optim.AdamW(tied.parameters()), tied)
        with pytest.raises(UsageError, match="layerwise groups"):
            make("adamw", "lambda")[1].load_state_dict(other.state_dict())
        with pytest.raises(UsageError, match="made without htsr"):
            make("adamw", "lambda")[1].load_state_dict(torch.optim.AdamW(tied.parameters()).state_dict())

    def test_of_another_policy_is_said(self, caplog):
        first = make("adamw", "lambda")
        make("adamw", "lambda", bounds=(1.0, 3.0))[1].load_state_dict(first[1].state_dict())
        assert "from here on" in caplog.text


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_do_not_count(fused):
    model = TinyLM()
    optimizer = htsr.layerwise(AdamW(model.parameters(), lr=LR, fused=fused), model, interval=2, ramp=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    steps = []
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(loss(model, step)).backward()
        if step in (0, 2):
            model.lm_head.weight.grad[0, 0] = float("inf")
        before = model.lm_head.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.lm_head.weight) == (step in (0, 2))
        steps.append((optimizer.param_groups[0]["htsr_step"], optimizer.param_groups[0]["htsr_event"]))
        assert {g["lr"] for g in optimizer.param_groups} == {LR}
    assert steps == [(0, 0), (1, 1), (1, 1), (2, 2), (3, 2)]


def test_tensor_lr_stays_the_same_object():
    model = TinyLM()
    optimizer = htsr.layerwise(AdamW(model.parameters(), lr=torch.tensor(LR), foreach=False), model)
    before = [group["lr"] for group in optimizer.param_groups]
    assert len({id(lr) for lr in before}) == len(before)  # one each, or they would be multiplied together
    train(model, optimizer, range(3))
    for lr, group in zip(before, optimizer.param_groups, strict=True):
        assert group["lr"] is lr
        assert lr == torch.tensor(LR)


class TestScheduler:
    """`LayerwiseLR`."""

    def make(self, **changes):
        model = TinyLM()
        optimizer = AdamW(decay_groups(model), lr=LR)
        scheduler = htsr.LayerwiseLR(
            optimizer, model, schedule=warmup_cosine(TOTAL, 4), total_steps=TOTAL, **(POLICY | changes)
        )
        return model, optimizer, scheduler

    def test_trains_as_the_hooks_do(self):
        """Rates in the groups themselves; the weights of both runs are the same bits."""
        model, optimizer, scheduler = self.make()
        twin = make("adamw", "lambda")
        train(model, optimizer, range(TOTAL), scheduler)
        train(*twin[:2], range(TOTAL), twin[2])
        for seen, other in zip(optimizer.seen, twin[1].seen, strict=True):
            assert {n: r for n, (r, _) in seen.items()} == pytest.approx(
                {n: r for n, (r, _) in other.items()}, rel=1e-5
            )
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        assert len(set(scheduler.get_last_lr())) > 4

    @pytest.mark.parametrize("cut", [4, 7, 14])
    def test_resumes(self, cut):
        whole, first, again = self.make(), self.make(), self.make()
        train(*whole[:2], range(TOTAL), whole[2])
        train(*first[:2], range(cut), first[2])
        for part, state in zip((again[0], again[2], again[1]), saved(first[0], first[2], first[1]), strict=True):
            part.load_state_dict(state)
        train(*again[:2], range(cut, TOTAL), again[2])
        assert_same(whole, again)

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
    def test_a_copy_goes_on_and_loads_a_checkpoint_made_without_htsr(self, copied):
        """torch keeps no hooks in a copied optimizer, and refused the groups of the checkpoint."""
        run = self.make()
        train(*run[:2], range(4), run[2])
        twin = copied(run) if copied is copy.deepcopy else (*run[:2], copied(run[2]))
        assert len(twin[1]._optimizer_load_state_dict_pre_hooks) == 1
        if copied is copy.deepcopy:
            twin[1].seen = []  # which torch does not copy
            for model, optimizer, scheduler in (run, twin):
                train(model, optimizer, range(4, TOTAL), scheduler)
            assert all(torch.equal(p, q) for p, q in zip(run[0].parameters(), twin[0].parameters(), strict=True))
        plain_model = TinyLM()
        plain = torch.optim.AdamW(decay_groups(plain_model), lr=LR)
        train(plain_model, plain, range(2))
        twin[1].load_state_dict(plain.state_dict())
        assert len(twin[1].state) == len(plain.state)
        assert {group["htsr_step"] for group in twin[1].param_groups} == {0}

    def test_sets_no_decay(self):
        with pytest.raises(UsageError, match="weight decay"):
            htsr.LayerwiseLR(AdamW(TinyLM().parameters()), TinyLM(), "alphadecay")


def test_compiled_step():
    """torch.compile breaks its graph at the hooks and compiles what is between: the same rates, every step counted."""
    runs = []
    for compiled in (False, True):
        model, optimizer, scheduler = make("adamw-tensor-lr", "lambda", score=None)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for i in range(4):
            optimizer.zero_grad()
            loss(model, i).backward()
            step()
            scheduler.step()
        runs.append((optimizer.seen, optimizer.param_groups[0]["htsr_step"], [p.detach() for p in model.parameters()]))
    assert runs[0][:2] == runs[1][:2]
    torch.testing.assert_close(runs[0][2], runs[1][2], rtol=1e-3, atol=1e-3 * LR)
