from .entry import CatalogEntry as CatalogEntry
from .gather import gather as gather
from .page import catalog_html as catalog_html
from .page import catalog_json as catalog_json
from .page import catalog_markdown as catalog_markdown
