"""What happens beside the steps: metrics, progress, validation of every budget, checkpoints."""

from elastic.training.callbacks.checkpoints import Checkpoints
from elastic.training.callbacks.metrics import Metrics
from elastic.training.callbacks.progress import Progress
from elastic.training.callbacks.restore import Restore
from elastic.training.callbacks.validation import BudgetValidation

__all__ = ["BudgetValidation", "Checkpoints", "Metrics", "Progress", "Restore"]
