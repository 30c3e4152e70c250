"""What several algorithms share: slates, buffers, logged transitions, item policies, the click scorer."""
