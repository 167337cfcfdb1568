from .explain_command import add_explain as add_explain
from .explain_page import explain_html as explain_html
from .explanation import Explanation as Explanation
from .explanation import explain as explain
