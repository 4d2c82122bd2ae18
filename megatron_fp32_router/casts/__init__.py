"""Router parameters and buffers stay out of bfloat16(), half() and to(dtype)."""
