"""`htsr finetune`: a recipe, what is checked before anything is loaded, the run, and what it leaves."""
