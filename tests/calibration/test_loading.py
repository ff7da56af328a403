import json

import numpy as np
import pytest
import torch

import htsr
from htsr.calibration.loading import load_model, load_tokenizer
from tests.transformer import bert, llama, word_tokenizer


def test_a_model_has_the_class_that_its_configuration_names(tmp_path):
    bert().save_pretrained(tmp_path / "bert")
    assert type(load_model(str(tmp_path / "bert"))).__name__ == "BertModel"
    llama().save_pretrained(tmp_path / "llama")
    model = load_model(str(tmp_path / "llama"), dtype=torch.bfloat16)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tokenizer = word_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    tokenizer.save_pretrained(tmp_path / "llama")
    loaded = load_tokenizer(str(tmp_path / "llama"))
    assert (loaded.pad_token, loaded.padding_side) == ("</s>", "right")
    with pytest.raises(htsr.SourceError, match="none does not exist"):
        load_model(str(tmp_path / "none"))


def test_gguf_becomes_plain_floats_that_can_be_saved_and_trained(tmp_path, random):
    gguf = pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM
    from transformers.trainer_utils import validate_quantization_for_training

    width, heads, vocabulary = 64, 4, 96
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 32),
        (writer.add_embedding_length, width),
        (writer.add_feed_forward_length, width),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, heads),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, vocabulary),
    ):
        add(value)
    matrices = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width))
    matrices |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), (width, width))
    shapes = {f"blk.0.{name}.weight": shape for name, shape in matrices.items()}
    shapes |= {"token_embd.weight": (vocabulary, width), "output.weight": (vocabulary, width)}
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = {n: gguf.quantize(random.standard_normal(s).astype(np.float32), kind) for n, s in shapes.items()}
    for name, values in stored.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(width, dtype=np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()

    model = load_model(str(tmp_path / "model.gguf"), dtype=torch.float32)
    up = torch.from_numpy(gguf.dequantize(stored["blk.0.ffn_up.weight"], kind))
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, up)
    validate_quantization_for_training(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, up)


def test_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(htsr.SourceError, match=r"some\.gguf is GGUF, which transformers does not quantise anew"):
        load_model(str(tmp_path / "some.gguf"), causal=True, four_bit=True)


def changed(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "loaded: "),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "loaded: "),
        (lambda f: (f / "model.safetensors").unlink(), "loaded: "),
        (lambda f: changed(f, hidden_size=48, head_dim=12), "loaded: "),
        (lambda f: changed(f, num_hidden_layers=4), r"its weights lack model\.layers\.3\.\S+ and \d more"),
        (lambda f: changed(f, num_hidden_layers=10**6), "num_hidden_layers is 1000000, and not a whole number from 1"),
        (lambda f: changed(f, num_hidden_layers="three"), "configuration of .* (cannot be read|has no meaning): "),
        (lambda f: changed(f, hidden_size=None), "model could not be loaded|configuration"),
        (lambda f: changed(f, vocab_size=-5), "vocab_size is -5|configuration"),
        (lambda f: changed(f, num_attention_heads=0), "num_attention_heads is 0|configuration"),
        (lambda f: changed(f, hidden_act="none such"), "loaded: .*none such"),
        (lambda f: changed(f, rope_parameters=3), "configuration|loaded"),
        (lambda f: changed(f, model_type="t5"), r"\(t5\) is no causal language model of transformers"),
        (lambda f: changed(f, model_type=7), "configuration of .* cannot be read"),
        (lambda f: (f / "config.json").write_text("["), "configuration of .* cannot be read"),
    ],
)
def test_models_that_cannot_be_loaded(tmp_path, harm, message):
    llama().save_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(htsr.SourceError, match=message) as caught:
        load_model(str(tmp_path), causal=True)
    assert len(str(caught.value)) < 700


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path):
    llama().model.save_pretrained(tmp_path)  # without the head
    with pytest.raises(htsr.SourceError, match=r"its weights lack lm_head\.weight"):
        load_model(str(tmp_path), causal=True)
    assert type(load_model(str(tmp_path))).__name__ == "LlamaModel"
    bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(htsr.SourceError, match=r"\(bert\) is no causal language model .*, but an encoder"):
        load_model(str(tmp_path / "bert"), causal=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [("runs/typo/x", "does not exist"), ("typo.gguf", "does not exist"), ("~nosuchuser/x", "cannot be read|not exist")],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(htsr.SourceError, match=message):
        load_model(name)


def test_a_file_of_weights_and_a_revision_of_a_path(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(htsr.SourceError, match=r"is a file; models are run from a folder, a \.gguf file or a hub id"):
        load_model(str(tmp_path / "model.safetensors"))
    with pytest.raises(htsr.UsageError, match="a revision belongs to a hub id"):
        load_model(str(tmp_path), revision="main")
