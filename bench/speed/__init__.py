"""Speed, measured in turns."""
