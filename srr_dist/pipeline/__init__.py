"""The distributed part: stages of consecutive blocks on Ray, windows planned by memory, progress."""
