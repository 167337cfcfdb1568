"""Acceptance tests: the exports, drawn by the engines that people use. They run by ``make engines`` alone."""
