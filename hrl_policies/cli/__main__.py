"""``python -m hrl_policies.cli``."""

from hrl_policies.cli.main import main

main()
