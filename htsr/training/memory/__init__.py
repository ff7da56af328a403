"""The memory that a training run will need, predicted from the configuration of its model.

============ ===========================================================================================================
`plan`       what decides about memory, and the result: bytes by part at the peak
`prediction` `htsr.predict_memory`, from any source of a configuration
`simulation` a training step on tensors without values
============ ===========================================================================================================
"""
