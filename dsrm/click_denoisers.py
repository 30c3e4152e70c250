"""T-CE, R-CE and BOD as purifiers: clicks of the window count by how credible a denoising click model finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from dsrm.baselines import raw_bound
from dsrm.click_model import ClickModel, ClickModelConfig, train_click_model, window_tensors
from dsrm.purifier import Binding, MismatchError, WorldKey, state_space
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import Tensors
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.spaces import mean_embeddings
from kuaifair_env.world import World


class ClickDenoiser:
    """The weighted mean embedding of the clicked items, ``s~_w = sum_j w_j e_j / sum_j w_j`` (the state hook).

    * T-CE: ``w_j`` is 0 for the clicks of a window with the largest loss, a share ``eps_max`` of them, else 1.
    * R-CE: ``w_j = y_j ^ beta`` with ``y_j`` the predicted click probability. The observed state is made of clicked
      items alone, so skipped items, which the loss reweights too, have no place in it.
    * BOD: ``w_j = g(u, j)``, the learnt weight.

    Args:
        config: Loss and sizes of the click model.
        key: The world that it was trained on.
        item_ids: ``int64 (M,)``, raw ids in the order of the model's rows.
        model: The trained click model.
        report: Provenance, JSON-able.
    """

    def __init__(
        self,
        config: ClickModelConfig,
        key: WorldKey,
        item_ids: Any,
        model: ClickModel,
        report: Mapping[str, Any],
    ) -> None:
        self.kind = config.loss
        self.config = config
        self._key = key
        self._item_ids = np.asarray(item_ids, np.int64)
        self._model = model
        self._report = dict(report)
        self._binding = Binding(key)

    @classmethod
    def fit(cls, world: World, config: ClickModelConfig, progress: bool = False) -> ClickDenoiser:
        """Trains the click model of a training world and returns the purifier."""
        report = {
            "mode": config.loss,
            "data": world.data.provenance.as_dict(),
            "test_log": "unread",
            "training_users": len(world.users),
        }
        model = train_click_model(world, config, progress)
        return cls(config, WorldKey.of_world(world), world.data.items.ids, model, report)

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        self._binding.bind(world)
        if not np.array_equal(self._item_ids, world.data.items.ids):
            raise MismatchError(
                "the click model knows the items in another order; train it for these candidates"
            )
        return state_space(raw_bound(world), world.dimension)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return mean_embeddings(self._binding.builder.embeddings, window.items, self.weights(window))

    @torch.inference_mode()
    def weights(self, window: HistoryWindow) -> FloatArray:
        """Returns what each place of a window counts for, ``float32 (B, H)``; 0 where nothing was clicked."""
        items, clicks = window_tensors(window)
        users = self._model.users(items, clicks)
        if self.config.loss == "bod":
            factors = self._model.item(items)
            found = self._model.weights(users[:, None, :].expand_as(factors), factors)
        else:
            logits = self._model.logits(users, items)
            found = (
                _kept(logits, clicks, self.config.drop)
                if self.config.loss == "tce"
                else logits.sigmoid() ** self.config.beta
            )
        weights: FloatArray = (found * clicks).numpy()
        return weights

    def describe(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return {
            "kind": self.kind,
            "config": asdict(self.config),
            "world": self._key.as_dict(),
            "report": self._report,
        }

    def parts(self) -> tuple[Tensors, dict[str, Any]]:
        """Returns what a file holds: tensors, settings."""
        tensors: Tensors = {f"net.{name}": value.numpy() for name, value in self._model.state_dict().items()}
        described = self.describe()
        settings = {name: described[name] for name in ("config", "world", "report")}
        return tensors | {"item_ids": self._item_ids}, settings

    @classmethod
    def from_parts(cls, tensors: Tensors, settings: Mapping[str, Any]) -> ClickDenoiser:
        """Restores what :meth:`parts` returned."""
        config = ClickModelConfig(**settings["config"])
        model = ClickModel(len(tensors["item_ids"]), config)
        model.load_state_dict(
            {
                name.removeprefix("net."): torch.from_numpy(value)
                for name, value in tensors.items()
                if "net." in name
            }
        )
        key = WorldKey.from_dict(settings["world"])
        return cls(config, key, tensors["item_ids"], model.eval().requires_grad_(False), settings["report"])


def _kept(logits: torch.Tensor, clicks: torch.Tensor, drop: float) -> torch.Tensor:
    """Returns 1 for clicks that T-CE keeps: all but the share ``drop`` of a window's clicks with the least logit."""
    # The loss of a click falls with its logit; places that were not clicked come last and are never counted.
    order = torch.where(clicks > 0, logits, torch.inf).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    dropped = (drop * clicks.sum(dim=1, keepdim=True)).floor()
    return (rank >= dropped).to(torch.float32)
