"""What moved away is still found here by who asks; the scripts do not."""
