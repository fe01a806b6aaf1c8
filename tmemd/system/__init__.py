"""What is asked of the operating system, and only of it."""
