"""An agent of your own in the zoo: one decorated function, then everything that shipped methods have.

Run: python examples/own_method.py [training steps]

The agent is A2C whose exploration noise shrinks while it trains, shown beside plain A2C and QuotaGreedy, a control that
learns nothing by reinforcement. Once registered it is planned, trained, evaluated, stored and tuned by name. In a
package of your own, name the module in pyproject.toml, and ``kuaifair train``, ``tune`` and ``methods`` know it too:

    [project.entry-points."kuaifair.methods"]
    annealed-a2c = "my_package.own_method"
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from stable_baselines3 import A2C

from hrl_policies import (
    BuildContext,
    RunRecord,
    load_settings,
    load_worlds,
    plan_run,
    register_method,
    result_tables,
    sb3_algorithm,
    search_space,
    single_threaded,
    train,
)

ENV = "KuaiFair-Toy-v0"


class AnnealedA2C(A2C):
    """A2C whose noise may not exceed a bound that falls in a straight line from its start.

    Args:
        final_log_std: Where the bound on the log deviation of actions ends.
    """

    def __init__(self, *arguments: Any, final_log_std: float = -3.0, **settings: Any) -> None:
        self.final_log_std = final_log_std
        super().__init__(*arguments, **settings)

    def _setup_model(self) -> None:
        super()._setup_model()
        self._start = self.policy.log_std.max().item()

    def train(self) -> None:
        """One update, then the bound."""
        super().train()
        left = self._current_progress_remaining
        with torch.no_grad():
            self.policy.log_std.clamp_(max=left * self._start + (1 - left) * self.final_log_std)


# Its settings are those of A2C, one more, and where `kuaifair tune` looks for a better value of it.
SHIPPED = load_settings("a2c")
HYPERPARAMETERS = {**SHIPPED.hyperparameters, "final_log_std": -3.0}
SEARCH = {"final_log_std": {"uniform": [-5.0, -2.0]}, "learning_rate": {"log": [1e-4, 1e-2]}}


@register_method(
    "annealed-a2c",
    title="A2C, annealed",
    family="on-policy",
    reference="examples/own_method.py",
    kind="online",
    action_mode="embedding",
    sees="observed states and rewards of the training world",
    settings=replace(
        SHIPPED, hyperparameters=HYPERPARAMETERS, search=search_space(SEARCH, HYPERPARAMETERS, "own_method")
    ),
)
def build(context: BuildContext) -> Any:
    """Builds the untrained agent over the training sessions."""
    return sb3_algorithm(AnnealedA2C, context)


def main(steps: int = 100_000) -> None:
    single_threaded()
    worlds = load_worlds(ENV)
    records = []
    for name in ("annealed-a2c", "a2c", "quota-greedy"):
        result = train(plan_run(name, ENV, total_steps=steps), worlds)
        assert result.evaluation is not None
        records.append(RunRecord.of_evaluation(result.config, result.evaluation))
    for table in result_tables(records, "python examples/own_method.py"):
        print(table.markdown())
    print("One training seed and one short run each: no evidence for either agent.")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
