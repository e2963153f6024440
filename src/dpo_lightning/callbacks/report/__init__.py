"""What a run was and did, on one page."""
