"""What scripts/bench measures: one file a question, and page.py, which writes docs/performance.md from the answers."""
