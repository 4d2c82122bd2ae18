"""What scripts/study runs, and the page that it writes."""
