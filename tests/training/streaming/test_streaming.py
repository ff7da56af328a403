"""Training with frozen blocks in host memory is training with them on the device, bit for bit."""

import pytest
import torch

import htsr
from tests.training.runs import batches, loss_of
from tests.transformer import gpt2, llama


def make(streams, *, model=llama, checkpointing=False, gradients="keep", method="owlore", blocks=5, more=None, **of):
    """A model, its sampler, its optimizer and its streaming (or None)."""
    net = model(blocks, **(more or {}))
    net.config.use_cache = False
    if checkpointing:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    sampler = htsr.LayerSampler(net, **({"active": 2, "interval": 2, "seed": 1} | of))
    streaming = htsr.stream_frozen(net, sampler) if streams else None
    if method == "owlore":
        groups = htsr.low_rank_groups(net, rank=4)
        optimizer = htsr.LowRankAdamW(groups, lr=1e-2, refresh_every=3, gradients=gradients)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    sampler.attach(optimizer)
    return net, sampler, optimizer, streaming


def train(net, optimizer, data):
    losses = []
    for tokens in data:
        loss = loss_of(net.train(), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"checkpointing": True},
        {"method": "lisa"},
        {"method": "lisa", "embedding": "train", "checkpointing": True},
        {"gradients": "project", "checkpointing": True, "frozen_state": "offload"},
        {"gradients": "update", "frozen_state": "keep"},
        {"gradients": "update", "frozen_state": "offload", "checkpointing": True},
        {"method": "lisa", "embedding": "sampled", "more": {"tie_word_embeddings": True}, "frozen_state": "keep"},
        {"model": gpt2, "checkpointing": True},
        {"model": gpt2, "method": "lisa"},
    ],
    ids=str,
)
def test_streamed_is_resident_over_several_draws(how):
    found = []
    for streams in (False, True):
        net, sampler, optimizer, streaming = make(streams, **how)
        losses = train(net, optimizer, batches(9))
        found.append((losses, weights(net), sampler.coverage()))
        if streams:
            assert set(streaming.streamed) == set(range(5)) - set(sampler.active)
    assert found[0][0] == found[1][0]
    assert found[0][2] == found[1][2]
    assert_same(found[0][1], found[1][1])


class Odd(torch.nn.Module):
    """A block of which autograd keeps views of weights, and that has a weight of its neighbour and a buffer."""

    def __init__(self, common):
        super().__init__()
        self.common, self.weight = common, torch.nn.Parameter(torch.randn(8, 8).T / 3)  # not contiguous
        self.narrow = torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x):
        x = x + torch.tanh(x @ self.weight.t()[:, :8]) * self.narrow.float().exp().sum() * self.common
        return x + (x * self.weight[0]) @ self.weight[2:4].t() @ self.weight[4:6] + self.shift


class Oddities(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        common = torch.nn.Parameter(torch.tensor(0.1))
        self.layers = torch.nn.ModuleList(Odd(common) for _ in range(5))
        self.head = torch.nn.Linear(8, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_backward_reads_the_weights_of_its_block_and_not_what_is_in_the_buffer_by_then():
    gradients = []
    for streams in (False, True):
        net = Oddities()
        sampler = htsr.LayerSampler(net, [1, 0, 0, 0, 0], active=1)
        streaming = htsr.stream_frozen(net, sampler) if streams else None
        sampler.attach(torch.optim.SGD(net.parameters(), lr=1e-2))
        net(torch.ones(2, 8)).square().sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.requires_grad])
        if streaming is not None:
            assert streaming.streamed == (1, 2, 3, 4)
            assert net.layers[1].weight.stride() == net.layers[0].weight.stride() == (1, 8)
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
