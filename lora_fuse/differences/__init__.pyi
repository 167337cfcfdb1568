from . import presence as presence
from .paired import PairedCheckpoints as PairedCheckpoints
from .paired import PairedTensor as PairedTensor
from .paired import RowPiece as RowPiece
from .paired import open_pair as open_pair
from .paired import opened as opened
from .presence import presence_warnings as presence_warnings
