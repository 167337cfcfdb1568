from .export_records import check_exports as check_exports
from .export_records import flat_exports as flat_exports
from .export_table import Cell as Cell
from .export_table import export_rows as export_rows
from .export_table import trade_off as trade_off
from .export_verdicts import JudgedExport as JudgedExport
from .measured_export import decoders_of as decoders_of
from .measured_export import judge_exports as judge_exports
