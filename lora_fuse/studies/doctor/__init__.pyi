from .examination import examine as examine
from .finding import Finding as Finding
from .finding import Status as Status
from .finding import table as table
from .finding import verdict as verdict
