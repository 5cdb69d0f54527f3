"""Power-law exponents of weight spectra, layer by layer, before and after training.

`power_law` fits one tail, `layers` the weights of a model.
"""
