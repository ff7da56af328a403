"""The memory that a training run will need, predicted from the configuration of its model.

============ ===========================================================================================================
`plan`       what decides about memory, and the result: bytes by part at the peak
`prediction` `htsr.predict_memory`, from any source of a configuration
`by_batch`   plans of every batch, from simulations of two
`simulation` a training step on tensors without values
`ledger`     what of it is alive, moment by moment
`head`       the loss of TRL's trainer, tile by tile
`states`     an optimizer's states and temporaries, by formulas
============ ===========================================================================================================
"""
