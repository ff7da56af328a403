"""Where a model's weight matrices are: from any source to a list of matrices, none of them read yet.

`sources.open_model` goes the whole way. What a source holds are stored tensors; made plain, they are taken apart into
matrices:

============== ========================================================================================================
stored tensors `stored_tensors` (`StoredTensor`)
of files       `hub`, `folders` (which files are the model), `checkpoint_files`; one format each `file_bytes`
               (safetensors), `pickles`, `gguf_files`
of modules     `modules`, `tuners` (layers with PEFT's adapters), `sharded` (spread over processes)
of adapters    `adapters` by `deltas` (ΔW from its factors), `adapter_config`, `peft_folders` (ΔW computed by PEFT)
made plain     `quantized` with `packed` and `scaled`, `parametrized`, `layouts` (what converters change), `tying`
matrices       `apart`, by `naming`, `roles`, `towers` and `fused`; the result is in `models` (`WeightMatrix`,
               `Model`, `Filter`)
chosen         `patterns` (names as users write them), `blocks` (the blocks of a live model)
compared       `checksums` (whether two processes or runs hold the same)
and back       `positions` (where a matrix stands in its tensor), `writing` (a changed copy of a checkpoint)
============== ========================================================================================================
"""
