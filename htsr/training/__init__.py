"""Training with what the spectra say: optimizers, samplers, adapters, and the memory that they need.

===================== ==================================================================================================
`layerwise`           learning rates and weight decay by matrix, around any torch optimizer
`lowrank`             AdamW whose states live in low-rank subspaces of the gradients
`sampling`            which blocks of a transformer train now
`streaming`           frozen weights in host memory or on disk, which visit the device
`memory`              the memory that a run will need, predicted
`lora`                ranks of LoRA adapters from spectra
`spectral_projection` spectra that are nudged towards α = 2 while an optimizer trains
`monitoring`          spectra while a model trains, in any loop
`callbacks`           layerwise rates and layer sampling under the transformers Trainer
`trainer_log`         how a callback logs by the Trainer that calls it
`steps`               what can be known of an optimizer's step while it runs
`adam`                Adam's arithmetic on lists of tensors, as torch has it
===================== ==================================================================================================
"""
