"""Adapters of every kind that PEFT has, live and from the folder that it saves, against PEFT's own merge."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import htsr
from htsr.arrays import as_numpy
from tests.matrices.test_adapters import Convolutions, gpt2

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = {"target_modules": ["q_proj", "down_proj"]}
SQUARE = {"target_modules": ["q_proj", "v_proj"]}


def llama(**changes) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **changes
    )
    return transformers.LlamaForCausalLM(config).eval()


# kind: (name of the configuration's class, its arguments). PEFT merges all of these.
MERGED = {
    "lora": ("LoraConfig", {"r": 3, **LINEAR}),
    "lora, rank-stabilised": ("LoraConfig", {"r": 3, "use_rslora": True, **LINEAR}),
    "lora, gaussian": ("LoraConfig", {"r": 3, "init_lora_weights": "gaussian", **LINEAR}),
    "lora, orthogonal": ("LoraConfig", {"r": 4, "init_lora_weights": "orthogonal", **LINEAR}),
    "lora, pissa": ("LoraConfig", {"r": 3, "init_lora_weights": "pissa", **LINEAR}),
    "lora, olora": ("LoraConfig", {"r": 3, "init_lora_weights": "olora", **LINEAR}),
    "lora, mica": ("LoraConfig", {"r": 3, "init_lora_weights": "mica", **LINEAR}),
    "lora, bias": ("LoraConfig", {"r": 3, "bias": "lora_only", "lora_bias": False, **LINEAR}),
    "lora, tokens": ("LoraConfig", {"r": 3, "trainable_token_indices": {"embed_tokens": [1, 5]}, **LINEAR}),
    "lora, embedding": ("LoraConfig", {"r": 3, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora, modules to save": ("LoraConfig", {"r": 3, "modules_to_save": ["lm_head"], **LINEAR}),
    "dora": ("LoraConfig", {"r": 3, "use_dora": True, **LINEAR}),
    "adalora": ("AdaLoraConfig", {"init_r": 3, "total_step": 10, **LINEAR}),
    "adamss": ("AdamssConfig", {"r": 8, "num_subspaces": 2, **LINEAR}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, **LINEAR}),
    "c3a": ("C3AConfig", {"block_size": 4, **LINEAR}),
    "deft": ("DeftConfig", {"r": 3, **LINEAR}),
    "delora": ("DeloraConfig", {"r": 3, **LINEAR}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, **LINEAR}),
    "frod": ("FrodConfig", {**LINEAR}),
    "glora": ("GloraConfig", {"r": 3, **LINEAR}),
    "gralora": ("GraloraConfig", {"r": 4, **LINEAR}),
    "hira": ("HiraConfig", {"r": 3, **LINEAR}),
    "hra": ("HRAConfig", {"r": 4, **LINEAR}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"], **LINEAR}),
    "ln tuning": ("LNTuningConfig", {"target_modules": ["q_proj", "input_layernorm"]}),
    "loha": ("LoHaConfig", {"r": 3, **LINEAR}),
    "lokr": ("LoKrConfig", {"r": 3, **LINEAR}),
    "miss": ("MissConfig", {"r": 4, **LINEAR}),
    "miss, bat": ("MissConfig", {"r": 4, "init_weights": "bat", **LINEAR}),
    "oft": ("OFTConfig", {"oft_block_size": 4, **LINEAR}),
    "osf": ("OSFConfig", {**LINEAR}),
    "peanut": ("PeanutConfig", {"r": 3, **LINEAR}),
    "psoft": ("PsoftConfig", {"r": 4, **LINEAR}),
    "pvera": ("PveraConfig", {"r": 4, **SQUARE}),
    "randlora": ("RandLoraConfig", {"r": 4, **LINEAR}),
    "road": ("RoadConfig", {"group_size": 4, **LINEAR}),
    "shira": ("ShiraConfig", {"r": 3, **LINEAR}),
    "supertuning": ("SupertuningConfig", {**LINEAR}),
    "tinylora": ("TinyLoraConfig", {**LINEAR}),
    "trainable tokens": ("TrainableTokensConfig", {"token_indices": [0, 7], "target_modules": ["embed_tokens"]}),
    "unilora": ("UniLoraConfig", {"r": 4, **LINEAR}),
    "vblora": ("VBLoRAConfig", {"r": 2, "vector_length": 4, "num_vectors": 8, **LINEAR}),
    "vera": ("VeraConfig", {"r": 4, **SQUARE}),
    "waveft": ("WaveFTConfig", {"n_frequency": 20, **LINEAR}),
}


def adapted(kind: str, model: nn.Module | None = None):
    """A PeftModel of a kind, its trainable numbers moved away from where they start."""
    name, options = MERGED[kind]
    if not hasattr(peft, name):
        pytest.skip(f"this PEFT has no {name}")
    try:
        config = getattr(peft, name)(**copy.deepcopy(options))
    except (TypeError, ValueError) as error:
        pytest.skip(f"this PEFT has no {kind}: {error}")
    torch.manual_seed(1)
    model = peft.get_peft_model(llama() if model is None else model, config)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def values(source, **kwargs) -> dict[str, np.ndarray]:
    return {matrix.name: np.array(as_numpy(matrix.read())) for matrix in htsr.describe(source, **kwargs)}


def assert_same(found, expected, tolerance) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("kind", MERGED)
def test_a_live_adapter_is_read_as_peft_merges_it(kind):
    model = adapted(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen, plain = values(model), values(llama())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = values(copy.deepcopy(model).merge_and_unload())
    assert_same(seen, merged, 1e-5)
    assert max(np.abs(seen[name] - plain[name]).max() for name in plain) > 1e-3
    with model.disable_adapter():
        bare = values(model)
    if kind not in ("lora, pissa", "lora, olora", "osf", "psoft", "adamss", "deft"):  # which change W where they begin
        assert_same(bare, plain, 0)


@pytest.mark.parametrize("kind", MERGED)
def test_a_saved_adapter_on_its_base_is_what_peft_loads_and_merges(tmp_path, kind):
    """Seeds, starts that change W, numbers that layers share: all as PEFT has them when it loads the folder."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    llama().save_pretrained(base)
    adapted(kind).save_pretrained(folder)
    if kind in ("tinylora", "unilora"):
        with pytest.raises(htsr.SourceError, match="follow the order of the model's layers, which files do not tell"):
            htsr.describe(str(folder), base=str(base))
        return
    again = transformers.AutoModelForCausalLM.from_pretrained(base)
    expected = values(peft.PeftModel.from_pretrained(again, folder).merge_and_unload())
    state = torch.random.get_rng_state()
    found = values(str(folder), base=str(base))
    assert_same(dict(sorted(found.items())), dict(sorted(expected.items())), 1e-5)
    assert torch.equal(torch.random.get_rng_state(), state)


GPT2 = {"target_modules": ["c_attn", "mlp.c_proj"]}  # which stores (in, out)
KERNELS = {"target_modules": ["first", "second"]}
OTHER_LAYERS = {
    "gpt2, ia3": ("IA3Config", {"feedforward_modules": ["mlp.c_proj"], **GPT2}),
    "gpt2, pissa": ("LoraConfig", {"r": 3, "init_lora_weights": "pissa", **GPT2}),
    "gpt2, vera": ("VeraConfig", {"r": 4, "target_modules": ["c_attn"]}),
    "kernels, loha": ("LoHaConfig", {"r": 3, **KERNELS}),
    "kernels, oft": ("OFTConfig", {"oft_block_size": 3, "target_modules": ["first"]}),
    "kernels, hra": ("HRAConfig", {"r": 2, **KERNELS}),
}


@pytest.mark.parametrize("kind", OTHER_LAYERS)
def test_other_layers_than_linear_ones(tmp_path, kind, monkeypatch):
    monkeypatch.setitem(MERGED, kind, OTHER_LAYERS[kind])
    make = gpt2 if kind.startswith("gpt2") else Convolutions
    model = adapted(kind, make())
    (tmp_path / "base").mkdir()
    save_file({name: t.clone() for name, t in make().state_dict().items()}, tmp_path / "base" / "model.safetensors")
    model.save_pretrained(tmp_path / "adapter")
    assert_same(values(model), values(copy.deepcopy(model).merge_and_unload()), 1e-5)
    expected = values(peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").merge_and_unload())
    found = values(str(tmp_path / "adapter"), base=str(tmp_path / "base"))
    assert {name.partition("[")[0] for name in expected} <= {name.partition("[")[0] for name in found}
    for name in found.keys() & expected.keys():
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)


def test_adapted_stacks_of_experts_on_a_loaded_base(tmp_path):
    """Files of Mixtral name the experts one by one, the loaded model has them in one tensor."""
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    before = copy.deepcopy(model)
    targets = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
    changed = peft.get_peft_model(model, lora)
    changed.save_pretrained(tmp_path / "adapter")
    expected = values(changed.merge_and_unload())
    assert_same(values(str(tmp_path / "adapter"), base=before), expected, 1e-5)
    with pytest.raises(htsr.SourceError, match="does not belong to this base, which has no place for"):
        htsr.describe(str(tmp_path / "adapter"), base=str(tmp_path / "base"))


def test_a_start_that_is_drawn_anew_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=3, init_lora_weights="pissa_niter_4", **LINEAR)
    peft.get_peft_model(llama(), lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(htsr.SourceError, match="that PEFT draws anew each time it is loaded"):
        htsr.describe(str(tmp_path / "adapter"), base=str(tmp_path / "base"))


UNMERGED = {
    "lily": ("LilyConfig", {"r": 3, **LINEAR}),
    "poly": ("PolyConfig", {"r": 2, "n_tasks": 2, "n_skills": 2, "n_splits": 1, **LINEAR}),
    "activated lora": ("LoraConfig", {"r": 3, "alora_invocation_tokens": [1], "task_type": "CAUSAL_LM", **LINEAR}),
}


@pytest.mark.parametrize("kind", UNMERGED)
def test_an_adapter_that_has_no_weight_is_told(kind, monkeypatch):
    monkeypatch.setitem(MERGED, kind, UNMERGED[kind])
    rows = {row.name: row for row in htsr.analyze(adapted(kind), device="cpu", null=False)}
    assert list(rows) == list(values(llama()))
    bad = {name for name, row in rows.items() if row.status == "unmerged"}
    assert bad == {name for name in rows if name.endswith(("q_proj", "down_proj"))}
    name = "model.layers.0.self_attn.q_proj"
    assert rows[name].warning.startswith(f"{name}.weight has an adapter of PEFT's ")
    assert {row.status for name, row in rows.items() if name not in bad} == {"ok"}


PROMPTS = {
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 9}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 9, "encoder_hidden_size": 16}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 9}),
    "adaption prompt": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_change_no_weight(kind, monkeypatch):
    name, options = PROMPTS[kind]
    monkeypatch.setitem(MERGED, kind, (name, {"task_type": "CAUSAL_LM", **options}))
    seen, plain = values(adapted(kind)), values(llama())
    more = {name for name in seen if name not in plain}
    assert_same({name: seen[name] for name in plain}, plain, 0)
    assert all("prompt" in name for name in more)


def test_several_kinds_at_once():
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=3, init_lora_weights=False, **LINEAR), "a", mixed=True)
    model.add_adapter("b", peft.LoHaConfig(r=2, init_weights=False, **SQUARE))
    model.set_adapter(["a", "b"])
    model.eval()
    assert_same(values(model), values(copy.deepcopy(model).merge_and_unload()), 1e-5)


def test_adapters_mixed_for_each_input(tmp_path):
    peft.get_peft_model(llama(), peft.LoraConfig(r=2, init_lora_weights=False, **LINEAR)).save_pretrained(tmp_path)
    base = llama(use_cache=False)
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters={"0": str(tmp_path)})
    rows = {row.name: row for row in htsr.analyze(peft.get_peft_model(base, config), device="cpu", null=False)}
    plain = values(llama())
    assert set(plain) <= set(rows)
    assert {n for n in plain if rows[n].status == "unmerged"} == {
        n for n in plain if n.endswith(("q_proj", "down_proj"))
    }
    assert "mixed anew for each input" in rows["model.layers.0.self_attn.q_proj"].warning


@pytest.mark.parametrize("kind", ["loha", "ia3", "oft"])
def test_half_precision_is_not_rounded_once_more(kind):
    """W + ΔW is what the layer computes with; PEFT's merge would round it to bfloat16."""
    model = adapted(kind, llama().to(torch.bfloat16))
    exact = copy.deepcopy(model).float().merge_and_unload()
    assert_same(values(model), values(exact), 1e-6)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", [1e-3, 30])
def test_a_small_or_large_change_of_a_half_precision_base(tmp_path, ratio, factors):
    """The sum has the base's rounding, not its own: that would hide W beside a large ΔW; and ΔW has none."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(256, 256, bias=False)).requires_grad_(False)
    base[0].weight.data.normal_(0, 0.02)
    base = base.to(torch.bfloat16)
    config = peft.LoraConfig(r=12, lora_alpha=12, target_modules=["0"])
    model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=factors == torch.float32)
    A, B = (getattr(model.base_model.model[0], f"lora_{x}").default.weight.data for x in "AB")
    assert A.dtype == factors
    B.copy_(torch.randn(256, 12) * torch.logspace(0, -1, 12))
    B.mul_(ratio * base[0].weight.float().norm() / (B.float() @ A.float()).norm())
    W, change = base[0].weight.detach().double(), B.double() @ A.double()
    model.save_pretrained(tmp_path / "adapter")
    save_file({"0.weight": base[0].weight.detach()}, tmp_path / "base.safetensors")
    files = str(tmp_path / "adapter"), str(tmp_path / "base.safetensors")

    for source, options in ((model, {}), (files[0], {"base": files[1]})):
        assert_same(values(source, **options), {"0": (W + change).numpy()}, 1e-6)
        found = htsr.analyze(source, **options, device="cpu").eigenvalues["0"]
        expected = np.linalg.svd((W + change).numpy())[1][::-1] ** 2
        np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-3)
        other = base if source is model else files[1]
        found = htsr.analyze(source, against=other, **options, device="cpu").eigenvalues["0"]
        expected = np.linalg.svd(change.numpy())[1][11::-1] ** 2
        np.testing.assert_allclose(found[-12:], expected, rtol=1e-4)
        assert not found[:-12].any()


def test_a_large_change_that_peft_merges_has_the_rounding_of_its_base():
    torch.manual_seed(0)
    base = llama().to(torch.bfloat16)
    model = adapted("adalora", copy.deepcopy(base))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_E" in name:
            parameter.data.mul_(1000)
    assert {row.status for row in htsr.analyze(model, device="cpu") if row.M == 16} == {"ok"}


def test_stacks_of_experts_in_half_precision_are_not_rounded_once_more(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    base = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    options = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = peft.get_peft_model(copy.deepcopy(base), options)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.02)
    exact = values(copy.deepcopy(model).float().merge_and_unload())
    assert_same(values(model), exact, 1e-6)
    model.save_pretrained(tmp_path / "adapter")
    assert_same(values(str(tmp_path / "adapter"), base=base), exact, 1e-6)


@pytest.mark.parametrize("kind", ["lora, tokens", "lora, pissa"])
def test_a_saved_adapter_on_a_half_precision_base_is_not_rounded_once_more(tmp_path, kind):
    base = llama().to(torch.bfloat16)
    model = adapted(kind, copy.deepcopy(base).float())
    model.save_pretrained(tmp_path / "adapter")
    assert_same(values(str(tmp_path / "adapter"), base=base), values(model.merge_and_unload()), 1e-5)


def test_merged_adapters_are_not_merged_twice():
    for kind in ("loha", "ln tuning", "trainable tokens"):
        model = adapted(kind)
        expected = values(model)
        model.merge_adapter()
        assert_same(values(model), expected, 1e-6)
