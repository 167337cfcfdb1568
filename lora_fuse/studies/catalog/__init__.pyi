from .gather import gather as gather
from .page import catalog_html as catalog_html
from .page import catalog_json as catalog_json
from .page import catalog_markdown as catalog_markdown
from .records import Entry as Entry
from .records import Places as Places
from .records import Wanted as Wanted
from .records import WantedLora as WantedLora
