"""Training with frozen blocks in host memory is training with them on the device, bit for bit."""

import copy
import io

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

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
    ids=lambda how: " ".join(f"{key}={getattr(value, '__name__', value)}" for key, value in how.items()),
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


class Mixer(torch.nn.Module):
    """Autograd keeps views of its weight, and of its neighbours' weight of which it has the half."""

    def __init__(self, common):
        super().__init__()
        self.common, self.weight = common, torch.nn.Parameter(torch.randn(8, 8).T / 3)  # not contiguous
        self.narrow = torch.nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x):
        x = x + torch.tanh(x @ self.weight.t()[:, :8]) * self.narrow.float().exp().sum() * self.common
        return x + (x * self.weight[0]) @ self.weight[2:4].t() @ self.weight[4:6] + self.shift


class Block(torch.nn.Module):
    """A block with a weight of its own, parts of which are computed again in backward if wanted."""

    def __init__(self, common, again):
        super().__init__()
        self.mixer, self.gain, self.again = Mixer(common), torch.nn.Parameter(torch.ones(8)), again

    def forward(self, x):
        def inside(x):
            return self.gain * self.mixer(x)

        return checkpoint(inside, x, use_reentrant=False) if self.again == "inside" else inside(x)


class Oddities(torch.nn.Module):
    def __init__(self, again):
        super().__init__()
        torch.manual_seed(0)
        common = torch.nn.Parameter(torch.tensor(0.1))
        self.layers = torch.nn.ModuleList(Block(common, again) for _ in range(5))
        self.head = torch.nn.Linear(8, 1)

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if layer.again == "whole" else layer(x)
        return self.head(x)


@pytest.mark.parametrize("again", ["never", "inside", "whole"])
def test_backward_reads_the_weights_of_its_block_and_not_what_is_in_the_buffer_by_then(again):
    gradients = []
    for streams in (False, True):
        net = Oddities(again)
        sampler = htsr.LayerSampler(net, [1, 0, 0, 0, 0], active=1)
        streaming = htsr.stream_frozen(net, sampler) if streams else None
        sampler.attach(torch.optim.SGD(net.parameters(), lr=1e-2))
        net(torch.ones(2, 8)).square().sum().backward()
        gradients.append([p.grad for p in net.parameters() if p.requires_grad])
        if streaming is not None:
            assert streaming.streamed == (1, 2, 3, 4)
            assert net.layers[1].mixer.weight.stride() == net.layers[0].mixer.weight.stride() == (1, 8)
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_resumed_run_is_the_uninterrupted_one():
    net, sampler, optimizer, _ = make(True, frozen_state="offload")
    whole = train(net, optimizer, batches(9))
    first, _, its, _ = make(True, frozen_state="offload")
    losses = train(first, its, batches(9)[:5])
    kept = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": its.state_dict()}, kept)
    for streams in (True, False):  # a checkpoint is the same wherever weights lived
        kept.seek(0)
        state = torch.load(kept, weights_only=True)
        second, resumed, its, _ = make(streams, frozen_state="offload", seed=2)
        train(second, its, batches(1))
        second.load_state_dict(state["model"])
        its.load_state_dict(state["optimizer"])
        assert losses + train(second, its, batches(9)[5:]) == whole
        assert_same(weights(second), weights(net))
        assert resumed.coverage() == sampler.coverage()


def test_whoever_reads_the_model_finds_it_whole(tmp_path):
    resident, _, its, _ = make(False)
    net, sampler, optimizer, streaming = make(True)
    for model, mine in ((resident, its), (net, optimizer)):
        train(model, mine, batches(3))
    prompt = batches(1)[0][:, :3]
    generated = [m.eval().generate(prompt, max_new_tokens=6, do_sample=False) for m in (resident, net)]
    assert torch.equal(*generated)
    with torch.inference_mode():
        assert torch.equal(resident(prompt).logits, net(prompt).logits)
    net.save_pretrained(tmp_path)
    assert_same(weights(type(net).from_pretrained(tmp_path)), weights(resident))
    assert [row.entropy for row in htsr.analyze(net)] == [row.entropy for row in htsr.analyze(resident)]
    train(resident, its, batches(5)[3:])
    assert_same(weights(resident), (train(net, optimizer, batches(5)[3:]), weights(net))[1])
    streaming.stop()
    sampler.detach()
    assert torch.equal(resident.eval()(prompt).logits, net.eval()(prompt).logits)
    assert streaming.streamed == ()


def test_weights_that_others_set_count_from_the_next_pass_on():
    net, _, _, streaming = make(True, active=1)
    frozen = net.model.layers[streaming.streamed[0]].mlp.up_proj.weight
    tokens = batches(1)[0]
    before = net(tokens).logits
    for change in (
        lambda: frozen.data.mul_(2),
        lambda: setattr(frozen, "data", frozen.data * 2),
        lambda: net.model.layers[streaming.streamed[1]].mlp.float(),
    ):
        change()
        twin = type(net)(net.config)
        twin.load_state_dict(net.state_dict())
        now = net(tokens).logits
        assert torch.equal(now, twin(tokens).logits)
    assert not torch.equal(now, before)


def test_what_cannot_be_streamed_is_refused_in_one_sentence():
    net = llama(3)
    sampler = htsr.LayerSampler(net, active=1)
    for wrong, sentence in (
        (torch.nn.DataParallel(net), "one that is wrapped"),
        (llama(3).to("meta"), "on the meta device"),
        (llama(3), "of another model"),
    ):
        with pytest.raises(htsr.UsageError, match=sentence):
            htsr.stream_frozen(wrong, sampler)
    compiled = llama(3)
    compiled.model.layers[1].compile()
    for one in (compiled, torch.compile(llama(3))):
        with pytest.raises(htsr.UsageError, match="compiled, or spread"):
            htsr.stream_frozen(one, sampler)
    streaming = htsr.stream_frozen(net, sampler)
    with pytest.raises(htsr.UsageError, match="is streamed already"):
        htsr.stream_frozen(net, htsr.LayerSampler(net, active=1))
    with pytest.raises(htsr.UsageError, match="attach the sampler before training"):
        net(input_ids=batches(1)[0])
    net.to("cpu")
    layer = net.model.layers[streaming.streamed[0]]
    layer.mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(96, 32))
    with torch.no_grad(), pytest.raises(htsr.HtsrError, match=r"weight of model.layers.\d has been replaced"):
        net(input_ids=batches(1)[0])
    with pytest.raises(htsr.UsageError, match="stop that before the model is moved elsewhere or cast"):
        net.double()


def test_an_error_in_a_block_leaves_everything_at_home():
    net, _, optimizer, streaming = make(True, active=1)
    resident, _, its, _ = make(False, active=1)
    layer = net.model.layers[streaming.streamed[0]]

    def fail(*_):
        raise RuntimeError("stop here")

    handle = layer.mlp.register_forward_pre_hook(fail)
    homes = {id(p): p.data_ptr() for p in layer.parameters()}
    with pytest.raises(RuntimeError, match="stop here"):
        net(input_ids=batches(1)[0])
    assert {id(p): p.data_ptr() for p in layer.parameters()} == homes
    handle.remove()
    assert train(net, optimizer, batches(3)) == train(resident, its, batches(3))


def test_the_next_block_is_on_its_way_while_one_computes(monkeypatch):
    net, sampler, _, streaming = make(True, active=1, blocks=6, gradients="update", checkpointing=True)
    sent = []
    for block in streaming._blocks:
        monkeypatch.setattr(
            block.home, "send", lambda memory, h=block.home, s=block.home.send: (sent.append(h), s(memory))
        )
    homes = {block.home: index for index, block in enumerate(streaming._blocks)}
    for _ in range(2):  # the order is learned in the first pass
        sent.clear()
        loss_of(net.train(), batches(1)[0]).backward()
        for parameter in net.parameters():
            parameter.grad = None
    lowest = sampler.active[0]
    forward = [i for i in range(6) if i != lowest]
    assert [homes[home] for home in sent] == forward + [i for i in reversed(forward) if lowest < i < forward[-2]]


def test_weights_on_disk_train_alike_and_leave_the_file_as_it_is(tmp_path, caplog):
    llama(5).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content, outcomes = file.read_bytes(), []
    for where in (None, "disk"):
        net = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        net.gradient_checkpointing_enable({"use_reentrant": False})
        sampler = htsr.LayerSampler(net, active=2, interval=2, seed=1)
        if where:
            homes = [p.data_ptr() for p in net.model.layers.parameters()]
            streaming = htsr.stream_frozen(net, sampler, where=where)
            assert [p.data_ptr() for i in streaming.streamed for p in net.model.layers[i].parameters()] == [
                home for i in streaming.streamed for home in homes[9 * i : 9 * i + 9]
            ]
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        sampler.attach(optimizer)
        outcomes.append((train(net, optimizer, batches(7)), weights(net)))
    assert outcomes[0][0] == outcomes[1][0]
    assert_same(outcomes[0][1], outcomes[1][1])
    assert file.read_bytes() == content
    assert "are in host memory" not in caplog.text
    htsr.stream_frozen(net := llama(3), htsr.LayerSampler(net, active=1), where="disk")
    assert "are in host memory" in caplog.text
    with pytest.raises(htsr.UsageError, match="one of host, disk, not in 'tape'"):
        htsr.stream_frozen(net, htsr.LayerSampler(net, active=1), where="tape")


def test_an_interrupt_leaves_everything_at_home_and_other_models_as_they_are():
    first, _, its, _ = make(True, active=1)
    fresh = train(first, its, batches(3))
    net, _, optimizer, streaming = make(True, active=1)
    before, homes = weights(net), [p.data_ptr() for p in net.model.layers.parameters()]

    def interrupt(*_):
        raise KeyboardInterrupt

    top = torch._C._autograd._top_saved_tensors_default_hooks
    for index in streaming.streamed:
        part = net.model.layers[index].mlp
        handle = (part if index % 2 else part.act_fn).register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, id):
            net(input_ids=batches(1)[0])
        handle.remove()
        assert [p.data_ptr() for p in net.model.layers.parameters()] == homes
        assert top(True) is None
        with torch.no_grad():
            net(input_ids=batches(1)[0])
        assert_same(weights(net), before)
    # an interrupt in the streaming itself is undone by the next pass
    streaming._enter(streaming.streamed[-1])
    other, _, its, _ = make(True, active=1)
    assert train(other, its, batches(3)) == fresh
    assert top(True) is not None
    assert train(net, optimizer, batches(3)) == fresh
    assert top(True) is None


def test_weights_that_others_set_count_in_a_part_of_the_model_too():
    net, _, _, _ = make(True, active=1)
    tokens = batches(1)[0]
    net(tokens)
    with torch.no_grad():
        for parameter in net.model.layers.parameters():
            parameter.mul_(1.5)
    twin = type(net)(net.config)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(net.model(tokens).last_hidden_state, twin.model(tokens).last_hidden_state)


def test_a_copy_is_as_any_other_model():
    net, *_ = make(True, active=1)
    tokens, kept = batches(1)[0], io.BytesIO()
    torch.save(net, kept)
    kept.seek(0)
    for copied in (copy.deepcopy(net), torch.load(kept, weights_only=False)):
        assert_same(weights(copied.double()), {name: value.double() for name, value in weights(net).items()})
        twin = type(net)(net.config).double()
        twin.load_state_dict(copied.state_dict())
        assert torch.equal(copied(tokens).logits, twin(tokens).logits)
        again = htsr.LayerSampler(copied.requires_grad_(True), active=1)
        htsr.stream_frozen(copied, again).stop()
        copied.float()
    with pytest.raises(htsr.UsageError, match="stop that before"):
        net.double()
    net = Oddities("never")  # blocks of two dtypes
    htsr.stream_frozen(net, htsr.LayerSampler(net, active=1))
    torch.save(net, io.BytesIO())
