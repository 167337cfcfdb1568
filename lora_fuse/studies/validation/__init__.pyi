from . import several as several
from .outcome import Outcome as Outcome
from .several import JudgedVersion as JudgedVersion
from .validation import ANSWER as ANSWER
from .validation import VALIDATION as VALIDATION
from .validation import Request as Request
from .validation import Validation as Validation
from .validation_report import ValidationReport as ValidationReport
