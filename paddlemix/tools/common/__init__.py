"""What several commands share: flags, errors and exit statuses, processors without weights, reports, a terminal."""
