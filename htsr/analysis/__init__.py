"""Any model to rows of numbers, two models beside each other, a model changed through its spectra.

`analyze`, `comparison` (by `matching` and `distance`) and `surgery` are the three. `execution` shares the work out to
threads and `sharing` to processes; `journal` keeps finished rows, `saving` (with `schema`) writes an analysis to a
file; `tables` and `report` say what people see.
"""
