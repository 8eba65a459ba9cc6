"""The search: study, executors, tracking, and the loop that joins them."""
