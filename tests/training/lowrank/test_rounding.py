"""How narrow weights are rounded.

Stochastic rounding: its two neighbours, its expectation, and that nothing but a seed and the place decides. Kahan sums
and masters: training in float32.
"""

import io

import numpy as np
import pytest
import torch
from torch import nn

import htsr
from htsr.training.lowrank.optimizer import LowRankAdamW
from htsr.training.lowrank.rounding import ROUNDINGS, axis_keys, entry_noise, stochastically_rounded

DTYPES = [torch.bfloat16, torch.float16]


def neighbours(x, dtype):
    """The numbers of `dtype` on both sides of float32 x, towards zero and away from it, by torch's own rounding."""
    nearest = x.to(dtype)
    away = torch.where(x >= 0, torch.inf, -torch.inf).to(dtype)
    out = torch.nextafter(nearest, away)
    back = torch.nextafter(nearest, torch.zeros_like(nearest))
    over = nearest.float().abs() > x.abs()
    return torch.where(over, back, nearest), torch.where(over, nearest, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_entry_becomes_one_of_its_two_neighbours_by_its_place_between_them(dtype):
    random = np.random.default_rng(0)
    x = torch.tensor(random.standard_normal(300) * 10.0 ** random.integers(-9, 5, 300)).float()
    x = x.clamp(-6e4, 6e4)
    low, high = neighbours(x, dtype)
    noise = torch.arange(0, 2**16, 16, dtype=torch.int32)
    rounded = stochastically_rounded(x[:, None].expand(-1, len(noise)).contiguous(), dtype, noise.expand(300, -1))
    up = rounded == high[:, None]
    assert bool((up | (rounded == low[:, None])).all())
    place = (x - low.float()).double() / (high.double() - low.double())
    torch.testing.assert_close(up.double().mean(1), place, rtol=0, atol=2.0**-11)  # the noise counts through all values


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_type_has_stays_and_what_no_type_has_does_too(dtype):
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-20, torch.inf, -torch.inf])
    for noise in (0, 1, 2**15, 2**16 - 1):
        rounded = stochastically_rounded(exact, dtype, torch.full((7,), noise, dtype=torch.int32))
        assert torch.equal(rounded.float(), exact)
        assert bool(stochastically_rounded(torch.full((7,), torch.nan), dtype, rounded.int() * 0 + noise).isnan().all())


def test_noise_is_uniform_without_structure_and_a_function_of_the_seed():
    keys = axis_keys(torch.empty(512, 512), seed=3)
    state = torch.get_rng_state()
    noise = entry_noise(keys)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(entry_noise(keys, slice(100, 300)), noise[100:300])
    assert torch.equal(entry_noise(axis_keys(torch.empty(512, 512), seed=3)), noise)
    assert not torch.equal(entry_noise(axis_keys(torch.empty(512, 512), seed=4)), noise)
    n = noise.numel()
    counts = torch.bincount(noise.flatten() >> 8, minlength=256).double()
    assert float(((counts - n / 256) ** 2 / (n / 256)).sum()) < 255 + 5 * (2 * 255) ** 0.5  # χ², mean + 5 deviations
    # the errors of one place between neighbours are white: no singular value beyond 2√n·σ, where a sum of keys has ~n·σ
    errors = (noise < 2**14).double() - 0.25
    assert float(torch.linalg.matrix_norm(errors, 2)) < 1.1 * 2 * 512**0.5 * (0.25 * 0.75) ** 0.5


def test_keys_are_splitmix64_and_those_of_many_seeds_are_those_of_each():
    """The stream of seed 1234567 as Rosetta Code gives it; the upper halves, as signed numbers."""
    stream = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    upper = (torch.tensor([number >> 32 for number in stream]) + 2**31) % 2**32 - 2**31
    rows, columns = axis_keys(torch.empty(2, 3), seed=1234567)
    assert torch.cat([rows, columns]).tolist() == upper.tolist()
    for shape in ((4, 3), (2, 5, 3), (6,), ()):
        together = axis_keys(torch.empty(shape), [1, 2**62, 3])
        noise = entry_noise(together)
        for i, seed in enumerate((1, 2**62, 3)):
            assert torch.equal(noise[i], entry_noise(axis_keys(torch.empty(shape), seed)))
        assert torch.equal(entry_noise(together, slice(1, 2)), noise[:, 1:2])


@pytest.mark.parametrize("rank", [None, 32])
def test_small_updates_move_bfloat16_weights_as_far_as_they_should(rank):
    """Case: lr 2e-5 for 50 steps, where rounding to nearest leaves 9 of 10 entries where they were."""

    def moved(dtype, **options):
        torch.manual_seed(0)
        W = nn.Parameter((torch.randn(256, 256) * 0.02).bfloat16().to(dtype))
        start = W.detach().clone()
        optimizer = LowRankAdamW([{"params": [W], "rank": rank}], lr=2e-5, scale=1.0, **options)
        G = torch.outer(torch.linspace(-1, 1, 256), torch.linspace(1, 2, 256))
        for _ in range(50):
            W.grad = (0.01 * G + 0.01 * torch.randn(256, 256)).bfloat16().to(dtype)
            optimizer.step()
        return start.float(), W.detach().float() - start.float()

    start, exact = moved(torch.float32)
    _, stochastic = moved(torch.bfloat16)
    _, nearest = moved(torch.bfloat16, rounding="nearest")
    assert float((nearest == 0).float().mean()) > 0.5
    ulp = 2.0 ** (torch.floor(torch.log2(start.abs().clamp(min=1e-9))) - 7)
    far = exact.abs() > 8 * ulp  # an entry that stays had 50 chances, of 8 in all: at most e⁻⁸
    assert far.float().mean() > 0.03
    assert float((stochastic[far] == 0).float().mean()) < 2 * np.exp(-8) + 5 / far.sum()
    # projected on the exact way, every entry's error is at most one unit a step: variance ≤ Σ ulp²/4·50 · exact²
    along = float((stochastic * exact).sum() / exact.square().sum())
    deviation = float((50 / 4 * (2 * ulp).square() * exact.square()).sum().sqrt() / exact.square().sum())
    assert abs(along - 1) < 5 * deviation + 0.03  # the rest: gradients and projectors in bfloat16
    assert float((nearest * exact).sum() / exact.square().sum()) < 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_over_entries_is_the_update(dtype):
    """lr·1 on equal weights: an entry moves with probability q = lr/ulp; the mean's variance is q(1-q)ulp²/n."""
    n, lr = 2**18, 1e-5
    for weight in (1.0, -0.3):
        W = nn.Parameter(torch.full((n,), weight, dtype=dtype))
        before = W.detach().double()
        W.grad = torch.full_like(W, 0.5)
        LowRankAdamW([W], lr=lr, eps=0.0).step()
        low, high = neighbours(torch.tensor([weight]), dtype)
        ulp = abs(float(high.double() - low.double()))
        q = lr / ulp
        mean = float((W.detach().double() - before).mean())
        assert abs(mean + lr) < 5 * ulp * (q * (1 - q) / n) ** 0.5 + lr * 2.0**-8  # and the noise's own resolution


def test_weight_decay_acts_on_bfloat16():
    """lr·weight_decay = 1e-4 of a weight is a fortieth of its unit in the last place: to nearest, nothing decays."""
    ends = {}
    for rounding in ROUNDINGS:
        W = nn.Parameter(torch.ones(200, 200, dtype=torch.bfloat16))
        optimizer = LowRankAdamW([W], lr=1e-3, weight_decay=0.1, rounding=rounding)
        for _ in range(100):
            W.grad = torch.zeros_like(W)
            optimizer.step()
        ends[rounding] = float(W.detach().double().mean())
    assert ends["nearest"] == 1.0
    assert ends["kahan"] == ends["master"] == float(torch.tensor((1 - 1e-4) ** 100).bfloat16())
    assert abs(ends["stochastic"] - (1 - 1e-4) ** 100) < 5 * (0.01 * 2.0**-8 / 200**2) ** 0.5 + 1e-5


def test_float32_is_not_touched_and_options_ride_in_the_state():
    ends = []
    for rounding in ROUNDINGS:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(24, 16)), nn.Parameter(torch.randn(10))]
        optimizer = LowRankAdamW([{"params": params[:1], "rank": 4}, {"params": params[1:]}], rounding=rounding)
        for _ in range(4):
            for parameter in params:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        ends.append(params)
        state = optimizer.state_dict()
        assert all(set(one) <= {"step", "exp_avg", "exp_avg_sq", "projector"} for one in state["state"].values())
        assert [group.pop("rounding") for group in state["param_groups"]] == [rounding] * 2
        optimizer.load_state_dict(state)  # as 0.1.0 saved it
        assert all(group["rounding"] == rounding for group in optimizer.param_groups)
    assert all(map(torch.equal, ends[0], end) for end in ends[1:])


def trained(dtype, steps, rank=None, lr=1e-4, shape=(48, 32), **options):
    """A weight of this dtype after so many steps with the same gradients, and its optimizer."""
    torch.manual_seed(0)
    W = nn.Parameter((torch.randn(shape) * 0.05).bfloat16().to(dtype))
    optimizer = LowRankAdamW([{"params": [W], "rank": rank}], lr=lr, weight_decay=0.1, scale=1.0, **options)
    bias = torch.randn(shape) * 0.005
    W.largest = W.detach().abs()
    for _ in range(steps):
        W.grad = (torch.randn(shape) * 0.01 + bias).to(torch.bfloat16).to(dtype)
        optimizer.step()
        W.largest = torch.maximum(W.largest, W.detach().abs())
    return W, optimizer


@pytest.mark.parametrize("lr", [1e-3, 1e-4, 1e-5])
def test_a_master_is_training_in_float32_and_a_kahan_sum_within_a_unit_of_it(lr):
    exact = trained(torch.float32, 300, lr=lr)[0]
    W, optimizer = trained(torch.bfloat16, 300, lr=lr, rounding="master")
    assert torch.equal(optimizer.state[W]["master"], exact)
    assert torch.equal(W.detach(), exact.detach().bfloat16())
    W, optimizer = trained(torch.bfloat16, 300, lr=lr, rounding="kahan")
    unit = 2.0 ** (exact.largest.log2().ceil() - 8)
    assert bool(((W - exact).abs() <= unit).all())
    # the compensation has 8 bits, too: each step cuts off at most 2⁻⁹ of half a unit
    sums = W + optimizer.state[W]["compensation"].float()
    assert bool(((sums - exact).abs() <= 300 * 2.0**-10 * unit).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["kahan", "master"])
def test_what_rounding_cuts_off_is_kept_at_low_rank_too(rounding, dtype):
    exact = trained(torch.float32, 100, rank=8)[0].detach()
    ends = {how: trained(dtype, 100, rank=8, rounding=how)[0].detach() for how in (rounding, "nearest")}
    error = {how: float((W.float() - exact).norm()) for how, W in ends.items()}
    least = float((exact.to(dtype).float() - exact).norm())
    assert error[rounding] < 1.5 * least + 2e-3  # projectors and gradients in this dtype
    assert dtype == torch.float16 or error["nearest"] > 2 * error[rounding]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_weight_that_was_changed_from_outside_is_where_the_next_step_begins(rounding, dtype):
    W, optimizer = trained(dtype, 20, rounding=rounding)
    outside = torch.randn(48, 32).to(dtype)
    outside[:5] = 0.0
    outside[5] = W.detach()[5]
    before = W.detach().clone()
    with torch.no_grad():
        W.copy_(outside)
    kept = {name: optimizer.state[W][name].clone() for name in ("master", "compensation") if name in optimizer.state[W]}
    optimizer.param_groups[0]["lr"] = 0.0
    W.grad = torch.zeros_like(W)
    optimizer.step()
    half = (neighbours(before.float(), dtype)[1].float() - before.float()).abs().clamp(min=2.0**-24)
    if rounding == "kahan":
        assert bool(((W.float() - outside.float()).abs() <= half + 2.0**-9 * outside.float().abs()).all())
    else:
        assert torch.equal(W.detach(), outside)
    if rounding == "master":
        master = optimizer.state[W]["master"]
        assert torch.equal(master[5], kept["master"][5])
        changed = outside[6:] != before[6:]
        assert torch.equal(master[6:][changed], outside[6:][changed].float())


@pytest.mark.parametrize("rounding", ["kahan", "master"])
def test_a_block_that_is_frozen_keeps_what_rounding_has_kept_of_it(rounding):
    """Three steps of 1e-5 are a hundredth of a unit at 1: dropped with the state, nothing would be left of any."""
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(300, 300) for _ in range(2))})
    model = model.bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    sampler = htsr.LayerSampler(model, [0.5, 0.5], active=1, interval=3, blocks="layers")
    optimizer = LowRankAdamW(model.parameters(), lr=1e-5, rounding=rounding, seed=1)
    sampler.attach(optimizer)
    steps = [0, 0]
    for _ in range(12):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        (active,) = sampler.active
        steps[active] += 1
        optimizer.step()
    assert min(steps) > 0
    frozen = model["layers"][1 - sampler.active[0]]
    assert not optimizer.state.keys() & set(frozen.parameters())
    sampler.detach()
    for parameter in model.parameters():
        optimizer.drop_state(parameter)  # that of the block that was drawn last, too
    assert not optimizer.state
    unit = 2.0**-8
    for block, moved in enumerate(steps):
        W = model["layers"][block].weight.detach()
        chance = moved * 1e-5 / unit  # of an entry, to be a unit lower
        assert abs(float((1 - W.double()).mean()) - moved * 1e-5) < 5 * unit * (chance / W.numel()) ** 0.5 + 1e-7


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "master"])
def test_a_state_that_is_dropped_takes_other_noise_the_next_time(rounding, every):
    """The same noise in each life of a state moves the same entries each time, and the others never.

    400 updates of 0.0064 units: rounded independently an entry stays with probability (1 - 0.0064)⁴⁰⁰ = 0.077, and
    the number of its moves is binomial, with deviation 1.6. Dropping less often than at each step rounds less often.
    """

    def moved(drops, resumed=False):
        W = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        optimizer = LowRankAdamW([W], lr=5e-5, rounding=rounding)
        for step in range(1, 401):
            W.grad = -torch.ones_like(W)
            optimizer.step()
            if drops and step % every == 0:
                optimizer.drop_state(W)
            if resumed and step == 205:
                saved = optimizer.state_dict()
                optimizer = LowRankAdamW([W], lr=5e-5, rounding=rounding)
                optimizer.load_state_dict(saved)
        optimizer.drop_state(W)
        return (W.detach() - 1).double() / 2.0**-7

    units = moved(drops=True)
    assert abs(float(units.mean()) - 2.56) < 5 * 1.6 / 4000**0.5
    assert float((units == 0).double().mean()) < 0.077 + 5 * (0.077 * 0.923 / 4000) ** 0.5
    assert float(units.std()) < 1.6 * (1 + 5 / 8000**0.5)
    assert float(units.max()) <= 13  # of 4000 binomial numbers the largest exceeds it with probability 1e-2
    if every == 10:  # step 205 is within a state's life
        assert torch.equal(moved(drops=True, resumed=True), units)
    elif rounding == "stochastic":  # which is the same process, dropped or not
        assert abs(float(units.std()) / float(moved(drops=False).std()) - 1) < 0.1


def test_second_moments_and_subspaces_take_other_noise_the_next_time_too():
    """From the same weights and gradients; the randomised projector and the moments' rounding are all that differs."""
    torch.manual_seed(0)
    group, seen = {"params": [nn.Parameter(torch.randn(20, 12))], "rank": 3}, []
    optimizer = LowRankAdamW([group], state_dtype="bfloat16")
    G = torch.randn(20, 12)
    (W,) = group["params"]
    for _ in range(2):
        W.grad = G
        optimizer.step()
        seen.append({name: value.clone() for name, value in optimizer.state[W].items()})
        optimizer.drop_state(W)
        optimizer.drop_state(W)  # of which there is none
    assert optimizer.param_groups[0]["drops"] == 2
    assert not torch.equal(seen[0]["projector"], seen[1]["projector"])
    assert not torch.equal(seen[0]["exp_avg_sq"], seen[1]["exp_avg_sq"])


def test_another_rounding_takes_over_between_steps_and_leaves_nothing_of_the_last():
    W, optimizer = trained(torch.bfloat16, 2, rounding="master")
    for rounding, kept in (("kahan", {"compensation"}), ("nearest", set()), ("master", {"master"})):
        optimizer.param_groups[0]["rounding"] = rounding
        W.grad = torch.ones_like(W)
        optimizer.step()
        assert set(optimizer.state[W]) - {"step", "exp_avg", "exp_avg_sq"} == kept


@pytest.mark.parametrize("rounding", ["kahan", "master"])
def test_what_was_kept_is_in_the_weight_when_another_rounding_takes_over(rounding):
    """Forty updates of 5e-5 are a quarter of a unit at 1: an entry in four moves, and the mean is right."""
    n = 10_000
    W = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    optimizer = LowRankAdamW([W], lr=5e-5, rounding=rounding)
    for step in range(41):
        if step == 40:
            optimizer.param_groups[0].update(rounding="nearest", lr=0.0)
        W.grad = -torch.ones_like(W)
        optimizer.step()
    unit, chance = 2.0**-7, 40 * 5e-5 * 2**7
    deviation = unit * (chance * (1 - chance) / n) ** 0.5
    assert abs(float(W.detach().double().mean()) - 1 - 40 * 5e-5) < 5 * deviation + 1e-5


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_beyond_the_largest_number_a_weight_is_infinite_and_never_nan(rounding):
    W = nn.Parameter(torch.full((4,), 65504.0, dtype=torch.float16))
    optimizer = LowRankAdamW([W], lr=100.0, rounding=rounding)
    for _ in range(4):
        W.grad = torch.tensor([-1.0, 1.0, -1.0, 1.0]).half()
        optimizer.step()
    assert not bool(W.isnan().any())
    assert bool(W[1::2].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shape", [(24, 16), (3, 8, 12), (40,), ()])
def test_resumed_rounds_as_uninterrupted_and_pieces_as_the_whole(dtype, rounding, shape, monkeypatch):
    def run(stop=None, piece=2**22):
        monkeypatch.setattr("htsr.training.lowrank.update.PIECE", piece)
        random = np.random.default_rng(1)

        def draw():
            return torch.tensor(random.standard_normal(shape)).to(dtype)

        W = nn.Parameter(draw())
        group = {"params": [W], "rank": 4} if len(shape) > 1 else {"params": [W]}
        options = {"lr": 1e-4, "weight_decay": 0.1, "refresh_every": 3, "seed": 5, "rounding": rounding}
        optimizer = LowRankAdamW([dict(group)], **options)
        for step in range(6):
            if step == stop:
                file = io.BytesIO()
                torch.save([W.detach(), optimizer.state_dict()], file)
                file.seek(0)
                weights, state = torch.load(file, weights_only=True)
                W = nn.Parameter(weights)
                optimizer = LowRankAdamW([dict(group, params=[W])], **options)
                optimizer.load_state_dict(state)
                torch.manual_seed(step)  # of no concern
            W.grad = draw()
            optimizer.step()
        return W.detach()

    whole = run()
    assert torch.equal(run(stop=3), whole)
    if len(shape) < 2:  # products of other shapes round otherwise
        assert torch.equal(run(piece=7), whole)
    else:
        torch.testing.assert_close(run(piece=40), whole, rtol=2.0**-7, atol=1e-4)


@pytest.mark.parametrize("rank", [None, 8])
def test_a_second_moment_in_bfloat16_decays_as_one_in_float32(rank):
    """Rounded to nearest it stays where the first, larger gradients have put it, and steps stay too small."""

    def roots(state_dtype):
        torch.manual_seed(0)
        W = nn.Parameter(torch.zeros(32, 32))
        optimizer = LowRankAdamW([{"params": [W], "rank": rank}], state_dtype=state_dtype, refresh_every=10**6)
        for step in range(800):
            W.grad = torch.randn(32, 32) * (1.0 if step < 200 else 0.2)
            optimizer.step()
        return optimizer.state[W]["exp_avg_sq"].double().sqrt()

    exact, narrow = roots("float32"), roots("bfloat16")
    ratios = narrow / exact
    # a random walk of 800 independent roundings, each of less than 2⁻⁸, that the mean over entries averages
    assert abs(float(ratios.mean()) - 1) < 0.005
    assert float(ratios.std()) < 0.08


@pytest.mark.parametrize("shape", [(40,), (6, 8)])
def test_moments_in_bfloat16_round_by_place_whatever_the_pieces(shape, monkeypatch):
    def run(piece):
        monkeypatch.setattr("htsr.training.lowrank.update.PIECE", piece)
        monkeypatch.setattr("htsr.training.lowrank.update.BLOCK", 1)
        torch.manual_seed(0)
        W = nn.Parameter(torch.randn(shape))
        optimizer = LowRankAdamW([W], state_dtype="bfloat16", seed=2)
        for _ in range(5):
            W.grad = torch.randn(shape)
            optimizer.step()
        return optimizer.state[W]["exp_avg_sq"]

    assert torch.equal(run(9), run(2**22))
