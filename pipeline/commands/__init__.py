"""What can be typed, a file each."""
