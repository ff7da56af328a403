import pytest
from peft import LoraConfig, get_peft_model

import htsr
from htsr.training.lora_targets import module_options, saved_modules, target_modules
from tests.transformer import gpt2, llama


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        ("attn.*", ("q_proj", "k_proj", "v_proj", "o_proj")),
        (["q_proj", "mlp.down"], ("q_proj", "down_proj")),
        (r".*\.0\.self_attn\.[qv]_proj", ("0.self_attn.q_proj", "0.self_attn.v_proj")),
        (["model.layers.1.mlp.up_proj"], ("1.mlp.up_proj",)),
        (["q_proj", "embed", "head"], ("q_proj", "embed_tokens", "lm_head")),
    ],
)
def test_adapters_go_where_names_roles_and_expressions_say(targets, ends):
    model = llama(2)
    expected = [name for name, _ in model.named_modules() if name.endswith(ends)]
    assert target_modules(model, targets) == expected
    adapted = get_peft_model(model, LoraConfig(r=2, **module_options(model, targets, [], {})))
    found = [name.removeprefix("base_model.model.") for name, m in adapted.named_modules() if hasattr(m, "lora_A")]
    assert found == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_porj"], "no module of LlamaForCausalLM has the name or role 'q_porj'; did you mean q_proj?"),
        ("[", "'\\[' is no regular expression"),
        (["attn.*", "mlp.upp"], "'mlp.upp'; did you mean mlp.up?"),
    ],
)
def test_a_target_that_means_nothing_is_named(targets, message):
    with pytest.raises(htsr.UsageError, match=message):
        target_modules(llama(1), targets)


def test_what_trains_whole():
    model = llama(1)
    assert saved_modules(model, ["head", "embed"]) == ["model.embed_tokens", "lm_head"]
    with pytest.raises(htsr.UsageError, match=r"modules_to_save: no module .* 'lm_hed'; did you mean lm_head"):
        saved_modules(model, ["lm_hed"])
    with pytest.raises(htsr.UsageError) as refused:
        module_options(model, ["attn.q", "foo", "bar"], ["nosuch"], {})
    keys = ["lora.targets", "lora.targets", "lora.modules_to_save"]
    wrong = [(line.split(":")[0], line.split("'")[1]) for line in str(refused.value).splitlines()]
    assert wrong == list(zip(keys, ("foo", "bar", "nosuch"), strict=True))
    with pytest.raises(htsr.UsageError, match="lm_head is among targets and modules_to_save"):
        module_options(model, ["head"], ["lm_head"], {})
    tied = gpt2()
    assert module_options(tied, "attn.*", ["head"], {})["ensure_weight_tying"]
    with pytest.raises(htsr.UsageError, match="wte and lm_head are one tensor, into which PEFT would merge"):
        module_options(tied, ["embed"], [], {})


def test_an_embedding_that_trains_whole_is_in_the_memory_plan():
    model = llama(2)
    plain, whole = (htsr.predict_memory(model, "lora", sequence=8, modules_to_save=m) for m in ([], ["embed"]))
    table = model.model.embed_tokens.weight.numel()
    assert whole.trainable - plain.trainable == table
    assert whole.optimizer - plain.optimizer == 8 * table
    few = htsr.predict_memory(model, "lora", sequence=8, targets=["q_proj"])
    assert few.trainable == sum(8 * (32 + 32) for _ in range(2))
    with pytest.raises(htsr.UsageError, match="are those of adapters, which full has not"):
        htsr.predict_memory(model, "full", targets=["q_proj"])


def test_ranks_by_score_of_named_modules():
    model = llama(2)
    names = target_modules(model, ["q_proj", "down_proj"])
    config = htsr.lora_config(model, htsr.analyze(model), rank=4, score="stable_rank", modules=names)
    assert len(config.rank_pattern) == len(names) == 4
    assert config.target_modules == {*names}
    with pytest.raises(htsr.UsageError, match="lm_head is no Linear inside the blocks"):
        htsr.lora_config(model, htsr.analyze(model), modules=["lm_head"])
