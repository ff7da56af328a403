"""`htsr finetune`: a recipe, what is checked before anything is loaded, the run, and what it leaves.

=============== ========================================================================================================
the recipe      `recipe` (its keys), `recipe_values` (YAML into dataclasses), `reading`
checked first   `arguments` (of TRL, PEFT and the optimizer), `preflight` (data, tokenizer, sizes), `labels` (what the
                loss is taken of), `checkpoints`, `run_folder`
the run         `run`, with `methods` (adapters, sampler of blocks), `trainer` (TRL's, with htsr's optimizers) and
                `memory` (what it will need)
what it leaves  `saving` (model and reports), `model_card`, `result`
=============== ========================================================================================================
"""
