"""Agents, method zoo, studies and the command line, on top of the environments and purifiers.

Importing this package imports neither torch nor Stable-Baselines3; its parts do so when they need them:

* :mod:`hrl_policies.common` holds controls, which learn nothing, and the click model they rank by;
* :mod:`hrl_policies.zoo` names every method, with its source and its hyperparameters;
* :mod:`hrl_policies.study` trains, evaluates, stores and tabulates;
* :mod:`hrl_policies.cli.main` is the ``kuaifair`` command.
"""
