"""Any model to rows of numbers, two models beside each other, a model changed through its spectra."""
