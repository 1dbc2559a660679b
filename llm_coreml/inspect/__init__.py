"""What is inside an artifact, told without running it."""
