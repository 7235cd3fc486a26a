"""What the steps of a run share: the settings, and all that was worked out from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic.cluster.place import Place
from elastic.config import ParentShape, RunConfig
from elastic.data import PreparedData
from elastic.members.architecture import Architecture, Space
from elastic.members.goals import Target
from elastic.parent.sealed import parent_seals
from elastic.routing.curriculum import Stage
from elastic.storage.seals import Seals


@dataclass(frozen=True)
class Setup:
    """A run that can be run, and all that its steps need to know."""

    config: RunConfig
    place: Place
    stages: list[Stage]
    source: Path | None
    """Checkpoint of a parent that was given; None where it is trained here."""
    shape: ParentShape
    space: Space
    targets: dict[str, Target]
    """What each budget asks for, largest first."""
    given: dict[str, Architecture]
    """The family that settings give, largest first; empty where the router decides."""
    data: PreparedData
    base_config: dict[str, Any]
    """Fields of a written config.json beside the sizes."""
    device: torch.device
    kernels: str
    """`torch` or `mamba_ssm`."""

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def original(self) -> Path:
        """Where the parent as it was found or trained is, or will be once it is pretrained."""
        return self.source or self.run_dir / "parent"

    @property
    def seals(self) -> Seals | None:
        """Of the parent: its own where it was trained here, else what the run has sealed of it."""
        if self.source is None:
            return Seals.read(self.original)
        return parent_seals(self.source, self.run_dir)

    def stages_of(self, mode: str) -> list[Stage]:
        """Stages of `pretrain` or of `elastic`."""
        return [stage for stage in self.stages if stage.config.mode == mode]
