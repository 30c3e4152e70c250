"""Files of purifiers, encoders, item terms and beliefs: whole and what they should be, or an error that names them."""

from __future__ import annotations

import numpy as np
import pytest
from damage import contents, needs_error, try_damaged_bytes, try_foreign_files, try_wrong_settings, try_wrong_tensors
from helpers import small_world
from purifiers import quick_config
from small_worlds import taste_worlds

from dsrm import training
from dsrm.belief import BELIEFS, Belief, BeliefItems
from dsrm.encoder import ENCODERS, Encoder, EncoderConfig, pretrain_encoder
from dsrm.item_term import ITEM_TERMS, ItemTerm
from dsrm.pretraining import pretrain
from dsrm.purifier import MODES, PURIFIERS, load_purifier, save_purifier
from dsrm.training import CHECKPOINTS
from kuaifair_env.files import save_artifact

# One mode of each class of purifiers, and of preference models; those with networks are files of many tensors.
SLOW = {"belief", "belief_regression"}
USED = sorted(set(MODES) - {"paper", "unbiased", "paired", "rce", "bod"})


@pytest.mark.parametrize("mode", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in USED])
def test_purifiers(purifiers, mode, tmp_path):
    path = tmp_path / "p.safetensors"
    save_purifier(purifiers[mode], path)
    try_damaged_bytes(path, PURIFIERS, load_purifier, 8)
    try_foreign_files(path, PURIFIERS, load_purifier)
    try_wrong_settings(path, PURIFIERS, load_purifier)
    try_wrong_tensors(path, PURIFIERS, load_purifier)


@pytest.mark.parametrize("kind", ["mean", "transformer"])
def test_encoders(kind, tmp_path):
    path = tmp_path / "e.safetensors"
    config = EncoderConfig(kind, dimension=4, negatives=4, steps=1, batch_size=4)
    pretrain_encoder(taste_worlds()[0], config).save(path)
    try_damaged_bytes(path, ENCODERS, Encoder.load, 8)
    try_foreign_files(path, ENCODERS, Encoder.load)
    try_wrong_settings(path, ENCODERS, Encoder.load)
    try_wrong_tensors(path, ENCODERS, Encoder.load)


@pytest.mark.parametrize("similarity", [None, 0.5])
def test_item_terms(similarity, tmp_path):
    path = tmp_path / "t.safetensors"
    ItemTerm("log", np.arange(5), np.zeros(5, np.float32), similarity, {"data_hash": "0" * 16}).save(path)
    try_damaged_bytes(path, ITEM_TERMS, ItemTerm.load, 20)
    try_foreign_files(path, ITEM_TERMS, ItemTerm.load)
    try_wrong_settings(path, ITEM_TERMS, ItemTerm.load, ["similarity"])
    try_wrong_tensors(path, ITEM_TERMS, ItemTerm.load)


def test_beliefs_and_a_belief_that_could_not_be_read_is_as_it_was(tmp_path):
    path = tmp_path / "b.safetensors"
    items = BeliefItems.of_world(small_world(n_items=12))
    Belief(items).save(path)
    belief = Belief(items)
    before = belief.scales

    def load(path):
        belief.load(path)

    try_damaged_bytes(path, BELIEFS, load, 8)
    try_foreign_files(path, BELIEFS, load)
    assert belief.scales == before
    try_wrong_settings(path, BELIEFS, load)
    try_wrong_tensors(path, BELIEFS, load)


def test_checkpoints_of_pretraining(tmp_path, monkeypatch):
    path, shown = tmp_path / "p.safetensors.partial", training.show_round

    def stop(bar, trainer):
        shown(bar, trainer)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "show_round", stop)
    train, config = taste_worlds()[0], quick_config("regression")
    with pytest.raises(KeyboardInterrupt):
        pretrain(train, config, checkpoint=path)
    whole = path.read_bytes()

    def load(path):
        pretrain(train, config, checkpoint=path)

    for content in (b"", whole[:100], whole[:-1], whole[:-3] + b"\0\1\0"):
        path.write_bytes(content)
        needs_error(load, path, f"{len(content)} bytes")
    path.write_bytes(whole)
    kind, tensors, settings = contents(path, CHECKPOINTS)
    progress = settings.pop("progress")
    fewer = {name: tensor for name, tensor in tensors.items() if not name.startswith("best.")}
    for wrong in (
        {},
        {"progress": []},
        {"progress": progress | {"rounds": "many"}},
        {"progress": progress | {"losses": 1}},
    ):
        save_artifact(path, kind, tensors, settings | wrong, CHECKPOINTS)
        needs_error(load, path, repr(wrong))
    save_artifact(path, kind, fewer, settings | {"progress": progress}, CHECKPOINTS)
    needs_error(load, path, "without the best weights")
