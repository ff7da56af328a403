"""The device itself behaves like an accelerator, as far as the other tests rely on it."""

import copy
import io

import pytest
import torch


def test_a_host_tensor_beside_one_of_the_device_is_refused_unless_it_is_a_number(device):
    here = torch.arange(6.0).reshape(2, 3).to(device)
    with pytest.raises(RuntimeError, match="same device"):
        here + torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.functional.linear(here, torch.ones(2, 3))
    assert (here + torch.tensor(1.0)).device.type == device.type


def test_numbers_are_those_of_the_cpu(device):
    weights = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    there = weights.to(device)
    torch.testing.assert_close((there @ there.T).cpu(), weights @ weights.T)
    torch.testing.assert_close(torch.linalg.svdvals(there).cpu(), torch.linalg.svdvals(weights))
    assert there.sum(dtype=torch.float64).dtype == torch.float64


def test_views_and_data_share_memory(device):
    whole = torch.zeros(4, 6, device=device)
    whole.view(6, 4)[1].fill_(1)
    whole.T[0, 0] = 2
    assert whole.sum().item() == 6
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.data = whole[:2, :2]
    assert parameter.device == whole.device
    assert isinstance(parameter, torch.nn.Parameter)
    whole.zero_()
    assert parameter.sum().item() == 0


def test_a_module_keeps_its_parameters_when_it_moves(device):
    module = torch.nn.Linear(3, 2)
    before, hooked = list(module.parameters()), []
    module.weight.register_post_accumulate_grad_hook(hooked.append)
    module.to(device)
    module(torch.ones(1, 3, device=device)).sum().backward()
    assert len(hooked) == 1
    assert hooked[0] is module.weight
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    assert all(parameter.device == device for parameter in before)
    assert copy.deepcopy(module).weight.device == device
    module.to("cpu")
    assert all(parameter.device.type == "cpu" for parameter in before)


def test_what_waits_is_counted(device, synchronisations):
    here = torch.randn(8, 8, device=device)
    with synchronisations() as counted:
        (here @ here).sum().mul_(2).to(torch.bfloat16)
        here[1] = 0
        torch.where(here > 0, here, 0)
        here.to("cpu", non_blocking=True)
    assert not counted.names, counted.names
    with synchronisations() as counted:
        here.sum().item()
        here.cpu()
        here.nonzero()
        here[here > 0]
        bool(here.isfinite().all())
        torch.zeros(3).to(device)
        torch.accelerator.synchronize()
    assert counted.count in (7, None), counted.names


def test_memory_is_counted(device, memory):
    with memory() as used:
        first = torch.empty(2**20, device=device)
        view = first.view(2**10, -1)
        del first
        second = view + 1
        assert used.now == 2**23
        del view, second
    assert used.now == 0
    assert used.peak == 2**23


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
def test_an_optimizer_steps_without_waiting(device, synchronisations, options):
    torch.manual_seed(0)
    here = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    there, batch = copy.deepcopy(here).to(device), torch.randn(5, 8)
    optimizers = {model: torch.optim.AdamW(model.parameters(), **options) for model in (here, there)}
    for _ in range(3):
        for model, optimizer in optimizers.items():
            optimizer.zero_grad()
            model(batch.to(next(model.parameters()).device)).square().mean().backward()
            with synchronisations() as counted:
                optimizer.step()
            assert not counted.names, counted.names
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu())


def test_files_come_back_where_they_were(device):
    file = io.BytesIO()
    torch.save({"weight": torch.arange(4.0, device=device)}, file)
    for place in (None, "cpu", device):
        file.seek(0)
        loaded = torch.load(file, map_location=place)["weight"]
        assert loaded.device.type == ("cpu" if place == "cpu" else device.type)
        assert loaded.cpu().tolist() == [0, 1, 2, 3]


def test_streams_events_and_pinned_memory(device):
    stream, here = torch.Stream(device), torch.zeros(3, device=device)
    source = torch.ones(3).pin_memory()
    assert source.is_pinned()
    assert torch.empty(3, pin_memory=True).is_pinned()
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        here.copy_(source, non_blocking=True)
        event = stream.record_event()
    torch.accelerator.current_stream().wait_event(event)
    here.record_stream(stream)
    event.synchronize()
    assert here.sum().item() == 3


def test_autocast_multiplies_in_lower_precision(device):
    here = torch.randn(3, 3, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        product = here @ here.T
    assert product.dtype == torch.bfloat16
    product.float().sum().backward()
    assert here.grad.dtype == torch.float32


def test_the_process_has_the_accelerator_within_a_test_only(device):
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator().type == device.type


def test_a_context_of_the_device_is_where_tensors_are_made(device):
    with device:
        made = [torch.empty(2), torch.zeros(2), torch.nn.Linear(2, 2).weight, torch.nn.Embedding(3, 2).weight]
    assert {tensor.device.type for tensor in made} == {device.type}
    assert torch.empty(2).device.type == "cpu"
