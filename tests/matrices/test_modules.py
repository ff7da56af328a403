"""Live modules: what is analyzed is the weight that the module computes with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import htsr
from htsr.matrices.modules import unwrapped

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]}


def llama(**changes) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **changes
    )
    return transformers.LlamaForCausalLM(config).eval()


def values(source, **kwargs) -> dict[str, np.ndarray]:
    return {matrix.name: np.array(matrix.read()) for matrix in htsr.describe(source, **kwargs)}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", ["ddp", "compile", "data parallel", "compiled ddp"])
def test_wrappers_change_no_name_and_no_value(wrap, process_group):
    model = llama()
    wrapped = nn.parallel.DistributedDataParallel(model) if "ddp" in wrap else model
    wrapped = torch.compile(wrapped, backend="eager") if "compile" in wrap else wrapped
    wrapped = nn.DataParallel(wrapped) if wrap == "data parallel" else wrapped
    assert unwrapped(wrapped) is model
    assert_same(values(wrapped), values(model))
    assert htsr.describe(wrapped).label == "LlamaForCausalLM"


@pytest.mark.parametrize("inner", ["compile", "checkpoint"])
def test_wrapped_blocks_change_no_name(inner):
    model = llama()
    expected = values(model)
    for i, block in enumerate(model.model.layers):
        if inner == "compile":
            model.model.layers[i] = torch.compile(block, backend="eager")
        else:
            from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

            model.model.layers[i] = checkpoint_wrapper(block)
    assert_same(values(model), expected)


def test_tied_weights_count_once():
    tied, free = llama(tie_word_embeddings=True), llama(tie_word_embeddings=False)
    assert set(values(free)) - set(values(tied)) == {"lm_head"}
    assert set(values(dict(tied.state_dict()))) == set(values(tied))
    shared = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    shared["c"] = shared["a"]
    shared["b"].weight = shared["a"].weight
    assert list(values(shared)) == ["a"]


def test_views_of_one_storage_that_differ_are_both_there():
    whole = torch.arange(32.0).reshape(4, 8)
    assert list(values({"a.weight": whole[:2], "b.weight": whole[2:], "c.weight": whole.T})) == [
        "a", "b", "c",
    ]  # fmt: skip


@pytest.mark.parametrize("layer", ["linear", "embedding", "convolution", "conv1d of gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_is_added_as_peft_merges_it(layer, dora):
    peft = pytest.importorskip("peft")
    model, targets = {
        "linear": (llama(), ["q_proj", "down_proj"]),
        "embedding": (llama(), ["embed_tokens"]),
        "convolution": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1)), ["0", "2"]),
        "conv1d of gpt2": (
            transformers.GPT2Model(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)),
            ["c_attn", "mlp.c_proj"],
        ),
    }[layer]
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, use_dora=dora, init_lora_weights=False,
        fan_in_fan_out=layer == "conv1d of gpt2",
    )  # fmt: skip
    before = values(model)
    adapted = peft.get_peft_model(model, config)
    if dora:  # untrained magnitudes are the norms of W, so that W + 0 would pass
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.data *= torch.rand_like(parameter) + 0.5
    seen = values(adapted)
    merged = values(adapted.merge_and_unload())
    assert_same(seen, merged, 1e-5)
    changed = {name.partition("[")[0] for name in seen if np.abs(seen[name] - before[name]).max() > 1e-3}
    assert all(any(name.endswith(target) for target in targets) for name in changed)
    assert len(changed) >= len(targets)


def test_active_adapters_only():
    peft = pytest.importorskip("peft")
    model = llama()
    base = values(model)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA, init_lora_weights=False))
    adapted.add_adapter("second", peft.LoraConfig(**LORA, init_lora_weights=False))
    first = values(adapted)
    adapted.set_adapter("second")
    second = values(adapted)
    q = "model.layers.0.self_attn.q_proj"
    assert np.abs(first[q] - second[q]).max() > 1e-3
    with adapted.disable_adapter():
        assert_same(values(adapted), base)
    assert_same(values(adapted), second)
    adapted.merge_adapter()
    assert_same(values(adapted), second, 1e-6)  # merged is not added twice
    adapted.unmerge_adapter()
    adapted.base_model.set_adapter(["default", "second"])
    both = values(adapted)
    np.testing.assert_allclose(both[q], first[q] + second[q] - base[q], atol=1e-6)


def test_modules_to_save_stand_for_the_original():
    peft = pytest.importorskip("peft")
    model = llama()
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA, modules_to_save=["lm_head"]))
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.fill_(2.0)
    seen = values(adapted)
    assert (seen["lm_head"] == 2).all()
    assert sum("lm_head" in name for name in seen) == 1
    with adapted.disable_adapter():
        assert not (values(adapted)["lm_head"] == 2).any()


def test_adapted_parameters():
    """PEFT can adapt a bare parameter, such as a stack of experts."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralModel(config)
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    seen = values(adapted)
    assert_same(seen, values(adapted.merge_and_unload()), 1e-6)


def test_weight_norm_and_spectral_norm_are_computed():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)),
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
    ).eval()
    with torch.no_grad():
        model[0].parametrizations.weight.original0 *= 3
    seen = values(model)
    assert list(seen) == ["0", "1", "2"]
    for name, weights in seen.items():
        np.testing.assert_array_equal(weights, model[int(name)].weight.detach().numpy())
    np.testing.assert_allclose(seen["2"] @ seen["2"].T, np.eye(4), atol=1e-6)


def test_a_meta_model_has_rows_that_say_so():
    with torch.device("meta"):
        model = llama()
    rows = htsr.analyze(model, device="cpu").rows
    assert [row.name for row in rows] == list(values(llama()))
    assert {row.status for row in rows} == {"meta"}
    assert rows[1].warning == "model.layers.0.self_attn.q_proj.weight is on the meta device and has no values"


def test_a_half_loaded_model_is_analyzed_as_far_as_it_goes():
    model = llama()
    model.model.layers[1].to("meta")
    status = {row.name: row.status for row in htsr.analyze(model, device="cpu", where=htsr.Filter(roles=("attn.q",)))}
    assert status == {"model.layers.0.self_attn.q_proj": "ok", "model.layers.1.self_attn.q_proj": "meta"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_low_precision_is_read_as_it_is(dtype):
    layer = nn.Linear(24, 32, bias=False)
    expected = layer.weight.detach().to(dtype)
    layer.weight = nn.Parameter(expected, requires_grad=False)
    model = nn.ModuleDict({"layer": layer})
    assert htsr.describe(model).matrices[0].dtype == str(dtype).removeprefix("torch.")
    row = htsr.analyze(model, device="cpu")[0]
    assert row.status == "ok"
    assert row.spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(expected.double(), 2)) ** 2, rel=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_layers(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    W = torch.randn(64, 128) * 0.05
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(W.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(W.clone(), requires_grad=False, quant_type="nf4")
    try:
        layer = layer.to("cpu")
        layer(torch.randn(2, 128))
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"bitsandbytes cannot quantize on this CPU: {error}")
    model = nn.ModuleDict({"up_proj": layer})
    (matrix,) = htsr.describe(model)
    assert (matrix.name, matrix.shape, matrix.role) == ("up_proj", (64, 128), "mlp.up")
    error = np.abs(np.asarray(matrix.read().float()) - W.numpy()).max()
    assert 0 < error < (0.002 if bits == 8 else 0.05)
    assert htsr.analyze(model, device="cpu")[0].status == "ok"


def test_what_is_no_model():
    with pytest.raises(htsr.SourceError, match="a module, a state dict, a path or a hub id, not a int"):
        htsr.describe(3)
    with pytest.raises(htsr.SourceError, match="Sequential has no weight matrices"):
        htsr.describe(nn.Sequential(nn.LayerNorm(4)))


def test_sharded_parameters_are_gathered_one_by_one(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    plain = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    expected = [replace(row, seconds=0.0) for row in htsr.analyze(plain, device="cpu")]
    model = distribute_module(plain, init_device_mesh("cpu", (1,)))
    assert [replace(row, seconds=0.0) for row in htsr.analyze(model, device="cpu")] == expected
    assert len(htsr.analyze(model, device="cpu", where=htsr.Filter(include=("1",)))) == 1


def test_a_difference_to_sharded_parameters_has_rows_that_say_so(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    model = distribute_module(nn.Sequential(nn.Linear(8, 8)), init_device_mesh("cpu", (1,)))
    (row,) = htsr.analyze(model, device="cpu", against=nn.Sequential(nn.Linear(8, 8)))
    assert (row.status, row.rows, row.columns) == ("sharded", 8, 8)
    assert row.warning == "0.weight is sharded over processes; analyze the gathered model or its checkpoint"


class Rounded(torch.Tensor):
    """A stand-in for the tensor classes of quantisation libraries: integers in units of 1/4."""

    @staticmethod
    def __new__(cls, steps: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, steps.shape, dtype=torch.float32)

    def __init__(self, steps: torch.Tensor) -> None:
        self.steps = steps

    def dequantize(self) -> torch.Tensor:
        return self.steps.float() / 4

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].steps)
        raise NotImplementedError(function)


def test_tensors_that_can_dequantize_themselves():
    layer = nn.Linear(6, 4, bias=False)
    steps = torch.arange(24).reshape(4, 6).to(torch.int8)
    layer.weight = nn.Parameter(Rounded(steps), requires_grad=False)
    (matrix,) = htsr.describe(nn.ModuleDict({"up_proj": layer})).matrices
    assert (matrix.shape, matrix.dtype, matrix.warning) == ((4, 6), "Rounded", "de-quantised")
    assert torch.equal(torch.as_tensor(matrix.read()), steps / 4)


def test_a_lora_variant_that_is_not_known_is_not_guessed():
    peft = pytest.importorskip("peft")
    if "alora_invocation_tokens" not in peft.LoraConfig.__dataclass_fields__:
        pytest.skip("this PEFT has no aLoRA")
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(**LORA, alora_invocation_tokens=[1], task_type="CAUSAL_LM"))
    rows = {row.name: row for row in htsr.analyze(adapted, device="cpu", where=htsr.Filter(roles=("attn.*",)))}
    assert rows["model.layers.0.self_attn.q_proj"].status == "unmerged"
    warning = rows["model.layers.0.self_attn.q_proj"].warning
    assert warning.endswith("q_proj.weight has an adapter of PEFT's lora: aLoRA does not support merging.")
    assert rows["model.layers.0.self_attn.k_proj"].status == "ok"
