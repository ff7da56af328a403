"""What hangs on the optimizer: copies, steps that fail, wrappers around it, and taking it off again."""

import copy
import io
import logging

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import htsr
from htsr.errors import HtsrError, UsageError
from htsr.spectra import esd as spectra
from htsr.training.layerwise import live_scores
from htsr.training.layerwise.hooks import engine_of
from tests.training.models import MATRICES, Spying, SpyingSGD, TinyLM, decay_groups, loss, train

LR = 3e-3
POLICY = {"interval": 3, "ramp": 4}


def made(cls=torch.optim.AdamW, model=None, policy="llr", **changes):
    model = model or TinyLM()
    optimizer = htsr.layerwise(cls(decay_groups(model), lr=LR), model, policy, total_steps=20, **(POLICY | changes))
    return model, optimizer


def same(model, twin):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def pickled(pair):
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
    def test_a_copy_of_model_and_optimizer_goes_on_as_the_same_run(self, copied):
        """In the middle of a ramp: the multipliers that it reports are those by which it moves."""
        model, optimizer = made()
        train(model, optimizer, range(4))
        model_of_copy, copy_of_optimizer = copied((model, optimizer))
        again = copied((model_of_copy, copy_of_optimizer))  # a copy of a copy is one, too
        pairs = ((model, optimizer), (model_of_copy, copy_of_optimizer), again)
        before = copy.deepcopy(model)
        for pair in pairs:
            train(*pair, range(4, 9))
        for twin, other in pairs[1:]:
            assert same(model, twin)
            assert htsr.multipliers(other) == htsr.multipliers(optimizer)
            assert {g["htsr_step"] for g in other.param_groups} == {9}
        assert not same(model, before)
        assert len(set(htsr.multipliers(optimizer).values())) > 3

    def test_an_optimizer_copied_alone_has_the_model_of_its_parameters(self):
        model, optimizer = made()
        other = copy.deepcopy(optimizer)
        mine = {id(p) for p in engine_of(other).model.parameters()}
        assert {id(p) for g in other.param_groups for p in g["params"]} == mine
        assert mine.isdisjoint({id(p) for p in model.parameters()})

    def test_a_scheduler_goes_with_the_copy(self):
        model, optimizer = made()
        scheduler = schedulers.CosineAnnealingLR(optimizer, 9)
        train(model, optimizer, range(3), scheduler)
        twins = copy.deepcopy((model, optimizer, scheduler))
        for run in ((model, optimizer, scheduler), twins):
            train(run[0], run[1], range(3, 7), run[2])
        assert same(model, twins[0])

    def test_a_shallow_copy_shares_the_groups(self):
        model, optimizer = made(SpyingSGD, score=None)
        other = copy.copy(optimizer)
        other.seen = []
        train(model, other, range(2))
        train(model, optimizer, range(2, 3))
        assert [seen["embed_tokens"][0] for seen in (*other.seen, *optimizer.seen)] == [5 * LR] * 3
        assert {g["htsr_step"] for g in optimizer.param_groups} == {3}


class TestRaisingSteps:
    def test_schedulers_go_on_from_the_values_of_the_user(self):
        """CosineAnnealingLR computes the next rate from the one that it finds."""
        model, optimizer = made()
        scheduler = schedulers.CosineAnnealingLR(optimizer, 12)
        plain = torch.optim.AdamW(TinyLM().parameters(), lr=LR)
        expected = schedulers.CosineAnnealingLR(plain, 12)

        def broken():
            raise ArithmeticError

        for step in range(6):
            if step == 2:
                with pytest.raises(ArithmeticError):
                    optimizer.step(broken)
            else:
                train(model, optimizer, [step])
            plain.step()
            assert {g["lr"] for g in optimizer.param_groups} == {plain.param_groups[0]["lr"]}
            scheduler.step()
            expected.step()
        assert {g["htsr_step"] for g in optimizer.param_groups} == {5}


def test_a_step_cannot_be_captured(monkeypatch):
    """A CUDA graph would repeat the multipliers of its capture."""
    model, optimizer = made()
    train(model, optimizer, [0])
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UsageError, match="captured into a CUDA graph"):
        train(model, optimizer, [1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    monkeypatch.undo()
    train(model, optimizer, [1])
    assert {group["lr"] for group in optimizer.param_groups} == {LR}
    assert optimizer.param_groups[0]["htsr_step"] == 2


class SAM(torch.optim.Optimizer):
    """Two steps a batch, of which the base optimizer does the second."""

    def __init__(self, params, base, **kwargs):
        super().__init__(params, {"rho": 0.05, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    def first_step(self):
        for p in (p for g in self.param_groups for p in g["params"]):
            self.state[p]["old"] = p.data.clone()
            p.data.add_(p.grad, alpha=0.05)

    def second_step(self):
        for p in (p for g in self.param_groups for p in g["params"]):
            p.data.copy_(self.state[p]["old"])
        self.base_optimizer.step()


class Wrapper(torch.optim.Optimizer):
    """As ScheduleFreeWrapper: an optimizer by class only."""

    def __init__(self, base):
        self.base = base

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)


class TestWrappers:
    def test_one_that_steps_through_another_is_told_which(self):
        model = TinyLM()
        for wrapper, name in ((SAM(model.parameters(), SpyingSGD, lr=LR), "base_optimizer"),
                              (Wrapper(torch.optim.SGD(model.parameters(), lr=LR)), "base")):  # fmt: skip
            before = list(wrapper.param_groups)
            with pytest.raises(UsageError, match=f"its .{name}"):
                htsr.layerwise(wrapper, model)
            assert all(a is b for a, b in zip(wrapper.param_groups, before, strict=True))

    def test_the_inner_one_is_layerwise(self):
        model = TinyLM()
        sam = SAM(model.parameters(), SpyingSGD, lr=LR)
        htsr.layerwise(sam.base_optimizer, model, score=None)
        loss(model, 0).backward()
        sam.first_step()
        sam.second_step()
        assert sam.base_optimizer.seen[0]["embed_tokens"][0] == 5 * LR
        assert {g["lr"] for g in sam.param_groups} == {LR}

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_accelerate(self, when):
        from accelerate import Accelerator

        accelerator, model = Accelerator(cpu=True), TinyLM()
        optimizer = SpyingSGD(model.parameters(), lr=LR)
        if when == "before":
            htsr.layerwise(optimizer, model, score=None)
        prepared_model, prepared = accelerator.prepare(model, optimizer)
        if when == "after":
            assert htsr.layerwise(prepared, prepared_model, score=None) is prepared
        accelerator.backward(loss(prepared_model, 0))
        prepared.step()
        assert optimizer.seen[0]["embed_tokens"][0] == 5 * LR
        assert htsr.multipliers(prepared)["embed_tokens"] == 5.0
        assert htsr.remove_layerwise(prepared) is prepared
        assert len(prepared.param_groups) == 1

    def test_what_is_no_optimizer(self):
        class Engine:
            param_groups = ()

        with pytest.raises(UsageError, match=r"Engine is no torch\.optim\.Optimizer"):
            htsr.layerwise(Engine(), TinyLM())

    def test_a_step_without_hooks_is_told(self, caplog):
        model, optimizer = made(torch.optim.SGD)
        for p in model.parameters():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        optimizer.state_dict()
        optimizer.state_dict()
        assert caplog.text.count("without the hooks of its step") == 1


class TestOptimizersOfOneRate:
    def test_refused_at_once(self):
        model = TinyLM()
        for optimizer in (torch.optim.LBFGS(model.parameters()), torch.optim.Rprop(model.parameters())):
            with pytest.raises(UsageError, match=f"^{type(optimizer).__name__} "):
                htsr.layerwise(optimizer, model)
            assert len(optimizer.param_groups) == 1

    def test_prodigy(self):
        prodigyopt = pytest.importorskip("prodigyopt")
        model = TinyLM()
        optimizer = prodigyopt.Prodigy(model.parameters(), weight_decay=0.1)
        with pytest.raises(UsageError, match="one learning rate for all"):
            htsr.layerwise(optimizer, model)
        htsr.layerwise(optimizer, model, "alphadecay")
        train(model, optimizer, range(2))
        assert {g["htsr_step"] for g in optimizer.param_groups} == {2}
        assert max(htsr.multipliers(optimizer).values()) == 3.0

    def test_state_from_birth_is_no_obstacle(self):
        """torch's Adagrad has its sums before the first step."""
        model, twin = TinyLM(), TinyLM()
        ratios = {"mlp.*": 4, "embed": 2}
        optimizer = htsr.layerwise(torch.optim.Adagrad(model.parameters(), lr=LR), model, ratios)
        rate = {True: 4 * LR, False: LR}
        groups = [
            {"params": [p], "lr": 2 * LR if name.startswith("embed") else rate["mlp" in name]}
            for name, p in twin.named_parameters()
        ]
        plain = torch.optim.Adagrad(groups, lr=LR)
        train(model, optimizer, range(3))
        train(twin, plain, range(3))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


TOTAL = 8
LISTS = {
    "lambda": lambda o, two: schedulers.LambdaLR(o, two([lambda s: 0.9**s, lambda s: 1 / (1 + s)])),
    "multiplicative": lambda o, two: schedulers.MultiplicativeLR(o, two([lambda _: 0.9, lambda _: 0.7])),
    "one-cycle": lambda o, two: schedulers.OneCycleLR(o, two([LR, LR / 10]), total_steps=TOTAL + 1),
    "cyclic": lambda o, two: schedulers.CyclicLR(o, two([1e-4, 2e-4]), two([LR, LR / 2]), 3, cycle_momentum=False),
    "plateau": lambda o, two: schedulers.ReduceLROnPlateau(o, factor=0.3, patience=0, min_lr=two([1e-3, 2e-3])),
}


class TestListsForGroups:
    @pytest.mark.parametrize("name", LISTS)
    def test_lists_for_the_groups_of_the_user(self, name):
        """Each group has the rate that the plain optimizer's group has, which was written for it."""
        model, optimizer = made(cls=type("SpyingAdamW", (Spying, torch.optim.AdamW), {}), score=None)
        scheduler = LISTS[name](optimizer, lambda values: htsr.per_group(optimizer, values))
        twin = TinyLM()
        plain = torch.optim.AdamW(decay_groups(twin), lr=LR)
        expected = LISTS[name](plain, lambda values: values)
        rates = []
        train(twin, plain, range(TOTAL), expected, lambda _: rates.append([g["lr"] for g in plain.param_groups]))
        found = []
        train(
            model,
            optimizer,
            range(TOTAL),
            scheduler,
            lambda _: found.append({(g["htsr_origin"], g["lr"]) for g in optimizer.param_groups}),
        )
        for groups, wanted in zip(found, rates, strict=True):
            assert [origin for origin, _ in sorted(groups)] == [0, 1]
            assert [rate for _, rate in sorted(groups)] == pytest.approx(wanted)
        assert rates[0] != rates[-1]

    def test_parameters_of_another_model_are_left_alone(self):
        model, other = TinyLM(), nn.Linear(3, 4)
        optimizer = htsr.layerwise(SpyingSGD([*model.parameters(), *other.parameters()], lr=LR), model, score=None)
        loss(model, 0).backward()
        optimizer.step()
        assert optimizer.seen[0] == {"embed_tokens": (5 * LR, 0), "lm_head": (5 * LR, 0), "rest": (LR, 0)}

    def test_as_many_as_there_were(self):
        _, optimizer = made()
        with pytest.raises(UsageError, match="2 groups"):
            htsr.per_group(optimizer, [1, 2, 3])
        with pytest.raises(UsageError, match="takes a list"):
            htsr.per_group(optimizer, 5)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert htsr.per_group(optimizer, "abc")[-1] == "c"
        plain = torch.optim.SGD(decay_groups(TinyLM()), lr=LR)
        assert htsr.per_group(plain, [1, 2]) == [1, 2]


class TestRemoved:
    def test_the_optimizer_is_the_plain_one_again(self):
        model, optimizer = made(score=None)
        train(model, optimizer, range(3))
        assert htsr.remove_layerwise(optimizer) is optimizer
        twin = TinyLM()
        plain = torch.optim.AdamW(decay_groups(twin), lr=LR)
        twin.load_state_dict(model.state_dict())
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == [
            {k: v for k, v in g.items() if k != "params"} for g in plain.param_groups
        ]
        for pair in ((model, optimizer), (twin, plain)):
            train(*pair, range(3, 6))
        assert same(model, twin)
        assert engine_of(optimizer) is None
        copy.copy(optimizer)
        htsr.layerwise(optimizer, model, "alphadecay")  # and another policy may follow

    def test_a_scheduler_counts_on_the_groups(self):
        _, optimizer = made()
        schedulers.StepLR(optimizer, 3)
        with pytest.raises(UsageError, match="make the scheduler anew"):
            htsr.remove_layerwise(optimizer)
        assert engine_of(optimizer) is not None
        with pytest.raises(UsageError, match="not layerwise"):
            htsr.remove_layerwise(torch.optim.SGD(TinyLM().parameters()))
        for state in ({}, torch.optim.SGD(TinyLM().parameters()).state_dict()):
            with pytest.raises(UsageError, match="no state dict of a layerwise optimizer"):
                htsr.remove_layerwise(state)

    def test_checkpoints_for_the_plain_optimizer(self):
        model, optimizer = made()
        train(model, optimizer, range(2))
        plain = torch.optim.AdamW(decay_groups(TinyLM()), lr=LR)
        plain.load_state_dict(htsr.remove_layerwise(optimizer.state_dict()))
        assert len(plain.state) == len(optimizer.state)

    def test_empty_groups_stay(self):
        """Of a checkpoint made without htsr, and back."""

        def groups(model):
            return [{"params": []}, *decay_groups(model), {"params": [], "weight_decay": 0.3}]

        model, plain_model = TinyLM(), TinyLM()
        plain = torch.optim.AdamW(groups(plain_model), lr=LR)
        train(plain_model, plain, range(2))
        optimizer = htsr.layerwise(torch.optim.AdamW(groups(model), lr=LR), model)
        optimizer.load_state_dict(plain.state_dict())
        train(model, optimizer, range(2))
        state = htsr.remove_layerwise(optimizer.state_dict())
        assert [len(g["params"]) for g in state["param_groups"]] == [len(g["params"]) for g in plain.param_groups]
        assert [g["weight_decay"] for g in state["param_groups"]] == [g["weight_decay"] for g in plain.param_groups]
        plain.load_state_dict(state)


class TestEventsThatFail:
    """An event is no reason to end a training."""

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), torch.linalg.LinAlgError("no convergence")])
    @pytest.mark.parametrize("where", ["around the solver", "in the solver"])
    def test_the_matrix_keeps_its_multiplier(self, error, where, monkeypatch, caplog):
        model, optimizer = made(SpyingSGD, ramp=0)
        victim, before = "layers.0.mlp.up_proj", {}

        def failing(original):
            def instead(matrices, *how, **more):
                if before and any(
                    torch.equal(torch.as_tensor(W), model.get_parameter(f"{victim}.weight")) for W in matrices
                ):
                    raise error
                return original(matrices, *how, **more)

            return instead

        room, functions = (
            (live_scores, ["esd_batch"])
            if where == "around the solver"
            else (spectra, ["batch_eigenvalues", "piece_eigenvalues"])
        )
        for function in functions:
            monkeypatch.setattr(room, function, failing(getattr(room, function)))
        train(model, optimizer, [0])
        before = htsr.multipliers(optimizer)
        with torch.no_grad():  # so that every α is another one
            for name in MATRICES:
                weight = model.get_parameter(f"{name}.weight")
                weight.copy_(weight.sign() * weight.abs() ** 3)
        with caplog.at_level(logging.WARNING):
            train(model, optimizer, [1, 2])
        after = htsr.multipliers(optimizer)
        assert after[victim] == before[victim] != 1.0
        status = {g["name"]: g["status"] for g in optimizer.param_groups}
        assert ("memory" if isinstance(error, torch.OutOfMemoryError) else str(error)) in status[victim]
        assert {value for name, value in status.items() if name != victim} == {"ok"}
        assert f"{victim} keeps its multiplier" in caplog.text
        assert sum(after[name] != before[name] for name in MATRICES) >= 3

    @pytest.mark.parametrize("error", [AttributeError("no"), ZeroDivisionError("by zero"), RuntimeError("no")])
    def test_a_score_of_the_users_own_that_fails_is_told(self, error):
        def score(spectrum):
            raise error

        model, optimizer = made(score=score)
        with pytest.raises(HtsrError, match=rf"the score .*score of layers.*fails: {type(error).__name__}"):
            train(model, optimizer, [0])
        with pytest.raises(HtsrError, match=rf"the score .*score of layers.*fails: {type(error).__name__}"):
            htsr.layerwise_plan(model, score=score)

    def test_where_no_matrix_has_a_score_the_ends_keep_theirs_too(self, monkeypatch):
        model, optimizer = made(ramp=0)
        original = live_scores.esd_batch

        def failing(*_args, **_more):
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(live_scores, "esd_batch", failing)
        train(model, optimizer, [0])
        assert set(htsr.multipliers(optimizer).values()) == {1.0}
        monkeypatch.setattr(live_scores, "esd_batch", original)
        train(model, optimizer, [1, 2])
        found = htsr.multipliers(optimizer)
        assert found["embed_tokens"] == found["lm_head"] == 5.0
        monkeypatch.setattr(live_scores, "esd_batch", failing)
        train(model, optimizer, [3, 4])
        assert htsr.multipliers(optimizer) == found


class TestWarnings:
    def test_nothing_to_set(self, caplog):
        model = TinyLM()
        htsr.layerwise(torch.optim.SGD([p for p in model.parameters() if p.ndim < 2], lr=1.0), model)
        assert caplog.text.count("nothing to set") == 1

    def test_events_that_never_end(self, caplog):
        model = TinyLM()
        optimizer = htsr.layerwise(torch.optim.SGD(model.parameters(), lr=LR), model, interval=2)
        train(model, optimizer, range(1))
        assert "without total_steps" not in caplog.text
        train(model, optimizer, range(1, 6))
        assert caplog.text.count("without total_steps layerwise measures to the end, not for 20%") == 1

    def test_parameters_that_come_later(self, caplog):
        model, optimizer = made()
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        train(model, optimizer, range(2))
        assert caplog.text.count("1 parameters came to the optimizer after") == 1
