"""Frozen blocks that stream from host memory to the device, against the CPU that has them all."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import htsr


def _model(blocks=5, width=32, inner=96, vocabulary=64):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        vocab_size=vocabulary,
        attn_implementation="eager",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def test_the_peak_is_the_predicted_one(device, memory):
    model = _model(blocks=6, width=128, inner=352, vocabulary=500)
    options = {"active_blocks": 1, "rank": 8, "sequence": 64, "checkpointing": True, "gradients": "project"}
    plan = htsr.predict_memory(model, "owlore", frozen_weights="host", **options)
    sampler = htsr.LayerSampler(model, [1, 0, 0, 0, 0, 0], active=1)
    with memory() as used:
        htsr.stream_frozen(model, sampler, device=device)
        _train(model, sampler, "project", 2, True, rank=8, shape=(1, 64))
    assert used.peak == pytest.approx(plan.total, rel=0.1)


def _train(model, sampler, gradients, steps, checkpointing, rank=4, shape=(2, 9)):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    groups = htsr.low_rank_groups(model, rank=rank)
    optimizer = htsr.LowRankAdamW(groups, lr=1e-2, refresh_every=3, method="svd", gradients=gradients)
    sampler.attach(optimizer)
    device, losses = model.lm_head.weight.device, []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(0, 64, shape, generator=generator).to(device)
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [loss.item() for loss in losses]


@pytest.mark.parametrize(
    ("gradients", "checkpointing"), [("keep", False), ("project", True), ("update", False), ("update", True)]
)
def test_streamed_to_the_device_is_resident_on_the_cpu(device, gradients, checkpointing):
    losses, weights = [], []
    for streams in (False, True):
        model = _model()
        sampler = htsr.LayerSampler(model, active=2, interval=2, seed=1, frozen_state="offload")
        if streams:
            streaming = htsr.stream_frozen(model, sampler, where="disk" if gradients == "update" else "host")
            assert streaming.device == device
        losses.append(_train(model, sampler, gradients, 5, checkpointing))
        weights.append({name: value.cpu() for name, value in model.state_dict().items()})
        if streams:
            for index, block in enumerate(sampler.blocks.modules):
                where = device.type if index in sampler.active else "cpu"
                assert {p.device.type for p in block.parameters()} == {where}
            streaming.stop()
            assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
            model.to(device)
            streaming.stop()  # it has ended
            assert {tensor.device.type for tensor in model.parameters()} == {device.type}
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_the_device_holds_what_trains_and_two_blocks_and_waits_for_no_copy(device, memory, synchronisations):
    tokens = torch.zeros(1, 4, dtype=torch.long, device=device)

    def waits(model):
        with synchronisations() as counted:
            model(input_ids=tokens).logits.square().mean().backward()
        return counted.count

    resident = waits(_model().to(device))  # transformers asks for its masks
    model = _model()
    block = sum(-(-p.numel() * 4 // 512) * 512 for p in model.model.layers[0].parameters())
    rest = sum(p.numel() * 4 for name, p in model.named_parameters() if ".layers." not in name)
    with memory() as used:
        sampler = htsr.LayerSampler(model, "increase", active=1, interval=2, seed=1)
        streaming = htsr.stream_frozen(model, sampler, device=device)
        slack = 8192  # rotary frequencies, and what an allocator rounds up
        assert abs(used.now - 3 * block - rest) < slack
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        sampler.attach(optimizer)
        seen = set()
        for _ in range(6):
            assert waits(model) == resident
            optimizer.step()
            optimizer.zero_grad()
            seen.add(streaming.streamed)
        assert len(seen) > 1
        assert abs(used.now - 3 * block - rest) < slack
        assert used.peak < 4 * block + rest + slack  # gradients and activations come to less than a block
        streaming.stop()
        assert used.now < slack
