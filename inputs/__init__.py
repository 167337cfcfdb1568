"""The input pictures of the real models' regression cases, and the code that draws them."""
