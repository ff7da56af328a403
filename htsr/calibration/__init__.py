"""Models run on texts: norms of activations, outliers, multiple-choice answers; and how models and texts are read.

================= ======================================================================================================
`loading`         models, configurations and tokenizers from paths, hub ids and installed packages
`records`         records of text from files and data sets
`record_forms`    the forms that a record may have
`activations`     norms of the input features of every linear layer
`outliers`        `htsr.measure_outliers`: which blocks hold outliers
`multiple_choice` accuracy by log-likelihood
================= ======================================================================================================
"""
