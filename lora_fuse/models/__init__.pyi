from .families import COMPONENT as COMPONENT
from .families import pair_warnings as pair_warnings
