"""What several test modules share: tiny models, projects, checkouts, commands and expensive results."""
