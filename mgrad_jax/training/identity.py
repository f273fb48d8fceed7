"""Which run a file belongs to: what determines its numbers, and the machine that they were computed on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib

from mgrad_jax import models
from mgrad_jax.data import Interactions
from mgrad_jax.declaration import marked, plain
from mgrad_jax.errors import UserError, shown
from mgrad_jax.training.config import RunConfig
from mgrad_jax.training.methods import follows_epochs, unused

# Where a run lies, where its data lie (their digest counts), how far it goes, and what it keeps besides.
_FREE = marked(RunConfig, "free")
_DEFAULTS = RunConfig.defaults()


def run_settings(config: RunConfig, data: Interactions) -> dict[str, Any]:
    """Everything that determines a run, as plain values: the configuration and a digest of the data."""
    return {**config.to_dict(), "data_digest": data.digest}


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What changes the numbers of an epoch, of `run_settings` that may be an older version's or damaged.

    Hyper-parameters stand beside the other settings. Not decisive is what the training does not use, and how many
    epochs there are, unless its schedule is spread over them.
    """
    ignored = {*_FREE, "hyper_parameters", *unused(settings.get("training"))}
    if follows_epochs(settings):
        ignored.discard("epochs")
    hyper = settings.get("hyper_parameters")
    values = {**_DEFAULTS, **settings, **(hyper if isinstance(hyper, dict) else {})}
    values = {name: plain(value) for name, value in values.items() if name not in ignored}
    decay = values.get("learning_rate_decay")
    if isinstance(decay, list) and decay[:1] == [1.0]:
        values["learning_rate_decay"] = [1.0]  # over how many epochs nothing decays is all the same
    return values


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The decisive settings that differ, in words; empty where there are none.

    >>> settings = {"training": "plain", "seed": 7, "epochs": 3}
    >>> differences(settings, {**settings, "seed": 8, "epochs": 5})
    'seed was 7 and is 8'
    """
    old, new = decisive(before), decisive(now)
    # A digest says nothing to anybody.
    named = [name for name in {**old, **new} if name != "data_digest" and old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {shown(old.get(name))} and is {shown(new.get(name))}" for name in named)


def identity(settings: Mapping[str, Any]) -> str:
    """A digest of what is decisive; a setting that a later version adds at its default does not change it."""
    defaults = dict(_DEFAULTS)
    model = settings.get("model")
    if isinstance(model, str):
        defaults.update(dataclasses.asdict(models.make_config(model, {})))
    values = decisive(settings)
    own = {name: value for name, value in values.items() if name not in defaults or value != plain(defaults[name])}
    # All numbers as floats: 1 and 1.0 are the same setting.
    text = json.dumps(json.loads(json.dumps(own, default=str), parse_int=float), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def machine() -> dict[str, Any]:
    """What the last bits of a number may depend on besides its run."""
    device = jax.devices()[0]
    try:
        threads = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        threads = os.cpu_count() or 1
    return {
        "device": f"{device.platform} ({device.device_kind})",
        "threads": threads,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
    }


def spread(devices: int) -> dict[str, int]:
    """Over how many devices of how many processes a run is split; one of each goes without saying."""
    return {"devices": devices, "processes": jax.process_count()} if devices > 1 else {}


def differing_machine(before: Mapping[str, Any], devices: int = 1) -> str:
    """In what the machine of a run differs from this one, in words; empty where it does not."""
    one = {"devices": 1, "processes": 1}
    before, here = {**one, **before}, {**one, **machine(), **spread(devices)}
    return ", ".join(f"{k} was {shown(before.get(k))} and is {shown(v)}" for k, v in here.items() if before.get(k) != v)


def is_digest_of(value: Any, data: Interactions) -> bool:
    """Whether `value` is the digest of these data, by this version or an earlier one (a checksum of 32 bits)."""
    if isinstance(value, str) and len(value) == 8:
        return value == _checksum(data)
    return bool(value == data.digest)


def check_data(place: Path, before: Mapping[str, Any], settings: Mapping[str, Any], data: Interactions) -> None:
    """Refuse to go on with a run or sweep begun with other data: what its files say, before and now, tells which."""
    digest = before.get("data_digest")
    if digest != settings["data_digest"] and not is_digest_of(digest, data):
        raise UserError(
            f"data {settings['data']} is not what {place} was begun with ({before.get('data')}); resume with that, "
            "or choose another --out."
        )


def _checksum(data: Interactions) -> str:
    value = zlib.crc32(f"{data.n_users} {data.n_items}".encode())
    for split in ("train", "valid", "test"):
        value = zlib.crc32(getattr(data, split).tobytes(), value)
    for name in sorted(data.features):
        value = zlib.crc32(data.features[name].data, zlib.crc32(name.encode(), value))
    return f"{value:08x}"
