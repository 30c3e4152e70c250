"""Pages of the reference that are made from the code: public names, commands, settings, YAML files, methods."""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any

import typer.main
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hrl_policies.cli.main import app
from hrl_policies.common.transition_sources import LogReading
from hrl_policies.hrl_ppo import HierarchySettings, RankingSettings
from hrl_policies.study.spec import SessionSettings, StudyMethod, StudySpec, shipped_plans
from hrl_policies.world_model import WorldModelSettings
from hrl_policies.zoo import MethodSettings, all_methods
from kuaifair_env import SETTINGS, Randomisation
from kuaifair_env.data.own import OwnTables

PACKAGES = (
    "kuaifair_env",
    "kuaifair_env.data",
    "kuaifair_env.metrics",
    "kuaifair_env.response",
    "dsrm",
    "hrl_policies",
    "hrl_policies.ope",
    "hrl_policies.study",
    "hrl_policies.zoo",
)
"""Packages whose public names the reference holds; a name stands under the first that exports it."""

FAMILIES = (
    (
        "the paper's method and its ablations",
        "DSRM-HRL, FLAT, HRL, HRL + T-CE, R-CE, BOD, CDAE and DiffRec, constant manager, with and without "
        "fairness reward",
    ),
    (
        "baselines of the paper",
        "A2C, TD3, BCQ (continuous and discrete, offline), MOFIR, DORL, DNaIR, SAC4IR (the last two in two forms)",
    ),
    ("other agents", "PPO, SAC, RecurrentPPO, TQC"),
    (
        "controls",
        "Random, PopOnly, TailOnly, GreedyCTR, QuotaGreedy, SessionQuota, ItemQuota, BeliefQuota (items by click rates "
        "or by features), ToleranceQuota, MeanToleranceQuota, QualityOracle, Oracle",
    ),
)
"""Methods of the zoo in short."""

_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n        .*)*)", re.MULTILINE)


def cell(text: Any) -> str:
    """Returns text for a cell of a Markdown table."""
    return " ".join(plain(str(text)).split()).replace("|", "\\|")


def plain(text: str) -> str:
    """Returns a docstring's text with its roles as code."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Returns a Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def settings_page() -> str:
    """Returns the page of what ``gym.make`` takes."""
    parts = {"world": "Of the world", "sessions": "Of its sessions", "leave rule": "Of the leave rule"}
    text = """# Settings of environments

`gym.make(id, ...)` takes all of these as keywords, and so do `gym.make_vec` and `kuaifair_env.make_sb3`; `make_world`
takes those of the world. On the command line `--env-kwargs ad_bound=0.2` gives any of them but `action_mode`, which is
the method's; in a study's YAML file they stand under `session:` and `world_settings:`, or under `sweep:` with several
values. `kuaifair envs --settings` and `help(kuaifair_env.KuaiFairEnv)` show the same lists.
"""
    for part, title in parts.items():
        rows = [
            (f"`{setting.name}`", setting.meaning, setting.values, f"`{setting.default!r}`")
            for setting in SETTINGS
            if setting.part == part
        ]
        text += f"\n## {title}\n\n"
        if part == "leave rule":
            text += (
                "An error where the rule has no such parameter; see [When a user leaves](../concepts/leaving.md).\n\n"
            )
        text += table(("setting", "meaning", "values", "default"), rows) + "\n"
    return text


def attribute_texts(owner: type) -> dict[str, str]:
    """Returns what a class's docstring says of its attributes."""
    _, _, attributes = (inspect.getdoc(owner) or "").partition("Attributes:\n")
    return {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(attributes)}


def fields_table(owner: type) -> str:
    """Returns a table of the fields of a pydantic model or a dataclass: key, meaning, default."""
    meaning = attribute_texts(owner)
    if issubclass(owner, BaseModel):
        found = {name: (field.default, field.default_factory) for name, field in owner.model_fields.items()}
    else:
        found = {field.name: (field.default, field.default_factory) for field in fields(owner)}
    rows = []
    for name, (default, factory) in found.items():
        if factory not in (None, MISSING):
            default = factory()
        needed = default in (MISSING, PydanticUndefined)
        shown = default.model_dump(exclude_defaults=True) if isinstance(default, BaseModel) else default
        rows.append((f"`{name}`", meaning.get(name, ""), "needed" if needed else f"`{shown!r}`"))
    return table(("key", "meaning", "default"), rows)


def yaml_page() -> str:
    """Returns the page of every YAML file that is read, key by key."""
    plans = ", ".join(f"`{name}`" for name in shipped_plans())
    return f"""# Keys of YAML files

## A study

`kuaifair study run FILE` ([how to](../how-to/studies.md)). Shipped studies, which the command takes by name: {plans}.

{fields_table(StudySpec)}

### An entry of `methods`

A name of the zoo, `controls` for all controls, or a mapping:

{fields_table(StudyMethod)}

### `session`

Keys that the leave rule does not have are an error; see [settings of environments](settings.md).

{fields_table(SessionSettings)}

### `randomisation`

`auto`, `none`, or scales by name ([what they mean](../concepts/worlds.md#randomised-training-worlds)):

{fields_table(Randomisation)}

### `sweep`

Values by parameter: a key of `session`, a setting of worlds, `total_steps`, `n_envs`, `randomisation`, or a
hyperparameter by its dotted name (`policy_kwargs.log_std_init`).

## Settings of a method

`kuaifair train --settings FILE`, and what `kuaifair methods NAME` prints ([how to](../how-to/tune.md)).

{fields_table(MethodSettings)}

Besides, `like: OTHER` inherits the settings of another method (`NAME: null` takes a line out), and `worlds:` holds
`n_envs`, `total_steps` and `hyperparameters` for single environment ids. Under `search` each hyperparameter has one of
`log: [low, high]`, `uniform: [low, high]`, `integer: [low, high]` and `choice: [...]`.

### `policy_kwargs` of `RankingPolicy`

Under `hyperparameters` of `dsrm-hrl`:

{fields_table(RankingSettings)}

### `policy_kwargs` of `HierarchicalPolicy`

{fields_table(HierarchySettings)}

### World models of DORL

{fields_table(WorldModelSettings)}

### Logged transitions of offline methods

{fields_table(LogReading)}

## A log of your own

`kuaifair train --env MyShop-v0 --data shop.yml`, and entries of `worlds` in a study ([how to](../how-to/own-log.md)).

{fields_table(OwnTables)}
"""


def commands(command: Any, name: str) -> Iterable[tuple[str, Any]]:
    """Yields a command with all below it, with their names."""
    yield name, command
    for below, group in getattr(command, "commands", {}).items():
        yield from commands(group, f"{name} {below}")


def cli_page() -> str:
    """Returns the page of the command line, from the texts that ``--help`` prints."""
    text = "# Command line\n\nThis page is made from what `kuaifair --help` and `kuaifair COMMAND --help` print.\n"
    for name, command in commands(typer.main.get_command(app), "kuaifair"):
        context = command.make_context(name, [], resilient_parsing=True)
        usage = command.get_usage(context).removeprefix("Usage: ")
        text += f"\n## `{name}`\n\n```text\n{usage}\n```\n\n{plain(inspect.cleandoc(command.help or ''))}\n\n"
        below = [
            (f"[`{name} {key}`](#{f'{name}-{key}'.replace(' ', '-')})", first_sentence(value.help))
            for key, value in getattr(command, "commands", {}).items()
        ]
        text += table(("command", "what it does"), below) + "\n\n" if below else ""
        records = [parameter.get_help_record(context) for parameter in command.params]
        rows = [(f"`{record[0]}`", record[1]) for record in records if record]
        text += table(("argument or option", "what it is"), rows) + "\n" if rows else ""
    return text


def first_sentence(text: str | None) -> str:
    """Returns the first sentence of a help text."""
    return re.split(r"(?<=\.)\s", " ".join((text or "").split()), maxsplit=1)[0]


def methods_page() -> str:
    """Returns the page of the zoo."""
    text = """# Methods

What `kuaifair methods` lists. `kuaifair methods NAME` shows one with its hyperparameters, which are YAML files with a
section for each world that needs others ([keys](yaml.md#settings-of-a-method)); what each method is given:
[what each method sees](../how-to/studies.md#what-each-method-sees).

"""
    text += table(("in the zoo", ""), FAMILIES) + "\n\n"
    rows = [
        (f"`{name}`", spec.title, spec.kind, spec.action_mode, spec.purifier or "", spec.reference)
        for name, spec in all_methods().items()
    ]
    return text + table(("name", "title", "kind", "acts by", "purifier", "source"), rows) + "\n"


def api_pages() -> dict[str, tuple[str, str]]:
    """Returns title and text of one page for each package, with its public names by the module that holds them."""
    pages, shown = {}, set()
    for package_name in PACKAGES:
        package = import_module(package_name)
        groups: dict[str, list[str]] = defaultdict(list)
        for name in sorted(set(package.__all__) - shown, key=str.lower):
            groups[home_of(package, name)].append(name)
        introduction = re.sub(r"(?m)^(    .*(?:\n(?:    .*)?)*)", code_block, plain(inspect.getdoc(package) or ""))
        again = [name for name in package.__all__ if name in shown]
        text = f"# {package_name}\n\n{introduction}\n\nAll names below import from `{package_name}`."
        text += f" So do, from pages before: {', '.join(f'`{name}`' for name in again)}.\n" if again else "\n"
        for home, names in sorted(groups.items()):
            text += f"\n## From {home} {{: #from-{home.replace('.', '-')} }}\n\n"
            text += "".join(member_text(home, name) for name in names)
        shown |= set(package.__all__)
        pages[f"reference/{package_name}.md"] = package_name, text
    return pages


def code_block(match: re.Match[str]) -> str:
    """Returns an indented block as a fenced one."""
    return "```python\n" + inspect.cleandoc(match.group(1)) + "\n```\n\n"


def home_of(package: Any, name: str) -> str:
    """Returns the module that a public name comes from."""
    value = getattr(package, name)
    home = getattr(value, "__module__", None)
    if isinstance(home, str) and home.startswith(tuple(PACKAGES)) and hasattr(sys.modules.get(home), name):
        return home
    places = (
        module_name
        for module_name, module in sorted(sys.modules.items())
        if module_name.startswith(package.__name__ + ".") and vars(module).get(name) is value
    )
    return next(places, package.__name__)


def member_text(home: str, name: str) -> str:
    """Returns what asks mkdocstrings for a public name."""
    return f"::: {home}.{name}\n    options:\n      heading_level: 3\n\n"


PAGES: dict[str, tuple[str, Callable[[], str]]] = {
    "reference/settings.md": ("Settings of environments", settings_page),
    "reference/yaml.md": ("Keys of YAML files", yaml_page),
    "reference/cli.md": ("Command line", cli_page),
    "reference/methods.md": ("Methods", methods_page),
}
"""Title and maker of each page but those of the packages."""


def reference_pages() -> dict[str, tuple[str, str]]:
    """Returns path, title and text of every page that is made from the code."""
    return {path: (title, make()) for path, (title, make) in PAGES.items()} | api_pages()
