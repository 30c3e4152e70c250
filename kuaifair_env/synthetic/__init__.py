"""Synthetic twins: data sets whose truth is known, in the form and with the marginals of the real ones."""
