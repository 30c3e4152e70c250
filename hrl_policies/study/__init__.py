"""Studies: what was run over which seeds and users, and what may be concluded from it."""
