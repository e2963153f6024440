"""What happens around the steps of a run: resume, checkpoints, guards, replies, reports, exports."""
