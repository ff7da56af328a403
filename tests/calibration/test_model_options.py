"""What a recipe says of how transformers makes a model."""

import json

import pytest
import torch

import htsr
from htsr.calibration.loading import load_config, load_model
from tests.transformer import llama

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    llama(2).save_pretrained(folder)
    return str(folder)


def test_what_is_wished_is_in_the_model(folder):
    options = {"attn_implementation": "sdpa", "attention_dropout": 0.25, "rope_scaling": {"factor": 2.0}}
    options["rope_parameters"] = {"rope_type": "linear"}  # under both names, and with the model's own theta
    model = load_model(folder, causal=True, options=options)
    assert model.config._attn_implementation == "sdpa"
    assert model.model.layers[0].self_attn.attention_dropout == 0.25
    assert model.config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    plain = load_model(folder, causal=True)
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert (model.eval()(tokens).logits - plain(tokens).logits).abs().max() > 1e-6
        sdpa = load_model(folder, causal=True, options={"attn_implementation": "sdpa"})
        torch.testing.assert_close(sdpa(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attention_dropuot": 0.1}, htsr.UsageError, "no option of .*; did you mean attention_dropout?"),
        ({"attn_implementation": "sdap"}, htsr.UsageError, "model_options.attn_implementation: Specified"),
        ({"num_hidden_layers": 1}, htsr.UsageError, "would make another model than the weights of"),
        ({"rope_parameters": {"rope_type": "lineor"}}, htsr.UsageError, "model_options.rope_parameters: "),
        ({"device_map": "auto"}, htsr.UsageError, "model_options.device_map the model lies where"),
        ({"torch_dtype": "bfloat16"}, htsr.UsageError, "model_options.torch_dtype is set by dtype"),
        ({"quantization_config": {}}, htsr.UsageError, "those of the method qlora"),
        ({"revision": "main"}, htsr.UsageError, "model_options.revision is set by revision"),
    ],
)
def test_what_has_no_meaning_is_refused_with_its_reason(folder, options, error, message):
    with pytest.raises(error, match=message):
        load_config(folder, causal=True, options=options)


def test_code_that_comes_with_a_model_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    model = llama(2)
    model.save_pretrained(tmp_path)
    (tmp_path / "configuration_own.py").write_text(CONFIGURATION)
    (tmp_path / "modeling_own.py").write_text(MODELING)
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    options = {"trust_remote_code": True, "attention_dropout": 0.5}
    loaded = load_model(str(tmp_path), causal=True, options=options)
    assert (type(loaded).__name__, loaded.config.attention_dropout) == ("OwnModel", 0.5)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    plan = htsr.predict_memory(str(tmp_path), sequence=8, model_options=options)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    with pytest.raises(htsr.SourceError, match="trust_remote_code"):
        load_config(str(tmp_path), causal=True, options={})
