"""Every setting of a run: typed, with units, validated in one place.

`parse` is the one gate from Hydra to the library: past it there is no `DictConfig`, and whatever is
unknown, of the wrong type or impossible has stopped with one line. Nothing here imports torch, so
that a typing mistake is reported in a second.
"""

from elastic.config.bench import (
    BENCHES,
    BenchConfig,
    DataBenchConfig,
    ExtractBenchConfig,
    LossBenchConfig,
    ProfileBenchConfig,
    RunBenchConfig,
    ScanBenchConfig,
    ScanShape,
    StepBenchConfig,
)
from elastic.config.budgets import UNITS, WEIGHT_BYTES, BudgetConfig
from elastic.config.checks import ConfigError
from elastic.config.commands import (
    CacheConfig,
    CacheTeacherConfig,
    EvaluateConfig,
    ExtractConfig,
    PrepareConfig,
    RunConfig,
)
from elastic.config.data import DataConfig, SourceConfig
from elastic.config.gate import CONF, explain, parse
from elastic.config.model import (
    AXES,
    KINDS,
    LAYERED_AXES,
    ImportanceConfig,
    NormsConfig,
    ParentConfig,
    ParentShape,
    RouterConfig,
    SpaceConfig,
)
from elastic.config.plan import PlanConfig, PlanSettings
from elastic.config.study import ArmConfig, StudyConfig, StudySettings
from elastic.config.training import (
    CurriculumConfig,
    LoggerConfig,
    ObjectiveConfig,
    OptimConfig,
    StageConfig,
    TrainerConfig,
)

__all__ = [
    "AXES",
    "BENCHES",
    "CONF",
    "KINDS",
    "LAYERED_AXES",
    "UNITS",
    "WEIGHT_BYTES",
    "ArmConfig",
    "BenchConfig",
    "BudgetConfig",
    "CacheConfig",
    "CacheTeacherConfig",
    "ConfigError",
    "CurriculumConfig",
    "DataBenchConfig",
    "DataConfig",
    "EvaluateConfig",
    "ExtractBenchConfig",
    "ExtractConfig",
    "ImportanceConfig",
    "LoggerConfig",
    "LossBenchConfig",
    "NormsConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParentConfig",
    "ParentShape",
    "PlanConfig",
    "PlanSettings",
    "PrepareConfig",
    "ProfileBenchConfig",
    "RouterConfig",
    "RunBenchConfig",
    "RunConfig",
    "ScanBenchConfig",
    "ScanShape",
    "SourceConfig",
    "SpaceConfig",
    "StageConfig",
    "StepBenchConfig",
    "StudyConfig",
    "StudySettings",
    "TrainerConfig",
    "explain",
    "parse",
]
