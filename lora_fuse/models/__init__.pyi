from .families import COMPONENT as COMPONENT
from .families import alpha_warnings as alpha_warnings
from .families import pair_warnings as pair_warnings
