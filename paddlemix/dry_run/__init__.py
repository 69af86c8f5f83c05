"""What a run would do and how much memory it would take, without running it: `--dry-run`."""
