"""Laws of lora."""
