"""Which metric sees what: trained against random weights, before and after fine-tuning, quantised against original."""
