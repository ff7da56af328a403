"""The low-rank optimizer: against galore-torch, a slow twin, torch's AdamW, and itself taken another way."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from htsr.errors import HtsrError, UsageError
from htsr.training.layerwise.wrapper import layerwise
from htsr.training.lowrank.groups import low_rank_groups
from htsr.training.lowrank.optimizer import LowRankAdamW
from htsr.training.lowrank.released import ReleasedGradient
from htsr.training.lowrank.subspace import project
from tests.reference import lowrank as reference
from tests.transformer import llama

SHAPES = [(24, 16), (16, 24), (16, 16), (10,)]


def parameters(dtype=torch.float32, seed=0):
    random = np.random.default_rng(seed)
    return [nn.Parameter(torch.from_numpy(random.standard_normal(shape)).to(dtype)) for shape in SHAPES]


def gradients(steps, dtype=torch.float32, seed=1):
    random = np.random.default_rng(seed)
    return [[torch.from_numpy(random.standard_normal(shape)).to(dtype) for shape in SHAPES] for _ in range(steps)]


def groups(params, rank=4, **options):
    return [{"params": params[:-1], "rank": rank, **options}, {"params": params[-1:]}]


def take(optimizer, params, grads):
    for parameter, grad in zip(params, grads, strict=True):
        parameter.grad = grad.clone()
    optimizer.step()


class Experts(nn.Module):
    """Stacked, as transformers has them; all see every token."""

    def __init__(self, number, width):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(number, 2 * width, width) / width**0.5)
        self.down_proj = nn.Parameter(torch.randn(number, width, 2 * width) / width**0.5)

    def forward(self, x):
        inner = torch.einsum("eij,btj->ebti", self.up_proj, x).relu()
        return torch.einsum("eij,ebtj->bti", self.down_proj, inner) / len(self.up_proj)


class Block(nn.Module):
    """Parts named as a decoder names them."""

    def __init__(self, width, experts=0):
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict(
            {
                "up_proj": nn.Linear(width, 3 * width, bias=False),
                "down_proj": nn.Linear(3 * width, width, bias=False),
            }
        )
        if experts:
            self.mlp["experts"] = Experts(experts, width)

    def forward(self, x):
        x = x + self.self_attn["q_proj"](x).tanh()
        x = x + self.mlp["down_proj"](self.mlp["up_proj"](x).relu())
        return x + self.mlp["experts"](x) if "experts" in self.mlp else x


class Net(nn.Module):
    def __init__(self, blocks=2, width=16, experts=0):
        super().__init__()
        self.embed_tokens = nn.Embedding(40, width)
        self.layers = nn.ModuleList(Block(width, experts) for _ in range(blocks))
        self.lm_head = nn.Linear(width, 40, bias=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block(x)
        return self.lm_head(x)


def make(seed=0, dtype=torch.float32, **parts):
    torch.manual_seed(seed)
    return Net(**parts).to(dtype)


def batch(step, part=0, size=6):
    return torch.from_numpy(np.random.default_rng((step, part)).integers(0, 40, (size, 5)))


def loss_of(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


def train(model, optimizer, steps, parts=1, clip=None, start=0):
    for step in range(start, start + steps):
        for part in range(parts):
            (loss_of(model, batch(step, part)) / parts).backward()
        if clip is not None:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def close(a, b, **tolerance):
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_exact_svd_takes_the_steps_of_galore_torch(weight_decay):
    galore_torch = pytest.importorskip("galore_torch")
    lr, eps, scale, beta2 = 1e-2, 1e-6, 0.25, 0.999
    ours, theirs = parameters(), parameters()
    # galore-torch decays after the update (so the update shrinks, too) and adds eps before the bias correction:
    # the same rule with another scale and another eps at each step
    decayed = 1 - lr * weight_decay
    mine = LowRankAdamW(
        groups(ours, scale=scale * decayed, refresh_every=5), lr=lr, weight_decay=weight_decay, method="svd"
    )
    mine.param_groups[1]["lr"] = lr * decayed
    mine.param_groups[1]["weight_decay"] = weight_decay / decayed
    other = galore_torch.GaLoreAdamW(
        groups(theirs, scale=scale, update_proj_gap=5, proj_type="std"), lr=lr, eps=eps, weight_decay=weight_decay,
        no_deprecation_warning=True,
    )  # fmt: skip
    start = [parameter.detach().clone() for parameter in ours]
    for step, grads in enumerate(gradients(14), 1):
        for group in mine.param_groups:
            group["eps"] = eps / (1 - beta2**step) ** 0.5
        take(mine, ours, grads)
        take(other, theirs, grads)
        for a, b, before in zip(ours, theirs, start, strict=True):
            torch.testing.assert_close(a - before, b - before, rtol=2e-5, atol=1e-6)


@settings(max_examples=25)
@given(
    rows=st.integers(2, 14),
    columns=st.integers(2, 14),
    rank=st.integers(1, 14),
    every=st.integers(1, 4),
    rotate=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 99),
)
def test_every_step_is_that_of_the_slow_twin(rows, columns, rank, every, rotate, weight_decay, seed):
    random = np.random.default_rng(seed)
    W, grads = random.standard_normal((rows, columns)), list(random.standard_normal((6, rows, columns)))
    rank = min(rank, rows, columns)
    if not rotate:
        every = 6  # kept moments depend on the signs that an SVD happens to give
    expected = reference.galore(W, grads, 0.02, 0.9, 0.99, 1e-8, weight_decay, rank, 0.5, every, rotate)
    parameter = nn.Parameter(torch.from_numpy(W.copy()))
    optimizer = LowRankAdamW(
        [{"params": [parameter], "rank": rank}], lr=0.02, betas=(0.9, 0.99), weight_decay=weight_decay, scale=0.5,
        refresh_every=every, method="svd", moments="rotate" if rotate else "keep",
    )  # fmt: skip
    for grad, after in zip(grads, expected, strict=True):
        take(optimizer, [parameter], [torch.from_numpy(grad)])
        np.testing.assert_allclose(parameter.detach().numpy(), after, rtol=1e-9, atol=1e-10)


def test_without_a_rank_it_is_adamw():
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    mine = LowRankAdamW(ours, lr=0.01, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for grads in gradients(8, torch.float64):
        take(mine, ours, grads)
        take(other, theirs, grads)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_at_full_rank_it_is_adamw_on_rotated_weights(method):
    """Not AdamW itself, whose square roots see the coordinates: W·P trained by AdamW on G·P."""
    W = parameters(torch.float64)[0]
    start = W.detach().clone()
    optimizer = LowRankAdamW([{"params": [W], "rank": 16}], lr=0.01, scale=1.0, method=method)
    grads = [grad[0] for grad in gradients(6, torch.float64)]
    take(optimizer, [W], grads[:1])
    P = optimizer.state[W]["projector"]
    turned = nn.Parameter(start @ P)
    other = torch.optim.AdamW([turned], lr=0.01, weight_decay=0.0)
    take(other, [turned], [grads[0] @ P])
    for grad in grads[1:]:
        take(optimizer, [W], [grad])
        take(other, [turned], [grad @ P])
    torch.testing.assert_close(W.detach(), turned.detach() @ P.T, rtol=1e-11, atol=1e-11)
    plain = parameters(torch.float64)[0]
    adamw = torch.optim.AdamW([plain], lr=0.01, weight_decay=0.0)
    for grad in grads:
        take(adamw, [plain], [grad])
    assert (plain - W).abs().max() > 1e-3


def test_groups_of_a_model():
    model = make()
    low, full, vectors = low_rank_groups(model, 4, scale=0.5)
    assert low["rank"] == 4
    assert low["scale"] == 0.5
    assert len(low["params"]) == 6
    assert [tuple(p.shape) for p in full["params"]] == [(40, 16), (40, 16)]
    assert all(p.ndim == 1 for p in vectors["params"])
    assert vectors["weight_decay"] == 0
    assert len(low_rank_groups(model, 4, embeddings=True)[0]["params"]) == 8
    counted = sum(len(group["params"]) for group in low_rank_groups(model, 4, embeddings=True))
    assert counted == len(list(model.parameters()))
    with pytest.raises(UsageError, match="no matrix of Net can have rank 16"):
        low_rank_groups(model, 16)


@pytest.mark.parametrize("mode", ["project", "update"])
@pytest.mark.parametrize("moments", ["keep", "rotate"])
def test_releasing_gradients_during_backward_changes_nothing(mode, moments):
    kept, released = make(), make()
    options = {"lr": 0.01, "weight_decay": 0.1, "refresh_every": 3, "moments": moments}
    train(kept, LowRankAdamW(low_rank_groups(kept, 4), **options), 8)
    optimizer = LowRankAdamW(low_rank_groups(released, 4), gradients=mode, **options)
    train(released, optimizer, 7)
    loss_of(released, batch(7)).backward()
    gone = optimizer.param_groups[0]["params"] if mode == "project" else list(released.parameters())
    assert all(isinstance(parameter.grad, ReleasedGradient) for parameter in gone)
    optimizer.step()
    assert same(kept, released)


def test_at_most_one_full_gradient_lives_during_backward():
    model = make()
    optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients="update")
    alive = []
    for parameter in model.parameters():
        parameter.register_hook(lambda _: alive.append(sum(type(p.grad) is torch.Tensor for p in model.parameters())))
    loss_of(model, batch(0)).backward()
    assert len(alive) == len(list(model.parameters()))
    assert max(alive) == 0
    assert all(len(optimizer.state[p]) >= 3 for p in model.parameters())


def test_accumulating_in_the_subspace_is_projecting_the_sum():
    model, whole = make(dtype=torch.float64), make(dtype=torch.float64)
    optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients="project", refresh_every=2, lr=0.01)
    plain = LowRankAdamW(low_rank_groups(whole, 4), refresh_every=2, lr=0.01)
    train(model, optimizer, 1)
    train(whole, plain, 1)
    for part in range(3):
        (loss_of(model, batch(1, part)) / 3).backward()
        (loss_of(whole, batch(1, part)) / 3).backward()
    for ours, theirs in zip(optimizer.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(
            ours.grad.R, project(theirs.grad, plain.state[theirs]["projector"]), rtol=1e-9, atol=1e-12
        )
    optimizer.step()
    plain.step()
    close(model, whole, rtol=1e-9, atol=1e-10)
    optimizer.zero_grad()
    train(model, optimizer, 3, parts=3, start=2)  # through a refresh, whose subspace is that of the first part
    fresh = project(torch.zeros(16, 16, dtype=torch.float64), optimizer.state[ours]["projector"][:16])
    assert torch.isfinite(fresh).all()
    (loss_of(model, batch(9)) * float("1e3")).backward()
    optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()  # zero_grad has dropped what was projected
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", ["keep", "project"])
def test_clipping_scales_the_gradients_that_the_step_will_use(mode):
    model = make(dtype=torch.float64)
    optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients=mode, method="svd", lr=0.01)
    loss_of(model, batch(0)).backward()
    twin = make(dtype=torch.float64)
    loss_of(twin, batch(0)).backward()
    used = []
    for name, parameter in twin.named_parameters():
        G = parameter.grad
        in_block = name.startswith("layers") and G.ndim == 2
        used.append(torch.linalg.svdvals(G)[:4].norm() if in_block else G.norm())
    expected = torch.stack(used).norm()
    norm = optimizer.clip_grad_norm_(0.1)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-5, atol=0)
    assert norm < nn.utils.get_total_norm([p.grad for p in twin.parameters()])
    optimizer.step()
    exp_avg = [optimizer.state[parameter]["exp_avg"] for parameter in model.parameters()]
    clipped = torch.stack([m.norm() for m in exp_avg]).norm() / 0.1  # 1 - β₁
    torch.testing.assert_close(clipped, torch.tensor(0.1, dtype=torch.float64), rtol=1e-4, atol=0)


def test_torch_clips_projected_gradients_as_the_optimizer_does():
    ends, norms = [], []
    for clip in (None, "torch", "optimizer"):
        model = make(dtype=torch.float64)
        optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients="project", refresh_every=2, lr=0.01)
        for step in range(4):
            for part in range(2):
                (loss_of(model, batch(step, part)) / 2).backward()
            if clip == "torch":
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05))
            elif clip == "optimizer":
                norms.append(optimizer.clip_grad_norm_(0.05))
            optimizer.step()
            model.zero_grad()
        ends.append(model)
    torch.testing.assert_close(torch.stack(norms[:4]), torch.stack(norms[4:]), rtol=1e-9, atol=0)
    close(ends[1], ends[2], rtol=1e-9, atol=1e-10)
    assert not same(ends[0], ends[1])


def test_what_would_pass_over_released_gradients_is_refused():
    """A GradScaler saw the rest only: it clipped scaled gradients, and never skipped a step (also case 19 and 26)."""
    for mode, sentence in (("project", "GradScaler, or whatever else"), ("update", "Set max_grad_norm to 0")):
        model = make()
        optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients=mode)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(loss_of(model, batch(0))).backward()
        with pytest.raises(UsageError, match=sentence):
            scaler.unscale_(optimizer)
        with pytest.raises(UsageError, match=sentence):
            scaler.step(optimizer)
        for use in (
            lambda _, model=model: nn.utils.clip_grad_value_(model.parameters(), 1e-3),
            lambda grads: nn.utils.get_total_norm(grads, norm_type=1.0),
            lambda grads: sum(grad.abs().sum() for grad in grads),
            lambda grads: [grad + 1 for grad in grads],
        ):
            with pytest.raises(UsageError, match=sentence):
                use([parameter.grad for parameter in model.parameters()])
        assert "ReleasedGradient" in repr(optimizer.param_groups[0]["params"][0].grad)
        optimizer.zero_grad()
        optimizer.zero_grad(set_to_none=False)
        train(model, optimizer, 1)
    loss_of(model, batch(1)).backward()
    with pytest.raises(UsageError, match="Set max_grad_norm to 0"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(UsageError, match="takes one backward a step, and this is the second"):
        loss_of(model, batch(1)).backward()


@pytest.mark.parametrize("drop", ["optimizer", "model"])
@pytest.mark.parametrize("mode", ["keep", "project"])
def test_a_batch_that_is_dropped_leaves_nothing(mode, drop):
    """model.zero_grad(), the Trainer's, knew nothing of what was projected or clipped."""
    plain, dropped = make(), make()
    options = {"gradients": mode, "lr": 0.01, "refresh_every": 1, "method": "svd"}
    train(plain, LowRankAdamW(low_rank_groups(plain, 4), **options), 3)
    optimizer = LowRankAdamW(low_rank_groups(dropped, 4), **options)
    train(dropped, optimizer, 2)
    (100 * loss_of(dropped, batch(7))).backward()
    optimizer.clip_grad_norm_(50.0)
    (optimizer if drop == "optimizer" else dropped).zero_grad()
    loss_of(dropped, batch(2)).backward()
    optimizer.step()
    assert same(plain, dropped)


@pytest.mark.parametrize("method", ["svd", "randomized"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-2),
        lambda model: loss_of(model, batch(8)).backward(),
        lambda model: (model.zero_grad(set_to_none=False), loss_of(model, batch(9)).backward()),
        lambda model: [parameter.grad.data.mul_(0.5) for parameter in model.parameters()],
    ],
    ids=["torch clips", "one more backward", "a skipped step", "data"],
)
def test_what_becomes_of_kept_gradients_after_clipping_counts(change, method):
    """0.1.0 made the step with the gradients of the call, whatever had been added to them or taken off since."""
    models = make(), make()
    options = {"refresh_every": 2, "lr": 0.01, "method": method, "moments": "rotate"}
    optimizers = [LowRankAdamW(low_rank_groups(model, 4), **options) for model in models]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, batch(step)).backward()
            if model is models[0]:
                optimizer.clip_grad_norm_(1e9)
            change(model)
            optimizer.step()
            optimizer.zero_grad()
    assert same(*models)
    states = [list(optimizer.state.values()) for optimizer in optimizers]
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*states, strict=True))


def test_a_backward_after_clipping_adds_to_what_was_clipped_as_in_torch():
    models = make(dtype=torch.float64), make(dtype=torch.float64)
    for model in models:
        optimizer = LowRankAdamW(low_rank_groups(model, 4), method="svd", lr=0.01)
        loss_of(model, batch(0)).backward()
        if model is models[0]:
            norm = optimizer.clip_grad_norm_(0.05)
        else:
            for parameter in model.parameters():
                parameter.grad.mul_(0.05 / (norm + 1e-6))
        loss_of(model, batch(1)).backward()
        optimizer.step()
    close(*models, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["keep", "project", "update"])
def test_a_copy_of_model_and_optimizer_trains_as_they_do(mode):
    model = make()
    optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients=mode, refresh_every=2, lr=0.01)
    train(model, optimizer, 3)
    twin, copied = copy.deepcopy((model, optimizer))
    assert copied.gradients == mode
    train(model, optimizer, 3, start=3)
    train(twin, copied, 3, start=3)
    assert same(model, twin)
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    twin, loaded = torch.load(file, weights_only=False)
    train(model, optimizer, 2, start=6)
    train(twin, loaded, 2, start=6)
    assert same(model, twin)
    optimizer.process_group = object()
    with pytest.raises(UsageError, match="process_group cannot be copied"):
        copy.deepcopy(optimizer)


def run_trainer(folder, mode, **arguments):
    """One record again and again through transformers' own Trainer, on CPU."""
    from transformers import Trainer, TrainingArguments

    model = llama(2)
    optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients=mode, method="svd", lr=1e-3)
    record = {"input_ids": torch.arange(4, 13), "labels": torch.arange(4, 13)}
    given = {"max_steps": 1, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), save_strategy="no", per_device_train_batch_size=2, **given, **arguments),
        train_dataset=[record] * 8,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )
    trainer.train()
    return trainer, model, optimizer, record


def test_the_trainer_of_transformers_clips_projected_gradients_and_logs_their_norm(tmp_path):
    trainer, _, optimizer, record = run_trainer(tmp_path, "project", max_grad_norm=1e-3, gradient_accumulation_steps=2)
    twin = llama(2)
    other = LowRankAdamW(low_rank_groups(twin, 4), method="svd")
    twin(**{key: value[None] for key, value in record.items()}).loss.backward()
    norm = float(other.clip_grad_norm_(1.0))
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    moments = torch.stack([state["exp_avg"].norm() for state in optimizer.state.values()])
    assert float(moments.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)  # (1 - β₁) of the clipped gradient


def test_the_trainer_of_transformers_is_told_what_updates_during_backward_cannot(tmp_path):
    with pytest.raises(UsageError, match="transformers' Trainer clips by default"):
        run_trainer(tmp_path, "update")
    with pytest.raises(UsageError, match="take gradients='project' to accumulate"):
        run_trainer(tmp_path, "update", max_grad_norm=0.0, gradient_accumulation_steps=2)
    trainer, model, optimizer, record = run_trainer(tmp_path, "update", max_grad_norm=0.0)
    twin = llama(2)
    other = LowRankAdamW(low_rank_groups(twin, 4), method="svd", lr=1e-3)
    batch = {key: torch.stack([value] * 2) for key, value in record.items()}
    twin(**batch).loss.backward()
    norm = float(other.clip_grad_norm_(torch.inf))
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    other.step()
    close(model, twin, rtol=1e-5, atol=1e-6)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_clipping_beyond_the_norm_changes_nothing_and_modes_agree():
    models = [make() for _ in range(3)]
    train(models[0], LowRankAdamW(low_rank_groups(models[0], 4), refresh_every=2), 5)
    train(models[1], LowRankAdamW(low_rank_groups(models[1], 4), refresh_every=2), 5, clip=1e9)
    assert same(models[0], models[1])
    clipped = [make(dtype=torch.float64) for _ in range(2)]
    for model, mode in zip(clipped, ("keep", "project"), strict=True):
        train(model, LowRankAdamW(low_rank_groups(model, 4), refresh_every=2, gradients=mode), 5, clip=0.05)
    close(*clipped, rtol=0, atol=1e-9)
    optimizer = LowRankAdamW(low_rank_groups(models[2], 4), gradients="update")
    with pytest.raises(UsageError, match="take gradients='project'"):
        optimizer.clip_grad_norm_(1.0)


@pytest.mark.parametrize("mode", ["keep", "project", "update"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_resumed_is_uninterrupted_bit_for_bit(mode, state_dtype, method):
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    options = {"gradients": mode, "state_dtype": state_dtype, "method": method, "refresh_every": 3, "seed": 3}

    def start():
        model = make(dtype=torch.bfloat16 if state_dtype == "bfloat16" else torch.float32)
        return model, LowRankAdamW(low_rank_groups(model, 4, lr=0.02), **options)

    through, optimizer = start()
    train(through, optimizer, 8)
    first, optimizer = start()
    train(first, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = start()
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, 4, start=4)
    assert same(through, second)


def test_options_ride_in_the_state_dict_and_live_groups_are_used():
    model, other = make(), make()
    optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients="update", seed=7, lr=0.5)
    train(model, optimizer, 1)
    loaded = LowRankAdamW(low_rank_groups(other, 4), gradients="update")
    loaded.load_state_dict(optimizer.state_dict())
    assert {(group["seed"], group["lr"]) for group in loaded.param_groups} == {(7, 0.5)}
    for group in loaded.param_groups:
        group["lr"] = 0.0
    train(other, loaded, 1)  # the hooks were made before the groups were loaded, and act by the present learning rate
    assert same(other, make())


def test_an_optimizer_that_is_gone_acts_no_more_and_two_are_an_error():
    model = make()
    first = LowRankAdamW(low_rank_groups(model, 4), gradients="update", lr=0.5)
    del first
    loss_of(model, batch(0)).backward()
    assert same(model, make())
    model.zero_grad()
    pair = [LowRankAdamW(low_rank_groups(model, 4), gradients="update") for _ in range(2)]
    with pytest.raises(UsageError, match="another optimizer"):
        loss_of(model, batch(0)).backward()
    assert pair


def test_eight_bit_and_bfloat16_states_stay_near():
    pytest.importorskip("bitsandbytes")
    ends = {}
    for state_dtype in ("float32", "bfloat16", "8bit"):
        model = make()
        optimizer = LowRankAdamW(low_rank_groups(model, 4), state_dtype=state_dtype, scale=1.0, lr=1e-3)
        train(model, optimizer, 6)
        ends[state_dtype] = torch.cat([p.detach().flatten() for p in model.parameters()])
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        assert state["exp_avg"].dtype == {"8bit": torch.uint8}.get(state_dtype) or getattr(torch, state_dtype, None)
    moved = (ends["float32"] - torch.cat([p.detach().flatten() for p in make().parameters()])).norm()
    for state_dtype in ("bfloat16", "8bit"):
        distance = (ends[state_dtype] - ends["float32"]).norm()
        assert 0 < distance < 0.2 * moved


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("shape", [(1300, 5), (1024, 3, 2), (300,), ()])
def test_large_parameters_are_updated_piece_by_piece_with_the_same_result(monkeypatch, state_dtype, shape):
    if state_dtype == "8bit":
        pytest.importorskip("bitsandbytes")
    ends = []
    for piece in (2**22, 1000):
        monkeypatch.setattr("htsr.training.lowrank.update.PIECE", piece)
        random = np.random.default_rng(0)
        parameter = nn.Parameter(torch.tensor(random.standard_normal(shape)).float())
        optimizer = LowRankAdamW([parameter], state_dtype=state_dtype, weight_decay=0.1)
        for _ in range(4):
            take(optimizer, [parameter], [torch.tensor(random.standard_normal(shape)).float()])
        ends.append(parameter.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("mode", ["keep", "project", "update"])
def test_frozen_parameters_can_be_thawed_and_their_state_dropped(mode):
    model = make()
    block = list(model.layers[1].parameters())
    for parameter in block:
        parameter.requires_grad_(False)
    optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients=mode)
    before = [parameter.detach().clone() for parameter in block]
    train(model, optimizer, 2)
    assert all(map(torch.equal, block, before))
    assert not any(parameter in optimizer.state for parameter in block)
    for parameter in block:
        parameter.requires_grad_(True)
    train(model, optimizer, 2, start=2)
    assert not any(map(torch.equal, block, before))
    for parameter in block:
        assert parameter.grad is None
        parameter.requires_grad_(False)
        del optimizer.state[parameter]
    before = [parameter.detach().clone() for parameter in block]
    train(model, optimizer, 1)
    assert all(map(torch.equal, block, before))


def test_layerwise_learning_rates_act_on_it():
    models = []
    for mode, policy in (("keep", {"mlp.*": 5}), ("project", {"mlp.*": 5}), ("keep", None)):
        model = make()
        optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients=mode, refresh_every=2, lr=0.01)
        if policy:
            layerwise(optimizer, model, policy)
        train(model, optimizer, 4)
        models.append(model)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_step_hooks_do_not_pass_in_silence():
    model = make()
    optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients="update")
    optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(UsageError, match="take gradients='project'"):
        loss_of(model, batch(0)).backward()


def test_clipping_by_a_step_hook():
    models = [make(), make()]
    train(models[0], LowRankAdamW(low_rank_groups(models[0], 4)), 3, clip=0.05)
    optimizer = LowRankAdamW(low_rank_groups(models[1], 4))
    optimizer.register_step_pre_hook(lambda opt, *_: opt.clip_grad_norm_(0.05) and None)
    train(models[1], optimizer, 3)
    assert same(*models)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "qr"}, "unknown method 'qr'"),
        ({"moments": "drop"}, "unknown moments 'drop'"),
        ({"state_dtype": "float16"}, "unknown state_dtype 'float16'"),
        ({"gradients": "drop"}, "unknown gradients 'drop'"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"betas": (0.9,)}, "betas are"),
        ({"betas": 0.9}, "betas are"),
        ({"betas": (0.9, "x")}, "betas are"),
        ({"scale": math.nan}, "scale is nan; it is a finite number, at least 0"),
        ({"scale": -1}, "scale is -1; it is"),
        ({"lr": math.inf}, "lr is inf; it is"),
        ({"eps": None}, "eps is None; it is"),
        ({"refresh_every": 1.5}, "refresh_every is 1.5; it is a whole number, at least 1"),
        ({"refresh_every": None}, "refresh_every is None; it is"),
        ({"rounding": "no"}, "unknown rounding 'no': one of stochastic, kahan, master, nearest"),
        ({"refresh_every": 0}, "refresh_every is 0"),
    ],
)
def test_bad_options_are_a_sentence(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        LowRankAdamW(groups(parameters()), **options)


def test_bad_parameters_and_gradients_are_a_sentence():
    for rank in (0, True, 2.5, None):
        if rank is not None:
            with pytest.raises(UsageError, match=f"rank is {rank}; it is a whole number, at least 1"):
                LowRankAdamW(groups(parameters(), rank=rank))
        with pytest.raises(UsageError, match=f"rank is {rank}; it is a whole number, at least 1"):
            low_rank_groups(make(), rank)
    with pytest.raises(UsageError, match=r"one of its parameters is \(10,\)"):
        LowRankAdamW([{"params": parameters(), "rank": 2}])
    params = parameters()
    optimizer = LowRankAdamW(groups(params))
    grads = gradients(1)[0]
    grads[1][3, 3] = float("nan")
    with pytest.raises(HtsrError, match=r"parameter 1 \(16×24\) at step 1: a gradient has NaN or Inf"):
        take(optimizer, params, grads)
    embedding = nn.Embedding(9, 4, sparse=True)
    optimizer = LowRankAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match="sparse=False"):
        optimizer.step()


def test_a_gradient_with_nan_stops_the_step_before_anything_is_changed():
    params = parameters()
    optimizer = LowRankAdamW(groups(params, refresh_every=2), lr=0.1)
    for grads in gradients(2):
        take(optimizer, params, grads)
    before = copy.deepcopy([params, list(optimizer.state.values())])
    grads = gradients(3)[2]
    grads[2][0, 5] = float("inf")
    for parameter, grad in zip(params, grads, strict=True):
        parameter.grad = grad
    with pytest.raises(HtsrError, match=r"parameter 2 \(16×16\) at step 3: a gradient has NaN or Inf"):
        optimizer.clip_grad_norm_(1.0)
    with pytest.raises(HtsrError, match=r"parameter 2 \(16×16\) at step 3: a gradient has NaN or Inf"):
        optimizer.step()
    torch.testing.assert_close([params, list(optimizer.state.values())], before, rtol=0, atol=0)
    named = [{"params": [(f"W{i}", p) for i, p in enumerate(params[1:3])], "rank": 2, "refresh_every": 2}]
    optimizer = LowRankAdamW(named)
    with pytest.raises(HtsrError, match=r"parameter W1 \(16×16\) at step 1: a gradient has NaN or Inf"):
        optimizer.step()
    take(optimizer, params, gradients(1)[0])
    params[2].grad.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="non-finite"):  # what the guide says for the steps between
        nn.utils.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    optimizer.step()
    assert bool(params[2].isnan().all())


@pytest.mark.parametrize("mode", ["keep", "project", "update"])
def test_backward_and_step_under_autocast_project_in_the_precision_of_the_gradient(mode):
    """In autocast's bfloat16 a projection is 1 % off, and a basis of randomised iteration no basis."""
    models = make(), make()
    states = []
    for model, autocast in zip(models, (False, True), strict=True):
        optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients=mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch(0))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            (loss + sum(1e-3 * parameter.square().sum() for parameter in model.parameters())).backward()
            if mode != "update":
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        states.append([optimizer.state[parameter] for parameter in optimizer.param_groups[0]["params"]])
    for right, ours in zip(*states, strict=True):
        P = ours["projector"]
        torch.testing.assert_close(P.mT @ P, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(right["exp_avg"], ours["exp_avg"], rtol=1e-4, atol=1e-7)


def test_hooks_of_loading_are_heeded_and_find_the_state_as_it_stays():
    """A sampler's, that keep some of it on the host; all was moved to the device after them."""
    model = make(dtype=torch.bfloat16)
    optimizer = LowRankAdamW(low_rank_groups(model, 4))
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    resumed = LowRankAdamW(low_rank_groups(model, 4))
    seen = []

    def before(_, state_dict):
        return {**state_dict, "state": {key: value for key, value in state_dict["state"].items() if key}}

    def after(loaded):
        state = loaded.state[loaded.param_groups[0]["params"][1]]
        seen.append({name: value.dtype for name, value in state.items()})
        state["exp_avg"] = state["exp_avg"].clone()
        seen.append(state["exp_avg"].data_ptr())

    resumed.register_load_state_dict_pre_hook(before)
    resumed.register_load_state_dict_post_hook(after)
    resumed.load_state_dict(saved)
    first, second = resumed.param_groups[0]["params"][:2]
    assert first not in resumed.state
    assert seen[0] == {"step": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32} | {
        "projector": torch.bfloat16
    }
    assert resumed.state[second]["exp_avg"].data_ptr() == seen[1]
    for mine, name in itertools.product([second], resumed.state[second]):
        assert torch.equal(resumed.state[mine][name], optimizer.state[mine][name])
        assert resumed.state[mine][name].data_ptr() != optimizer.state[mine][name].data_ptr()


@pytest.mark.parametrize("mode", ["keep", "update"])
def test_a_compiled_step_is_the_step(mode):
    models = make(), make()
    for model in models:
        optimizer = LowRankAdamW(low_rank_groups(model, 4), gradients=mode, refresh_every=2)
        step = torch.compile(optimizer.step, backend="eager") if model is models[0] else optimizer.step
        for number in range(5):
            loss_of(model, batch(number)).backward()
            step()
            optimizer.zero_grad()
    assert same(*models)


def test_capture_in_a_cuda_graph_is_refused(monkeypatch):
    """It would repeat one step's bias correction, noise and subspace without a word."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = make()
    optimizer = LowRankAdamW(low_rank_groups(model, 4))
    with pytest.raises(UsageError, match="cannot be captured in a CUDA graph"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_a_default_device_is_not_that_of_steps_and_noise(method):
    """As after torch.set_default_device("cuda"): step counters, generators and keys have a place of their own."""
    models = make(dtype=torch.bfloat16), make(dtype=torch.bfloat16)
    for model in models:
        optimizer = LowRankAdamW(low_rank_groups(model, 4), method=method, refresh_every=2)
        for number in range(3):
            loss_of(model, batch(number)).backward()
            with torch.device("meta" if model is models[0] else "cpu"):
                optimizer.step()
            optimizer.zero_grad()
        assert all(state["step"].device.type == "cpu" for state in optimizer.state.values())
    assert same(*models)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    W = nn.Parameter(torch.ones(6, 4))
    optimizer = LowRankAdamW([{"params": [W], "rank": 2}], lr=0.1)
    assert float(optimizer.clip_grad_norm_(1.0)) == 0.0  # no gradient yet

    def closure():
        loss = W.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 24.0
    assert float(W.detach().square().sum()) < 24.0
    with pytest.raises(UsageError, match="kept gradients are averaged by DDP"):
        LowRankAdamW([W], process_group=object())


@pytest.mark.parametrize("method", ["svd", "randomized"])
@pytest.mark.parametrize("moments", ["keep", "rotate"])
def test_a_stack_is_trained_as_its_matrices_one_by_one(method, moments):
    random = np.random.default_rng(3)
    wide = {"rank": 4, "method": method, "refresh_every": 3, "weight_decay": 0.1, "moments": moments}
    for shape in ((5, 24, 16), (5, 16, 24)):
        stack = nn.Parameter(torch.from_numpy(random.standard_normal(shape)))
        matrices = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
        together = LowRankAdamW([{"params": [stack], **wide}], lr=0.05)
        apart = [LowRankAdamW([{"params": [matrix], **wide}], lr=0.05) for matrix in matrices]
        for _ in range(8):
            left, right = (random.standard_normal((5, side, 4)) for side in shape[1:])  # randomised bases are exact
            G = torch.from_numpy(left * [8, 4, 2, 1] @ right.swapaxes(1, 2))
            take(together, [stack], [G])
            for optimizer, matrix, part in zip(apart, matrices, G, strict=True):
                take(optimizer, [matrix], [part])
        torch.testing.assert_close(stack, torch.stack(matrices), rtol=0, atol=1e-6)
        assert together.state[stack]["projector"].shape == (5, 16, 4)


def test_experts_of_a_mixture_get_a_rank():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = {"hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**small, **heads))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    low, full, _ = low_rank_groups(model, 8)
    stacked = [names[id(p)] for p in low["params"] if p.ndim == 3]
    assert stacked == [
        f"model.layers.{i}.mlp.experts.{part}" for i in range(2) for part in ("gate_up_proj", "down_proj")
    ]
    assert not any("experts" in names[id(p)] for p in full["params"])
    optimizer = LowRankAdamW([low, full], lr=1e-2, gradients="project")
    tokens = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(15):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert all(isinstance(p.grad, ReleasedGradient) for p in low["params"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("moments", ["keep", "rotate"])
@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 8), (None, 4), (4, None)])
def test_moments_of_another_rank_are_refused_in_one_sentence(before, after, moments):
    W = nn.Parameter(torch.randn(20, 12))
    optimizer = LowRankAdamW([{"params": [W], "rank": before}], moments=moments, refresh_every=1)
    W.grad = torch.randn(20, 12)
    optimizer.step()
    optimizer.param_groups[0]["rank"] = after
    kept = W.detach().clone()
    with pytest.raises(UsageError, match=f"moments of rank {before}, and its group now has rank {after}: call"):
        optimizer.step()
    assert torch.equal(W, kept)
    optimizer.drop_state(W)
    optimizer.step()


def test_a_step_that_is_a_plain_number_and_complex_parameters():
    W = nn.Parameter(torch.ones(4))
    optimizer = LowRankAdamW([W])
    W.grad = torch.ones(4)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["step"] = 1
    optimizer.load_state_dict(state)
    optimizer.step()
    assert optimizer.state[W]["step"].item() == 2
    with pytest.raises(UsageError, match="complex"):
        LowRankAdamW([nn.Parameter(torch.ones(4, dtype=torch.complex64))])
