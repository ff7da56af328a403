"""Layerwise learning rates and weight decay around any torch optimizer.

============= ==========================================================================================================
`policy`      what a policy is: which score, which map to multipliers, what they multiply, when
`names`       what the parameters of a model are called, also those of adapters
`units`       which parameters have a multiplier in common, and what it becomes once the scores are known
`live_scores` scores of a model in training, its matrices shared among the processes
`groups`      param groups, split one per unit; they carry all state
`engine`      which multiplier each group has at each step
`together`    one step of Adam or AdamW for all groups at once
`hooks`       how an engine is attached to its optimizer
`wrapper`     `htsr.layerwise`, which does it all
`schedulers`  the same as a scheduler of torch, `htsr.LayerwiseLR`
`plan`        the multipliers of the first event, before any training
============= ==========================================================================================================
"""
