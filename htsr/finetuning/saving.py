"""What a fine-tuning run leaves behind: the model as plain transformers loads it, and the reports beside it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr.calibration.loading import absolute, load_model
from htsr.calibration.record_texts import template_of_headings
from htsr.files import written
from htsr.finetuning.placing import how_loaded
from htsr.finetuning.run_folder import RESULTS, kept_leaves, leaves, plain, write_json
from htsr.finetuning.starts import START, Start, begun, changes_weights, for_stored_weights, start_of
from htsr.ranks import Ranks

if TYPE_CHECKING:
    from htsr.analysis.comparison import Comparison
    from htsr.finetuning.recipe import Recipe
    from htsr.finetuning.result import Moved, Result


def save_model(
    recipe: Recipe, trainer: Any, tokenizer: Any, output: Path, ranks: Ranks, *, preamble: str | None = None
) -> None:
    """Save the model as plain transformers loads it, in safetensors; adapters merged, and alone under ``adapter``.

    Where they are not to be merged, they lie in the folder itself.

    Args:
        recipe: recipe, of which model, revision, dtype and lora are read.
        trainer: trainer that has trained the model.
        tokenizer: tokenizer of the model.
        output: folder of the result.
        ranks: processes that train; the first writes.
        preamble: what stood above Alpaca's headings, under which it was trained on instructions, and of which a
            tokenizer without a chat template gets one; None where it was trained otherwise.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if preamble is not None and tokenizer.chat_template is None:
        tokenizer.chat_template = template_of_headings(tokenizer, preamble)
    if trainer.is_fsdp_enabled:  # whatever its checkpoints are
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if recipe.lora is None:
        trainer.save_model(str(output))
    else:
        merge, folder = recipe.lora.merge, output / "adapter" if recipe.lora.merge else output
        trainer.save_model(str(folder))
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]  # under ZeRO-3 all ranks would have to load
        ranks.wait()
        if merge:
            ranks.of_first(lambda: _save_merged(recipe, output))
        ranks.of_first(lambda: _complete_adapter(recipe, output, folder))

    def save_tokenizer() -> None:
        tokenizer.save_pretrained(output)

    ranks.of_first(save_tokenizer)


def _save_merged(recipe: Recipe, output: Path) -> None:
    """Merge the adapter into a fresh copy of the model, whatever wraps the trained one."""
    from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    base: Any = load_model(recipe.model, revision=recipe.revision, **how_loaded(recipe) | {"four_bit": False})
    folder = str(output / "adapter")
    if not changes_weights(start_of(recipe.lora)):
        PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(output)
        return
    adapted = begun(base, LoraConfig.from_pretrained(folder), Start.load(output / START), changed=True)
    set_peft_model_state_dict(adapted, dict(load_peft_weights(folder)))
    adapted.merge_and_unload().save_pretrained(output)


def _complete_adapter(recipe: Recipe, output: Path, folder: Path) -> None:
    """Have the adapter in `folder` name its base as it is stored, and be one of it, however it began."""
    from peft import LoraConfig, load_peft_weights
    from safetensors.torch import save_file

    changed = changes_weights(start_of(recipe.lora))
    if not changed and recipe.revision is None:
        return
    config = LoraConfig.from_pretrained(str(folder))
    if changed:
        trained = load_peft_weights(str(folder))
        tensors, config = for_stored_weights(trained, Start.load(output / START), config)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config.base_model_name_or_path, config.init_lora_weights = absolute(recipe.model), True
    config.revision = recipe.revision
    config.save_pretrained(str(folder))


def write_reports(recipe: Recipe, result: Result, output: Path, comparison: Comparison | None) -> None:
    """Write the comparison of the spectra, the model card, and last ``results.json``, the mark of a finished run.

    Args:
        recipe: recipe of the run.
        result: result of the run.
        output: folder of the result.
        comparison: the model before training beside the trained one, None where neither was analyzed.
    """
    from htsr.finetuning.model_card import model_card
    from htsr.reporting.formats import as_csv
    from htsr.reporting.text import encodable

    if comparison is not None:
        with written(output / "spectra.csv") as temporary:
            temporary.write_text(encodable(as_csv(comparison.records())), encoding="utf-8")
    with written(output / "README.md") as temporary:
        temporary.write_text(model_card(recipe, result, comparison), encoding="utf-8")
    write_json(output / RESULTS, {"recipe": dataclasses.asdict(recipe), **dataclasses.asdict(result)})


def most_moved(comparison: Comparison | None) -> tuple[Moved, ...]:
    """The matrices that moved most: `BY_NORM` by the weights, then as many others by α.

    Args:
        comparison: the model before training beside the trained one; None for none.
    """
    from htsr.finetuning.result import BY_NORM, Moved

    if comparison is None:
        return ()
    rows = [
        Moved(pair.name, pair.distance.relative if pair.distance else None, pair.a.alpha, pair.b.alpha)
        for pair in comparison.pairs
    ]
    by_weights = sorted((row for row in rows if row.relative), key=lambda row: -(row.relative or 0.0))[:BY_NORM]
    others = [row for row in rows if row not in by_weights and _change(row)]
    return (*by_weights, *sorted(others, key=_change, reverse=True)[:BY_NORM])


def _change(row: Moved) -> float:
    """How far α has changed; 0 where there is none."""
    return 0.0 if row.alpha_before is None or row.alpha_after is None else abs(row.alpha_after - row.alpha_before)


def finished_result(recipe: Recipe, output: Path) -> Result | None:
    """The result of a run of this very `recipe` that came to its end in `output`; None where there is none."""
    from htsr.finetuning.result import Moved, Result
    from htsr.training.sampling.coverage import Coverage

    try:
        content = json.loads((output / RESULTS).read_text(encoding="utf-8"))
        both = kept_leaves(content["recipe"]), leaves(plain(recipe))
        then, now = ({k: v for k, v in one if v is not None} for one in both)
        if then != now:  # a recipe of an older version lacks keys that are not set
            return None
        return Result(
            content["output"],
            content["metrics"],
            tuple(Coverage(**row) for row in content["coverage"]),
            tuple((int(step), float(loss)) for step, loss in content.get("losses", ())),
            tuple(Moved(**row) for row in content.get("moved", ())),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
