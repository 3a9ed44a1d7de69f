"""Devices of this machine, and devices that the user only imagines."""

from __future__ import annotations

from ..errors import ConfigError
from ..spec import Device
from ._progress import starting


def local_devices() -> list[Device]:
    """The devices of this machine, the one that a model would be put on first."""
    with starting():
        import torch

    gpus = [
        torch.device("cuda", index) for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return list(dict.fromkeys(Device.of(device) for device in [*gpus, torch.device("cpu")]))


def wanted_device(text: str | None) -> tuple[Device, bool]:
    """The device that ``text`` names (None: the one of this machine) and whether it is imagined, not in this machine.

    ``cuda`` and ``cuda:0`` are GPUs of this machine, ``cuda:sm90`` any of that kind. ConfigError for anything else.
    """
    here = local_devices()
    if text is None:
        return here[0], False
    kind, _, number = text.strip().lower().partition(":")
    if kind == "cuda" and (not number or number.isdigit()):
        import torch

        if int(number or 0) >= (torch.cuda.device_count() if torch.cuda.is_available() else 0):
            raise ConfigError(f"device {text!r}: this machine has no such GPU; for an imagined one write cuda:sm90")
        return Device.of(torch.device("cuda", int(number or 0))), False
    device = Device.parse(text)
    return device, device not in here
