from .assembly import checked_release as checked_release
from .download_check import Published as Published
from .download_check import check_published as check_published
from .download_check import is_published as is_published
from .signing import Trusted as Trusted
