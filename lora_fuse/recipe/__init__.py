"""What is built: a recipe's parameters, the records and the paths that stages share."""
