from .evidence import Outcome as Outcome
from .report import Validation as Validation
from .trial import BUILD as BUILD
from .trial import VALIDATION as VALIDATION
from .trial import Request as Request
from .trial import Trial as Trial
