from .building import Builder as Builder
from .building import sheet_of as sheet_of
from .building import wrong_points as wrong_points
from .contact import write_sheet as write_sheet
from .planning import SweptParams as SweptParams
from .planning import plan_sweep as plan_sweep
from .running import run as run
