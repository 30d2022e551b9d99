"""What each UI makes of a file, and what is installed into UIs."""
